"""Ids are the tokenizer's own and spans lie where its offsets say, whatever shortcut was taken."""

import doctest
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smol_post import encoding

LLAMA, QWEN = sorted(encoding._WORD_PATTERNS, key=len, reverse=True)
TEXT = "Notes: it's 3 pens, 12 or 2024!\n\n  def f(x):\n\treturn x's\r\n caf\u00e9 \u4f60\u597d don't 'sun "
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>s"]
SPLITS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, pattern in (("llama3", LLAMA), ("qwen", QWEN))
    },
    "another pattern": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+ \p{L}+|.|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "no words": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens that splits words as `name` says."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = SPLITS[name], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        [TEXT, TEXT.upper(), "the end, they said; then the rest of it's their's", "caf\u00e9 " * 9], trainer
    )
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def by_words(one: PreTrainedTokenizerFast) -> bool | None:
    """Whether words are encoded once; None where the tokenizer is not taken for a byte-level one."""
    added = one.backend_tokenizer.get_added_tokens_decoder()
    contents = tuple((i, each.content) for i, each in added.items())
    made = encoding._byte_level(one.backend_tokenizer, contents, one.split_special_tokens)
    return None if made is None else made._by_words


# What splitters differ about: contractions, runs of spaces, digits, marks, separators.
EDGES = [*SPECIAL, "<think>", "<|im_", "'s", "'S", "it's", "'sun", " 'll", "\r\n", "\n\n ", "\t", "3", " 12",
         "2024.", "caf\u00e9", "e\u0301", "\u200d", "\U0001f469\u200d\U0001f4bb", "\u00a0", "\u0660",
         "\u4f60\u597d",
         "\x1c", "\x85", "\u2028", "a", " b", ", c", "(d", "_e", "-"]  # fmt: skip
pieces = st.one_of(st.sampled_from(EDGES), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
texts = st.lists(pieces, max_size=12).map("".join)


@pytest.mark.parametrize("name", SPLITS)
@settings(deadline=None, max_examples=150, derandomize=True)
@given(batch=st.lists(texts, min_size=1, max_size=4))
def test_ids_are_the_tokenizer_s_own(name: str, batch: list[str]) -> None:
    one = tokenizer(name)
    wanted = one(batch, add_special_tokens=False)["input_ids"]
    assert [ids for ids, _ in encoding.encode([(text, []) for text in batch], one)] == wanted


@pytest.mark.parametrize("name", ["gpt2", "digits", "llama3", "another pattern"])
@settings(deadline=None, max_examples=150, derandomize=True)
@given(parts=st.lists(texts, min_size=1, max_size=5))
def test_spans_lie_where_the_offsets_say(name: str, parts: list[str]) -> None:
    """Every other part is a span; its borders are special tokens, so that no token can cross them."""
    text, spans = "", []
    for part in parts:
        spans.append((len(text) + len("<|im_start|>"), len(text) + len("<|im_start|>" + part)))
        text += f"<|im_start|>{part}<|im_end|>\n"
    (fast,) = encoding.encode([(text, spans)], tokenizer(name))
    (slow,) = encoding._encode_by_offsets([(text, spans)], tokenizer(name))
    assert fast == slow


def test_a_token_across_the_border_of_a_span_is_an_error() -> None:
    (ids, _) = next(encoding.encode([("then", [])], tokenizer("gpt2")))
    assert len(ids) < 4
    with pytest.raises(ValueError, match=r"the token '.*' lies across the border of a trained span: 'then'"):
        list(encoding.encode([("then", [(1, 4)])], tokenizer("gpt2")))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("gpt2", True), ("digits", True), ("llama3", True), ("qwen", True), ("another pattern", False),
     ("no words", False), ("prefix space", None)],
)  # fmt: skip
def test_words_are_encoded_once_only_where_their_borders_are_known(name: str, wanted: bool | None) -> None:
    assert by_words(tokenizer(name)) is wanted


@pytest.mark.parametrize("change", ["normalizer", "stripping token", "special tokens split", "dropout"])
def test_whatever_else_a_tokenizer_does_to_text_is_not_skipped(change: str) -> None:
    backend = Tokenizer.from_str(tokenizer("gpt2").backend_tokenizer.to_str())
    if change == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    if change == "stripping token":
        backend.add_special_tokens([AddedToken("<|pad|>", lstrip=True)])
    if change == "dropout":
        backend.model.dropout = 0.5
    one = PreTrainedTokenizerFast(
        tokenizer_object=backend, split_special_tokens=change == "special tokens split"
    )
    text = "Notes: THE  <|pad|> <|im_end|> end"
    if change != "dropout":
        ((ids, _),) = encoding.encode([(text, [])], one)
        assert ids == one(text, add_special_tokens=False)["input_ids"]
    assert by_words(one) in (None, False)


def test_a_token_that_was_added_since_is_seen() -> None:
    one = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer("gpt2").backend_tokenizer.to_str())
    )
    before = next(encoding.encode([("a<|new|>b", [])], one))
    one.add_tokens(["<|new|>"])
    after = next(encoding.encode([("a<|new|>b", [])], one))
    assert len(after[0]) == 3 < len(before[0])


def test_special_tokens_are_split_from_the_moment_the_tokenizer_says_so() -> None:
    one = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer("gpt2").backend_tokenizer.to_str())
    )
    text = "end<|im_end|>"
    before = next(encoding.encode([(text, [])], one))
    one.split_special_tokens = True
    after = next(encoding.encode([(text, [])], one))
    assert len(after[0]) > len(before[0])
    assert after[0] == one(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_an_empty_batch_and_empty_texts_are_no_matter() -> None:
    assert list(encoding.encode([], tokenizer("gpt2"))) == []
    assert list(encoding.encode([("", []), ("", [(0, 0)])], tokenizer("gpt2"))) == [([], []), ([], [(0, 0)])]


def test_the_examples_in_the_text_are_true() -> None:
    assert doctest.testmod(encoding).failed == 0
