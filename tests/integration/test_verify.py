"""`smol-post verify`, and the same before step 1 of every run: what is written where, what goes on after."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from smol_post import data, manifest, runner
from smol_post.verify import verify

Command = Callable[..., subprocess.CompletedProcess[str]]
TINY = {
    "num_hidden_layers": 2,
    "no_rope_layers": [1, 0],
    "no_rope_layer_interval": 2,
    "attention_dropout": 0.2,
}


@pytest.fixture
def folder(recipe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe with one run, `base`: two layers with dropout, two steps, a checkpoint after the first."""
    path = recipe_folder / "base.yaml"
    tree = yaml.safe_load(path.read_text())
    tree |= {"num_steps": 2, "model": tree["model"] | TINY, "num_threads": 1, "micro_batch_size": 4}
    tree["trainer"] |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    path.write_text(yaml.safe_dump(tree))
    runs_of(recipe_folder, {"base": {}})
    return recipe_folder


def runs_of(folder: Path, overrides: dict[str, dict[str, Any]]) -> None:
    runs = [
        {"name": name, "stage": "base", "recipe": "base.yaml", "overrides": one}
        for name, one in overrides.items()
    ]
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"runs": runs}))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def verified(folder: Path, *words: str) -> int:
    """The command in this process."""
    given = [str(folder / "base.yaml"), "--run-dir", str(folder.parent / "runs"), *words]
    return verify(given, program="smol-post verify", separate=False)


def made(folder: Path, *words: str) -> int:
    """The run itself, in this process."""
    given = [str(folder / "base.yaml"), "--run-dir", str(folder.parent / "runs"), *words]
    return runner.stage_command("base", given, program="smol-post base", separate=False)


def test_a_run_is_verified_before_it_is_made_while_it_is_not_whole_and_when_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder.parent / "runs" / "base"

    assert verified(folder, "--level", "full") == 0  # absent
    said = capsys.readouterr().out
    assert said.count("base: passed   ") == 10
    assert "base: not run  preference training starts at its reference: packs have no reference" in said
    assert "base: verified: 10 proofs in" in said
    assert (read(run / "verify.json")["level"], read(run / "state.json")["status"]) == ("full", "verified")
    assert {path.name for path in run.iterdir()} == {".lock", "verify.json", "state.json"}

    assert made(folder) == 0  # and simply goes on
    one = manifest.verify(run)
    assert one["verified"].items() >= {"level": "quick", "step": 0, "passed": 10, "not run": 1}.items()
    weights = (run / "model.safetensors").read_bytes()
    said = capsys.readouterr().out
    assert said.index("base: verifying by 11 proofs") < said.index("base: verified: 10 proofs in")

    before = snapshot(run)  # whole
    assert verified(folder) == 0
    assert snapshot(run) == before
    assert manifest.verify(run) == one
    beside = folder.parent / "runs" / "evals" / "verify_base.json"
    assert read(beside)["level"] == "quick"

    (run / "manifest.json").unlink()  # unfinished, with its checkpoints
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    state = {
        "fingerprint": one["fingerprint"],
        "recipe": one["recipe"],
        "parents": [],
        "status": "interrupted",
    }
    manifest.write_json(run / "state.json", state)
    kept = snapshot(run / "checkpoints")
    assert verified(folder) == 0
    assert (read(run / "state.json")["status"], snapshot(run / "checkpoints")) == ("verified", kept)
    assert made(folder) == 0
    assert (run / "model.safetensors").read_bytes() == weights


