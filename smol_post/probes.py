"""Needles in a haystack for any model and tokenizer, at any length in the model's own tokens.

After RULER (Hsieh et al., 2024, arXiv:2404.06654): keys are pairs of words, values numbers of seven digits,
and the answer is begun for the model.

    Special magic numbers are hidden in the text below. Remember them.

    The icy engine passed the odd yard. One of the special magic numbers for brave-harbor is 4817730. The ...

    What is the special magic number for brave-harbor in the text above?
    The special magic number for brave-harbor is| 4817730          generated, greedily

Generated, not teacher-forced: several values may be said in any order, and how a tokenizer would split an
answer at the border to its prompt is not ours to guess. It costs a dozen steps a value after the same prompt.
"""

import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smol_post import scoring
from smol_post.evals_config import Probe
from smol_post.refusal import Refusal

ADJECTIVES, NOUNS, VERBS, PLACES = (
    words.split(",")
    for words in (
        "amber,brave,calm,distant,early,faded,gentle,hollow,icy,jolly,keen,lively,mellow,narrow,odd,plain,quiet,"
        "rapid,silver,tidy,urban,vast,warm,young",
        "anchor,bridge,candle,dragon,engine,forest,garden,harbor,island,jacket,kettle,ladder,meadow,nest,orchard,"
        "palace,quarry,river,saddle,temple,umbrella,valley,window,yard",
        "crossed,followed,found,kept,left,moved,passed,reached,saw,sold,watched",
        "after dark,before noon,in the rain,near the old road,on market day,over the hill,at last",
    )
)
THINGS = ("special magic number", "access code", "ticket number")
OPENINGS = (
    "{Thing}s are hidden in the text below. Remember them.",
    "Read the text. A question about the {thing}s in it follows.",
    "The following text mentions {thing}s here and there. I will ask for them afterwards.",
)
NEEDLES = (
    "One of the {thing}s for {key} is {value}.",
    "For {key}, one of the {thing}s is {value}.",
    "Here is one of the {thing}s for {key}: {value}.",
)
QUESTIONS = {  # by whether there are several values
    False: (
        ("What is the {thing} for {key} in the text above?", "The {thing} for {key} is"),
        ("Which {thing} does the text give for {key}?", "The text gives for {key} the {thing}"),
    ),
    True: (
        ("What are all the {thing}s for {key} in the text above?", "The {thing}s for {key} are"),
        ("Which {thing}s does the text give for {key}?", "The text gives for {key} the {thing}s"),
    ),
}
TOKENS_A_VALUE = 12  # seven digits, each at most a token, and what stands between two values


class Question(NamedTuple):
    """A prompt as text and ids, the values to give in any order, and every (key, value) hidden in it."""

    text: str
    ids: list[int]
    wanted: list[str]
    hidden: list[tuple[str, str]]


def ask(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    *,
    num_tokens: int,
    seed: int,
    batch_size: int,
    date_string: str,
) -> scoring.Metric:
    """Share of questions answered right: the first numbers of seven digits said are exactly those wanted."""
    how = {"num_tokens": num_tokens, "seed": seed, "date_string": date_string}
    asked = [question(tokenizer, probe, index, **how) for index in range(probe.num_questions)]
    said = scoring.generate(
        lm,
        tokenizer,
        [one.ids for one in asked],
        max_new_tokens=TOKENS_A_VALUE * len(asked[0].wanted),
        batch_size=batch_size,
    )
    return scoring.share([is_right(text, one.wanted) for (text, _), one in zip(said, asked, strict=True)])


def is_right(text: str, wanted: list[str]) -> bool:
    """Whether the first numbers of seven digits in `text` are those wanted, in any order.

    >>> is_right(" 2222222 and 1111111.", ["1111111", "2222222"]), is_right(" 33333333, 1111111", ["1111111"])
    (True, True)
    >>> is_right(" 3333333, not 1111111", ["1111111"])
    False
    """
    numbers = re.findall(r"(?<!\d)\d{7}(?!\d)", text)
    return sorted(numbers[: len(wanted)]) == sorted(wanted)


