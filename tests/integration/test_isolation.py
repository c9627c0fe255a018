"""Documents in a pack see themselves alone, through the very batches that the trainer makes."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smol_post import batches, config, data, training, vocabulary

Build = Callable[..., Any]
ROPE = {"some NoPE": [1, 1, 1, 0], "all RoPE": [1, 1, 1, 1], "all NoPE": [0, 0, 0, 0]}
ATTENTION = ["varlen", "sdpa", "eager"]
TEXTS = [
    "one two",
    "3+4=7;7*2=4",
    "a",
    "some birds came over it",
    "Notes: pet cat.",
    "by a quiet lake we sat",
]


def batch_of(lm: Any, tokenizer: Any, folder: Path, *, strategy: str = "bfd") -> dict[str, Any]:
    """The first batch of the trainer: two packs of at most 40 tokens, as one row."""
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS * 2))
    source = config.Source(name="rows", path="rows.jsonl")
    recipe = config.MidRecipe(
        stage="mid",
        packing=strategy,
        max_tokens=40,
        global_batch_size=2,
        micro_batch_size=2,
        num_steps=1,
        sources=[source],
    )
    words = vocabulary.Vocabulary(tokenizer, None, "<|endoftext|>", [])
    packs = data.prepare(recipe, words, folder=folder, cache_dir=folder / "cache").dataset
    arguments = training.trainer_arguments(recipe, run_dir=folder, num_processes=1)
    trainer = training.pack_trainer(lm, tokenizer, packs, arguments=arguments)
    return dict(trainer.data_collator([packs[0], packs[1]]))


@torch.no_grad()
def logits(lm: Any, batch: dict[str, Any]) -> torch.Tensor:
    return lm(**batches.model_inputs(batch)).logits[0]


@torch.no_grad()
def alone(lm: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Every document by itself, one after another."""
    documents = batch["input_ids"][0].split(batch["seq_lengths"])
    return torch.cat([lm(ids[None], use_cache=False).logits[0] for ids in documents])


def changed(batch: dict[str, Any], at: int) -> dict[str, Any]:
    ids = batch["input_ids"].clone()
    ids[0, at] = (ids[0, at] + 1) % 256
    return {**batch, "input_ids": ids}


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
@pytest.mark.parametrize("layers", ROPE)
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_document_in_a_pack_has_the_logits_it_has_alone(
    build: Build, tokenizer: Any, tmp_path: Path, attention: str, layers: str, strategy: str
) -> None:
    lm = build(attention=attention, no_rope_layers=ROPE[layers])
    batch = batch_of(lm, tokenizer, tmp_path, strategy=strategy)
    assert len(batch["seq_lengths"]) >= 4
    assert batch["input_ids"].shape[0] == 1
    # The reference is a run of the ordinary model on one document, its attention by transformers.
    reference = build(attention="eager", no_rope_layers=ROPE[layers])
    reference.load_state_dict(lm.state_dict())
    found, wanted = logits(lm, batch), alone(reference, batch)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_changed_token_moves_no_logit_of_another_document(
    build: Build, tokenizer: Any, tmp_path: Path, attention: str
) -> None:
    lm = build(attention=attention)
    batch = batch_of(lm, tokenizer, tmp_path)
    before = logits(lm, batch)
    edges = [0, *itertools.accumulate(batch["seq_lengths"])]
    for start, stop in itertools.pairwise(edges):
        moved = (logits(lm, changed(batch, start)) - before).abs().amax(-1)
        assert moved[start:stop].min() > 1e-4  # every later token of the document sees it
        assert moved[:start].sum() + moved[stop:].sum() == 0


@pytest.mark.parametrize("attention", ATTENTION)
def test_wrapped_cross_document_lets_attention_cross(
    build: Build, tokenizer: Any, tmp_path: Path, attention: str
) -> None:
    lm = build(attention=attention)
    batch = batch_of(lm, tokenizer, tmp_path, strategy="wrapped_cross_document")
    assert batch["seq_lengths"] == [40, 40]
    moved = (logits(lm, changed(batch, 0)) - logits(lm, batch)).abs().amax(-1)
    assert moved[:40].min() > 1e-6
    assert moved[40:].sum() == 0


def test_varlen_refuses_a_mask_beside_packs(build: Build, tokenizer: Any, tmp_path: Path) -> None:
    lm = build()
    batch = batch_of(lm, tokenizer, tmp_path)
    given = batches.model_inputs(batch)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="no attention mask"):
        lm(**given, attention_mask=mask)
    two = {key: given[key].repeat(2, 1) for key in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="one row a batch"):
        lm(**{**given, **two})


def test_varlen_isolates_by_position_ids_where_lengths_are_not_given(
    build: Build, tokenizer: Any, tmp_path: Path
) -> None:
    lm = build()
    batch = batch_of(lm, tokenizer, tmp_path)
    given = batches.model_inputs(batch)
    plain = {key: given[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        torch.testing.assert_close(lm(**plain).logits[0], logits(lm, batch), rtol=0, atol=0)


def test_varlen_generates_from_padded_prompts_as_sdpa_does(build: Build, tokenizer: Any) -> None:
    varlen, sdpa = build(), build(attention="sdpa")
    sdpa.load_state_dict(varlen.state_dict())
    batch = tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt")
    assert batch["attention_mask"].min() == 0
    kept = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": 6}
    wanted, found = (lm.generate(**batch, **kept) for lm in (sdpa, varlen))
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-5)
