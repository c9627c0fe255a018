"""Judging of generated answers: modes, limits, repetition, and checks against a reference."""

import doctest
import json
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from smol_post import judging
from smol_post.judging import Answer, letter, make_check, number, reject, reject_pair, repetition
from smol_post.judging_config import Check, Limits
from smol_post.refusal import Refusal

THOUGHT = "<think>\n3+4=7\n</think>\n"
PARAGRAPH = (
    "We first count the apples that are left in the basket, then the pears, and in the end we add both "
    "numbers and look whether that is what was asked for in the question. "
)


def judged(text: str, mode: Any = "think", *, ended: bool = True, num_tokens: int = 9, **limits: Any) -> Any:
    return reject(Answer(text, ended, num_tokens), mode=mode, limits=Limits(**limits))


def check(kind: Any, text: str, row: dict[str, Any], column: str = "ref", **fields: Any) -> bool:
    return make_check(Check(kind=kind, column=column, **fields), row)(text)


def test_the_examples_of_the_docstrings_hold() -> None:
    assert doctest.testmod(judging).failed == 0


@pytest.mark.parametrize(
    ("text", "mode", "ended", "reason"),
    [
        (THOUGHT + "7", "think", True, None),
        ("7", "no_think", True, None),
        (THOUGHT + "7", "think", False, "unfinished"),
        ("<think>\n3+4", "think", True, "unfinished"),
        ("<think>\n3+4", "no_think", True, "unfinished"),
        (" \n", "no_think", True, "empty"),
        (THOUGHT + " ", "think", True, "empty"),
        (THOUGHT + " ", "no_think", True, "empty"),
        ("7", "think", True, "wrong_mode"),
        ("<think>\n\n</think>\n7", "think", True, "wrong_mode"),
        (THOUGHT + "<think>again</think>7", "think", True, "wrong_mode"),
        (THOUGHT + "7", "no_think", True, "wrong_mode"),
    ],
)
def test_an_answer_is_kept_if_it_is_whole_and_in_its_mode(
    text: str, mode: str, ended: bool, reason: str | None
) -> None:
    assert judged(text, mode, ended=ended) == reason


def test_rules_are_tried_in_the_order_in_which_they_are_reported() -> None:
    loop = THOUGHT + "wait, " * 100
    answer = Answer(loop, True, 200)
    rules: dict[str, Any] = {"mode": "think", "check": lambda text: False}
    assert reject(answer._replace(ended=False), limits=Limits(max_tokens=100), **rules) == "unfinished"
    assert reject(answer, limits=Limits(max_tokens=100), **rules | {"mode": "no_think"}) == "wrong_mode"
    assert reject(answer, limits=Limits(max_tokens=100), **rules) == "too_long"
    assert reject(answer, limits=Limits(max_tokens=200), **rules) == "repetition"
    assert reject(answer, limits=Limits(max_repetition=1.0), **rules) == "wrong_answer"


def test_a_check_sees_the_answer_without_its_thought() -> None:
    seen: list[str] = []
    answer = Answer(THOUGHT + "seven\n", True, 9)
    assert reject(answer, mode="think", limits=Limits(), check=lambda text: not seen.append(text)) is None
    assert seen == ["seven"]


@pytest.mark.parametrize(
    "text",
    [
        "Wait, " * 40,
        "wait " * 40,
        PARAGRAPH * 2,
        "So the answer is 5. Let me check. " * 10,
        "a" * 3000,
        "!" * 3000,
        "\u7b49\u4e00\u4e0b\uff0c\u8ba9\u6211\u518d\u60f3\u60f3\u3002" * 20,
        " ".join(f"step {i} gives {i * i}" for i in range(500)) + " no, wait." * 150,
    ],
    ids=lambda text: text[:12],
)
def test_loops_are_repetition(text: str) -> None:
    assert judged(text, "no_think") == "repetition"
    assert judged(f"<think>{text}</think>7") == "repetition"


@pytest.mark.parametrize(
    "text",
    [
        "| n | square |\n|-----|--------|\n" + "\n".join(f"| {i} | {i * i} |" for i in range(200)),
        "\n".join(
            f"def test_{name}():\n    assert square({i}) == {i * i}\n" for i, name in enumerate("abcdefgh")
        ),
        ";".join(f"{i % 10}+{(3 * i) % 7}={(i + 3 * i % 7) % 10}" for i in range(40)),
        "\n".join(json.dumps({"name": "price", "arguments": {"of": name}}) for name in "abcdefgh"),
        "\n".join(
            f"The remains of popsicle {i} melt 2 * {2**i} times as fast as the first." for i in range(9)
        ),
        "=" * 150 + "\nTitle\n" + "=" * 150,
        PARAGRAPH
        + "Then something else follows, which nobody has said before, in as many words as there were "
        "above, more or less, so that it is the smaller part that is said again. " + PARAGRAPH[:60],
    ],
    ids=lambda text: text[:12],
)
def test_honest_tables_code_and_arithmetic_are_no_repetition(text: str) -> None:
    assert judged(text, "no_think") is None


