"""Texts with spans of characters -> token ids with intervals of tokens: the tokenizer's own ids, only sooner.

    "a\\u00fcb<|im_end|>\\n", [(2, 13)]  ->  ids of a \\u00fc b <|im_end|> \\n, [(2, 4)]

Byte-level BPE has two properties that make this cheap. A word is encoded the same wherever it stands, so that
each is encoded once. And the bytes of a token follow from its id, so that borders need no offsets. Any other
tokenizer takes the slow path, with the same result.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, islice, pairwise
from typing import Any

Intervals = list[tuple[int, int]]  # [start, stop), in order

# The word patterns of Llama 3 and Qwen 2.5 (GPT-2's is ByteLevel's own). In all of them a word that holds an
# ASCII letter ends before any other ASCII character, and no part of a pattern looks across that border.
_WORD_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits +
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
}  # fmt: skip
_BORDER = re.compile(r"(?<=[A-Za-z])(?=[\x00-@\[-`{-\x7f])")
_MAX_WORDS = 500_000  # kept of one tokenizer, about 200 bytes each


def encode(
    rendered: Sequence[tuple[str, Intervals]], tokenizer: Any
) -> Iterator[tuple[list[int], Intervals]]:
    """Token ids of each text, nothing added and nothing cut, and the tokens of its spans of characters.

    Where a token's bytes follow from its id, their sums are the borders of the tokens of all texts. Here the
    token u umlaut has two; the span of the characters [2, 13) is [3, 14) in bytes and [2, 4) in tokens:

        token          a  u  b  <|im_end|>  \\n  next text ...
        bytes before   0  1  3  4           14  15

    A text whose sum is not its length, and one with a border inside a token, is encoded by offsets. Raises
    ValueError for a token across the border of a span.
    """
    from numpy import concatenate, fromiter, where

    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = tokenizer.split_special_tokens
    backend.no_truncation()  # left over from another call
    backend.no_padding()
    added = backend.get_added_tokens_decoder()
    contents = tuple((i, token.content) for i, token in added.items())
    made = _byte_level(backend, contents, tokenizer.split_special_tokens)
    if made is None:
        yield from _encode_by_offsets(rendered, tokenizer)
        return
    ids = made.ids([text for text, _ in rendered])
    starts = list(accumulate(map(len, ids), initial=0))
    every = fromiter(chain.from_iterable(ids), int, starts[-1])
    before = concatenate([[0], made.lengths[every].cumsum()])
    first_bytes = zip(before[starts].tolist(), rendered, strict=False)
    borders = [[first + border for border in _byte_borders(*one)] for first, one in first_bytes]
    wanted = list(chain.from_iterable(borders))
    tokens = before.searchsorted(wanted).clip(max=len(before) - 1)
    tokens = iter(where(before[tokens] == wanted, tokens, -1).tolist())
    for i, one in enumerate(rendered):
        *inner, last = (token - starts[i] for token in islice(tokens, len(borders[i])))
        if last == len(ids[i]) and min(inner, default=0) >= 0:
            yield ids[i], list(zip(inner[::2], inner[1::2], strict=True))
        else:
            yield from _encode_by_offsets([one], tokenizer)


def _byte_borders(text: str, spans: Intervals) -> list[int]:
    """The borders of the spans and the end of the text, in bytes.

    >>> _byte_borders("a\\u00fcb", [(1, 2)])
    [1, 3, 4]
    """
    borders = [*chain.from_iterable(spans), len(text)]
    if text.isascii():
        return borders
    return list(accumulate(len(text[start:stop].encode()) for start, stop in pairwise([0, *borders])))


@lru_cache(maxsize=4)
def _byte_level(backend: Any, added: tuple[tuple[int, str], ...], split: bool) -> "_ByteLevel | None":
    """The tokenizer as a byte-level one, for as long as it has these added tokens; None where it is another.

    `split`: added tokens are split as other text is.

    A byte-level vocabulary writes each byte as one character (a space as U+0120).
    """
    from tokenizers import pre_tokenizers

    spec = json.loads(backend.to_str())
    model, splitter = spec["model"], spec["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    plain = (
        model["type"] == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and spec["normalizer"] is None
        and (spec["decoder"] or {}).get("type") == "ByteLevel"
        and any(step["type"] == "ByteLevel" and not step["add_prefix_space"] for step in steps)
        and model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    )
    if not plain:
        return None
    known = {"Digits", "ByteLevel"}
    cuts = [step.get("use_regex") or step.get("pattern", {}).get("Regex") in _WORD_PATTERNS for step in steps]
    words = (
        all(step["type"] in known or cut for step, cut in zip(steps, cuts, strict=True))
        and all(step.get("behavior", "Isolated") == "Isolated" and not step.get("invert") for step in steps)
        and any(cuts)
        and not any(one["lstrip"] or one["rstrip"] or one["single_word"] for one in spec["added_tokens"])
        and not split
    )
    return _ByteLevel(backend, model["vocab"], added, by_words=words)


class _ByteLevel:
    """A byte-level tokenizer: `lengths[i]` is how many bytes of text the token i stands for."""

    def __init__(
        self, backend: Any, vocab: dict[str, int], added: tuple[tuple[int, str], ...], *, by_words: bool
    ) -> None:
        from numpy import fromiter, zeros

        self.lengths = zeros(1 + max([*vocab.values(), *(i for i, _ in added)]), int)
        self.lengths[fromiter(vocab.values(), int)] = fromiter(map(len, vocab), int)
        for i, content in added:
            self.lengths[i] = len(content.encode())
        longest_first = sorted((content for _, content in added), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._backend, self._by_words = backend, by_words
        self._known: dict[str, list[int]] = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, those of each word from the tokenizer itself, once."""
        if not self._by_words:
            return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        split = [self._words(text) for text in texts]
        wanted = set().union(*split)
        if len(self._known) > _MAX_WORDS:
            self._known.clear()
        new = list(wanted - self._known.keys())
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        self._known.update(zip(new, [one.ids for one in encodings], strict=True))
        return [list(chain.from_iterable(map(self._known.__getitem__, words))) for words in split]

    def _words(self, text: str) -> list[str]:
        """A text cut at its added tokens, and where it is certain that words meet.

        "Notes: a 3 b.<|im_end|>\\n"  ->  "Notes", ": a", " 3 b", ".", "<|im_end|>", "\\n"
        """
        words: list[str] = []
        for i, part in enumerate(self._added.split(text)):
            words += [part] if i % 2 else _BORDER.split(part) if part else []
        return words


def _encode_by_offsets(
    rendered: Sequence[tuple[str, Intervals]], tokenizer: Any
) -> Iterator[tuple[list[int], Intervals]]:
    """The same with any fast tokenizer, by the characters of each token; ValueError for one across a border.

    A token of no width (the tokenizer trimmed its spaces) lies before its offset.
    """
    texts = [text for text, _ in rendered]
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    parts = zip(rendered, encoding["input_ids"], encoding["offset_mapping"], strict=True)
    for (text, spans), ids, offsets in parts:
        borders, rights = list(chain.from_iterable(spans)), [right for _, right in offsets]
        tokens = [bisect_right(rights, border) for border in borders]
        for border, i in zip(borders, tokens, strict=True):
            if i < len(offsets) and offsets[i][0] < border:
                left, right = offsets[i]
                token, near = text[left:right], text[max(0, left - 20) : right + 20]
                raise ValueError(f"the token {token!r} lies across the border of a trained span: {near!r}")
        yield ids, list(zip(tokens[::2], tokens[1::2], strict=True))
