"""Judging of generated answers: modes, limits, repetition, and checks against a reference of the row.

    Answer("<think>\\n3+4=7\\n</think>\\n7", ended=True, num_tokens=9)  ->  None: keep it
    Answer("<think>\\nwait, wait, wait, ...", ended=False, ...)         ->  "unfinished"

All of it is a function of texts and recipe; nothing is drawn.
"""

import json
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from smol_post import constraints
from smol_post.judging_config import Check, Limits
from smol_post.messages import END_THINK, THINK, check_text, well_formed
from smol_post.refusal import Refusal, describe

# Words and numbers, in pieces of 20 characters; letters beyond ASCII one by one, for scripts without spaces;
# rows of 20 marks. Shorter ones, as in the rule below the head of a table, are nothing.
_UNIT = re.compile(r"[a-z]{1,20}|\d{1,20}|[^\W\d_]|(?:[^\w\s]|_){20}")


class Answer(NamedTuple):
    """A text with its think block, as the row will have it; whether it came to its end; its tokens."""

    text: str
    ended: bool
    num_tokens: int


def reject(
    answer: Answer,
    *,
    mode: Literal["think", "no_think"],
    limits: Limits,
    check: Callable[[str], bool] | None = None,
) -> str | None:
    """Why an answer is left out, by the first rule that it breaks; None: keep it.

    In order: bad_text (a control token, which no mixture takes, or half a character), unfinished (cut, or a
    thought that never closes), empty (nothing, or nothing after the thought), wrong_mode, too_long,
    repetition, wrong_answer.

    >>> reject(Answer("<think>Hm</think>7", True, 5), mode="no_think", limits=Limits())
    'wrong_mode'
    """
    try:
        check_text(answer.text, "answer", "text")
    except ValueError:
        return "bad_text"
    if not answer.ended or (THINK in answer.text and END_THINK not in answer.text):
        return "unfinished"
    thought, _, after = answer.text.rpartition(END_THINK)
    if not after.strip():
        return "empty"
    said = well_formed(answer.text, mode, ended=True)
    if said is None:
        return "wrong_mode"
    if limits.max_tokens is not None and answer.num_tokens > limits.max_tokens:
        return "too_long"
    how = {"n": limits.repetition_n, "window": limits.repetition_window}
    # One by one: an answer may well be the last draft of its thought.
    if max(repetition(text, **how) for text in (thought, after)) > limits.max_repetition:
        return "repetition"
    return None if check is None or check(said) else "wrong_answer"


def reject_pair(chosen: Answer, rejected: Answer, *, limits: Limits) -> str | None:
    """Why two answers, each of which may be kept, make no pair: equal, or length_skewed; None: they do."""
    if chosen.text.split() == rejected.text.split():
        return "equal"
    shorter, longer = sorted([chosen.num_tokens, rejected.num_tokens])
    if limits.max_length_ratio is not None and longer > limits.max_length_ratio * shorter:
        return "length_skewed"
    return None