def test_an_answer_may_repeat_the_last_draft_of_its_thought() -> None:
    assert judged(f"<think>{PARAGRAPH}</think>{PARAGRAPH}") is None


def test_a_loop_counts_wherever_it_stands() -> None:
    words = " ".join("".join(chr(97 + (i // 26**k) % 26) for k in range(3)) for i in range(2000))
    assert repetition(words, n=24, window=512) == 0
    for text in (PARAGRAPH * 20 + words, words + PARAGRAPH * 20, words + PARAGRAPH * 20 + words):
        assert repetition(text, n=24, window=512) > 0.8


def test_pairs_of_equal_or_of_very_unequal_answers_are_left_out() -> None:
    limits = Limits(max_length_ratio=4)
    assert reject_pair(Answer("a  b\n", True, 2), Answer("a b", True, 9), limits=limits) == "equal"
    assert reject_pair(Answer("a", True, 40), Answer("b", True, 10), limits=limits) is None
    assert reject_pair(Answer("a", True, 41), Answer("b", True, 10), limits=limits) == "length_skewed"
    assert reject_pair(Answer("a", True, 10), Answer("b", True, 41), limits=limits) == "length_skewed"
    assert reject_pair(Answer("a", True, 10), Answer("b", True, 41), limits=Limits()) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 72.", "72"),
        ("#### 1,234,567", "1234567"),
        ("It costs $1,234.50 a year.", "2469/2"),
        ("\\boxed{1{,}234}", "1234"),
        ("so x is 5.\n\n\\boxed{\\dfrac{3}{4}} since 4 = 4", "3/4"),
        ("\\boxed{\\text{about } -\\frac{7}{2}}", "-7/2"),
        ("\\boxed{\\boxed{6}}", "6"),
        ("Final answer: **-3 degrees**", "-3"),
        ("The answer is \u22123.5", "-7/2"),
        ("The answer is 8, because 3+5 comes in 2 steps", "8"),
        ("The answer is 3 + 5 = 8 apples", "8"),
        ("The answer is 5. No: the answer is 6.", "6"),
        ("1 1/2 cups", "3/2"),
        ("-1 1/2", "-3/2"),
        ("about .75", "3/4"),
        ("10-3 = 7", "7"),
        ("10 - 3", "3"),
        ("50%", "50"),
        ("6.02 \\times 10^{23}", str(602 * 10**21)),
        ("2e-3 m", "1/500"),
        ("12\u202f500 km", "12500"),
        ("the set 1,2,3", "3"),
        ("3/0", "0"),
        ("version v2 of H2O", None),
        ("none", None),
        ("1e999999999", "1"),
    ],
)
def test_a_number_is_read_as_a_person_reads_it(text: str, value: str | None) -> None:
    found = number(text)
    assert (None if found is None else str(found)) == value


def test_a_numeric_answer_is_right_if_it_is_the_number_of_the_reference() -> None:
    assert check("numeric", "So \\boxed{72}.", {"ref": "48/2 = 24; 48+24 = 72\n#### 72"})
    assert check("numeric", "The answer is 0.5", {"ref": "1/2"})
    assert check("numeric", "The answer is 72.0", {"ref": 72})
    assert not check("numeric", "The answer is 73", {"ref": 72})
    assert not check("numeric", "I do not know.", {"ref": 72})
    assert not check("numeric", "The answer is 3.14", {"ref": 3.14159})
    assert check("numeric", "The answer is 3.14", {"ref": 3.14159}, tolerance=0.001)
    assert check("numeric", "9" * 5000, {"ref": "9" * 5000})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B) Rome", "B"),
        ("B: it is the capital", "B"),
        ("**B**", "B"),
        ("The correct answer is (B), as said.", "B"),
        ("The answer is option B because it is.", "B"),
        ("Oslo is cold.\nAnswer: B", "B"),
        ("\\boxed{B}", "B"),
        ("The answer is Rome.", "B"),
        ("rome", "B"),
        ("The answer is A. No, the answer is B.", "B"),
        ("A", "A"),
        ("B) Oslo", None),
        ("A good idea", None),
        ("The answer is a city.", None),
        ("I think so", None),
        ("Both A and B", None),
        ("D", "D"),
        ("", None),
    ],
)
def test_a_choice_is_a_letter_or_the_text_of_an_option(text: str, found: str | None) -> None:
    assert letter(text, ["Oslo", "Rome", "Bern"]) == found


@pytest.mark.parametrize("reference", ["B", "b", "(B)", 1, "Rome"])
def test_the_reference_of_a_choice_is_a_letter_an_index_or_a_text(reference: Any) -> None:
    row = {"ref": reference, "texts": ["Oslo", "Rome"]}
    assert check("choice", "The answer is B", row, options="texts")
    assert not check("choice", "The answer is A", row, options="texts")
    if reference != "Rome":
        assert check("choice", "The answer is B", row)


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_json_is_held_against_the_schema_of_its_row(schema: Any) -> None:
    for text in ('{"age": 3}', 'Here:\n```json\n{"age": 3}\n```\nDone.', '```\n{"age": 3}```'):
        assert check("json_schema", text, {"ref": schema}), text
    for text in ('{"age": "3"}', "{}", "age 3", '{"age": NaN}', "[" * 100_000, '```\n{"age": 3}\n```\n' * 2):
        assert not check("json_schema", text, {"ref": schema}), text[:40]