def test_a_proof_that_fails_stops_the_run_with_what_was_found(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder.parent / "runs" / "base"
    sound = data.Tokens.read
    with monkeypatch.context() as planted:
        planted.setattr(data.Tokens, "read", lambda *place: sound(*place)[::-1])
        for command in (made, verified):
            assert command(folder) == 2
            error = capsys.readouterr().err
            (line,) = [line for line in error.splitlines() if line.startswith("refused: ")]
            name = "trained tokens are those that preparation promised"
            assert line.startswith(f"refused: verify: it is not true that {name}: found {{")
            assert "Traceback" not in error
            assert [
                one["name"] for one in read(run / "verify.json")["proofs"] if one["status"] == "failed"
            ] == [name]
            assert (read(run / "state.json")["status"], manifest.is_whole(run)) == ("refused", False)
            assert not (run / "model.safetensors").exists()
    assert made(folder) == 0


def test_what_is_proved_is_no_part_of_what_is_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made(folder, "verify=off", "num_steps=1") == 0
    assert "verified" not in capsys.readouterr().out
    run = folder.parent / "runs" / "base"
    assert not (run / "verify.json").exists()
    assert read(run / "manifest.json")["verified"] is None
    assert made(folder, "verify=full", "num_steps=1") == 0
    assert "whole already, kept" in capsys.readouterr().out
    for command in (made, verified):
        assert command(folder, "verify=full", "num_steps=2") == 2
        assert "holds a whole run of something else (recipe num_steps: 1 -> 2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge.yaml"], "merge.yaml: nothing to train, so nothing to verify"),
        (["evals.yaml"], "no run of .*pipeline.yaml uses this recipe"),
        (["sft.yaml", "--level", "off"], "argument --level: invalid choice"),
        ([], "no recipe given; type: smol-post verify recipes/tiny/sft.yaml"),
    ],
)
def test_what_cannot_be_verified_is_refused(
    recipe_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = [str(recipe_folder / words[0]), *words[1:]] if words else []
    try:
        code = verify(given, program="smol-post verify", separate=False)
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1)
    assert re.search(message, lines[0])
    assert not (recipe_folder.parent / "runs").exists()


@pytest.mark.slow
def test_weights_are_the_same_bit_for_bit_whatever_is_proved(
    folder: Path, command: Command, tmp_path: Path
) -> None:
    """Through the real command, with dropout; one process each."""
    runs_of(folder, {level: {"verify": level} for level in ("off", "quick", "full")})
    done = command("smol-post", "base", folder / "base.yaml", "--run-dir", tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("verified: 10 proofs in") == 2
    runs = [tmp_path / "runs" / level for level in ("off", "quick", "full")]
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 1
    assert [(run / "verify.json").is_file() for run in runs] == [False, True, True]
    assert len({json.dumps(read(run / "manifest.json")["files"]) for run in runs}) == 1


TWO = """
import sys
from smol_post import trainers, verify
folder, root = sys.argv[1:]
words = ["--config", folder + "/base.yaml", "--run-dir", root]
codes = [verify.verify([*words, "--run", "sound"], program="verify", separate=False)]

def of_this_process_alone(self, batches, device):
    return sum((one["labels"][:, 1:] != -100).sum() for one in batches)

trainers.PackTrainer._get_num_items_in_batch = of_this_process_alone
codes.append(verify.verify([*words, "--run", "planted"], program="verify", separate=False))
sys.exit(codes != [0, 2])
"""


@pytest.mark.slow
def test_two_processes_prove_together_and_find_a_mean_over_one_of_them(
    folder: Path, command: Command, tmp_path: Path
) -> None:
    runs_of(folder, {"sound": {}, "planted": {}})
    (tmp_path / "two.py").write_text(TWO)
    launch = ["torchrun", "--standalone", "--nproc_per_node", "2", tmp_path / "two.py"]
    done = command(*launch, folder, tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    sound, planted = (read(tmp_path / "runs" / name / "verify.json") for name in ("sound", "planted"))
    assert (sound["num_processes"], sound["distributed"]) == (2, "MULTI_CPU")
    assert [one["name"] for one in sound["proofs"] if one["status"] != "passed"] == [
        "preference training starts at its reference"
    ]
    assert [one["name"] for one in planted["proofs"] if one["status"] == "failed"] == [
        "accumulation does not change the step"
    ]
    assert read(tmp_path / "runs" / "planted" / "state.json")["status"] == "refused"
