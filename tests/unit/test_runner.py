"""The life of a run: claimed once, never written over, its outcome written down."""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smol_post import config, inputs, manifest, runner
from smol_post.plan import Job, Parent, make_plan
from smol_post.refusal import Failure, Refusal

PARENT = Parent("../mid", Path("/nowhere"), "sha256:1", "mid")


@pytest.fixture
def job(recipe_folder: Path) -> Job:
    (recipe_folder / "rows.jsonl").write_text('{"text": "one"}\n')
    recipe_file = recipe_folder / "sft.yaml"
    text = recipe_file.read_text().replace(
        "generator: dual_mode_chats, num_rows: 100, seed: 2", "path: rows.jsonl"
    )
    recipe_file.write_text(text)
    return make_plan(recipe_file, run_root=recipe_folder.parent / "runs", arguments=[]).jobs[0]


def changed(job: Job, **keys: Any) -> Job:
    return replace(job, recipe=job.recipe.model_copy(update=keys))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish(job: Job, print_id: str) -> None:
    manifest.write_json(
        job.run_dir / "manifest.json",
        {
            **{"schema": manifest.SCHEMA, "fingerprint": print_id, "recipe": job.recipe.model_dump()},
            **{"parents": [], "stage": "sft", "files": {}, "digest": manifest.content_digest({})},
        },
    )


def test_a_fingerprint_holds_while_nothing_that_decides_the_run_changes(job: Job) -> None:
    first = runner.fingerprint(job, [PARENT])
    assert runner.fingerprint(job, [replace(PARENT, path="/elsewhere", folder=Path("/x"))]) == first
    rows = job.recipe_file.parent / "rows.jsonl"
    rows.touch()
    assert runner.fingerprint(job, [PARENT]) == first


def test_a_fingerprint_changes_with_recipe_parent_and_data(job: Job) -> None:
    first = runner.fingerprint(job, [PARENT])
    assert runner.fingerprint(changed(job, num_steps=9), [PARENT]) != first
    assert runner.fingerprint(job, [replace(PARENT, digest="sha256:2")]) != first
    (job.recipe_file.parent / "rows.jsonl").write_text('{"text": "two"}\n')
    assert runner.fingerprint(job, [PARENT]) != first


def test_a_fingerprint_changes_where_two_data_files_change_places(job: Job) -> None:
    folder = job.recipe_file.parent
    sources = [config.Source(name=name, path=f"{name}.jsonl", repeat=at) for at, name in ((1, "a"), (2, "b"))]
    job = changed(job, sources=sources)
    texts = ['{"text": "one"}\n', '{"text": "two"}\n']
    found = set()
    for pair in (texts, texts[::-1]):
        for source, text in zip(sources, pair, strict=True):
            (folder / f"{source.name}.jsonl").write_text(text)
        found.add(runner.fingerprint(job, [PARENT]))
    assert len(found) == 2


def test_missing_data_is_refused_before_the_run_directory_exists(job: Job) -> None:
    (job.recipe_file.parent / "rows.jsonl").unlink()
    with pytest.raises(Refusal, match=r"sources: 'chats': .*rows\.jsonl does not exist"):
        runner.fingerprint(job, [])
    assert not job.run_dir.exists()


def test_a_new_directory_is_claimed_and_says_what_it_is_used_for(job: Job) -> None:
    lock = runner.claim(job, [PARENT], "print")
    assert lock is not None
    with lock:
        state = json.loads((job.run_dir / "state.json").read_text())
    assert (state["status"], state["fingerprint"], state["run"]) == ("running", "print", "sft")
    assert state["parents"] == [{"path": "../mid", "digest": "sha256:1"}]


def test_a_run_is_made_by_one_process_at_a_time(job: Job) -> None:
    lock = runner.claim(job, [PARENT], "print")
    assert lock is not None
    with lock, pytest.raises(Refusal, match=f"a run is under way, by process {os.getpid()} on"):
        runner.claim(job, [PARENT], "print")


def test_an_unfinished_run_of_the_same_recipe_is_taken_up_again(job: Job) -> None:
    for _ in range(2):
        lock = runner.claim(job, [PARENT], "print")
        assert lock is not None
        lock.close()


