"""Commands given at the same time do not harm each other."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smol_post import locks, manifest

pytestmark = pytest.mark.slow
Chain = tuple[Path, Path]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(environment: dict[str, str]) -> Start:
    def call(*words: str | Path) -> subprocess.Popen[str]:
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        whole = ["smol-post", *map(str, words)]
        return subprocess.Popen(whole, env=environment, start_new_session=True, **pipes)

    return call


def test_the_second_command_on_a_run_is_refused_with_the_first_s_process_and_start(
    chain: Chain, start: Start, tmp_path: Path
) -> None:
    recipe, root = chain
    shutil.copytree(root / "mid", tmp_path / "mid")
    words = ["sft", recipe / "sft.yaml", "--run-dir", tmp_path]
    first = start(*words, "num_steps=200")
    while not (tmp_path / "sft" / "train_log.jsonl").exists() and first.poll() is None:
        time.sleep(0.02)
    holder = locks.holder(tmp_path / "sft")
    assert holder is not None
    before = (tmp_path / "sft" / "state.json").read_bytes()
    second = start(*words)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2
    found = re.fullmatch(
        r"refused: (.*): a run is under way, by process (\d+) on \S+, since (\S+); wait for it or stop it\n",
        errors,
    )
    assert found, errors
    assert found.groups() == (str(tmp_path / "sft"), str(holder["pid"]), holder["started"])
    assert (tmp_path / "sft" / "state.json").read_bytes() == before
    output, errors = first.communicate(timeout=120)
    assert first.returncode == 0, output + errors
    assert manifest.verify(tmp_path / "sft")["metrics"]["num_steps"] == 200


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["the command", "all its processes"])
def test_a_signal_to_stop_saves_and_the_same_command_ends_the_run(
    chain: Chain, start: Start, tmp_path: Path, send: Callable[[int, int], None]
) -> None:
    recipe, root = chain
    shutil.copytree(root / "mid", tmp_path / "mid")
    words = ["sft", recipe / "sft.yaml", "--run-dir", tmp_path, "num_steps=150"]
    first = start(*words)
    while not (tmp_path / "sft" / "train_log.jsonl").exists() and first.poll() is None:
        time.sleep(0.02)
    send(first.pid, signal.SIGTERM)
    output, errors = first.communicate(timeout=120)
    assert first.returncode == 75, output + errors
    (saved,) = (tmp_path / "sft" / "checkpoints").glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert errors == (
        f"sft: stopped after step {step}, which is saved; the same command resumes from the last whole "
        "checkpoint\n"
    )
    second = start(*words)
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, output + errors
    assert manifest.verify(tmp_path / "sft")["metrics"]["resumed_from_step"] == step
    assert not (tmp_path / "sft" / "checkpoints").exists()  # the recipe asks for none


def test_preparation_in_several_processes_makes_each_data_set_once_and_whole(
    chain: Chain, start: Start, tmp_path: Path
) -> None:
    words = ["prepare", chain[0], "--json", "--run-dir"]
    here = [start(*words, tmp_path / "one") for _ in range(3)]
    other = start(*words, tmp_path / "other")
    outputs = []
    for each in [*here, other]:
        output, errors = each.communicate(timeout=240)
        assert each.returncode == 0, errors
        outputs.append([json.loads(line)["fingerprint"] for line in output.splitlines()])
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    for root in (tmp_path / "one", tmp_path / "other"):
        folders = [path for path in root.glob("cache/*/*") if path.is_dir()]
        assert len(folders) > 8
        assert [manifest.broken(folder) for folder in folders] == [[]] * len(folders)
