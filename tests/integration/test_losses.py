"""What is minimised is what the recipe says, however the batch is cut."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from trl.trainer.sft_trainer import SFTTrainer

from smol_post import config, data, training, vocabulary

Build = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")


def packs(seed: int = 0) -> datasets.Dataset:
    """Four packs of random documents; their prompts, and with them their trained tokens, differ in length."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for lengths in ([9, 4], [7, 7, 2], [16], [3, 12]):
        ids = torch.randint(5, 250, (sum(lengths),), generator=draw).tolist()
        labels = list(ids)
        for start, length in zip(itertools.accumulate([0, *lengths]), lengths, strict=False):
            for at in range(start, start + 1 + length // 3):
                labels[at] = data.IGNORED
        rows.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    return datasets.Dataset.from_list(rows)


def trainer_of(lm: Any, tokenizer: Any, folder: Path, *, micro: int, steps: int = 1) -> Any:
    recipe = config.SftRecipe(
        stage="sft",
        max_tokens=16,
        global_batch_size=4,
        micro_batch_size=micro,
        num_steps=steps,
        sources=[config.Source(name="s", generator="dual_mode_chats", num_rows=1)],
        trainer={
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
        },
    )
    arguments = training.trainer_arguments(recipe, run_dir=folder / f"micro{micro}", num_processes=1)
    Path(arguments["output_dir"]).mkdir(parents=True, exist_ok=True)
    return training.pack_trainer(lm, tokenizer, packs(), arguments=arguments, announce=str)


def token_mean(lm: Any) -> torch.Tensor:
    """Cross-entropy by hand: every document alone, the mean over all trained tokens of all packs."""
    total, count = torch.zeros(()), 0
    for row in packs():
        ids, labels = (torch.tensor(row[key]).split(row["seq_lengths"]) for key in ("input_ids", "labels"))
        for document, label in zip(ids, labels, strict=True):
            log_p = lm(document[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            for at in torch.nonzero(label[1:] != data.IGNORED).flatten().tolist():
                total, count = total - log_p[at, label[at + 1]], count + 1
    return total / count


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_one_step_descends_the_mean_over_the_trained_tokens_of_the_global_batch(
    build: Build, tokenizer: Any, tmp_path: Path, micro: int
) -> None:
    """SGD with learning rate 1: weights after one step = weights - gradient, however the batch is cut."""
    lm = build()
    loss = token_mean(lm)
    loss.backward()
    wanted = {name: (one - one.grad).detach() for name, one in lm.named_parameters()}
    lm.zero_grad(set_to_none=True)
    trainer = trainer_of(lm, tokenizer, tmp_path, micro=micro)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_the_lean_path_on_a_cpu_equals_trl_s_own(
    build: Build, tokenizer: Any, tmp_path: Path, attention: str
) -> None:
    lm = build(attention=attention).train()
    trainer = trainer_of(lm, tokenizer, tmp_path, micro=2)
    batch = trainer.data_collator([packs()[0], packs()[1]])
    number = (batch["labels"][:, 1:] != data.IGNORED).sum()
    gradients, losses = [], []
    for compute in (trainer.compute_loss, lambda *given: SFTTrainer.compute_loss(trainer, *given)):
        lm.zero_grad(set_to_none=True)
        loss = compute(lm, dict(batch), False, number)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: one.grad.clone() for name, one in lm.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precompute", [False, True])
def test_apo_zero_starts_at_exactly_one_with_no_reward(
    build: Build, tokenizer: Any, tmp_path: Path, precompute: bool
) -> None:
    recipe = config.ApoRecipe(
        stage="apo",
        max_tokens=256,
        global_batch_size=4,
        micro_batch_size=2,
        num_steps=2,
        sources=[config.Source(name="s", generator="preference_pairs", num_rows=8)],
        trainer={
            "loss_type": ["apo_zero"],
            "beta": 0.5,
            "learning_rate": 1.0e-2,
            "logging_steps": 1,
            "precompute_ref_log_probs": precompute,
        },
    )
    words = vocabulary.of_run(recipe, tokenizer, folder=tmp_path)
    pairs = data.prepare(recipe, words, folder=tmp_path, cache_dir=tmp_path / "cache").dataset
    arguments = training.trainer_arguments(recipe, run_dir=tmp_path, num_processes=1)
    Path(arguments["output_dir"]).mkdir(parents=True)
    lm, reference = build(attention="sdpa"), build(attention="sdpa")
    reference.load_state_dict(lm.state_dict())
    trainer = training.pair_trainer(
        lm, None if precompute else reference, tokenizer, pairs, arguments=arguments, announce=str
    )
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(1.0, abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0.0, abs=1e-5)
    assert second["loss"] < 1.0