def test_numbers_that_json_does_not_have_are_none() -> None:
    assert check("json_schema", "3", {"ref": {}})
    assert not check("json_schema", "NaN", {"ref": {}})


def test_a_schema_that_refers_elsewhere_fetches_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(Refusal, match=r"ref: .*refers to 'file:.*s.json', which is not in it"):
        check("json_schema", "{}", {"ref": {"$ref": (tmp_path / "s.json").as_uri()}})


def test_a_schema_that_has_no_end_is_a_refusal() -> None:
    with pytest.raises(Refusal, match="ref: the schema, or what it is held against, has no end"):
        check("json_schema", "{}", {"ref": {"$ref": "#"}})


@pytest.mark.parametrize(
    "text", ["x{}y 7", "1{}x 7", "1{}2/ 7", "is{}x 7", "```json\n{}x", "-{}7", "answer{}7"]
)
def test_no_answer_takes_long_to_judge(text: str) -> None:
    """Blanks by the ten thousand, as models write that lose their way."""
    started = time.monotonic()
    for blank in (" ", "\n", "\t \n"):
        long = text.format(blank * (50_000 // len(blank)))
        judging.number(long)
        judging.letter(long, ["Oslo", "Rome"])
        check("json_schema", long, {"ref": {}})
    assert time.monotonic() - started < 2


def test_a_number_too_long_to_be_one_is_a_wrong_answer() -> None:
    assert not check("numeric", f"It is 1{',234' * 2000}", {"ref": 7})


def test_constraints_are_those_of_ifeval_null_filled_by_arrow() -> None:
    ids = ["punctuation:no_comma", "detectable_format:number_highlighted_sections"]
    for kwargs in ([{"num_highlights": None}, {"num_highlights": 2}], ["{}", '{"num_highlights": 2}']):
        row = {"ref": ids, "kwargs": kwargs}
        assert check("constraints", "*one* and *two*", row)
        assert not check("constraints", "*one* and two", row)
        assert not check("constraints", "*one*, *two*", row)


@pytest.mark.parametrize(
    ("kind", "row", "fields", "message"),
    [
        ("numeric", {"other": 1}, {}, "row 3: ref: missing, found other; mend the row"),
        ("numeric", {"ref": None}, {}, "row 3: ref: missing, found no columns"),
        ("numeric", {"ref": "none"}, {}, 'row 3: ref: found "none" (str), wanted a number'),
        ("numeric", {"ref": True}, {}, "row 3: ref: found true (bool), wanted a number"),
        (
            "choice",
            {"ref": "E", "o": ["x", "y"]},
            {"options": "o"},
            'row 3: ref: found "E" (str), wanted the letter',
        ),
        ("choice", {"ref": -1}, {}, "row 3: ref: found -1 (int), wanted the letter"),
        (
            "choice",
            {"ref": "A", "o": "xy"},
            {"options": "o"},
            'row 3: o: found "xy" (str), wanted a list of texts',
        ),
        ("json_schema", {"ref": {"type": "thing"}}, {}, "row 3: ref: no JSON schema ('thing' is not valid"),
        ("json_schema", {"ref": "{"}, {}, "row 3: ref: no JSON schema ("),
        ("json_schema", {"ref": {"$schema": 7}}, {}, "row 3: ref: no JSON schema ("),
        ("json_schema", {"ref": 3}, {}, "row 3: ref: no JSON schema (found 3 (int), wanted a schema)"),
        ("constraints", {"ref": ["punctuation:no_comma"]}, {}, "row 3: kwargs: missing, found ref"),
        ("constraints", {"ref": ["no_comma"], "kwargs": [{}]}, {}, "row 3: ref: lm-eval knows no 'no_comma'"),
        ("constraints", {"ref": [], "kwargs": []}, {}, "row 3: ref: found [] (list), wanted a list of instr"),
        (
            "constraints",
            {"ref": ["keywords:existence"], "kwargs": [{"keywords": None}]},
            {},
            "row 3: kwargs: keywords:existence: keywords is missing",
        ),
        (
            "constraints",
            {"ref": ["keywords:existence"], "kwargs": [{"keywords": ["c++("]}]},
            {},
            "row 3: kwargs: keywords:existence: ",
        ),
    ],
)
def test_a_wrong_reference_is_refused_by_row_and_column(
    kind: Any, row: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refusal) as caught:
        make_check(Check(kind=kind, column="ref", **fields), row, where="row 3")
    assert str(caught.value).startswith(message), str(caught.value)


def test_a_key_that_a_check_would_not_read_is_an_error() -> None:
    with pytest.raises(ValidationError, match="options: goes with kind: choice, this check is numeric"):
        Check(kind="numeric", column="answer", options="choices")
    with pytest.raises(ValidationError, match="wanted at least 48, two n-grams"):
        Limits(repetition_window=40)
