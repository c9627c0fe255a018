"""The log says what a run did, step by step, whatever stops it; and a run gone wrong stops by itself."""

import copy
import fcntl
import io
import json
import math
import os
import random
import re
import signal
import struct
import termios
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    WandbCallback,
)

from smol_post import (
    config,
    data,
    disk,
    instruments,
    manifest,
    reference,
    trainer_block,
    training,
    vocabulary,
)
from smol_post.refusal import Failure, Refusal, Stopped

Build = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = {"seconds", "tokens_per_second", "memory_bytes"}  # what differs from one run to the next


# --- a run, in this process -------------------------------------------------------------------------------


def texts(number: int = 12) -> list[dict[str, str]]:
    """Rows whose tokens differ in number, and so do those that are trained."""
    draw = random.Random(0)
    words = [str(one) for one in range(100)]
    return [
        {
            "prompt": " ".join(draw.choices(words, k=2 + row % 3)),
            "completion": " ".join(draw.choices(words, k=1 + row % 5)),
        }
        for row in range(number)
    ]


class Run:
    """A run in a folder: the same each time `train` is called, so that the second call resumes the first."""

    def __init__(self, folder: Path, build: Build, tokenizer: Any, *, pairs: bool = False, **changes: Any):
        self.folder, self.build, self.tokenizer = folder, build, copy.deepcopy(tokenizer)
        self.lines: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts()))
        block = {"learning_rate": 1e-3, "logging_steps": 1, **changes.pop("trainer", {})}
        given: dict[str, Any] = {
            "num_steps": 6,
            "global_batch_size": 2,
            "verify": "off",
            "trainer": block,
            **changes,
        }
        if pairs:
            sources = [config.Source(name="pairs", generator="preference_pairs", num_rows=8)]
            self.recipe: Any = config.ApoRecipe(
                stage="apo", chat_template="smol_post", max_tokens=200, sources=sources, **given
            )
        else:
            self.recipe = config.LongContextRecipe(
                stage="long_context",
                rope_theta=50000.0,
                **{"max_tokens": 32, "packing": "bfd", "loss_on": "completion"} | given,
                sources=[config.Source(name="texts", path="rows.jsonl")],
            )
        words = vocabulary.of_run(self.recipe, self.tokenizer, folder=folder)
        self.prepared = data.prepare(self.recipe, words, folder=folder, cache_dir=folder / "cache")

    @property
    def dir(self) -> Path:
        return self.folder / "run"

    def trainer(self) -> Any:
        self.lm = self.build()
        arguments = training.trainer_arguments(self.recipe, run_dir=self.dir, num_processes=1)
        if isinstance(self.recipe, config.LongContextRecipe):
            return training.pack_trainer(self.lm, self.tokenizer, self.prepared.dataset, arguments=arguments)
        prepared = reference.with_reference(
            self.prepared,
            self.lm,
            weights="a",
            cache_dir=self.folder / "cache",
            micro_batch_tokens=400,
            announce=str,
        )
        return training.pair_trainer(
            self.lm, None, self.tokenizer, prepared.dataset, micro_batch_tokens=400, arguments=arguments
        )

    def train(self, *callbacks: TrainerCallback, pinned: Collection[str] = ()) -> dict[str, Any]:
        self.last = trainer = self.trainer()
        for callback in callbacks:
            trainer.add_callback(callback)
        self.dir.mkdir(exist_ok=True)
        return training.fit(
            trainer,
            self.tokenizer,
            prepared=self.prepared,
            recipe=self.recipe,
            run_dir=self.dir,
            only_verify=False,
            pinned=pinned,
            announce=self.lines.append,
        )

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.dir / "train_log.jsonl").read_text().splitlines()]

    def batches(self) -> list[list[dict[str, Any]]]:
        """The micro-batches of every step, from a trainer of their own."""
        trainer = self.trainer()
        each, size = [], trainer.args.gradient_accumulation_steps
        while len(each) < size * self.recipe.num_steps:
            loader = trainer.get_train_dataloader()
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(len(each) // len(loader))
            each += list(loader)
        return [each[at : at + size] for at in range(0, size * self.recipe.num_steps, size)]


@pytest.fixture
def run(tmp_path: Path, build: Build, tokenizer: Any) -> Callable[..., Run]:
    return lambda name="one", **changes: Run(tmp_path / name, build, tokenizer, **changes)


class At(TrainerCallback):
    """Do something when an event of a step comes."""

    def __init__(self, event: str, step: int, what: Callable[[Any], None]) -> None:
        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                what(kwargs["model"])

        setattr(self, event, call)


def stop(model: Any) -> None:
    raise KeyboardInterrupt


def lasting(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two runs of the same recipe have in common."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


# --- what a line says -------------------------------------------------------------------------------------


def test_tokens_and_trained_tokens_are_those_of_the_batches_so_far(run: Callable[..., Run]) -> None:
    one = run(micro_batch_size=1)
    metrics, log = one.train(), one.log()
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    tokens = trained = 0
    for line, step in zip(log, one.batches(), strict=True):
        assert len(step) == 2
        found = sum(sum(batch["seq_lengths"]) for batch in step)
        tokens += found
        trained += sum(int((batch["labels"] != data.IGNORED).sum()) for batch in step)
        assert (line["num_tokens"], line["num_trained_tokens"]) == (tokens, trained)
        assert line["utilisation"] == round(found / (2 * 32), 4)
    assert (metrics["num_tokens_seen"], metrics["num_trained_tokens_seen"]) == (tokens, trained)
    losses = [line["loss"] for line in log]
    assert metrics["train_loss"] == round(sum(losses) / 6, 5)
    assert (metrics["first_loss"], metrics["last_loss"]) == (losses[0], pytest.approx(sum(losses) / 6))


def test_an_epoch_is_every_document_once_as_the_tokenizer_counts_it(run: Callable[..., Run]) -> None:
    one = run(global_batch_size=1, num_steps=None, num_epochs=1.0)
    one.train()
    sizes = [
        [len(one.tokenizer(row[side]).input_ids) for side in ("prompt", "completion")] for row in texts()
    ]
    last = one.log()[-1]
    assert last["num_tokens"] == sum(before + after + 1 for before, after in sizes)  # and the end token
    assert last["num_trained_tokens"] == sum(after + 1 for _, after in sizes)
    assert last["epoch"] == 1.0
    filled = sum(line["utilisation"] for line in one.log()) / last["step"]
    assert filled == pytest.approx(one.prepared.ledger["utilisation"], abs=1e-4)


def test_loss_and_gradient_norm_are_torch_s_own(run: Callable[..., Run]) -> None:
    one = run(micro_batch_size=1)
    one.train(At("on_train_begin", 0, lambda model: one.last.tally.update(loss=5.0)))  # as a proof might
    lm, (step, *_) = one.build().train(), one.batches()
    total, count = torch.zeros(()), 0
    for batch in step:
        pieces = [batch[key][0].split(batch["seq_lengths"]) for key in ("input_ids", "labels")]
        for ids, labels in zip(*pieces, strict=True):
            logits = lm(ids[None], use_cache=False).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            count += int((labels[1:] != data.IGNORED).sum())
    (total / count).backward()
    norm = math.sqrt(sum(float(each.grad.square().sum()) for each in lm.parameters()))
    assert one.log()[0]["loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert one.log()[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    ours = [line["loss"] for line in one.log()]
    assert ours == pytest.approx([entry["loss"] for entry in one.last.state.log_history[:6]], rel=1e-6)


def cosine(step: int) -> float:
    return step / 2 if step < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 6)) / 2


SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "linear": ({"warmup_steps": 2}, lambda step: step / 2 if step < 2 else (8 - step) / 6),
    "warmup_stable_decay": (
        {"warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 3, "decay_type": "linear"}},
        lambda step: step / 2 if step < 2 else 1 if step < 5 else (8 - step) / 3,
    ),
    "cosine_with_min_lr": ({"warmup_steps": 2, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, cosine),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_is_the_one_that_the_schedule_s_formula_gives(
    run: Callable[..., Run], name: str
) -> None:
    block, formula = SCHEDULES[name]
    one = run(num_steps=8, trainer={"lr_scheduler_type": name, **block})
    one.train()
    assert [line["learning_rate"] for line in one.log()] == pytest.approx(
        [1e-3 * formula(n) for n in range(8)]
    )


def test_values_of_pairs_are_means_over_the_pairs_of_the_global_batch(run: Callable[..., Run]) -> None:
    one = run(pairs=True, num_steps=3, trainer={"beta": 0.5, "learning_rate": 1e-2})
    one.train()
    log, lm = one.log(), one.build().train()
    sums = [0.0, 0.0]
    (first,) = one.batches()[0]
    pieces = [first[key][0].split(first["seq_lengths"]) for key in ("input_ids", "labels")]
    for number, (ids, labels) in enumerate(zip(*pieces, strict=True)):
        log_p = lm(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        at = torch.nonzero(labels[1:] != data.IGNORED).flatten()
        sums[number % 2] += log_p[at, labels[1:][at]].sum().item()
    assert log[0]["logps/chosen"] == pytest.approx(sums[0] / 2, rel=1e-5)
    assert log[0]["logps/rejected"] == pytest.approx(sums[1] / 2, rel=1e-5)
    assert log[0]["loss"] == pytest.approx(1.0)
    assert log[0]["num_tokens"] == sum(first["seq_lengths"])
    assert "utilisation" not in log[0]
    for line in log:
        margin = line["rewards/chosen"] - line["rewards/rejected"]
        assert line["rewards/margins"] == pytest.approx(margin, abs=1e-5)
        assert line["rewards/accuracies"] in (0, 0.5, 1)
    assert abs(log[-1]["rewards/chosen"]) > 1e-3


def test_speed_memory_and_clock_are_measured(run: Callable[..., Run]) -> None:
    """The time that a checkpoint takes counts for the clock, not for the speed of the next step."""
    one = run(trainer={"save_strategy": "steps", "save_steps": 3})
    there: list[int] = []
    metrics = one.train(
        At("on_step_begin", 1, lambda model: there.append(len(one.log()))),
        At("on_save", 3, lambda model: time.sleep(1.0)),
        At("on_step_begin", 3, lambda model: there.append(len(one.log()))),
        At("on_step_begin", 4, lambda model: there.append(len(one.log()))),
    )
    assert there == [1, 3, 4]  # lines reach the file once a second, and before a checkpoint is sealed
    log = one.log()
    slow = log[3]
    assert slow["seconds"] - log[2]["seconds"] > 1
    assert slow["tokens_per_second"] > 3 * (slow["num_tokens"] - log[2]["num_tokens"])
    metrics, log = (one := run("two")).train(), one.log()
    before = 0.0
    for line, tokens in zip(log, (line["num_tokens"] for line in [{"num_tokens": 0}, *log]), strict=False):
        elapsed, before = line["seconds"] - before, line["seconds"]
        assert line["tokens_per_second"] == pytest.approx((line["num_tokens"] - tokens) / elapsed, rel=0.2)
    assert 0 < log[0]["seconds"] < log[-1]["seconds"] < 60
    assert metrics["training_seconds"] == round(log[-1]["seconds"], 1)
    assert 50e6 < log[-1]["memory_bytes"] < 50e9  # torch alone takes more than the one, no test the other


# --- stopped and resumed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "event", "step", "resumed"),
    [
        pytest.param(False, "on_step_begin", 3, 2, id="after a checkpoint"),
        pytest.param(False, "on_log", 4, 2, id="between line and checkpoint"),
        pytest.param(False, "on_save", 4, 2, id="between checkpoint and seal"),
        pytest.param(False, "on_step_begin", 1, 0, id="before any checkpoint"),
        pytest.param(False, "on_train_end", 7, 7, id="after the last checkpoint, within an epoch"),
        pytest.param(True, "on_step_begin", 5, 4, id="pairs"),
    ],
)
def test_a_run_stopped_anywhere_and_resumed_writes_the_log_of_an_uninterrupted_one(
    run: Callable[..., Run], pairs: bool, event: str, step: int, resumed: int
) -> None:
    block = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    straight, torn = (run(name, pairs=pairs, num_steps=7, trainer=block) for name in ("straight", "torn"))
    assert 7 % straight.prepared.ledger["updates_per_epoch"]
    wanted = straight.train()
    with pytest.raises(KeyboardInterrupt):
        torn.train(At(event, step, stop))
    before = torn.log()
    assert [line["step"] for line in before] == list(range(1, step + 1))
    with (torn.dir / "train_log.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')
    metrics = torn.train()
    assert metrics["resumed_from_step"] == resumed
    assert lasting(torn.log()) == lasting(straight.log())
    assert torn.log()[:resumed] == before[:resumed]
    seconds = [line["seconds"] for line in torn.log()]
    assert seconds == sorted(seconds)
    for key in wanted.keys() - {"training_seconds", "resumed_from_step"}:
        assert metrics[key] == wanted[key], key
    weights = [(one.dir / "model.safetensors").read_bytes() for one in (straight, torn)]
    assert weights[0] == weights[1]


def signalled(*numbers: int) -> Callable[[Any], None]:
    return lambda model: [os.kill(os.getpid(), number) for number in numbers] and None


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGTERM, Stopped), (signal.SIGUSR1, Stopped), (signal.SIGINT, KeyboardInterrupt)],
    ids=lambda one: getattr(one, "name", ""),
)
def test_a_signal_to_stop_is_obeyed_when_the_step_is_saved(
    run: Callable[..., Run], number: int, kind: type[BaseException]
) -> None:
    straight, asked = run("straight"), run("asked")
    straight.train()
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 3, which is saved$") as why:
        asked.train(At("on_step_begin", 2, signalled(number)))
    assert type(why.value) is kind
    assert signal.getsignal(number) == before
    assert [line["step"] for line in asked.log()] == [1, 2, 3]
    assert manifest.broken(asked.dir / "checkpoints" / "checkpoint-3") == []
    assert asked.train()["resumed_from_step"] == 3
    assert lasting(asked.log()) == lasting(straight.log())
    weights = [(one.dir / "model.safetensors").read_bytes() for one in (straight, asked)]
    assert weights[0] == weights[1]


def test_a_signal_that_comes_by_two_ways_is_one(run: Callable[..., Run]) -> None:
    with pytest.raises(Stopped, match=r"^stopped after step 3, which is saved$"):
        run().train(At("on_step_begin", 2, signalled(signal.SIGTERM, signal.SIGTERM)))


def test_who_asks_twice_is_not_kept_waiting(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "SAME_SECONDS", 0.0)
    one = run()
    with pytest.raises(Stopped, match=r"^$"):
        one.train(At("on_step_begin", 2, signalled(signal.SIGTERM, signal.SIGTERM)))
    assert not list((one.dir / "checkpoints").glob("checkpoint-*"))


def test_a_run_asked_to_stop_in_its_last_step_is_made_whole(run: Callable[..., Run]) -> None:
    one = run()
    assert one.train(At("on_step_begin", 5, signalled(signal.SIGTERM)))["num_steps"] == 6
    assert (one.dir / "model.safetensors").is_file()


def test_old_checkpoints_go_when_the_new_one_is_whole_and_those_others_start_from_stay(
    run: Callable[..., Run],
) -> None:
    one = run(trainer={"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2})
    folder, seen = one.dir / "checkpoints", []

    def look(model: Any) -> None:  # the new checkpoint has no seal yet
        seen.append({path.name for path in folder.glob("checkpoint-*") if not manifest.broken(path)})

    one.train(*(At("on_save", step, look) for step in range(1, 7)), pinned={"checkpoint-2"})
    names = [f"checkpoint-{step}" for step in range(1, 7)]
    assert seen[:3] == [set(), set(names[:1]), set(names[:2])]
    assert seen[5] == {names[1], names[3], names[4]}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {names[1], names[4], names[5]}


def test_a_kill_while_an_old_checkpoint_is_removed_holds_up_no_later_one(run: Callable[..., Run]) -> None:
    one = run(trainer={"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1})
    folder = one.dir / "checkpoints"
    (folder / instruments.GONE).mkdir(parents=True)
    (folder / instruments.GONE / "optimizer.pt").write_text("half of it is gone")
    (folder / "checkpoint-2-mine").mkdir()  # a copy by hand is nobody's business
    one.train()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"checkpoint-6", "checkpoint-2-mine"}


def test_a_run_is_refused_where_the_disk_has_no_room_for_it_and_its_checkpoints(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(trainer={"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2})
    size = sum(parameter.numel() for parameter in one.build().parameters())
    wanted = 4 * size + 3 * 12 * size
    monkeypatch.setattr(disk, "free", lambda folder: wanted - 1)
    with pytest.raises(Refusal, match=r"run: the run takes 0\.\d+ GiB of disk, found .* make room or choose"):
        one.train()
    assert not list((one.dir / "checkpoints").glob("checkpoint-*"))
    monkeypatch.setattr(disk, "free", lambda folder: wanted)
    one.train()
    # killed now, the weights would be written over: room for one checkpoint more is all that is missing
    assert training.required_bytes(one.recipe, one.build(), one.dir, 6) == 12 * size
    saved = sum(path.stat().st_size for path in (one.dir / "checkpoints" / "checkpoint-6").iterdir())
    assert saved == pytest.approx(12 * size, rel=0.2)


@pytest.mark.parametrize(
    ("step", "kept"), [(0, ""), (1, "a"), (2, "ab"), (9, "ab")], ids=["none", "one", "two", "all"]
)
@pytest.mark.parametrize("rest", ["", '{"step": 3', '{"step": 3}', "\0\0\n", "[]\n"])
def test_a_log_is_cut_behind_a_step_and_at_half_a_line(
    tmp_path: Path, step: int, kept: str, rest: str
) -> None:
    lines = {"a": '{"step": 1, "loss": 2.5}\n', "b": '{"step": 2, "loss": 2.0}\n'}
    path = tmp_path / "log.jsonl"
    path.write_text(lines["a"] + lines["b"] + rest)
    instruments.cut(path, step)
    assert path.read_text() == "".join(lines[one] for one in kept)


def test_cutting_a_log_that_is_not_there_makes_an_empty_one(tmp_path: Path) -> None:
    instruments.cut(tmp_path / "log.jsonl", 3)
    assert (tmp_path / "log.jsonl").read_bytes() == b""


# --- a run gone wrong -------------------------------------------------------------------------------------


def scaled(by: float) -> Callable[[Any], None]:
    """Weights of the head (and the embedding it is tied to) multiplied."""
    return lambda model: model.get_output_embeddings().weight.data.mul_(by)


def documents_of(one: Run, step: int) -> list[tuple[int, ...]]:
    pieces = [
        ids for batch in one.batches()[step - 1] for ids in batch["input_ids"][0].split(batch["seq_lengths"])
    ]
    return sorted(tuple(ids.tolist()) for ids in pieces)


def rows_of(one: Run, documents: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """The rows written down, read in the source and tokenised anew."""
    found, lines = [], (one.folder / "rows.jsonl").read_text().splitlines()
    for document in documents:
        assert (document["source"], document["mode"]) == ("texts", "text")
        row = json.loads(lines[document["row"] - 1])
        ids = [*one.tokenizer(row["prompt"]).input_ids, *one.tokenizer(row["completion"]).input_ids]
        found.append((*ids, one.tokenizer.eos_token_id))
        assert document["length"] == len(found[-1])
    return sorted(found)


def test_a_loss_that_is_not_a_number_stops_the_run_at_its_step_with_the_rows_written_down(
    run: Callable[..., Run],
) -> None:
    one = run(micro_batch_size=1, trainer={"save_strategy": "steps", "save_steps": 1})
    with pytest.raises(
        Failure, match=r"^step 4: the loss is nan; the rows of its batch are in .*bad_batch"
    ) as why:
        one.train(At("on_step_begin", 3, scaled(math.nan)))
    assert "\n" not in str(why.value)
    assert [line["step"] for line in one.log()] == [1, 2, 3]
    bad = json.loads((one.dir / "bad_batch.json").read_text())
    assert (bad["step"], bad["why"]) == (4, "the loss is nan")
    assert bad["losses"] == [*(line["loss"] for line in one.log()), "nan"]
    (batch,) = bad["batches"]
    assert batch["step"] == 4
    assert rows_of(one, batch["documents"]) == documents_of(one, 4)
    # Step 4 used the weights of step 3: none of what is resumed from is later than step 2.
    sealed = [manifest.is_sealed(one.dir / "checkpoints" / f"checkpoint-{step}") for step in (1, 2, 3)]
    assert sealed == [True, True, False]
    assert not (one.dir / "checkpoints" / "checkpoint-4").exists()
    assert not (one.dir / "model.safetensors").exists()
    metrics = one.train()
    assert metrics["resumed_from_step"] == 2
    assert [line["step"] for line in one.log()] == [1, 2, 3, 4, 5, 6]
    assert not (one.dir / "bad_batch.json").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(run: Callable[..., Run]) -> None:
    """What was computed before step 1, as a proof does, is no part of its batch."""
    one = run()
    with pytest.raises(Failure, match=r"^step 1: the norm of the gradient is (inf|nan); "):
        one.train(
            At("on_train_begin", 0, lambda model: one.last.addresses.append(0)),
            At(
                "on_step_begin",
                0,
                lambda model: model.model.norm.weight.register_hook(lambda g: g * math.inf),
            ),
        )
    assert one.log() == []
    (batch,) = json.loads((one.dir / "bad_batch.json").read_text())["batches"]
    assert rows_of(one, batch["documents"]) == documents_of(one, 1)


def test_a_loss_that_explodes_stops_the_run_and_the_batch_where_it_began_is_written_down(
    run: Callable[..., Run],
) -> None:
    one = run(num_steps=30, trainer={"save_strategy": "steps", "save_steps": 4, "save_total_limit": 9})
    with pytest.raises(Failure, match=r"^step 21: the loss explodes \(since step 17; last: ") as why:
        one.train(At("on_step_begin", 16, scaled(30.0)))
    assert "\n" not in str(why.value)
    bad = json.loads((one.dir / "bad_batch.json").read_text())
    assert [batch["step"] for batch in bad["batches"]] == [17, 21]
    for batch in bad["batches"]:
        assert rows_of(one, batch["documents"]) == documents_of(one, batch["step"])
    folders = [path for path in (one.dir / "checkpoints").glob("checkpoint-*") if manifest.is_sealed(path)]
    assert sorted(path.name for path in folders) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_an_explosion_is_seen_across_a_resume(run: Callable[..., Run]) -> None:
    """It begins in the step of the last checkpoint; the batch of that step is not known any more."""
    one = run(num_steps=30, trainer={"save_strategy": "steps", "save_steps": 17})
    with pytest.raises(KeyboardInterrupt):
        one.train(At("on_step_begin", 16, scaled(30.0)), At("on_step_begin", 17, stop))
    with pytest.raises(Failure, match=r"^step 21: the loss explodes \(since step 17; "):
        one.train()
    bad = json.loads((one.dir / "bad_batch.json").read_text())
    assert [batch["step"] for batch in bad["batches"]] == [21]
    assert rows_of(one, bad["batches"][0]["documents"]) == documents_of(one, 21)
    assert not manifest.is_sealed(one.dir / "checkpoints" / "checkpoint-17")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("level", [1e-4, 0.05, 0.7, 4.0])
def test_noise_around_any_level_is_no_explosion(level: float, seed: int) -> None:
    draw, losses = random.Random(seed), []
    for _ in range(400):
        odd = 30 if draw.random() < 0.02 else 1  # a batch now and then
        losses.append(level * odd * math.exp(draw.gauss(0, 0.5)))
        assert instruments.explosion(losses) is None


def test_a_falling_loss_and_a_loss_back_at_its_start_are_no_explosion() -> None:
    losses = [6 * math.exp(-step / 20) + 0.3 for step in range(200)]
    assert not [step for step in range(200) if instruments.explosion(losses[:step]) is not None]
    assert instruments.explosion([*losses[:20], *losses[:6]]) is None


@pytest.mark.parametrize(
    ("losses", "ago"),
    [
        ([1.0] * 10 + [9.0] * 10, 9),
        ([1.0] * 14 + [9.0] * 6, 5),
        ([1.0] * 15 + [9.0] * 5, 4),
        ([1.0] * 16 + [9.0] * 4, None),  # four may be odd batches
        ([1.0] * 10 + [9.0, 1.0] * 5, 9),
        ([1.0] * 9 + [9.0] * 10, None),  # too short a history
        ([1.0] * 10 + [3.5] * 10, None),  # not above 3 x 1 + 0.5
        ([1.0] * 10 + [3.51] * 10, 9),
        ([0.0] * 10 + [0.5] * 10, None),
        ([9.0] * 4 + [1.0] * 10 + [9.0] * 10, 9),  # a median before, too
        ([0.01] * 10 + [0.6] * 10, 9),
        ([9.0] * 200 + [1.0] * 100 + [4.0] * 10, 9),  # what was long ago does not count
        ([1.0] * 60 + [9.0] * 90 + [10.0] * 10, None),  # nor does what has become the rule
        ([], None),
    ],
)
def test_an_explosion_is_half_of_the_steps_far_above_the_median_before(
    losses: list[float], ago: int | None
) -> None:
    assert instruments.explosion(losses) == ago


def test_a_piece_of_a_long_row_is_named_with_where_it_starts(run: Callable[..., Run]) -> None:
    one = run(max_tokens=16, packing="wrapped", loss_on="all", global_batch_size=1)
    pieces = [
        piece for pack in one.prepared.index for piece in zip(pack["address"], pack["length"], strict=True)
    ]
    named = instruments.documents(one.prepared, [address for address, _ in pieces])
    rows = [
        [*one.tokenizer(row["prompt"] + row["completion"]).input_ids, one.tokenizer.eos_token_id]
        for row in texts()
    ]
    stored = [number for row in (one.prepared.stores[0].tokens,) for number in row.tolist()]
    assert sum("start" in document for document in named) > 3
    for (address, length), document in zip(pieces, named, strict=True):
        start = document.get("start", 0)
        ids = [max(token, ~token) for token in stored[address : address + length]]
        row = rows[document["row"] - 1]
        assert "start" not in document or start > 0
        assert len(row) == document["length"]
        assert ids == row[start : start + length]


# --- what a person sees -----------------------------------------------------------------------------------


def test_without_a_terminal_a_line_an_interval_says_how_far_how_good_and_how_fast(
    run: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    one = run(num_steps=6, trainer={"logging_steps": 2})
    one.train()
    first, second, third = one.lines
    loss = sum(line["loss"] for line in one.log()[2:4]) / 2
    speed = r"  [\d,]+ tokens/s  \d+ s left"
    rate = one.log()[3]["learning_rate"]
    assert pytest.approx(loss, abs=1e-4) == float(second.split()[3])
    for shown, wanted in (
        (first, rf"step 2/6  loss \d+\.\d{{4}}  lr \d\.\de-\d\d{speed}"),
        (second, rf"step 4/6  loss {loss:.4f}  lr {rate:.1e}{speed}"),
        (third, r"step 6/6  loss \d+\.\d{4}  lr \d\.\de-\d\d  [\d,]+ tokens/s  0 s left"),
    ):
        assert re.fullmatch(wanted, shown)
    assert "step" not in capfd.readouterr().err


def test_speed_and_time_left_leave_the_first_step_out(run: Callable[..., Run]) -> None:
    """A first step of a second, then steps of 10 tokens and half a second, as the clock would have it."""
    one = run()
    shown = instruments.Instruments(
        one.trainer(), prepared=one.prepared, run_dir=one.dir, room_tokens=64, announce=str
    )
    state = type("State", (), {"global_step": 3, "max_steps": 9})()
    shown.speed.append((100.0, 500))
    assert shown._text(1.0, 1e-3, state) == "step 3/9  loss 1.0000  lr 1.0e-03"
    shown.speed.extend([(100.5, 510), (101.0, 520)])
    assert shown._text(1.0, 1e-3, state).endswith("lr 1.0e-03  20 tokens/s  3 s left")


def test_on_a_terminal_a_bar_shows_it_instead(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    one = run(num_steps=6)
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
        one.train()
        terminal.flush()
        shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert one.lines == []
    frames = [frame.strip() for frame in shown.replace("\n", "\r").split("\r") if frame.strip()]
    last = one.log()[-1]
    head = f"run: step 6/6  loss {last['loss']:.4f}  lr {last['learning_rate']:.1e}  "
    assert frames[-1].startswith(head)
    assert re.fullmatch(r"[\d,]+ tokens/s  0 s left  \|\u2588+\|", frames[-1].removeprefix(head))
    assert frames[0].startswith("run  |")
    assert shown.endswith("\n")


# --- trackers ---------------------------------------------------------------------------------------------


def events(folder: Path) -> Iterator[tuple[str, int, float]]:
    """(name, step, value) of every scalar that TensorBoard would show."""
    from tensorboardX.proto import event_pb2

    for path in folder.glob("events.*"):
        stream = io.BytesIO(path.read_bytes())
        while head := stream.read(12):  # length of the record and its checksum; behind it another
            event = event_pb2.Event.FromString(stream.read(struct.unpack("<Q", head[:8])[0]))
            stream.read(4)
            yield from ((one.tag, event.step, one.simple_value) for one in event.summary.value)


def test_a_tracker_gets_every_measurement_and_leaves_a_plain_checkpoint(run: Callable[..., Run]) -> None:
    """What TRL counts of its own, from a resume on, gives way to what we count from step 1."""
    one = run(pairs=True, num_steps=4, trainer={"report_to": ["tensorboard"], "logging_steps": 2})
    one.train(At("on_step_begin", 3, lambda model: one.last._metrics["train"]["num_tokens"].append(1.0)))
    found = {(name, step): value for name, step, value in events(one.dir / "tensorboard")}
    log = one.log()
    for step in (2, 4):
        line, before = log[step - 1], log[step - 2]
        for key in ("num_tokens", "num_trained_tokens", "learning_rate", "grad_norm", "memory_bytes"):
            assert found[f"train/{key}", step] == pytest.approx(line[key], rel=1e-5)
        for key in ("loss", "rewards/margins", "logps/chosen", "tokens_per_second"):
            mean = (line[key] + before[key]) / 2
            assert found[f"train/{key}", step] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert ("train/step", 4) not in found
    assert not (one.dir / "checkpoints").exists()


class Recorded(WandbCallback):
    """Weights & Biases as far as its end, which it knows from the end of a process only."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self._wandb = SimpleNamespace(finish=lambda exit_code: self.ends.append(exit_code))

    on_train_begin = on_train_end = on_log = on_save = TrainerCallback.on_train_begin


@pytest.mark.parametrize("bad", [False, True])
def test_trackers_are_ended_with_the_run_whether_it_is_whole_or_not(
    run: Callable[..., Run], bad: bool
) -> None:
    one, recorded = run(num_steps=2, trainer={"report_to": "tensorboard"}), Recorded()
    with pytest.raises(Failure) if bad else nullcontext():
        one.train(recorded, At("on_step_begin", 1 if bad else -1, scaled(math.nan)))
    writers = [each for each in one.last.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
    assert [each.tb_writer for each in writers] == [None]
    assert recorded.ends == [int(bad)]
    assert one.last.gauges.__self__.stream.closed
    assert {step for name, step, _ in events(one.dir / "tensorboard") if name == "train/loss"} >= {1}


def test_a_tracker_that_is_not_installed_or_known_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # half a package, as an uninstall leaves it
    monkeypatch.syspath_prepend(tmp_path)
    for name, said in {
        "wandb": "'wandb' is not installed; pip install wandb, or remove it",
        "mlflow": "'mlflow' is not installed; pip install mlflow, or remove it",
        "tensorbord": r'found "tensorbord" \(str\); did you mean \'tensorboard\'\?',
    }.items():
        for value in (name, ["tensorboard", name]):
            with pytest.raises(Refusal, match=rf"^sft\.yaml: trainer\.report_to: {said}"):
                trainer_block.check_trainer_block("sft", {"report_to": value}, where="sft.yaml")
    for value in ("none", None, [], "tensorboard", ["tensorboard"], "all"):
        trainer_block.check_trainer_block("sft", {"report_to": value}, where="sft.yaml")


def test_the_trackers_we_know_are_those_of_the_installed_transformers() -> None:
    assert set(trainer_block.TRACKERS) == set(INTEGRATION_TO_CALLBACK)