def question(
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    index: int,
    *,
    num_tokens: int,
    seed: int,
    date_string: str,
) -> Question:
    """Question `index` of a probe, which depends on no other; prompt and answer fill `num_tokens`.

    Every needle lies at a depth of its own, drawn uniformly, where a sentence begins. The haystack is cut
    where the length is full: a token or two may be left. Raises Refusal where the question alone is longer.
    """
    rng = random.Random(f"{probe.kind} {seed} {index}")
    text = _text(probe.haystack) if probe.haystack else ""
    num_needles = 1 if probe.kind == "single" else probe.num_needles
    num_keys = num_needles if probe.kind == "multi_key" else 1
    every = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    keys = rng.sample([key for key in every if key not in text], num_keys)
    values = list[str]()
    while len(values) < num_needles:
        value = str(rng.randint(1_000_000, 9_999_999))
        values += [value] if value not in text and value not in values else []
    hidden = [(keys[i % num_keys], value) for i, value in enumerate(values)]
    wanted = [value for key, value in hidden if key == keys[0]]

    thing, needle = rng.choice(THINGS), rng.choice(NEEDLES)
    opening = rng.choice(OPENINGS).format(thing=thing, Thing=thing.capitalize())
    asked, begun = (part.format(thing=thing, key=keys[0]) for part in rng.choice(QUESTIONS[len(wanted) > 1]))
    needles = [needle.format(thing=thing, key=key, value=value) + " " for key, value in hidden]
    depths = [rng.random() for _ in needles]
    hay = _growing(_from_file(text, rng) if text else _sentences(rng))

    def prompt(length: int) -> str:
        """The prompt with a haystack of `length` characters."""
        straw, pieces, start = hay(length), list[str](), 0
        for depth, one in sorted(zip(depths, needles, strict=True)):
            at = _boundary(straw, int(depth * length))
            pieces += [straw[start:at], one]
            start = at
        body = f"{opening}\n\n{''.join(pieces) + straw[start:]}\n\n{asked}"
        if probe.form == "text":
            return f"{body}\n{begun}"
        chat = scoring.render(
            tokenizer,
            [{"role": "user", "content": body}],
            tokenize=False,
            enable_thinking=False,
            date_string=date_string,
        )
        return f"{chat}{begun}"

    def encode(length: int) -> list[int]:
        """Its tokens; of raw text after the first token that the tokenizer begins one with, if any."""
        first = scoring.beginning(tokenizer) if probe.form == "text" else []
        return [*first, *tokenizer(prompt(length), add_special_tokens=False, verbose=False)["input_ids"]]

    length = _fill(lambda length: len(encode(length)), num_tokens - TOKENS_A_VALUE * len(wanted))
    if length is None:
        raise Refusal(
            f"probes: {probe.kind}: lengths: found {num_tokens}, wanted at least "
            f"{len(encode(0)) + TOKENS_A_VALUE * len(wanted)}, the question without haystack; ask for more"
        )
    return Question(prompt(length), encode(length), wanted, hidden)


def _fill(count: Callable[[int], int], budget: int) -> int | None:
    """How many characters of haystack come to `budget` tokens, or just under; None where none do.

    `count` grows with its argument but for a token here and there, where pieces join: a length is only taken
    that was counted. The next guess is where the tokens found so far point to, within what is left.
    """
    low, full, high = 0, count(0), 0  # high 0: not known yet
    if full > budget:
        return None
    characters_a_token, tries = 4.0, 0
    while full < budget and (not high or high - low > 1):
        guess, tries = low + max(1, int((budget - full) * characters_a_token)), tries + 1
        if high and (guess >= high or tries > 8):
            guess = (low + high) // 2
        found = count(guess)
        if found > full:
            characters_a_token = (guess - low) / (found - full)
        low, full, high = (guess, found, high) if found <= budget else (low, full, guess)
    return low


def _boundary(straw: str, at: int) -> int:
    """Where the sentence of character `at` begins, else its word, if near; else `at`."""
    sentence, word = (straw.rfind(mark, max(0, at - 400), at) for mark in (". ", " "))
    return sentence + 2 if sentence >= 0 else 0 if at < 400 else word + 1 if word >= 0 else at


def _growing(pieces: Iterator[str]) -> Callable[[int], str]:
    """The first so many characters of what `pieces`, which never end, come to."""
    found, length = list[str](), 0

    def first(number: int) -> str:
        nonlocal length
        while length < number:
            found.append(next(pieces))
            length += len(found[-1])
        found[:] = ["".join(found)]
        return found[0][:number]

    return first


def _from_file(text: str, rng: random.Random) -> Iterator[str]:
    """The text from a sentence drawn at random, again and again."""
    yield text[_boundary(text, rng.randrange(len(text))) :] + " "
    while True:
        yield text + " "


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        (one, other), (noun, thing) = rng.choices(ADJECTIVES, k=2), rng.choices(NOUNS, k=2)
        yield f"The {one} {noun} {rng.choice(VERBS)} the {other} {thing} {rng.choice(PLACES)}. "


@lru_cache(maxsize=4)
def _text(path: str) -> str:
    """A text file in one line; Refusal where it is empty or not text."""
    try:
        text = " ".join(Path(path).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"haystack: {path}: not readable as text ({error}); give a UTF-8 file") from None
    if not text:
        raise Refusal(f"haystack: {path}: found no text; give a file with some, or leave the key out")
    return text
