"""Generators against what people run: `transformers serve` on loopback, and a checkpoint of a chain."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from smol_post import chat, generate, manifest, sources
from smol_post.config import Source
from tests.loopback import Loopback

pytestmark = pytest.mark.slow
SOURCE = {
    "name": "q",
    "generator": "dual_mode_chats",
    "num_rows": 6,
    "seed": 3,
    "options": {"variant_share": 0.0},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, build: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    build(num_hidden_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of `transformers serve`, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [shutil.which("transformers", path=environment["PATH"]) or "transformers", "serve", checkpoint]
    words = [*map(str, program), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        try:
            for _ in range(600):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    assert child.poll() is None
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child.kill()


def run(folder: Path, tree: dict[str, Any]) -> int:
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    return generate.generate([tree["stage"], str(folder / "r.yaml"), "--run-dir", str(folder / "runs")])


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / "r" / name).read_text().splitlines()]


def test_a_real_server_says_what_its_checkpoint_says_here_and_is_asked_once(
    server: str, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    how = {"max_new_tokens": 6, "temperature": 0.0}
    served = {"base_url": server, "model": str(checkpoint), "concurrency": 2, **how}
    served["extra_body"] = {"chat_template_kwargs": {"date_string": "01 July 2025"}}
    tree = {"stage": "traces", "modes": ["think", "no_think"], "sources": [SOURCE], "teacher": served}
    assert run(tmp_path, tree) == 0
    found = rows(tmp_path, "answers.jsonl")
    assert {(one["tokens"], one["ended"], one["finish"]) for one in found} == {(6, False, "length")}
    assert {one["mode"] for one in found} == {"think", "no_think"}
    assert run(tmp_path, tree) == 0
    assert "whole already, kept" in capsys.readouterr().out
    (tmp_path / "here").mkdir()
    assert run(tmp_path / "here", tree | {"teacher": {"checkpoint": str(checkpoint), **how}}) == 0
    here = {(one["row"], one["mode"]): one for one in rows(tmp_path / "here", "answers.jsonl")}
    assert len(here) == len(found) >= 6
    for one in found:
        other = here[one["row"], one["mode"]]
        assert (one["text"], one["prompt_tokens"]) == (other["text"], other["prompt_tokens"])


def test_a_paid_server_beside_a_checkpoint_is_asked_no_more_than_the_rows_want(
    checkpoint: Path, tmp_path: Path
) -> None:
    weak = {"checkpoint": str(checkpoint), "temperature": 1.0, "max_new_tokens": 4}
    tree = {"stage": "pairs", "modes": ["no_think"], "sources": [SOURCE | {"num_rows": 60}], "weak": weak,
            "rejected_may_be": ["unfinished"], "deduplicate": None, "format": "jsonl"}  # fmt: skip
    with Loopback(lambda body: "5") as server:
        tree |= {"strong": {"base_url": server.url, "model": "m"}}
        assert run(tmp_path, tree | {"num_rows": 3}) == 0
        assert len(rows(tmp_path, "rows.jsonl")) == 3
        assert 3 <= len(server.asked) <= 16
        assert run(tmp_path, tree | {"num_rows": 20}) == 0
        assert len(rows(tmp_path, "rows.jsonl")) == 20
        assert run(tmp_path, tree | {"num_rows": 1000}) == 0
        assert 20 < len(rows(tmp_path, "rows.jsonl")) <= len(server.asked) <= 60


def test_pairs_are_sampled_from_a_run_of_the_chain_and_train_as_they_are(
    checkpoint: Path, tmp_path: Path, tokenizer: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = Path(shutil.copytree(checkpoint, tmp_path / "runs" / "sft"))
    files = manifest.content_files(run_dir)
    whole = {"schema": 1, "run": "sft", "stage": "sft", "fingerprint": "x", "recipe": {}, "parents": []}
    manifest.write_manifest(run_dir, whole | {"files": files, "digest": manifest.content_digest(files)})
    weak = {"checkpoint": "../sft", "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "batch_size": 4}
    source = {"name": "q", "generator": "preference_pairs", "num_rows": 10, "seed": 3}
    tree = {"stage": "pairs", "sources": [source], "weak": weak, "format": "parquet",
            "deduplicate": {"near": False},
            "rejected_may_be": ["unfinished", "wrong_mode"], "filters": {"max_repetition": 1.0}}  # fmt: skip
    assert run(tmp_path, tree) == 0
    assert "AUC" in capsys.readouterr().out
    made = Source(name="x", path=str(tmp_path / "runs" / "r" / "rows.parquet"))
    pairs = [one.content for one in sources.read_rows(made, folder=tmp_path)]
    assert len(pairs) >= 8
    encoded = chat.encode_pairs(pairs, tokenizer, date_string="01 July 2025")  # type: ignore[arg-type]
    assert {one.mode for one in encoded} == {"think", "no_think"}
    manifest_of = manifest.verify(tmp_path / "runs" / "r")
    assert manifest_of["parents"] == [
        {"path": "../sft", "digest": manifest.content_digest(files), "stage": "sft"}
    ]

    # Stopped after five answers, in the second batch: the same five stand, and the rest comes as it did.
    before = rows(tmp_path, "answers.jsonl")
    kept = (tmp_path / "runs" / "r" / "answers.jsonl").read_text().splitlines(keepends=True)[:5]
    (tmp_path / "runs" / "r" / "answers.jsonl").write_text("".join(kept))
    (tmp_path / "runs" / "r" / "manifest.json").unlink()
    assert run(tmp_path, tree) == 0
    assert rows(tmp_path, "answers.jsonl") == before
