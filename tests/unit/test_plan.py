"""What a command will make: which runs, in which order, from which parents."""

import shutil
from pathlib import Path

import pytest
import yaml

from smol_post import commands, config, manifest, runner
from smol_post.plan import Job, Plan, make_plan, missing_parents, order, resolve_parent
from smol_post.refusal import Refusal

CHAIN = ["base", "long_context_1", "mid", "sft", "apo_seed0", "apo_seed1", "merge"]


def plan_of(where: Path, **options: object) -> Plan:
    root = (where if where.is_dir() else where.parent).parent / "runs"
    return make_plan(where, **{"run_root": root, "arguments": [], **options})  # type: ignore[arg-type]


def names(jobs: list[Job]) -> list[str]:
    return [job.name for job in jobs]


def make_whole(job: Job, text: str = "weights") -> None:
    """A run directory as a finished run leaves it."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    (job.run_dir / "model.safetensors").write_text(text)
    (job.run_dir / "config.json").write_text("{}")
    files = manifest.content_files(job.run_dir)
    manifest.write_json(
        job.run_dir / "manifest.json",
        {
            "schema": manifest.SCHEMA,
            "stage": job.recipe.stage,
            "files": files,
            "digest": manifest.content_digest(files),
            **{"fingerprint": "print", "recipe": {}, "parents": []},
        },
    )


def without_building(folder: Path) -> None:
    path = folder / "pipeline.yaml"
    path.write_text(path.read_text().replace("build_parents: true", "build_parents: false"))


def test_a_folder_means_every_run_in_the_order_of_the_pipeline(recipe_folder: Path) -> None:
    jobs = plan_of(recipe_folder).jobs
    assert names(jobs) == CHAIN
    assert jobs[3].run_dir == recipe_folder.parent / "runs" / "sft"
    assert jobs[3].parent_paths == ["../mid"]


def test_a_recipe_file_means_the_runs_that_use_it_and_run_picks_one(recipe_folder: Path) -> None:
    assert names(plan_of(recipe_folder / "apo.yaml").jobs) == ["apo_seed0", "apo_seed1"]
    assert names(plan_of(recipe_folder / "apo.yaml", run="apo_seed1").jobs) == ["apo_seed1"]
    assert names(plan_of(recipe_folder, stage="apo").jobs) == ["apo_seed0", "apo_seed1"]


def test_the_overrides_of_an_entry_reach_its_recipe(recipe_folder: Path) -> None:
    assert [job.recipe.seed for job in plan_of(recipe_folder / "apo.yaml").jobs] == [0, 1]


def test_arguments_change_the_runs_asked_for_and_not_their_parents(recipe_folder: Path) -> None:
    plan = plan_of(recipe_folder / "sft.yaml", arguments=["seed=5"])
    assert [job.recipe.seed for job in plan.jobs] == [5]
    assert [job.recipe.seed for job in order(plan)] == [0, 0, 0, 5]


def test_runs_go_under_runs_and_the_name_of_the_recipe_folder(recipe_folder: Path) -> None:
    assert make_plan(recipe_folder, run_root=None, arguments=[]).jobs[0].run_dir == Path("runs/recipe/base")


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("sft.yaml", {"stage": "mid"}, "found no run of stage mid; stages here: sft"),
        ("apo.yaml", {"run": "apo_seed2"}, "--run apo_seed2: .*did you mean 'apo_seed1'"),
        ("apo.yaml", {"run": "sft"}, "--run sft: no such run"),
        ("none.yaml", {}, "no such file or folder"),
        ("evals.yaml", {}, "no run of .*pipeline.yaml uses this recipe"),
    ],
)
def test_a_plan_that_asks_for_what_is_not_there_is_refused(
    recipe_folder: Path, file: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        plan_of(recipe_folder / file, **options)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"pipeline\.yaml: no such file"):
        plan_of(tmp_path)


def test_missing_parents_come_first_each_once_oldest_first(recipe_folder: Path) -> None:
    plan = plan_of(recipe_folder / "merge.yaml")
    assert names(missing_parents(plan.jobs[0], plan.pipeline)) == CHAIN[:-1]
    assert names(order(plan)) == CHAIN


def test_a_whole_parent_is_not_made_again(recipe_folder: Path) -> None:
    plan = plan_of(recipe_folder / "sft.yaml")
    make_whole(plan.pipeline[1])
    assert names(order(plan)) == ["mid", "sft"]
    make_whole(plan.pipeline[2])
    assert names(order(plan)) == ["sft"]


def test_missing_parents_are_named_with_the_command_where_the_recipe_does_not_build_them(
    recipe_folder: Path,
) -> None:
    without_building(recipe_folder)
    with pytest.raises(Refusal, match=r"parent .* is not whole.*smol-post run .* --until \w+"):
        order(plan_of(recipe_folder / "sft.yaml"))
    assert names(order(plan_of(recipe_folder))) == CHAIN  # a whole pipeline was asked for


def test_parents_are_never_built_inside_a_multi_process_launch(
    recipe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refusal, match="inside a multi-process launch"):
        order(plan_of(recipe_folder / "sft.yaml"))


def test_a_parent_is_resolved_to_its_folder_digest_and_stage(recipe_folder: Path) -> None:
    plan = plan_of(recipe_folder / "sft.yaml")
    make_whole(plan.pipeline[2])
    parent = resolve_parent(plan.jobs[0], "../mid")
    assert (parent.folder, parent.stage) == (plan.pipeline[2].run_dir.resolve(), "mid")
    assert parent.digest == manifest.read_manifest(parent.folder)["digest"]


def test_a_parent_that_was_touched_since_it_ended_is_refused(recipe_folder: Path) -> None:
    plan = plan_of(recipe_folder / "sft.yaml")
    make_whole(plan.pipeline[2])
    (plan.pipeline[2].run_dir / "model.safetensors").write_text("bit rot")
    with pytest.raises(Refusal, match=r"model\.safetensors: has changed"):
        resolve_parent(plan.jobs[0], "../mid")


def test_a_parent_that_is_not_whole_is_refused(recipe_folder: Path) -> None:
    with pytest.raises(Refusal, match=r"parent \.\./mid is not whole"):
        resolve_parent(plan_of(recipe_folder / "sft.yaml").jobs[0], "../mid")


def test_a_parent_that_fell_short_is_refused_by_any_name(recipe_folder: Path) -> None:
    plan = plan_of(recipe_folder / "sft.yaml")
    make_whole(plan.pipeline[2])
    run_dir = plan.pipeline[2].run_dir
    found = {"digest": manifest.read_manifest(run_dir)["digest"], "passed": False, "short": ["a is 0"]}
    (run_dir.parent / "evals").mkdir()
    manifest.write_json(run_dir.parent / "evals" / "gates_mid.json", found)
    for path in ("../mid", str(run_dir), f"{run_dir}/../mid"):
        with pytest.raises(Refusal, match="falls short: a is 0"):
            resolve_parent(plan.jobs[0], path)


@pytest.mark.parametrize(
    ("name", "metric", "known"),
    [
        ("base", "needle_2x", True),
        ("base", "needl_2x", False),
        ("base", "needle_3x_yarn", False),
        ("merge", "needle_3x_yarn", True),
    ],
)
def test_a_gate_that_no_suite_measures_is_refused_before_the_first_run(
    recipe_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    metric: str,
    known: bool,
) -> None:
    started: list[Job] = []
    monkeypatch.setattr(runner, "execute_all", lambda jobs, **_: started.extend(jobs) or 1)
    path = recipe_folder / f"{name}.yaml"
    path.write_text(path.read_text() + f"\ngates: {{{metric}: {{min: 0}}}}\n")
    code = commands.run([str(recipe_folder), "--run-dir", str(recipe_folder.parent / "runs")])
    assert (code, len(started)) == ((1, len(CHAIN)) if known else (2, 0))
    said = f"refused: {path}: gates: its suite measures no '{metric}'; did you mean 'needle_"
    assert capsys.readouterr().err.startswith(said) is not known


def test_any_checkpoint_folder_can_be_a_parent(recipe_folder: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe_folder / "sft.yaml")
    with pytest.raises(Refusal, match=r"no config\.json"):
        resolve_parent(plan.jobs[0], str(tmp_path / "elsewhere"))
    make_whole(plan.pipeline[2])
    elsewhere = Path(shutil.copytree(plan.pipeline[2].run_dir, tmp_path / "elsewhere"))
    (elsewhere / "manifest.json").unlink()
    parent = resolve_parent(plan.jobs[0], str(elsewhere))
    assert (parent.folder, parent.stage) == (elsewhere, None)
    assert parent.digest == manifest.read_manifest(plan.pipeline[2].run_dir)["digest"]


def test_a_chain_may_start_from_any_checkpoint(recipe_folder: Path) -> None:
    path = recipe_folder / "pipeline.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["runs"] = [{"name": "sft", "stage": "sft", "recipe": "sft.yaml", "parents": ["org/name@main"]}]
    path.write_text(yaml.safe_dump(tree))
    assert isinstance(order(plan_of(recipe_folder))[0].recipe, config.SftRecipe)
