"""What is measured is what was asked for: the same with less work, YaRN last and on the last run only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from smol_post import config, evals, loading, scoring, synthetic
from smol_post.refusal import Refusal

Build = Callable[..., Any]
NEEDLES = {"stage": "evals", "num_threads": 1, "needle_tokens": [32, 64], "num_needle_questions": 2}
YARN = {"yarn_context": 512, "yarn_needle_tokens": [64, 96], "num_yarn_questions": 1}


def recipe(**changes: Any) -> config.EvalsRecipe:
    return loading.validate(config.EvalsRecipe, {**NEEDLES, **changes}, where="evals.yaml")


def test_a_needle_is_found_if_greedy_decoding_says_it(build: Build, tokenizer: Any) -> None:
    """Against one forward pass a question with all its logits; the answers are the model's own."""
    lm = build(attention="sdpa")
    rows = list(synthetic.generate("needle_questions", num_rows=12, seed=0, num_tokens=40))
    said = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        logits = lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        said.append(logits.argmax(-1).tolist() == answer)
    for batch_size in (1, 5):
        found = scoring.needles(
            lm, tokenizer, num_tokens=40, num_questions=12, seed=0, batch_size=batch_size, options={}
        )
        assert found == scoring.share(said)


class Oracle:
    """A language model that says the next token of its input, or the one after, from where it is asked."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int, wrong: Callable[[int], bool]) -> None:
        self.vocab_size, self.wrong, self.num_rows = vocab_size, wrong, 0

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        following = input_ids.roll(-1, dims=1)
        for row in range(len(following)):
            following[row] += int(self.wrong(self.num_rows + row))
        self.num_rows += len(following)
        logits = torch.nn.functional.one_hot(following % self.vocab_size, self.vocab_size)
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


def test_every_question_is_judged_at_its_own_answer(tokenizer: Any) -> None:
    oracle = Oracle(len(tokenizer), wrong=lambda row: row % 4 == 1)
    found = scoring.needles(
        oracle,  # type: ignore[arg-type]
        tokenizer,
        num_tokens=50,
        num_questions=20,
        seed=0,
        batch_size=7,
        options={"max_overwrites": 1},
    )
    assert found["value"] == 0.75


@pytest.mark.parametrize("left_out", ["yarn_context", "yarn_needle_tokens"])
def test_half_of_what_yarn_needs_is_refused(left_out: str) -> None:
    with pytest.raises(Refusal, match="give both 'yarn_context' and 'yarn_needle_tokens', or neither"):
        recipe(**{key: value for key, value in YARN.items() if key != left_out})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(RoPE, length, number of questions) of every measurement of needles."""
    found: list[tuple[Any, ...]] = []

    def needles(lm: Any, _: Any, *, num_tokens: int, num_questions: int, **__: Any) -> dict[str, float]:
        rope = (getattr(lm.config, "rope_parameters", None) or {}).get("rope_type")
        found.append((rope, num_tokens, num_questions))
        return scoring.share([True] * num_questions)

    monkeypatch.setattr(scoring, "needles", needles)
    return found


def test_yarn_is_measured_beside_the_model_without_it(
    build: Build, tokenizer: Any, tmp_path: Path, asked: list[tuple[Any, ...]]
) -> None:
    build().save_pretrained(tmp_path)
    tokenizer.chat_template = (template := tokenizer.chat_template) and None
    tokenizer.save_pretrained(tmp_path)
    tokenizer.chat_template = template
    metrics, _ = evals.evaluate(tmp_path, recipe(**YARN))
    assert asked == [
        ("default", 32, 2),
        ("default", 64, 2),
        ("default", 96, 1),
        ("yarn", 64, 1),
        ("yarn", 96, 1),
    ]
    assert list(metrics) == ["needle_1x", "needle_2x", "needle_3x", "needle_2x_yarn", "needle_3x_yarn"]
    with pytest.raises(Refusal, match="nothing to extend"):
        evals.evaluate(tmp_path, recipe(**{**YARN, "yarn_context": 256}))


def test_a_model_without_rope_is_measured_without_yarn(
    tokenizer: Any, tmp_path: Path, asked: list[tuple[Any, ...]]
) -> None:
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    tokenizer.chat_template = (template := tokenizer.chat_template) and None
    tokenizer.save_pretrained(tmp_path)
    tokenizer.chat_template = template
    metrics, _ = evals.evaluate(tmp_path, recipe(**YARN))
    assert list(metrics) == ["needle_1x", "needle_2x"]
