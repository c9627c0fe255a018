"""A step on packs beside TRL's and a bare loop's (`sft_step`); sizes of models, and trainers watched.

Losses of all sides are held against each other, step by step: speed says nothing of those that differ.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measure import Call, Numbers, Result, in_turn, medians

if TYPE_CHECKING:
    from torch import Tensor

_ROPE = {"rope_type": "default", "rope_theta": 50000.0}


@dataclass(frozen=True)
class Size:
    """A SmolLM3, the most tokens of a pack (or of a side of a pair), the number of packs (or pairs)."""

    max_tokens: int
    number: int
    batch: int = 1  # packs a step
    vocab_size: int = 8_192
    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    initializer_range: float = 0.08

    def model(self, attention: str) -> Any:
        """The same random weights every time, on one thread."""
        from transformers import set_seed

        from smol_post import model

        model.use_threads(1)
        set_seed(0)
        parameters = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads // 2,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.max_tokens,
            "rope_parameters": _ROPE,
        }
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        return model.build_model(
            parameters, vocab_size=self.vocab_size, token_ids=ends, attn_implementation=attention
        )


LARGE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_layers": 8,
    "num_heads": 8,
    "initializer_range": 0.02,
}
PACKS = Size(max_tokens=512, number=360, batch=6, vocab_size=768)  # of the tiny recipe: 0.19M parameters
SMALL_PACKS = Size(max_tokens=256, number=310, vocab_size=768)  # a step of 18 ms
LARGE_PACKS = Size(max_tokens=2_048, number=5, **LARGE)  # 10.0M parameters
TURN_STEPS = 10
COMPARED_STEPS, CLOSE = 20, 1e-4  # so many losses are compared, and may differ by so much
LEARNING_RATE, WARMUP_STEPS = 1e-3, 10
TRAINER = {
    "train_sampling_strategy": "sequential",
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "cosine",
    "warmup_steps": WARMUP_STEPS,
    "adam_beta2": 0.95,
}


def sft_step(
    work: Path,
    *,
    call: Call,
    size: Size = PACKS,
    small: Size = SMALL_PACKS,
    large: Size = LARGE_PACKS,
    repetitions: int = 5,
) -> Result:
    """A step on packs of documents: TRL's and ours, each in turn with a bare loop."""
    call(write_tokenizer, folder=work)
    of = partial(call, _steps, work=work)
    samples = in_turn(
        repetitions, peer=partial(of, fit=_fit_peer, size=size), ours=partial(of, fit=_fit_ours, size=size)
    )
    for name, other in (("small", small), ("large", large)):
        sides = {"peer": _fit_peer, "ours": _fit_ours}
        samples |= in_turn(
            min(repetitions, 3),
            **{f"{name}_{side}": partial(of, fit=fit, size=other) for side, fit in sides.items()},
        )
    over = {name: _over_bare(each) for name, each in samples.items()}
    difference = max(one["loss_difference"] for each in samples.values() for one in each)
    ratio, bar = 1.05 / over["ours"], 1.0
    return Result(
        peer=medians(samples["peer"]),
        ours=medians(samples["ours"]),
        ratio=ratio,
        bar=bar,
        promises={"at most 1.05 of a bare loop": ratio >= bar, "same losses": difference < CLOSE},
        repetitions=repetitions,
        compared=(
            f"CPU seconds of an optimiser step on {size.batch} packs of at most {size.max_tokens} tokens, as "
            "the tiny recipe's SFT has them: chats, a fifth of their tokens trained; float32, one thread, "
            "varlen attention and fused AdamW on all sides. Each side takes turns of some steps with a bare "
            "torch loop in its process, and over_bare is the median over fresh processes of the quotient "
            "of both; ratio is 1.05 over ours. Not counted: the first turn, imports, preparation. Bare: "
            "packs and positions in memory, backbone, head on trained positions, cross_entropy, backward, "
            "clip_grad_norm_, AdamW, scheduler, zero_grad. Peer: TRL's SFTTrainer, padding_free, on the "
            "same packs. Ours: pack_trainer and fit, with their instruments, without the proofs before "
            f"step 1. small: one pack of {small.max_tokens} a step. large: 10.0M parameters, vocabulary "
            f"8,192, one pack of {large.max_tokens:,}. loss_difference: the largest one from the bare loop "
            f"over the first {COMPARED_STEPS} steps."
        ),
        samples=samples,
        extra={
            "over_bare": over,
            **{
                name: {side: medians(samples[f"{name}_{side}"]) for side in ("peer", "ours")}
                for name in ("small", "large")
            },
        },
    )


def _over_bare(samples: list[Numbers]) -> float:
    return statistics.median(one["step_cpu_seconds"] / one["bare_step_cpu_seconds"] for one in samples)


def write_tokenizer(folder: Path) -> None:
    """The tiny recipe's, as `tokenizer/` in `folder`."""
    from smol_post import vocabulary
    from smol_post.config import SftRecipe

    date = SftRecipe.model_fields["date_string"].default
    vocabulary.tiny_tokenizer(vocab_size=768, seed=0, date_string=date).save_pretrained(folder / "tokenizer")


