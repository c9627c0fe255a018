"""Every way to start a stage trains the same weights."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
Chain = tuple[Path, Path]
Command = Callable[..., subprocess.CompletedProcess[str]]


def roots(chain: Chain, to: Path, parent: str, *names: str) -> list[Path]:
    for name in names:
        shutil.copytree(chain[1] / parent, to / name / parent)
    return [to / name for name in names]


def test_accelerate_launch_and_smol_post_give_the_same_bytes(
    chain: Chain, command: Command, repo: Path, tmp_path: Path
) -> None:
    launched, called = roots(chain, tmp_path, "sft", "launched", "called")
    rest = ["--config", chain[0] / "apo.yaml", "--run", "apo_seed0", "--run-dir"]
    launch_file = repo / "recipes" / "accelerate" / "cpu.yaml"
    door = ["--config_file", launch_file] if launch_file.is_file() else ["--cpu", "--num_processes", "1"]
    first = command("accelerate", "launch", *door, repo / "smol_post" / "apo.py", *rest, launched)
    second = command("smol-post", "apo", *rest, called)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    weights = [root / "apo_seed0" / "model.safetensors" for root in (launched, called, chain[1])]
    assert weights[0].read_bytes() == weights[1].read_bytes() == weights[2].read_bytes()
    assert not (called / "apo_seed1").exists()


def test_a_launched_stage_without_a_recipe_says_what_to_type(command: Command, repo: Path) -> None:
    done = command("accelerate", "launch", "--cpu", "--num_processes", "1", repo / "smol_post" / "apo.py")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("refused: ")]
    assert len(lines) == 1
    assert "smol_post/apo.py --config recipes/tiny/apo.yaml" in lines[0]


def torchrun(command: Command, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return command("torchrun", "--standalone", "--nproc_per_node", "2", *words)


PAIRS = "global_batch_size=12"  # shares that are cut into several micro-batches
CURVES = {
    "packs": ("sft", "mid", ["num_steps=4", "trainer.learning_rate=0.5"], []),
    "packs past the end of an epoch": ("sft", "mid", ["num_steps=6", "trainer.learning_rate=0.5"], []),
    "packs in other micro-batches": (
        "sft", "mid", ["num_steps=4", "trainer.learning_rate=0.5"], ["micro_batch_size=1"]
    ),
    "pairs": ("apo", "sft", ["num_steps=3", "trainer.learning_rate=0.05", PAIRS], []),
    "pairs in other micro-batches": (
        "apo", "sft", ["num_steps=3", "trainer.learning_rate=0.05", PAIRS], ["micro_batch_tokens=1500"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CURVES)
def test_two_processes_train_the_weights_of_one(
    chain: Chain, command: Command, repo: Path, tmp_path: Path, case: str
) -> None:
    """Plain SGD: Adam would blow a rounding difference in a gradient near zero up to the learning rate."""
    stage, parent, rest, other = CURVES[case]
    first, second = roots(chain, tmp_path, parent, "one", "two")
    words = ["--config", chain[0] / f"{stage}.yaml", *rest, "trainer.optim=sgd"]
    alone = command("smol-post", stage, *words, "--run-dir", first)
    both = torchrun(command, repo / "smol_post" / f"{stage}.py", *words, *other, "--run-dir", second)
    assert (alone.returncode, both.returncode) == (0, 0), alone.stderr + both.stderr
    runs = [root / ("apo_seed0" if stage == "apo" else stage) for root in (first, second)]
    manifests = [json.loads((run / "manifest.json").read_text()) for run in runs]
    assert [made["num_processes"] for made in manifests] == [1, 2]
    one, two, start = (load_file(where / "model.safetensors") for where in (*runs, first / parent))
    assert max((one[name] - start[name]).abs().max().item() for name in one) > 5e-3
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


def test_several_processes_never_build_a_parent(
    chain: Chain, command: Command, repo: Path, tmp_path: Path
) -> None:
    stage = repo / "smol_post" / "sft.py"
    done = torchrun(command, stage, "--config", chain[0] / "sft.yaml", "--run-dir", tmp_path / "runs")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("refused: ")]
    assert len(lines) == 1, done.stderr
    assert "--until" in lines[0]
    assert not os.path.exists(tmp_path / "runs")
