"""A run that falls short of its gates is kept and marked, and the chain stops there with the numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow
Command = Callable[..., Any]


def demand(path: Path, gates: dict[str, Any] | None) -> None:
    """Write gates into a recipe, or an evals recipe out of a pipeline."""
    tree = yaml.safe_load(path.read_text())
    tree |= {"gates": gates}
    path.write_text(yaml.safe_dump(tree))


def test_the_chain_stops_at_a_run_that_falls_short_and_goes_on_when_it_does_not(
    recipe_folder: Path, command: Command, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    first = ["smol-post", "run", recipe_folder, "--run-dir", root, "--until", "base"]
    second = ["smol-post", "long-context", recipe_folder / "long_context_1.yaml", "--run-dir", root]
    demand(recipe_folder / "base.yaml", {"needle_1x": {"min": 0.9}, "needle_2x": {"max": 1}})
    done = command(*first)
    assert done.returncode == 1
    assert (
        "failed: base falls short: needle_1x is 0 +- 0, wanted at least 0.9; the run is kept" in done.stderr
    )
    before = (root / "base" / "manifest.json").read_bytes()
    page = (root / "report.md").read_text()
    assert "| base | needle_1x | failed | at least 0.900 | 0.000 ± 0.000 |" in page
    assert "|  | needle_2x | passed | at most 1.000 | 0.000 ± 0.000 |" in page
    done = command(*second)
    assert done.returncode == 2
    assert "parent ../base falls short: needle_1x is 0 +- 0, wanted at least 0.9; mend" in done.stderr
    assert not (root / "long_context_1").exists()

    demand(recipe_folder / "base.yaml", {"needle_1x": {"min": 0, "max": 0.5}})
    done = command(*first)
    assert done.returncode == 0, done.stderr
    assert "base: whole already, kept" in done.stdout
    assert "base: passed 1 gates" in done.stdout
    assert (root / "base" / "manifest.json").read_bytes() == before
    assert json.loads((root / "evals" / "gates_base.json").read_text())["passed"] is True
    assert command(*second).returncode == 0

    demand(recipe_folder / "base.yaml", {"needle_3x": {"min": 0}})
    done = command(*first)
    assert done.returncode == 2
    assert "base.yaml: gates: its suite measures no 'needle_3x'; did you mean 'needle_" in done.stderr


def test_gates_that_nothing_measures_are_refused(
    recipe_folder: Path, command: Command, tmp_path: Path
) -> None:
    demand(recipe_folder / "base.yaml", {"needle_1x": {"min": 0.9}})
    pipeline = yaml.safe_load((recipe_folder / "pipeline.yaml").read_text())
    del pipeline["evals"]
    (recipe_folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    done = command("smol-post", "run", recipe_folder, "--run-dir", tmp_path / "runs", "--until", "base")
    assert done.returncode == 2
    assert "base.yaml: gates: pipeline.yaml names no evals that would measure them" in done.stderr
    assert not (tmp_path / "runs").exists()
