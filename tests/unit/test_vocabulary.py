"""The tokenizer of a run follows from its parent's and the recipe, and data can be prepared with it alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from smol_post import chat, config, data, vocabulary
from smol_post.refusal import Refusal


@pytest.fixture
def plain(tokenizer: Any, tmp_path: Path) -> Any:
    """A base's tokenizer, saved and loaded: no chat template, texts end with <|endoftext|>."""
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    return vocabulary.load_tokenizer(tmp_path / "base")


def recipe(kind: Any, stage: str, **changes: Any) -> Any:
    generator = "preference_pairs" if stage == "apo" else "reasoning_chats"
    return kind(
        stage=stage,
        max_tokens=256,
        global_batch_size=1,
        num_steps=1,
        sources=[config.Source(name="s", generator=generator, num_rows=4)],
        **changes,
    )


@pytest.mark.parametrize(("kind", "stage", "name"), [(config.MidRecipe, "mid", "chatml"),
                                                      (config.SftRecipe, "sft", "smol_post")])  # fmt: skip
def test_a_chat_stage_saves_its_template_and_ends_turns(
    plain: Any, tmp_path: Path, kind: Any, stage: str, name: str
) -> None:
    words = vocabulary.of_run(recipe(kind, stage), plain, folder=tmp_path)
    assert words.tokenizer.chat_template == words.template == chat.load_template(name)
    assert (words.tokenizer.eos_token, words.text_end) == ("<|im_end|>", "<|endoftext|>")


def test_long_context_leaves_the_tokenizer_as_it_is_but_for_new_tokens(plain: Any, tmp_path: Path) -> None:
    size = len(plain)
    words = vocabulary.of_run(
        recipe(config.LongContextRecipe, "long_context", rope_theta=1e6, chat_template="chatml",
               add_tokens=["<think>", "<|new|>"]), plain, folder=tmp_path)  # fmt: skip
    assert words.tokenizer.chat_template is None
    assert words.tokenizer.eos_token == "<|endoftext|>"
    assert words.template == chat.load_template("chatml")
    assert words.new_ids == [size]


def test_preferences_want_a_template_from_parent_or_recipe(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="chat_template: the parent's tokenizer has none; set"):
        vocabulary.of_run(recipe(config.ApoRecipe, "apo"), plain, folder=tmp_path)
    plain.chat_template = chat.load_template("smol_post")
    words = vocabulary.of_run(recipe(config.ApoRecipe, "apo"), plain, folder=tmp_path)
    assert words.template == plain.chat_template


def test_tokens_that_template_or_text_want_and_the_vocabulary_lacks_are_named(
    plain: Any, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text("<|im_start|>x<|im_end|><think></think><|tool_call|>")
    own = recipe(config.SftRecipe, "sft", chat_template="own.jinja")
    with pytest.raises(Refusal, match=r"lacks <\|tool_call\|>, which the chat template writes; add them"):
        vocabulary.of_run(own, plain, folder=tmp_path)
    ends = recipe(config.SftRecipe, "sft", text_end="<|eot|>")
    with pytest.raises(Refusal, match=r"text_end: the vocabulary has no token '<\|eot\|>'"):
        vocabulary.of_run(ends, plain, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<|im_start|>{{ messages[0].content }}<|im_end|>", "marks 0 of 1 assistant turns"),
        ("<|im_start|>{{ messages + 1 }}<|im_end|>", "can only concatenate list"),
        ("<|im_start|>{% for message in messages %}<|im_end|>", "Unexpected end of template"),
    ],
)
def test_a_broken_template_is_refused_before_any_row_is_blamed(
    plain: Any, tmp_path: Path, text: str, complaint: str
) -> None:
    (tmp_path / "own.jinja").write_text(text)
    own = recipe(config.SftRecipe, "sft", chat_template="own.jinja")
    with pytest.raises(
        Refusal, match=r"chat_template own\.jinja: it cannot write a chat of two turns: "
    ) as caught:
        vocabulary.of_run(own, plain, folder=tmp_path)
    assert complaint in str(caught.value) or "lost" in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no loadable tokenizer") as caught:
        vocabulary.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_parent_s_truncation_does_not_cut_rows(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(tree))
    assert len(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.encode("one two three").ids) == 3
    assert len(vocabulary.load_tokenizer(tmp_path).backend_tokenizer.encode("one two three").ids) > 3


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_data_prepared_before_the_parent_exists_is_what_training_finds(
    plain: Any, tmp_path: Path, stage: str, build: Callable[..., Any]
) -> None:
    """The tokenizer in memory, and the same saved by a run and loaded again, make one cache key."""
    kind = {"mid": config.MidRecipe, "sft": config.SftRecipe}[stage]
    words = vocabulary.of_run(recipe(kind, stage), plain, folder=tmp_path)
    words.tokenizer.save_pretrained(tmp_path / "run")
    again = vocabulary.load_tokenizer(tmp_path / "run")
    next_run = recipe(config.SftRecipe, "sft", text_end="<|endoftext|>")
    prints = [
        data.prepare(
            next_run,
            vocabulary.of_run(next_run, one, folder=tmp_path),
            folder=tmp_path,
            cache_dir=tmp_path / "cache",
        ).ledger["fingerprint"]
        for one in (words.tokenizer, again)
    ]
    assert prints[0] == prints[1]
