"""Where every run stands, why, and what the command would do about it; looking changes nothing."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import smol_post
from smol_post import inputs, manifest, runner
from smol_post.__main__ import dispatch
from smol_post.plan import Job
from smol_post.refusal import Refusal
from tests.unit import trees


@dataclass
class Place:
    """A recipe folder, its run root, and the command line."""

    recipe: Path
    root: Path
    capsys: pytest.CaptureFixture[str]

    def jobs(self) -> dict[str, Job]:
        return trees.jobs_of(self.recipe, self.root)

    def say(self, *words: object) -> tuple[int, list[str]]:
        self.capsys.readouterr()
        code = dispatch(str(words[0]), [str(word) for word in words[1:]])
        said = self.capsys.readouterr()
        return code, (said.out + said.err).splitlines()

    def status(self) -> dict[str, str]:
        """Run -> its state and why, from the run root alone."""
        code, lines = self.say("status", self.root)
        assert code == 0
        return dict(line.split(maxsplit=1) for line in lines[1:-1])

    def explain(self) -> tuple[int, dict[str, str]]:
        code, lines = self.say("run", self.recipe, "--run-dir", self.root, "--explain")
        return code, dict(line.split(maxsplit=1) for line in lines)


@pytest.fixture
def place(recipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    """Nothing is made yet."""
    trees.with_local_inputs(recipe_folder)
    return Place(recipe_folder, tmp_path / "place" / "runs", capsys)


@pytest.fixture
def made(place: Place) -> Place:
    """Every run is whole."""
    trees.make_tree(place.recipe, place.root)
    return place


def set_entry(place: Place, name: str, **keys: Any) -> None:
    path = place.recipe / "pipeline.yaml"
    runs = [one | keys if one["name"] == name else one for one in json.loads(to_json(path))["runs"]]
    trees.edit(path, runs=runs)


def to_json(path: Path) -> str:
    import yaml

    return json.dumps(yaml.safe_load(path.read_text()))


# What is changed -> (how, the runs that it is an input of, what is said of them)
Edit = tuple[Callable[[Place, pytest.MonkeyPatch], object], list[str], str]
EDITS: dict[str, Edit] = {
    "recipe key": (
        lambda place, _: trees.edit(place.recipe / "mid.yaml", num_steps=5),
        ["mid"],
        "recipe num_steps: 4 -> 5",
    ),
    "recipe of two runs": (
        lambda place, _: trees.edit(place.recipe / "apo.yaml", max_tokens=256),
        ["apo_seed0", "apo_seed1"],
        "recipe max_tokens: 512 -> 256",
    ),
    "key of a source": (
        lambda place, _: trees.edit(
            place.recipe / "sft.yaml", sources=[{"name": "chats", "path": "chats.jsonl", "repeat": 2}]
        ),
        ["sft"],
        "recipe sources.chats.repeat: 1 -> 2",
    ),
    "overrides in the pipeline": (
        lambda place, _: set_entry(place, "apo_seed1", overrides={"seed": 7}),
        ["apo_seed1"],
        "recipe seed: 1 -> 7",
    ),
    "data file": (
        lambda place, _: (place.recipe / "chats.jsonl").write_text('{"text": "two"}\n'),
        ["sft"],
        "data file sources.chats has changed",
    ),
    "file in a folder of data": (
        lambda place, _: (place.recipe / "rows" / "b.jsonl").write_text('{"text": "two"}\n'),
        ["mid"],
        "data file sources.traces/b.jsonl was added",
    ),
    "file taken out of a folder of data": (
        lambda place, _: (place.recipe / "rows" / "a.jsonl").unlink(),
        ["mid"],
        "data file sources.traces/a.jsonl is gone",
    ),
    "template": (
        lambda place, _: (place.recipe / "mine.jinja").write_text("{{ other }}"),
        ["sft"],
        "template has changed",
    ),
    "gate's suite": (
        lambda place, _: trees.edit(place.recipe / "evals.yaml", num_arithmetic_questions=5),
        ["merge"],
        "gate.suite has changed",
    ),
    "text of the gate's suite": (
        lambda place, _: (place.recipe / "texts.jsonl").write_text('{"text": "two"}\n'),
        ["merge"],
        "gate.suite/texts.jsonl has changed",
    ),
    "parent's weights": (
        lambda place, _: trees.remake(place.jobs()["long_context_1"], weights="other"),
        ["mid", "merge"],
        "parent ../long_context_1 has other contents",
    ),
    "parents": (
        lambda place, _: set_entry(place, "merge", parents=["../apo_seed1", "../long_context_1"]),
        ["merge"],
        "parents ../apo_seed0, ../apo_seed1, ../long_context_1 -> ../apo_seed1, ../long_context_1",
    ),
    "version of the package": (
        lambda _, monkeypatch: monkeypatch.setattr(smol_post, "__version__", "9.9.9"),
        trees.RUNS,
        f"smol_post {smol_post.__version__} -> 9.9.9",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_changed_input_makes_its_runs_and_exactly_their_dependents_stale(
    made: Place, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    change, own, said = EDITS[what]
    assert {line.split()[0] for line in made.status().values()} == {"whole"}
    change(made, monkeypatch)
    wanted = {*own, *(one for name in own for one in trees.DEPENDENTS[name])}
    told = made.status()
    assert {name for name, line in told.items() if line.startswith("stale ")} == wanted
    for name, line in told.items():
        if name in own:
            assert said in line
        elif name in wanted:
            assert "recipe" not in line
            assert "has" not in line
            assert "parent ../" in line
            assert "is stale" in line


@pytest.mark.parametrize("what", EDITS)
def test_the_run_is_refused_for_the_input_that_status_names(
    made: Place, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    change, own, said = EDITS[what]
    change(made, monkeypatch)
    job = made.jobs()[own[0]]
    with pytest.raises(Refusal) as caught:
        runner.claim(job, *runner.examine(job))
    assert "holds a whole run of something else" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("what", EDITS)
def test_after_removing_what_explain_names_nothing_is_refused_and_no_more_is_made_than_need_be(
    made: Place, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    change, own, said = EDITS[what]
    change(made, monkeypatch)
    code, lines = made.explain()
    assert code == 2
    assert said.split(",")[0] in lines[own[0]]
    assert [name for name in trees.RUNS if "the command ends here" in lines[name]] == [own[0]]
    for line in lines.values():
        for path in line.partition("; remove ")[2].removesuffix("; the command ends here").split():
            shutil.rmtree(path, ignore_errors=True)
    wanted = {*own, *(one for name in own for one in trees.DEPENDENTS[name])}
    code, lines = made.explain()
    assert code == 0
    assert {name for name, line in lines.items() if line == "would be made"} == wanted
    assert {name for name, line in lines.items() if line.startswith("kept: ")} == set(trees.RUNS) - wanted


def test_what_decides_nothing_makes_nothing_stale(made: Place) -> None:
    trees.edit(made.recipe / "sft.yaml", verify="full", gates={"think_greedy": {"min": 0.1}})
    (made.recipe / "chats.jsonl").touch()
    (made.recipe / "README.md").write_text("notes")
    assert {line.split()[0] for line in made.status().values()} == {"whole"}


def test_a_data_file_that_is_gone_makes_its_run_stale_and_explain_refuses_by_its_path(made: Place) -> None:
    (made.recipe / "chats.jsonl").unlink()
    told = made.status()
    assert "stale" in told["sft"]
    assert "data file sources.chats is gone" in told["sft"]
    assert told["mid"].startswith("whole")
    code, lines = made.explain()
    assert code == 2
    assert "chats.jsonl does not exist" in lines["sft"]


def test_an_order_of_sources_is_an_input(made: Place) -> None:
    two = [{"name": "a", "path": "chats.jsonl"}, {"name": "b", "path": "texts.jsonl"}]
    assert inputs.differences({"sources": two}, {"sources": two[::-1]}) == ["sources"]


def test_a_process_under_way_is_told_with_its_step_and_the_time_left(place: Place) -> None:
    job = place.jobs()["base"]
    lock = runner.claim(job, *runner.examine(job))
    assert lock is not None
    with lock:
        assert f"process {os.getpid()}, before step 1" in place.status()["base"]
        manifest.note(job.run_dir, num_steps=12)
        assert f"process {os.getpid()}, step 0/12" in place.status()["base"]
        lines = [{"step": step, "loss": 1.0, "seconds": 30.0 * step} for step in (1, 2, 3)]
        text = "not json\n" + "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'
        (job.run_dir / "train_log.jsonl").write_text(text)
        assert place.status()["base"].endswith(f"process {os.getpid()}, step 3/12, 4 min 30 s left")
        code, told = place.explain()
        assert code == 2
        assert told["base"].startswith(f"refused: process {os.getpid()}")
        assert told["long_context_1"] == "waits for parent ../base"
    assert place.status()["base"].startswith("interrupted")


def test_the_process_of_another_machine_is_told_with_its_name(place: Place) -> None:
    job = place.jobs()["base"]
    with_state = runner.claim(job, *runner.examine(job))
    assert with_state is not None
    with with_state as lock:
        lock.truncate(0)
        lock.write(json.dumps({"pid": 7, "host": "node3", "started": "2026-11-22T22:30:00+00:00"}))
        lock.flush()
        assert "process 7 on node3, before step 1" in place.status()["base"]


def test_of_a_long_log_the_end_is_read(place: Place) -> None:
    job = place.jobs()["base"]
    lock = runner.claim(job, *runner.examine(job))
    assert lock is not None
    with lock, (job.run_dir / "train_log.jsonl").open("w") as log:
        manifest.note(job.run_dir, num_steps=10_000)
        for step in range(1, 5001):
            log.write(json.dumps({"step": step, "seconds": 2.0 * step, "loss": 1.0}) + "\n")
        log.flush()
        assert place.status()["base"].endswith("step 5000/10000, 2 h 46 min left")


def test_an_interrupted_run_goes_on_from_its_last_whole_checkpoint(place: Place) -> None:
    job = place.jobs()["base"]
    trees.begin(job)
    assert place.explain()[1]["base"].startswith("would begin again (no checkpoint yet")
    for step in (4, 8, 12):
        folder = trees.save_checkpoint(job, step)
    (folder / "optimizer.pt").unlink()
    assert "interrupted" in place.status()["base"]
    assert "whole as far as step 8; its process ended without a word" in place.status()["base"]
    code, told = place.explain()
    assert (code, told["base"]) == (0, "would go on from step 8")
    assert told["long_context_1"] == "would be made"
    trees.edit(place.recipe / "base.yaml", num_steps=20)
    assert "recipe num_steps: 12 -> 20" in place.status()["base"]
    code, told = place.explain()
    assert code == 2
    assert f"remove {job.run_dir}; the command ends here" in told["base"]
    assert told["merge"].startswith("waits for parent ../apo_seed0 and ../apo_seed1")


def test_a_run_that_holds_nothing_yet_begins_again_whatever_has_changed(place: Place) -> None:
    trees.begin(place.jobs()["base"])
    trees.edit(place.recipe / "base.yaml", num_steps=20)
    assert place.status()["base"].startswith("interrupted")
    code, told = place.explain()
    assert code == 0
    assert told["base"].startswith("would begin again")


def test_the_inputs_of_a_run_are_those_it_began_with(place: Place) -> None:
    jobs = place.jobs()
    for name in ("base", "long_context_1", "mid"):
        trees.finish(jobs[name])
    job = jobs["sft"]
    parents, print_id = runner.examine(job)
    trees.begin(job)
    (place.recipe / "chats.jsonl").write_text("edited while it ran")
    runner.record(job, parents, print_id, "failed", "step 3: the loss is nan")
    digest = manifest.digest_text('{"text": "one"}\n')
    assert manifest.read_json(job.run_dir / "state.json")["inputs"]["files"]["sources.chats"] == digest


def test_what_is_no_run_of_ours_is_never_named_for_removal(made: Place) -> None:
    trees.edit(made.recipe / "mid.yaml", num_steps=5)
    for name in ("sft", "apo_seed0"):
        shutil.rmtree(made.root / name)
    (made.root / "sft").mkdir()
    (made.root / "sft" / "thesis.tex").write_text("years of work")
    assert "parent ../sft comes of one that is stale" in made.status()["apo_seed1"]
    told = made.explain()[1]["mid"].partition("; remove ")[2].split(";")[0]
    assert told == " ".join(str(made.root / name) for name in ("mid", "apo_seed1", "merge"))


@pytest.mark.parametrize("state", ["failed", "refused", "interrupted"])
def test_what_came_of_a_run_is_told_in_its_own_words(place: Place, state: str) -> None:
    job = place.jobs()["base"]
    parents, print_id = runner.examine(job)
    trees.begin(job)
    runner.record(job, parents, print_id, state, "step 3: the loss is nan")
    told = place.status()["base"].split(maxsplit=1)
    assert told == [state, "no checkpoint yet; step 3: the loss is nan"]
    assert manifest.read_json(job.run_dir / "state.json")["inputs"]["files"] == {}
    assert place.explain()[0] == 0


def test_a_run_that_falls_short_of_its_gates_is_told_with_its_numbers(made: Place) -> None:
    gate = made.root / "evals" / "gates_sft.json"
    gate.parent.mkdir()
    digest = manifest.read_manifest(made.root / "sft")["digest"]
    short = {"digest": digest, "passed": False, "short": ["think_greedy is 0.2, wanted at least 0.9"]}
    manifest.write_json(gate, short)
    assert made.status()["sft"].startswith("whole"), "its recipe demands nothing any more"
    trees.edit(made.recipe / "sft.yaml", gates={"think_greedy": {"min": 0.9}})
    assert "short" in made.status()["sft"]
    assert "think_greedy is 0.2, wanted at least 0.9" in made.status()["sft"]
    trees.edit(made.recipe / "apo.yaml", max_tokens=256)
    code, told = made.explain()
    assert code == 1, "that of the first run that ends the command"
    assert "the chain stops there: think_greedy is 0.2" in told["sft"]
    assert told["apo_seed0"].startswith("refused: stale")
    manifest.write_json(gate, short | {"digest": "sha256:of another"})
    assert made.status()["sft"].startswith("whole")


def test_a_whole_run_without_its_parent_is_kept_if_that_comes_out_as_it_was(made: Place) -> None:
    shutil.rmtree(made.root / "mid")
    told = made.status()
    assert (told["mid"], told["sft"].split()[0]) == ("absent", "whole")
    code, lines = made.explain()
    assert code == 0
    assert lines["mid"] == "would be made"
    assert lines["sft"] == "kept, if ../mid comes out as it was"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_what_is_no_run_or_unreadable_is_unknown_and_would_be_refused(made: Place, text: str) -> None:
    (made.root / "sft" / "manifest.json").write_text(text)
    shutil.rmtree(made.root / "base")
    (made.root / "base").mkdir()
    (made.root / "base" / "thesis.tex").write_text("years of work")
    told = made.status()
    assert told["base"].split(maxsplit=1) == ["unknown", "holds no run of ours"]
    assert told["sft"].split()[0] == "unknown"
    code, lines = made.explain()
    assert code == 2
    assert {name for name, line in lines.items() if line.startswith("refused")} == {"base", "sft"}


def test_where_the_recipes_are_gone_or_broken_the_runs_are_shown_without_staleness(made: Place) -> None:
    trees.edit(made.recipe / "mid.yaml", num_step=5)
    code, lines = made.say("status", made.root)
    assert code == 0
    assert "did you mean 'num_steps'" in lines[0]
    assert "shown without staleness" in lines[0]
    shutil.rmtree(made.recipe)
    code, lines = made.say("status", made.root)
    assert code == 0
    assert lines[0] == f"{made.root}: its recipes are gone ({made.recipe}); shown without staleness"
    assert {line.split()[0]: line.split()[1] for line in lines[1:-1]} == dict.fromkeys(trees.RUNS, "whole")


def test_the_recipe_folder_is_that_of_the_pipeline_and_not_of_a_borrowed_recipe(
    made: Place, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tree = json.loads(to_json(made.recipe / "pipeline.yaml"))
    runs = [one | {"recipe": f"../recipe/{one['recipe']}"} for one in tree["runs"]][:3]
    (other / "pipeline.yaml").write_text(json.dumps({"runs": runs}))
    trees.make_tree(other, tmp_path / "others")
    code, lines = made.say("status", tmp_path / "others")
    assert (code, lines[0]) == (0, f"{tmp_path / 'others'}, by {other}")
    assert [line.split()[:2] for line in lines[1:-1]] == [[name, "whole"] for name in trees.RUNS[:3]]


def test_a_tree_that_was_moved_with_its_recipes_finds_them_from_any_folder(
    made: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipe", "place"):
        shutil.move(tmp_path / name, tmp_path / "far" / name)
    monkeypatch.chdir(tmp_path / "far" / "place" / "runs" / "sft")
    code, lines = made.say("status", "..")
    assert (code, lines[0]) == (0, f"..{', by '}{tmp_path / 'far' / 'recipe'}")
    assert {line.split()[1] for line in lines[1:-1]} == {"whole"}


def test_looking_writes_nothing_and_loads_no_torch(made: Place, environment: dict[str, str]) -> None:
    trees.begin(replace_run(made, "sft"))
    trees.edit(made.recipe / "mid.yaml", num_steps=5)
    before = trees.snapshot(made.root.parent)
    code = (
        "import sys\nfrom smol_post.__main__ import dispatch\n"
        f"dispatch('status', [{str(made.root)!r}])\n"
        f"dispatch('lineage', [{str(made.root / 'mid')!r}, '--verify'])\n"
        f"dispatch('run', [{str(made.recipe)!r}, '--run-dir', {str(made.root)!r}, '--explain'])\n"
        "assert not {'torch', 'numpy', 'datasets', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert trees.snapshot(made.root.parent) == before


def replace_run(made: Place, name: str) -> Job:
    shutil.rmtree(made.root / name)
    return made.jobs()[name]


def test_evals_of_what_is_there_now_are_counted(made: Place) -> None:
    for name, digest in (("base", None), ("mid", "sha256:of another")):
        path = made.root / "evals" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        digest = digest or manifest.read_manifest(made.root / name)["digest"]
        manifest.write_json(path, {"checkpoint_digest": digest})
    assert made.say("status", made.root)[1][-1] == "evals of 1 of 7 whole runs; report: none"
    (made.root / "report.html").touch()
    assert made.say("status", made.root)[1][-1].endswith(f"report: {made.root / 'report.html'}")
    shutil.copytree(made.root / "base", made.root / "traces")
    (made.root / "traces" / "answers.jsonl").touch()  # data that `generate` made is no model to measure
    assert made.say("status", made.root)[1][-1].startswith("evals of 1 of 7 whole runs")


def test_programs_get_the_same_from_the_root_and_from_the_recipe_folder(made: Place) -> None:
    trees.edit(made.recipe / "mid.yaml", num_steps=5)
    shutil.copytree(made.root / "base", made.root / "another")
    said = json.loads("\n".join(made.say("status", made.root, "--json")[1]))
    also = json.loads("\n".join(made.say("status", made.recipe, "--run-dir", made.root, "--json")[1]))
    assert said["runs"] == also["runs"]
    states = {one["name"]: (one["state"], one["changes"]) for one in said["runs"] if one["in_pipeline"]}
    assert states["mid"] == ("stale", ["recipe num_steps: 4 -> 5"])
    assert states["sft"] == ("stale", ["parent ../mid is stale"])
    assert states["base"] == ("whole", [])
    assert [one["name"] for one in said["runs"] if not one["in_pipeline"]] == ["another"]


@pytest.mark.parametrize("words", [["nowhere"], ["{root}/cache"], [], ["{root}", "--jsn"]])
def test_a_place_without_runs_or_a_wrong_option_is_refused(made: Place, words: list[str]) -> None:
    given = [word.replace("{root}", str(made.root)) for word in words]
    if len(given) == 1:
        code, lines = made.say("status", *given)
        assert code == 2
        assert "holds neither runs nor a pipeline.yaml" in lines[0]
    else:
        with pytest.raises(SystemExit) as caught:
            made.say("status", *given)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"origin": 3},
        {"parents": [{}]},
        {"parents": [{"path": []}]},
        {"data": 3},
        {"seconds": "x"},
        {"soup": "x"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_manifest_edited_by_hand_is_told_in_a_line(made: Place, keys: dict[str, Any]) -> None:
    trees.rewrite(made.root / "sft" / "manifest.json", **keys)
    assert made.say("status", made.root)[0] == 0
    assert made.say("run", made.recipe, "--run-dir", made.root, "--explain")[0] in (0, 2)
    assert made.say("lineage", made.root / "merge", "--verify")[0] in (1, 2)