def repetition(text: str, *, n: int, window: int) -> float:
    """Share of words that lie in an n-gram which stands before, in the worst window of so many words.

    Windows begin every half window, and the last ends with the text.

    >>> repetition("no, no, no, no, no, no", n=2, window=20)  # all but the first
    0.8333333333333334
    >>> repetition("one two three four", n=2, window=20)
    0.0
    """
    units, worst = _UNIT.findall(text.lower()), 0.0
    last = max(0, len(units) - window)
    for start in [*range(0, last, window // 2), last]:
        piece = units[start : start + window]
        seen: set[tuple[str, ...]] = set()
        covered = upto = 0
        for at in range(len(piece) - n + 1):
            gram = tuple(piece[at : at + n])
            if gram in seen:
                covered += at + n - max(at, upto)
                upto = at + n
            seen.add(gram)
        worst = max(worst, covered / max(1, len(piece)))
    return worst


def make_check(check: Check, row: Mapping[str, Any], *, where: str = "row") -> Callable[[str], bool]:
    """Whether a text, the thought taken off, answers this row rightly.

    Raises Refusal, which begins with `where`, for a row without the columns or with a reference that is none.
    """
    for name in check.columns():
        if row.get(name) is None:
            found = ", ".join(str(key) for key in row if row[key] is not None) or "no columns"
            raise Refusal(f"{where}: {name}: missing, found {found}; mend the row, or the check's columns")
    try:
        return _CHECKS[check.kind](check, row)
    except ValueError as error:
        raise Refusal(f"{where}: {error}; mend the row, or take another check") from None


_CUE = re.compile(r"####|\b(?:final )?answer\b[^\w\n]{0,6}(?:is\b|:|=)", re.IGNORECASE)
_WRITTEN = [  # LaTeX and typography -> plain numbers
    (re.compile("[\u2212\u2010\u2011\u2012\u2013]"), "-"),
    (re.compile(r"\{,\}"), ","),
    (re.compile("(?<=\\d)(?:\\\\[,!]|[\u00a0\u202f\u2009])(?=\\d{3})"), ""),
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"-\s+(?=\d+/\d)"), "-"),
    (re.compile(r"(?<!\s)\s*(?:\\times|\\cdot|\u00d7|\*)\s*10\s*\^\s*\{?([-+]?\d{1,3})\}?"), r"e\1"),
    (re.compile("\\\\?[$\u20ac\u00a3]"), ""),
]
_NUMBER = re.compile(
    r"(?<![A-Za-z\d.])(?P<sign>(?<![\w)\]}.])[-+])?(?:(?P<whole>\d{1,100})\s{1,9}(?=\d+/\d))?"
    r"(?P<top>\d{1,3}(?:,\d{3}){1,33}(?!\d|,\d{3})(?:\.\d{1,100})?|\d{1,100}(?:\.\d{1,100})?|\.\d{1,100})"
    r"(?:[eE](?P<ten>[-+]?\d{1,3})(?![\d.]))?(?:\s*/\s*(?P<bottom>0*[1-9]\d{0,99})(?![\d.]))?"
)


def _said(text: str) -> str | None:
    """What stands in the last \\boxed{}, else behind the last "answer is", "Answer:" or "####"."""
    if "\\boxed{" in text:
        inside, depth = text.rpartition("\\boxed{")[2], 1
        for at, letter in enumerate(inside):
            depth += (letter == "{") - (letter == "}")
            if not depth:
                return inside[:at]
    cues = list(_CUE.finditer(text))
    rest = text[cues[-1].end() :].strip(" \n*_:") if cues else ""
    return rest.partition("\n")[0] or None


def number(text: str) -> Fraction | None:
    r"""The number that a text gives as its answer, exactly; None where there is none.

    That is the first in \boxed{} or behind "answer is" (of an equation, what stands right of it), else the
    last of the text. Units, currencies and percent signs are not read; a comma parts thousands.

    >>> [str(number(text)) for text in ("The answer is $1,234.50.", r"\boxed{-\frac{3}{4}}", "10-3 = 7 km")]
    ['2469/2', '-3/4', '7']
    """
    said = _said(text)
    for pattern, plain in _WRITTEN:
        text, said = pattern.sub(plain, text), said and pattern.sub(plain, said)
    found = list(_NUMBER.finditer((said or "").rpartition("=")[2]))[:1] or list(_NUMBER.finditer(text))[-1:]
    if not found:
        return None
    sign, whole, top, ten, bottom = found[0].group("sign", "whole", "top", "ten", "bottom")
    value = Fraction(top.replace(",", "")) * Fraction(10) ** int(ten or 0) / int(bottom or 1) + int(
        whole or 0
    )
    return -value if sign == "-" else value


def _numeric(check: Check, row: Mapping[str, Any]) -> Callable[[str], bool]:
    given = row[check.column]
    wanted = None if isinstance(given, bool | list | dict) else number(str(given))
    if wanted is None:
        raise ValueError(f"{check.column}: found {describe(given)}, wanted a number or a text with one")
    room = abs(wanted) * Fraction(check.tolerance)

    def holds(text: str) -> bool:
        found = number(text)
        return found is not None and abs(found - wanted) <= room

    return holds


