"""Bad input through the real commands: parents, checkpoints and files as a run meets them."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from smol_post import manifest

pytestmark = pytest.mark.slow
Command = Callable[..., subprocess.CompletedProcess[str]]
LONG = ("num_steps=1", "max_tokens=512")  # as long as the rows of SFT
SAVING = ("num_steps=2", "trainer.save_strategy=steps", "trainer.save_steps=1")


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("refused: ")
    return line


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A folder with the test recipe and its base model."""
    where = tmp_path_factory.mktemp("base")
    shutil.copytree(Path(__file__).parent / "recipe", where / "recipe")
    done = command("smol-post", "base", where / "recipe", "--run-dir", where / "runs", *LONG)
    assert done.returncode == 0, done.stderr
    return where


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    """A copy of it, where SFT goes on from the base model."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    entry = {"name": "sft", "stage": "sft", "recipe": "sft.yaml", "parents": [f"{tmp_path}/runs/base"]}
    (tmp_path / "recipe" / "pipeline.yaml").write_text(yaml.safe_dump({"runs": [entry]}))
    return tmp_path


def test_a_parent_whose_weights_are_not_finite_is_refused_before_training(
    place: Path, command: Command
) -> None:
    path = place / "runs" / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    (place / "runs" / "base" / "manifest.json").unlink()  # a checkpoint from elsewhere
    said = refused(command("smol-post", "sft", place / "recipe", "--run-dir", place / "runs"))
    assert "model.layers.1.mlp.up_proj.weight: found 1 of" in said
    assert json.loads((place / "runs" / "sft" / "state.json").read_text())["status"] == "refused"
    assert not (place / "runs" / "sft" / "train_log.jsonl").exists()


def test_a_run_does_not_resume_from_damaged_notes(place: Path, command: Command) -> None:
    words = ("smol-post", "sft", place / "recipe", "--run-dir", place / "runs", *SAVING)
    assert command(*words).returncode == 0
    run = place / "runs" / "sft"
    (run / "manifest.json").rename(run / "state.json")  # of the keys of both, those that a resume reads
    notes = run / "checkpoints" / "checkpoint-2" / "instruments.json"
    good = notes.read_text()
    notes.write_text(good.replace('"launch"', '"lunch_"'))
    manifest.seal(notes.parent)  # else it is set aside
    assert "checkpoint-2/instruments.json: launch: found null" in refused(command(*words))
    notes.write_text(good)
    manifest.seal(notes.parent)
    (run / "checkpoints" / "data.json").write_text("[]")
    assert "checkpoints/data.json: found list, wanted an object" in refused(command(*words))


def bomb(place: Path) -> None:
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (place / "recipe" / "sft.yaml").write_text("\n".join(["a0: &a0 [x]", *lines]))


def pipe(place: Path) -> None:
    (place / "recipe" / "sft.yaml").unlink()
    os.mkfifo(place / "recipe" / "sft.yaml")


def rows_from_a_pipe(place: Path) -> None:
    os.mkfifo(place / "recipe" / "rows.jsonl")
    path = place / "recipe" / "sft.yaml"
    tree: Any = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | {"sources": [{"name": "a", "path": "rows.jsonl"}]}))


def unreadable(place: Path) -> None:
    (place / "recipe" / "sft.yaml").chmod(0)


@pytest.mark.parametrize(
    ("make", "words", "says"),
    [
        (bomb, ("check", "recipe/sft.yaml"), "its aliases unfold to over"),
        (pipe, ("check", "recipe/sft.yaml"), "is no file that can be read whole"),
        (rows_from_a_pipe, ("sft", "recipe"), "rows.jsonl: is no file that can be read whole"),
        (rows_from_a_pipe, ("prepare", "recipe", "--run-dir", "other"), "rows.jsonl: is a pipe or device"),
        pytest.param(
            unreadable, ("check", "recipe/sft.yaml"), "Permission denied",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything"),
        ),
    ],
)  # fmt: skip
def test_what_would_hang_or_fill_memory_is_refused(
    place: Path, command: Command, make: Callable[[Path], None], words: tuple[str, ...], says: str
) -> None:
    make(place)
    before = sorted(place.rglob("*"))
    assert says in refused(command("smol-post", *words, cwd=place))
    assert sorted(place.rglob("*")) == before