def prepared(work: Path, recipe: Any) -> tuple[Any, Any]:
    """The tokenizer of a run, and its packs or pairs."""
    from smol_post import data, vocabulary

    words = vocabulary.of_run(recipe, vocabulary.load_tokenizer(work / "tokenizer"), folder=work)
    return words.tokenizer, data.prepare(recipe, words, folder=work, cache_dir=work / "cache")


@dataclass
class Contest:
    """What a trainer is to do, who takes turns with it, and what was seen of both."""

    recipe: Any
    prepared: Any
    tokenizer: Any
    lm: Any
    run_dir: Path
    turn: Callable[[int], None] = lambda step: None  # called at the end of every step
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of the epoch

    def arguments(self) -> dict[str, Any]:
        """TRL's, as a run of the recipe has them."""
        from smol_post import training

        return training.trainer_arguments(self.recipe, run_dir=self.run_dir, num_processes=1)

    def watch(self, trainer: Any) -> None:
        """See the losses and the CPU seconds of a trainer."""
        from transformers import TrainerCallback

        contest, step = self, trainer.training_step

        class Watch(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                contest.seconds = -time.process_time()
                contest.turn(0)

            def on_step_end(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
                contest.turn(state.global_step)

            def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
                contest.seconds += time.process_time()

        def watched(*args: Any) -> "Tensor":
            loss = step(*args)
            self.losses.append(float(loss))
            return loss

        trainer.training_step = watched
        trainer.add_callback(Watch())

    def fit(self, trainer: Any) -> None:
        """Train as a run does."""
        from smol_post import training

        self.watch(trainer)
        training.fit(
            trainer,
            self.tokenizer,
            prepared=self.prepared,
            recipe=self.recipe,
            run_dir=self.run_dir,
            only_verify=False,
            announce=silent,
        )


def silent(text: str) -> None:
    """Nobody watches."""


def _steps(work: Path, fit: Callable[[Contest], None], size: Size) -> Numbers:
    """CPU seconds a step of a trainer, and of the bare loop that it takes turns with."""
    from smol_post import batches
    from smol_post.config import SftRecipe, Source

    num_steps = size.number // size.batch
    recipe = SftRecipe(
        stage="sft",
        max_tokens=size.max_tokens,
        global_batch_size=size.batch,
        micro_batch_size=size.batch,
        num_steps=num_steps,
        loss_on="assistant",
        text_end="<|endoftext|>",
        verify="off",
        sources=[
            Source(name="chats", generator="dual_mode_chats", num_rows=size.number * size.max_tokens // 60)
        ],
        trainer=TRAINER,
    )
    tokenizer, packs = prepared(work, recipe)
    parts = np.arange(num_steps * size.batch).reshape(num_steps, -1).tolist()
    ready = [batches.collate([packs.dataset[number] for number in part]) for part in parts]
    bare = _bare_loop(size.model("varlen"), [(batches.model_inputs(one), one["labels"]) for one in ready])
    length = max(1, min(TURN_STEPS, num_steps // 5))
    losses: list[Tensor] = []
    clock: list[float] = []  # begin of the trainer's turn, of the bare loop's, of the trainer's, ...

    def turn(step: int) -> None:
        if step and step % length == 0:
            clock.append(time.process_time())
            losses.extend(itertools.islice(bare, length))
        if step % length == 0:
            clock.append(time.process_time())

    with tempfile.TemporaryDirectory(dir=work) as folder:
        contest = Contest(recipe, packs, tokenizer, size.model("varlen"), Path(folder), turn)
        fit(contest)
    seconds = np.diff(clock)[2:].reshape(-1, 2).mean(0) / length
    some = zip(contest.losses[:COMPARED_STEPS], losses, strict=False)
    return {
        "step_cpu_seconds": seconds[0].item(),
        "bare_step_cpu_seconds": seconds[1].item(),
        "num_tokens": sum(one["input_ids"].numel() for one in ready) / num_steps,
        "loss_difference": max(abs(one - float(other)) for one, other in some),
    }


def _bare_loop(lm: Any, packs: list[tuple[dict[str, Any], "Tensor"]]) -> Iterator["Tensor"]:
    """An optimiser step on each pack, as one would write it by hand; the losses."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW(
        lm.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    scheduler = get_scheduler("cosine", optimizer, WARMUP_STEPS, len(packs))
    lm.train()
    for inputs, labels_1T in packs:
        hidden_1TD = lm.model(**inputs).last_hidden_state[:, :-1]
        next_1T = labels_1T[:, 1:]
        trained_1T = next_1T != -100
        logits_NV = lm.lm_head(hidden_1TD[trained_1T])
        total = torch.nn.functional.cross_entropy(logits_NV, next_1T[trained_1T], reduction="sum")
        loss = total / trained_1T.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield loss.detach()


def _fit_ours(contest: Contest) -> None:
    from smol_post import training

    packs = contest.prepared.dataset
    contest.fit(training.pack_trainer(contest.lm, contest.tokenizer, packs, arguments=contest.arguments()))


def _fit_peer(contest: Contest) -> None:
    import datasets
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    columns = ("input_ids", "labels", "seq_lengths")
    rows = [{key: np.asarray(row[key]).tolist() for key in columns} for row in contest.prepared.dataset]
    args = SFTConfig(
        **contest.arguments(),
        packing=False,
        padding_free=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        shuffle_dataset=False,
    )
    trainer = SFTTrainer(
        model=contest.lm,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=contest.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    contest.watch(trainer)
    trainer.train()
