"""Preference pairs without padding (`apo`): an epoch beside TRL's trainer, loss for loss."""

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loss import cpu_and_growth
from benchmarks.measure import Call, Numbers, Result, cpu_seconds, in_turn, medians
from benchmarks.training import CLOSE, LARGE, TRAINER, Contest, Size, prepared, silent, write_tokenizer

PAIRS = Size(max_tokens=1_500, number=40)  # 0.66M parameters
LARGE_PAIRS = Size(max_tokens=1_500, number=16, **LARGE)
BATCH_PAIRS, MICRO_BATCH_TOKENS = 8, 4_096
PROMPT_TOKENS, ANSWER_TOKENS = 60, 120  # medians


def apo(
    work: Path, *, call: Call, size: Size = PAIRS, large: Size = LARGE_PAIRS, repetitions: int = 3
) -> Result:
    """An epoch of apo_zero over pairs of uneven lengths: TRL's padded batches, and ours without padding."""
    call(write_tokenizer, folder=work)
    curves: dict[str, list[float]] = {}

    def of(name: str, measurement: Any, size: Size, **arguments: Any) -> Numbers:
        folder = work / f"{size.number}-{size.hidden_size}"
        if not folder.exists():
            folder.mkdir()
            shutil.copytree(work / "tokenizer", folder / "tokenizer")
            call(_write_pairs, folder=folder, size=size)
        numbers, curves[name] = call(measurement, work=folder, size=size, **arguments)
        return numbers

    samples = in_turn(
        repetitions,
        peer=partial(of, "peer", _peer_pairs, size),
        ours=partial(of, "ours", _our_pairs, size),
        grouped=partial(of, "grouped", _peer_pairs, size, by_length=True),
    )
    samples |= in_turn(
        1,
        large_peer=partial(of, "large_peer", _peer_pairs, large),
        large_ours=partial(of, "large_ours", _our_pairs, large),
    )
    found = {name: medians(each) for name, each in samples.items()}
    peer, ours = found["peer"], found["ours"]
    ratio, bar = peer["cpu_seconds"] / ours["cpu_seconds"], 8.0
    memory = peer["growth_bytes"] / ours["growth_bytes"]
    difference = max(
        abs(one - other)
        for prefix in ("", "large_")
        for one, other in zip(curves[f"{prefix}peer"], curves[f"{prefix}ours"], strict=True)
    )
    large_ratio = found["large_peer"]["cpu_seconds"] / found["large_ours"]["cpu_seconds"]
    return Result(
        peer=peer,
        ours=ours,
        ratio=ratio,
        bar=bar,
        promises={
            "CPU time": ratio >= bar,
            "memory at most a third": memory >= 3,
            "same losses": difference < CLOSE,
        },
        repetitions=repetitions,
        compared=(
            f"One epoch over {size.number} pairs of random token ids, apo_zero, batches of {BATCH_PAIRS} "
            f"pairs in the same order, log-normal lengths (median {PROMPT_TOKENS} for prompts, "
            f"{ANSWER_TOKENS} for answers, sigma 1, at most {size.max_tokens:,} together), 0.66M-parameter "
            f"SmolLM3, vocabulary {size.vocab_size:,}, float32, one thread. Both have the reference's "
            "log-probabilities computed before (reference_cpu_seconds, not in the ratio). Peer: TRL's "
            "DPOTrainer, padded, sdpa; only its preparation is replaced, so that it takes token ids. "
            "Ours: pair_trainer and fit with their instruments, varlen, micro-batches of "
            f"{MICRO_BATCH_TOKENS:,} tokens. grouped: the peer on pairs sorted by length, as "
            f"group_by_length sorts a large set. large: 10.0M parameters, {large.number} pairs, once. "
            "num_tokens: what went through the model, padding too. growth_bytes: the peak of resident "
            "memory, reference included, less what was resident before."
        ),
        samples=samples,
        extra={
            "memory_ratio": memory,
            "grouped": found["grouped"],
            "grouped_ratio": found["grouped"]["cpu_seconds"] / ours["cpu_seconds"],
            "large": {"peer": found["large_peer"], "ours": found["large_ours"], "ratio": large_ratio},
            "losses": curves,
            "loss_difference": difference,
        },
    )