# A letter, adorned or not; A and I are words too, and none where a word in small letters follows.
_LETTER = re.compile(
    r"(?:(?:option|choice|is)\s)*[\s*_(\[{$]*(?:\\text\w*\{)?\(?([A-Z])(?![\w'])"
    r"(?!(?<=[AI]) [a-z])(?P<rest>.*)",
    re.DOTALL,
)


def letter(text: str, options: list[str]) -> str | None:
    r"""The letter that a text chooses: boxed, behind "answer is", or at its beginning; or by its text.

    None where there is none, or where another option's text follows the letter.

    >>> texts = "(B) Rome", "The answer is **B**.", "rome", r"\boxed{\text{B}}", "B) Oslo", "A good idea"
    >>> [letter(text, ["Oslo", "Rome"]) for text in texts]
    ['B', 'B', 'B', 'B', None, None]
    """
    texts, said = [_plain(option) for option in options], _said(text) or text.strip()
    if _plain(said) in texts:
        return chr(ord("A") + texts.index(_plain(said)))
    match = _LETTER.match(said)
    if match is None or (said == text.strip() and re.match(r" \w", match["rest"])):
        return None
    other = _plain(match["rest"])
    wrong = other in texts and chr(ord("A") + texts.index(other)) != match[1]
    return None if wrong else match[1]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def _choice(check: Check, row: Mapping[str, Any]) -> Callable[[str], bool]:
    options, given = row[check.options] if check.options else [], row[check.column]
    if not isinstance(options, list) or not all(isinstance(one, str) for one in options):
        raise ValueError(f"{check.options}: found {describe(options)}, wanted a list of texts")
    if isinstance(given, int) and not isinstance(given, bool):
        wanted = chr(ord("A") + given) if 0 <= given < (len(options) or 26) else None
    elif isinstance(given, str) and given in options:
        wanted = chr(ord("A") + options.index(given))
    else:
        wanted = given.strip().strip("().").upper() if isinstance(given, str) else None
    if wanted is None or not re.fullmatch("[A-Z]", wanted) or (options and ord(wanted) - 65 >= len(options)):
        raise ValueError(
            f"{check.column}: found {describe(given)}, wanted the letter, index or text of an option"
        )
    return lambda text: letter(text, options) == wanted


_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)```", re.DOTALL)


def _json_schema(check: Check, row: Mapping[str, Any]) -> Callable[[str], bool]:
    import jsonschema
    import jsonschema.validators
    import referencing
    import referencing.exceptions

    given = row[check.column]
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        if not isinstance(schema, dict):
            raise ValueError(f"found {describe(given)}, wanted a schema")
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, AttributeError, RecursionError, jsonschema.SchemaError) as error:
        reason = " ".join(str(getattr(error, "message", error)).split())
        raise ValueError(f"{check.column}: no JSON schema ({reason})") from None
    validator = kind(schema, registry=referencing.Registry())  # which fetches nothing

    def holds(text: str) -> bool:
        fences = _FENCE.findall(text)
        try:
            value = json.loads(fences[0] if len(fences) == 1 else text, parse_constant=_no_json)
        except (ValueError, RecursionError):
            return False
        try:
            return validator.is_valid(value)
        except referencing.exceptions.Unresolvable as error:
            raise Refusal(f"{check.column}: the schema refers to {error.ref!r}, which is not in it") from None
        except RecursionError:
            raise Refusal(f"{check.column}: the schema, or what it is held against, has no end") from None

    return holds


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _constraints(check: Check, row: Mapping[str, Any]) -> Callable[[str], bool]:
    wanted = constraints.read(row[check.column], row[check.kwargs], (check.column, check.kwargs))
    return lambda text: all(one.holds(text) for one in wanted)


_CHECKS: dict[str, Callable[[Check, Mapping[str, Any]], Callable[[str], bool]]] = {
    "numeric": _numeric,
    "choice": _choice,
    "json_schema": _json_schema,
    "constraints": _constraints,
}
