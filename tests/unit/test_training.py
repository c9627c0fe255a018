"""Recipe to trainer: what is decayed, what is resumed, how a batch is cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from smol_post import config, manifest, trainers, training
from smol_post.refusal import Refusal

Build = Callable[..., Any]


def recipe(**changes: Any) -> config.SftRecipe:
    given: dict[str, Any] = {
        "stage": "sft",
        "max_tokens": 32,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "num_steps": 2,
        "sources": [config.Source(name="s", generator="dual_mode_chats", num_rows=1)],
    }
    return config.SftRecipe(**given | changes)


@pytest.mark.parametrize(("num_processes", "steps"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_accumulation_follows_from_batch_and_processes(num_processes: int, steps: int) -> None:
    assert training.accumulation_steps(recipe(), num_processes) == steps


@pytest.mark.parametrize("num_processes", [3, 16])
def test_a_batch_that_does_not_divide_among_the_processes_is_refused(num_processes: int) -> None:
    with pytest.raises(Refusal, match=f"8 does not divide by {num_processes} processes"):
        training.accumulation_steps(recipe(), num_processes)


@pytest.mark.parametrize(
    ("num_processes", "rows_and_steps"), [(1, (4, 3)), (2, (3, 2)), (3, (4, 1)), (6, (2, 1)), (12, (1, 1))]
)
def test_a_recipe_runs_on_any_number_of_processes_that_divides_its_batch(
    tmp_path: Path, num_processes: int, rows_and_steps: tuple[int, int]
) -> None:
    made = training.trainer_arguments(
        recipe(global_batch_size=12, micro_batch_size=4), run_dir=tmp_path, num_processes=num_processes
    )
    assert (made["per_device_train_batch_size"], made["gradient_accumulation_steps"]) == rows_and_steps


def test_the_recipe_s_own_keys_beat_defaults_and_trainer_block(tmp_path: Path) -> None:
    made = training.trainer_arguments(
        recipe(seed=3, trainer={"logging_steps": 7, "weight_decay": 0.1}), run_dir=tmp_path, num_processes=2
    )
    assert (made["seed"], made["data_seed"], made["logging_steps"], made["weight_decay"]) == (3, 3, 7, 0.1)
    assert (made["per_device_train_batch_size"], made["gradient_accumulation_steps"]) == (2, 2)
    assert (made["max_steps"], made["report_to"], made["bf16"]) == (2, "none", False)
    assert made["output_dir"] == str(tmp_path / "checkpoints")
    assert (made["run_name"], made["project"]) == (tmp_path.name, tmp_path.parent.name)  # for trackers
    epochs = training.trainer_arguments(
        recipe(num_steps=None, num_epochs=2.0), run_dir=tmp_path, num_processes=1
    )
    assert (epochs["max_steps"], epochs["num_train_epochs"]) == (-1, 2.0)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_not_decayed_and_other_matrices_are(
    build: Build, tokenizer: Any, tmp_path: Path, tied: bool
) -> None:
    row = {"input_ids": [5, 6], "labels": [-100, 6], "seq_lengths": [2], "address": [0]}
    rows = datasets.Dataset.from_list([row])
    lm = build(tied=tied)
    trainer = training.pack_trainer(
        lm,
        tokenizer,
        rows,
        arguments=training.trainer_arguments(
            recipe(trainer={"weight_decay": 0.1}), run_dir=tmp_path, num_processes=1
        ),
    )
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in lm.named_parameters()}
    groups = [
        (group["weight_decay"], {names[id(one)] for one in group["params"]})
        for group in trainer.optimizer.param_groups
    ]
    decayed = set().union(*(group for decay, group in groups if decay == 0.1))
    free = set().union(*(group for decay, group in groups if decay == 0.0))
    assert free == {name for name in names.values() if "norm" in name} | {"model.embed_tokens.weight"}
    assert decayed == set(names.values()) - free
    assert ("lm_head.weight" in decayed) == (not tied)


def checkpoint(run_dir: Path, step: int, *, sealed: bool = True) -> Path:
    folder = run_dir / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    names = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
    for name in names:
        (folder / name).write_text(name)
    if sealed:
        manifest.seal(folder)
    return folder


def test_the_newest_sealed_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    lines: list[str] = []
    assert training.last_checkpoint(tmp_path, announce=lines.append) is None
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    assert training.last_checkpoint(tmp_path, announce=lines.append) == newest
    assert lines == []


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("unsealed", "it was never finished"),
        ("cut short", "model.safetensors has 3 bytes, not 17"),
        ("file missing", "rng_state.pth is missing"),
        ("a bit flipped", "optimizer.pt has changed"),
        ("half a seal", "whole.json is not readable"),
        ("another seal", "whole.json is not readable"),
    ],
)
def test_a_torn_checkpoint_is_set_aside_and_named(tmp_path: Path, fault: str, named: str) -> None:
    whole = checkpoint(tmp_path, 5)
    torn = checkpoint(tmp_path, 10, sealed=fault != "unsealed")
    if fault == "cut short":
        (torn / "model.safetensors").write_text("mod")
    if fault == "file missing":
        (torn / "rng_state.pth").unlink()
    if fault == "a bit flipped":
        (torn / "optimizer.pt").write_text("optimizer.pu")
    if fault == "half a seal":
        (torn / manifest.SEAL).write_text('{"files": {')
    if fault == "another seal":
        (torn / manifest.SEAL).write_text('{"files": [1]}')
    lines: list[str] = []
    assert training.last_checkpoint(tmp_path, announce=lines.append) == whole
    aside = tmp_path / "checkpoints" / "torn" / "checkpoint-10"
    (line,) = lines
    assert line == f"checkpoint-10 is torn ({named}): set aside as {aside}, until the run is whole"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-5", "torn"]
    assert (aside / "trainer_state.json").is_file()
    (tmp_path / "checkpoints" / "gone.part" / "half").mkdir(parents=True)  # and was killed removing another
    torn = checkpoint(tmp_path, 10, sealed=False)  # the next attempt gets as far, and no further
    assert training.last_checkpoint(tmp_path, announce=lines.append) == whole
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-5", "torn"]


def test_a_sequence_longer_than_the_parent_s_context_is_refused(build: Build) -> None:
    training.check_length(recipe(max_tokens=256), build())
    with pytest.raises(Refusal, match="max_tokens: found 257, wanted at most 256"):
        training.check_length(recipe(max_tokens=257), build())


def test_preference_training_is_apo_zero_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    sources = [config.Source(name="s", generator="preference_pairs", num_rows=1)]
    given: dict[str, Any] = {"stage": "apo", "max_tokens": 32, "global_batch_size": 1, "num_steps": 1}
    apo = config.ApoRecipe(**given, sources=sources)
    assert training.trainer_arguments(apo, run_dir=tmp_path, num_processes=1)["loss_type"] == ["apo_zero"]
    other = config.ApoRecipe(**given, sources=sources, trainer={"loss_type": ["sigmoid"]})
    assert training.trainer_arguments(other, run_dir=tmp_path, num_processes=1)["loss_type"] == ["sigmoid"]


@pytest.mark.parametrize("kind", [trainers.PackTrainer, trainers.PairTrainer])
def test_neither_trainer_decays_embeddings(build: Build, kind: Any) -> None:
    names = kind.get_decay_parameter_names(object.__new__(kind), build(tied=True))
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not [name for name in names if "embed" in name or "lm_head" in name]
