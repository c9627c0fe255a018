"""What is minimised is what the recipe says, however the batch is cut."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from smol_post import batches, config, data, trainer_block, training, vocabulary
from smol_post.reference import with_reference

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
        address = [int(draw.initial_seed())] * len(lengths)
        rows.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths, "address": address})
    return datasets.Dataset.from_list(rows)


def trainer_of(lm: Any, tokenizer: Any, folder: Path, *, micro: int, steps: int = 1, **block: Any) -> Any:
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
            **block,
        },
    )
    arguments = training.trainer_arguments(recipe, run_dir=folder / f"micro{micro}", num_processes=1)
    Path(arguments["output_dir"]).mkdir(parents=True, exist_ok=True)
    return training.pack_trainer(lm, tokenizer, packs(), arguments=arguments)


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


@pytest.mark.parametrize(("attention", "lora"), [("varlen", False), ("sdpa", False), ("varlen", True)])
def test_our_head_inside_the_forward_equals_trl_s_own(
    build: Build, tokenizer: Any, tmp_path: Path, attention: str, lora: bool
) -> None:
    lm = build(attention=attention).train()
    if lora:  # adapters that already say something
        matrices = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        lm = get_peft_model(lm, matrices)
    trainer = trainer_of(lm, tokenizer, tmp_path, micro=2)
    batch = trainer.data_collator([packs()[0], packs()[1]])
    number = (batch["labels"][:, 1:] != data.IGNORED).sum()
    theirs = {**batches.model_inputs(batch), "labels": batch["labels"]}
    gradients, found = [], []
    for loss in (
        trainer.compute_loss(lm, dict(batch), num_items_in_batch=number),
        SFTTrainer.compute_loss(trainer, lm, theirs, num_items_in_batch=number),
    ):
        lm.zero_grad(set_to_none=True)
        loss.backward()
        found.append(loss.item())
        trained = {name: one for name, one in lm.named_parameters() if one.requires_grad}
        assert all("lora" in name for name in trained) == lora
        gradients.append({name: one.grad.clone() for name, one in trained.items()})
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["varlen", "eager"])
def test_gradients_do_not_depend_on_attention_or_activation_checkpointing(
    build: Build, tokenizer: Any, tmp_path: Path, attention: str, checkpointing: bool
) -> None:
    found = []
    for name, on in (("sdpa", False), (attention, checkpointing)):
        lm = build(attention=name).train()
        trainer = trainer_of(lm, tokenizer, tmp_path, micro=4)
        if on:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
            assert lm.is_gradient_checkpointing
        total, _ = trainer.sums(lm, trainer.data_collator(list(packs())))
        total.backward()
        found.append({key: one.grad for key, one in lm.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=2e-5)


def test_label_smoothing_and_dft_take_trl_s_path(build: Build, tokenizer: Any, tmp_path: Path) -> None:
    lm = build()
    plain = trainer_of(lm, tokenizer, tmp_path / "nll", micro=2)
    batch, losses = plain.data_collator([packs()[0], packs()[1]]), {}
    for name, block in {
        "nll": {},
        "dft": {"loss_type": "dft"},
        "eps": {"label_smoothing_factor": 0.1},
    }.items():
        trainer = trainer_of(lm, tokenizer, tmp_path / name, micro=2, **block)
        losses[name] = trainer.compute_loss(lm, dict(batch), num_items_in_batch=torch.tensor(20)).item()
    assert len({round(loss, 4) for loss in losses.values()}) == 3


# --- pairs ------------------------------------------------------------------------------------------------


def apo_recipe(**changes: Any) -> config.ApoRecipe:
    given: dict[str, Any] = {
        "stage": "apo",
        "max_tokens": 256,
        "global_batch_size": 8,
        "num_steps": 3,
        "sources": [config.Source(name="s", generator="preference_pairs", num_rows=24)],
        "trainer": {"beta": 0.5, "learning_rate": 1.0e-2, "logging_steps": 1},
    }
    return config.ApoRecipe(**given | changes)


def pairs_of(recipe: config.ApoRecipe, tokenizer: Any, folder: Path) -> data.Prepared:
    words = vocabulary.of_run(recipe, tokenizer, folder=folder)
    return data.prepare(recipe, words, folder=folder, cache_dir=folder / "cache")


def other(lm: Any, build: Build) -> Any:
    """A reference that differs from the policy, so that log-ratios are not zero."""
    made = build(attention=lm.config._attn_implementation, seed=1)
    made.load_state_dict({name: 0.9 * one for name, one in lm.state_dict().items()})
    return made


def pair_trainer(recipe: config.ApoRecipe, lm: Any, live: Any, tokenizer: Any, rows: Any, to: Path) -> Any:
    arguments = training.trainer_arguments(recipe, run_dir=to, num_processes=1)
    Path(arguments["output_dir"]).mkdir(parents=True, exist_ok=True)
    budget = recipe.micro_batch_tokens or 2 * recipe.max_tokens
    return training.pair_trainer(lm, live, tokenizer, rows, micro_batch_tokens=budget, arguments=arguments)


def padded(row: dict[str, Any]) -> dict[str, list[int]]:
    """A pair as TRL's own collator takes it."""
    border = row["seq_lengths"][0]
    start = int((row["labels"] != data.IGNORED).argmax())
    ids = row["input_ids"].tolist()
    return {
        "prompt_ids": ids[:start],
        "chosen_ids": ids[start:border],
        "rejected_ids": ids[border + start :],
    }


