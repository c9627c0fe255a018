"""`prepare` and `inspect` tell what a run would train on, before any of its parents exist."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from smol_post import preparation

Command = Callable[..., subprocess.CompletedProcess[str]]
NUMBERS = {"num_rows", "num_documents", "num_tokens", "num_trained_tokens", "num_truncated_rows",
           "num_turns_cut", "num_split_rows", "num_dropped_rows", "num_skipped_rows"}  # fmt: skip


def objects(capsys: pytest.CaptureFixture[str], code: int) -> list[dict[str, Any]]:
    """What a command printed, one JSON object a line."""
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return [json.loads(line) for line in shown.out.splitlines()]


@pytest.fixture
def recipe(recipe_folder: Path, tmp_path: Path, tokenizer: Any) -> Path:
    """The test recipe, SFT and APO only, from a parent that is a folder with a tokenizer: none is trained."""
    tokenizer.save_pretrained(tmp_path / "parent")
    parents = [str(tmp_path / "parent")]
    runs = [
        {"name": name, "stage": name[:3], "recipe": f"{name[:3]}.yaml", "parents": parents}
        for name in ("sft", "apo_seed0", "apo_seed1")
    ]
    runs.append(
        {"name": "merge", "stage": "merge", "recipe": "merge.yaml", "parents": ["../apo_seed0", "../sft"]}
    )
    (recipe_folder / "pipeline.yaml").write_text(yaml.safe_dump({"runs": runs}))
    return recipe_folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def test_a_folder_is_prepared_run_by_run_without_training_anything(
    recipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(recipe_folder), "--run-dir", str(tmp_path / "runs"), "--json"]
    found = objects(capsys, preparation.prepare(words))
    runs = ["base", "long_context_1", "mid", "sft", "apo_seed0", "apo_seed1"]
    assert [one["run"] for one in found] == runs
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"cache"}
    for one in found:
        assert one.keys() >= NUMBERS | {
            *("fingerprint", "path", "updates_per_epoch", "num_unused", "seconds", "dropped", "skipped"),
            *("by_source", "by_mode", "revisions"),
        }
        assert Path(one["path"]).is_dir()
        batch = yaml.safe_load((recipe_folder / f"{one['run'].split('_seed')[0]}.yaml").read_text())
        number = one.get("num_packs") or one["num_pairs"]
        assert divmod(number, batch["global_batch_size"]) == (one["updates_per_epoch"], one["num_unused"])
        for group in ("by_source", "by_mode"):
            for key in NUMBERS - {"num_rows", "num_skipped_rows"}:
                assert sum(each[key] for each in one[group].values()) == one[key], (one["run"], group, key)
        assert all(each.keys() >= NUMBERS | {"seconds", "dropped"} for each in one["by_source"].values())


def test_a_second_preparation_is_the_first_one_again(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(recipe / "sft.yaml"), "--run-dir", str(tmp_path / "runs"), "--json"]
    first = objects(capsys, preparation.prepare(words))
    assert objects(capsys, preparation.prepare(words)) == first
    (other,) = objects(capsys, preparation.prepare([*words, "seed=7"]))
    assert other["fingerprint"] != first[0]["fingerprint"]


def test_the_ledger_for_a_person_names_sources_modes_and_what_was_lost(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * number}],
             "enable_thinking": bool(number % 2)} for number in (1, 2, 3, 4, 900)]  # fmt: skip
    lines = [*map(json.dumps, rows), '{"messages": []}']
    (recipe / "rows.jsonl").write_text("\n".join(lines))
    source = {"name": "mine", "path": "rows.jsonl"}
    edit(
        recipe / "sft.yaml",
        sources=[source],
        on_bad_rows="skip",
        global_batch_size=1,
        micro_batch_size=1,
    )
    assert preparation.prepare([str(recipe / "sft.yaml"), "--run-dir", str(tmp_path / "runs")]) == 0
    told = capsys.readouterr().out
    for part in ("sft (sft): 4 documents in ", "updates per epoch", "mine", "no_think", "dropped",
                 "skipped",
                 "1 dropped: longer than max_tokens", "1 skipped: mine: messages: found [], wanted a list",
                 "(first: row 6: messages: found []"):  # fmt: skip
        assert part in told, told


def test_a_row_s_refusal_names_source_file_and_row(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe / "rows.jsonl").write_text('{"text": "fine"}\n{"title": "no text"}\n')
    edit(recipe / "sft.yaml", sources=[{"name": "mine", "path": "rows.jsonl"}], text_end="<|endoftext|>")
    code = preparation.prepare([str(recipe / "sft.yaml"), "--run-dir", str(tmp_path / "runs")])
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert shown.err.count("\n") == 1
    assert "source 'mine': rows.jsonl: row 2: found columns title, wanted text" in shown.err


def test_inspect_prints_every_source_and_mode_as_json(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(recipe / "sft.yaml"), "--run-dir", str(tmp_path / "runs"), "--json"]
    rows = objects(capsys, preparation.inspect([*words, "--rows", "3"]))
    assert [(row["source"], row["mode"]) for row in rows].count(("chats", "think")) == 3
    assert [(row["source"], row["mode"]) for row in rows].count(("chats", "no_think")) == 3
    for row in rows:
        assert row["tokens"][0].keys() == {"id", "text", "trained", "document", "position"}
        assert "".join(one["text"] for one in row["tokens"]).startswith("<|im_start|>system\n")
        assert any(one["trained"] for one in row["tokens"])
    only = objects(capsys, preparation.inspect([*words, "--mode", "think"]))
    assert {row["mode"] for row in only} == {"think"}


def test_inspect_writes_a_page_and_a_terminal_text(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(recipe / "apo.yaml"), "--run", "apo_seed0", "--run-dir", str(tmp_path / "runs")]
    page = tmp_path / "new folder" / "page.html"
    assert preparation.inspect([*words, "--html", str(page)]) == 0
    assert "<html" in page.read_text()
    capsys.readouterr()
    assert preparation.inspect(words) == 0
    assert "chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("prepare", [], "no recipe given; type: smol-post prepare recipes/tiny/sft.yaml"),
        ("prepare", ["sft.yaml", "--workers", "0"], "--workers: found 0, wanted at least 1"),
        ("prepare", ["sft.yaml", "num_step=3"], "did you mean 'num_steps'"),
        ("prepare", ["merge.yaml"], "no run of it has sources"),
        ("prepare", ["sft.yaml", "global_batch_size=4000"], ", the number of packs; lower it"),
        ("inspect", ["sft.yaml", "--rows", "0"], "--rows: found 0, wanted at least 1"),
        ("inspect", ["sft.yaml", "--mode", "thin"], "did you mean 'think'"),
        ("inspect", ["sft.yaml", "--source", "chat"], "did you mean 'chats'"),
        ("inspect", ["apo.yaml"], "found the runs apo_seed0, apo_seed1; name one, --run apo_seed0"),
    ],
)
def test_what_cannot_be_prepared_or_shown_is_refused_in_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, words: list[str],
    message: str
) -> None:  # fmt: skip
    given = [str(recipe / word) if word.endswith(".yaml") else word for word in words]
    assert getattr(preparation, command)([*given, "--run-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_reader_who_has_seen_enough_ends_it_quietly(
    recipe: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        f"smol-post inspect {recipe}/sft.yaml --rows 40 --json --run-dir {tmp_path}/runs | head -1",
        shell=True, env=environment, capture_output=True, text=True, check=False, cwd=os.getcwd(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["source"] == "chats"
