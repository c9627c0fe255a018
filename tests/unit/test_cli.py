"""The command line: one line for what is wrong, exit code 2, nothing written."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]
EDIT = {
    "misspelt key": ("sft.yaml", "num_steps:", "num_step:", "sft.yaml: num_step: .*did you mean"),
    "wrong type": ("sft.yaml", "num_steps: 6", "num_steps: six", "sft.yaml: num_steps: found .six."),
    "number as text": ("sft.yaml", "1.0e-3", "1e-6", "sft.yaml: trainer.learning_rate: .*1.0e-06"),
    "indivisible batch": ("sft.yaml", "micro_batch_size: 2", "micro_batch_size: 3", "not divide"),
    "missing parent": ("pipeline.yaml", "build_parents: true", "build_parents: false", "--until"),
    "unknown parent": ("pipeline.yaml", "[../mid]", "[../mit]", "did you mean 'mid'"),
}  # fmt: skip


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("refused: ")
    return lines[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", EDIT)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    command: Command, recipe_folder: Path, case: str
) -> None:
    name, old, new, message = EDIT[case]
    path = recipe_folder / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    before = files(recipe_folder.parent)
    line = refused(command("smol-post", "sft", recipe_folder / "sft.yaml", cwd=recipe_folder.parent))
    assert re.search(message, line), line
    assert files(recipe_folder.parent) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sfft"], "sfft: no such command; did you mean 'sft'?"),
        (["sft", "recipe/sft.yaml", "trainer.learning_rate=1e-6"], "write 1.0e-06"),
        (["evals", "recipe"], "no run of recipe is whole yet"),
        (["eval", "recipe", "--suite", "recipe/evals.yaml"], "recipe: no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_is_refused_in_one_line(
    command: Command, recipe_folder: Path, words: list[str], message: str
) -> None:
    before = files(recipe_folder.parent)
    assert message in refused(command("smol-post", *words, cwd=recipe_folder.parent))
    assert files(recipe_folder.parent) == before


def test_a_directory_that_holds_something_else_is_left_alone(command: Command, recipe_folder: Path) -> None:
    taken = recipe_folder.parent / "runs" / "base"
    taken.mkdir(parents=True)
    (taken / "thesis.tex").write_text("years of work")
    before = files(recipe_folder.parent)
    done = command("smol-post", "base", recipe_folder, "--run-dir", taken.parent)
    assert "exists and is no run of ours" in refused(done)
    assert files(recipe_folder.parent) == before


def test_a_stage_without_a_recipe_prints_the_command_to_type(command: Command, repo: Path) -> None:
    for words in (["smol-post", "apo"], ["python", repo / "smol_post" / "apo.py"]):
        line = refused(command(*words))
        assert (
            "accelerate launch --config_file recipes/accelerate/cpu.yaml smol_post/apo.py --config " in line
        )


@pytest.mark.parametrize("stage", ["base", "long-context", "mid", "sft", "apo", "merge"])
def test_the_command_that_a_stage_prints_exists(command: Command, repo: Path, stage: str) -> None:
    words = refused(command("smol-post", stage)).split("type: ")[1].split()
    assert (repo / words[words.index("--config") - 1]).is_file()


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["apo", "--help"], ["check", "--help"], []])
def test_help_is_there(command: Command, words: list[str]) -> None:
    done = command("smol-post", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: smol-post" in done.stdout


def test_help_names_every_command(command: Command) -> None:
    text = command("smol-post", "--help").stdout
    for word in ("run", "long-context", "mid", "sft", "apo", "merge", "evals", "eval", "report", "check"):
        assert f"  {word} " in text


def test_check_reads_a_recipe_without_torch(recipe_folder: Path, environment: dict[str, str]) -> None:
    code = (
        "import sys; from smol_post import commands; code = commands.check(sys.argv[1:]); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, recipe_folder],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 False"
    assert done.stdout.count("ok: ") == len(list(recipe_folder.glob("*.yaml")))