@pytest.mark.parametrize("loss_type", trainer_block.LOSSES)
def test_padding_free_pairs_have_the_loss_and_gradients_of_trl_s_padded_ones(
    build: Build, tokenizer: Any, tmp_path: Path, loss_type: str
) -> None:
    """The same eight pairs, live reference: flat rows in three cuts against one padded batch of TRL's."""
    lm = build(attention="sdpa")
    live = other(lm, build)
    rows = pairs_of(apo_recipe(), tokenizer, tmp_path).dataset
    block = {"beta": 0.5, "loss_type": [loss_type], "disable_dropout": True}
    stock = DPOTrainer(
        model=lm,
        ref_model=live,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, bf16=False, use_cpu=True,
            report_to="none", max_length=None, activation_checkpointing=False, **block,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8  # replaced below by the very ids
        ),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = stock.data_collator([padded(rows[number]) for number in range(8)])
    wanted = stock.compute_loss(lm, batch)
    wanted.backward()
    gradients = {name: one.grad.clone() for name, one in lm.named_parameters()}
    for budget in (512, 1024, 100_000):
        recipe = apo_recipe(trainer=block, micro_batch_tokens=budget)
        trainer = pair_trainer(recipe, lm, live, tokenizer, rows, tmp_path / str(budget))
        lm.zero_grad(set_to_none=True)
        flat = trainer.data_collator([rows[number] for number in range(8)])
        found = trainer.training_step(lm, flat)
        assert found.item() == pytest.approx(wanted.item(), abs=2e-5)
        for name, parameter in lm.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("reference", ["cached", "live"])
@pytest.mark.parametrize("budget", [512, 4096])
def test_apo_zero_starts_at_exactly_one_and_its_curve_does_not_depend_on_the_cut_or_the_kind_of_reference(
    build: Build, tokenizer: Any, tmp_path: Path, reference: str, budget: int
) -> None:
    recipe = apo_recipe(micro_batch_tokens=budget)
    lm, live = build(), None
    pairs = pairs_of(recipe, tokenizer, tmp_path)
    if reference == "live":
        live = build()
        live.load_state_dict(lm.state_dict())
    else:
        pairs = with_reference(
            pairs, lm, weights="w", cache_dir=tmp_path, micro_batch_tokens=2048, announce=str
        )
    trainer = pair_trainer(recipe, lm, live, tokenizer, pairs.dataset, tmp_path / "run")
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert curve[0] == pytest.approx(1.0, abs=1e-6)
    assert curve[1] < 0.99
    rows = pairs_of(recipe, tokenizer, tmp_path).dataset
    again = pair_trainer(apo_recipe(), build(), build(), tokenizer, rows, tmp_path / "again")
    again.train()
    assert curve == pytest.approx([one["loss"] for one in again.state.log_history if "loss" in one], abs=2e-5)


def test_the_reference_is_computed_once_for_all_seeds_and_anew_for_other_weights_or_pairs(
    build: Build, tokenizer: Any, tmp_path: Path
) -> None:
    lm = build()
    said: list[str] = []

    def reference(*, weights: str = "w", rounding: Any = "nothing", **changes: Any) -> Any:
        pairs = pairs_of(apo_recipe(**changes), tokenizer, tmp_path)
        return with_reference(
            pairs,
            lm,
            weights=weights,
            cache_dir=tmp_path,
            micro_batch_tokens=512,
            rounding=rounding,
            announce=said.append,
        )

    def by_pair(made: Any) -> dict[tuple[int, ...], list[float]]:
        return {tuple(row["input_ids"].tolist()): row["reference"] for row in made.dataset}

    first, second = by_pair(reference(seed=0)), by_pair(reference(seed=1))
    assert len(said) == 1
    assert first == second
    alone = build()
    for ids, (chosen, rejected) in list(first.items())[:3]:
        row = next(row for row in reference().dataset if tuple(row["input_ids"].tolist()) == ids)
        start, border = int((row["labels"] != data.IGNORED).argmax()), row["seq_lengths"][0]
        for side, wanted in ((row["input_ids"][:border], chosen), (row["input_ids"][border:], rejected)):
            log_p = alone(torch.tensor(side)[None]).logits[0].log_softmax(-1)
            each = [log_p[at - 1, side[at]].item() for at in range(start, len(side))]
            assert sum(each) == pytest.approx(wanted, abs=1e-3)
    assert len(said) == 1
    reference(weights="others")
    rounded = [by_pair(reference(rounding=one)) for one in ("products", "parameters")]
    assert len({str(one) for one in [first, *rounded]}) == 3
    assert str(by_pair(reference())) == str(first)  # the model's parameters are what they were
    reference(
        sources=[config.Source(name="s", generator="preference_pairs", num_rows=23)], global_batch_size=4
    )
    assert len(said) == 5
    repeated = [config.Source(name="s", generator="preference_pairs", num_rows=24, repeat=2)]
    assert len(reference(sources=repeated).dataset) == 48
    assert len(said) == 5