def _pair_recipe(size: Size) -> Any:
    from smol_post.config import ApoRecipe, Source

    return ApoRecipe(
        stage="apo",
        max_tokens=size.max_tokens,
        global_batch_size=BATCH_PAIRS,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        num_epochs=1.0,
        chat_template="smol_post",
        verify="off",
        sources=[Source(name="pairs", generator="preference_pairs", num_rows=size.number)],
        trainer={**TRAINER, "warmup_steps": 0},
    )


def _write_pairs(folder: Path, size: Size) -> None:
    """Our cache as if pairs of these lengths had been prepared: the files of a store, replaced."""
    from smol_post import manifest
    from smol_post.documents import RECORD

    store = prepared(folder, _pair_recipe(size))[1].stores[0].folder
    draw = np.random.default_rng(0)
    prompts = np.clip(
        draw.lognormal(np.log(PROMPT_TOKENS), 1.0, size.number), 4, size.max_tokens // 2
    ).astype(int)
    answers = draw.lognormal(np.log(ANSWER_TOKENS), 1.0, (size.number, 2))
    answers = np.clip(answers, 4, size.max_tokens - prompts[:, None]).astype(int)
    parts = []
    for prompt, pair in zip(prompts, answers, strict=True):
        ids = draw.integers(0, size.vocab_size, prompt, dtype=np.int32)
        for answer in pair:
            parts += [~ids, draw.integers(0, size.vocab_size, answer, dtype=np.int32)]
    records = np.zeros(2 * size.number, RECORD)
    records["row"] = np.repeat(np.arange(size.number), 2)
    records["num_trained"] = answers.ravel()
    records["length"] = (prompts[:, None] + answers).ravel()
    records["address"] = np.cumsum(records["length"]) - records["length"]
    np.concatenate(parts).tofile(store / "tokens.bin")
    records.tofile(store / "documents.bin")
    manifest.seal(store)
    shutil.rmtree(folder / "cache" / "packs")


def _our_pairs(work: Path, size: Size) -> tuple[Numbers, list[float]]:
    from smol_post import reference, training

    recipe = _pair_recipe(size)
    tokenizer, pairs = prepared(work, recipe)
    numbers: Numbers = {"num_tokens": pairs.ledger["num_tokens"]}
    lm = size.model(recipe.attention)
    with tempfile.TemporaryDirectory(dir=work) as folder, cpu_and_growth(numbers):
        with cpu_seconds(numbers, "reference_cpu_seconds"):
            pairs = reference.with_reference(
                pairs,
                lm,
                weights="",
                cache_dir=Path(folder),
                micro_batch_tokens=MICRO_BATCH_TOKENS,
                announce=silent,
            )
        contest = Contest(recipe, pairs, tokenizer, lm, Path(folder))
        trainer = training.pair_trainer(
            lm,
            None,
            tokenizer,
            pairs.dataset,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            arguments=contest.arguments(),
        )
        contest.fit(trainer)
    return {**numbers, "cpu_seconds": contest.seconds}, contest.losses


def _peer_pairs(work: Path, size: Size, *, by_length: bool = False) -> tuple[Numbers, list[float]]:
    import datasets
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Pretokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    datasets.disable_progress_bars()
    recipe = _pair_recipe(size)
    tokenizer, pairs = prepared(work, recipe)
    rows = [_padded(row) for row in pairs.dataset]
    if by_length:
        rows.sort(
            key=lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        )
    numbers: Numbers = {"num_tokens": 0}
    lm = size.model("sdpa")
    with tempfile.TemporaryDirectory(dir=work) as folder, cpu_and_growth(numbers):
        contest = Contest(recipe, pairs, tokenizer, lm, Path(folder))
        with cpu_seconds(numbers, "reference_cpu_seconds"):
            trainer = Pretokenised(
                model=lm,
                args=DPOConfig(**contest.arguments(), precompute_ref_log_probs=True),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        collate = trainer.data_collator

        def counted(examples: list[Any]) -> dict[str, Any]:
            batch = collate(examples)
            numbers["num_tokens"] += batch["input_ids"].numel()
            return batch

        trainer.data_collator = counted
        trainer.remove_callback(PrinterCallback)
        contest.watch(trainer)
        trainer.train()
    return {**numbers, "cpu_seconds": contest.seconds}, contest.losses


def _padded(row: dict[str, Any]) -> dict[str, list[int]]:
    """A pair of ours as TRL's collator takes it."""
    ids, border = row["input_ids"].tolist(), row["seq_lengths"][0]
    start = int((row["labels"] >= 0).argmax())
    return {"prompt_ids": ids[:start], "chosen_ids": ids[start:border], "rejected_ids": ids[border + start :]}