def test_a_whole_run_is_kept(job: Job) -> None:
    job.run_dir.mkdir(parents=True)
    finish(job, "print")
    before = snapshot(job.run_dir)
    assert runner.claim(job, [PARENT], "print") is None
    assert snapshot(job.run_dir) == before


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_of_another_recipe_is_refused_with_the_changed_key_and_left_alone(
    job: Job, whole: bool
) -> None:
    lock = runner.claim(job, [PARENT], "print")
    assert lock is not None
    lock.close()
    if whole:
        finish(job, "print")
    else:
        (job.run_dir / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    before = snapshot(job.run_dir)
    with pytest.raises(Refusal, match="num_steps: 6 -> 9"):
        runner.claim(changed(job, num_steps=9), [PARENT], "other")
    assert snapshot(job.run_dir) == before


def test_a_kill_while_another_recipe_s_attempt_is_removed_leaves_a_run_of_ours(job: Job) -> None:
    lock = runner.claim(job, [PARENT], "print")
    assert lock is not None
    lock.close()
    (job.run_dir / "train_log.jsonl").write_text("{}")
    runner._clear(job.run_dir)
    assert sorted(snapshot(job.run_dir)) == [str(job.run_dir / name) for name in (".lock", "state.json")]


def test_a_signal_while_inputs_are_hashed_ends_with_its_own_code(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    with (job.recipe_file.parent / "rows.jsonl").open("wb") as stream:
        stream.truncate(2**32)  # some seconds to hash
    job = replace(job, parent_paths=[])
    before = signal.getsignal(signal.SIGTERM)
    runner.interrupt_on_sigterm()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        assert runner.execute(job) == runner.EXIT_STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "sft: interrupted before it began\n"
    assert not job.run_dir.exists()


def test_a_directory_that_is_no_run_is_refused_and_left_alone(job: Job) -> None:
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(Refusal, match="exists and is no run of ours"):
        runner.claim(job, [PARENT], "print")
    assert snapshot(job.run_dir) == {str(job.run_dir / "thesis.tex"): b"years of work"}


def test_a_run_killed_before_its_first_word_is_taken_up_again(job: Job) -> None:
    job.run_dir.mkdir(parents=True)
    (job.run_dir / ".lock").touch()
    lock = runner.claim(job, [PARENT], "print")
    assert lock is not None
    lock.close()


def test_a_refused_run_can_be_made_after_the_remedy(job: Job) -> None:
    """Nothing was trained yet: mending the data file must be enough, the same command then works."""
    lock = runner.claim(job, [PARENT], runner.fingerprint(job, [PARENT]))
    assert lock is not None
    lock.close()
    runner.record(job, [PARENT], runner.fingerprint(job, [PARENT]), "refused", "row 1: no assistant turn")
    (job.recipe_file.parent / "rows.jsonl").write_text('{"text": "mended"}\n')
    lock = runner.claim(job, [PARENT], runner.fingerprint(job, [PARENT]))
    assert lock is not None
    lock.close()


def test_differences_name_every_leaf(job: Job) -> None:
    other = changed(job, seed=3, trainer={**job.recipe.model_dump()["trainer"], "logging_steps": 7})
    found = inputs.differences(job.recipe.model_dump(), other.recipe.model_dump())
    assert found == ["seed: 0 -> 3", "trainer.logging_steps: 2 -> 7"]


def test_a_refused_run_is_written_down_and_exits_2(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """The merge stage refuses, before any library is loaded, a long-context parent in the soup's place."""
    recipe = config.MergeRecipe(stage="merge")
    parents = [replace(PARENT, stage="long_context"), PARENT]
    merge = replace(job, recipe=recipe, parent_paths=[])
    lock = runner.claim(merge, parents, "print")
    assert lock is not None
    with lock:
        assert runner._guarded(merge, parents, "print", 0.0) == 2
    error = capsys.readouterr().err
    assert error.startswith("refused: ../mid is a long-context checkpoint")
    assert error.count("\n") == 1
    state = json.loads((job.run_dir / "state.json").read_text())
    assert (state["status"], state["message"][:6]) == ("refused", "../mid")


def test_a_run_that_cannot_go_on_is_written_down_in_a_line_and_exits_1(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*given: Any) -> None:
        raise Failure("step 3: the loss is nan; lower the learning rate")

    monkeypatch.setattr("smol_post.sft.run", diverge)
    lock = runner.claim(job, [], "print")
    assert lock is not None
    with lock:
        assert runner._guarded(replace(job, parent_paths=[]), [], "print", 0.0) == 1
    assert capsys.readouterr().err == "failed: step 3: the loss is nan; lower the learning rate\n"
    state = json.loads((job.run_dir / "state.json").read_text())
    assert (state["status"], state["message"][:6]) == ("failed", "step 3")


@pytest.mark.parametrize(
    ("words", "recipe", "pairs"),
    [
        (["r.yaml", "a=1", "b.c=2"], "r.yaml", ["a=1", "b.c=2"]),
        (["a=1", "--config", "r.yaml", "b=2"], "r.yaml", ["a=1", "b=2"]),
        (["--run-dir", "x", "r.yaml"], "r.yaml", []),
        (["a=1"], None, ["a=1"]),
    ],
)
def test_arguments_may_stand_in_any_order(words: list[str], recipe: str | None, pairs: list[str]) -> None:
    found, overrides = runner.parse(runner.parser("smol-post sft", stage="sft"), words)
    assert (found.recipe, overrides) == (recipe, pairs)


@pytest.mark.parametrize("words", [["r.yaml", "--rum", "x"], ["r.yaml", "s.yaml"], ["--config", "r", "s"]])
def test_an_argument_too_many_is_refused(words: list[str]) -> None:
    with pytest.raises(Refusal, match="argument "):
        runner.parse(runner.parser("smol-post sft", stage="sft"), words)


def test_a_fingerprint_changes_with_the_text_of_a_template_of_ones_own(job: Job) -> None:
    template = job.recipe_file.parent / "mine.jinja"
    template.write_text("one")
    own = changed(job, chat_template="mine.jinja")
    first = runner.fingerprint(own, [PARENT])
    template.write_text("two")
    assert runner.fingerprint(own, [PARENT]) != first
