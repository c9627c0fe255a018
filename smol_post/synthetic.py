"""Seeded data for the tiny recipe: needle documents, chained arithmetic, chats in both modes, preference pairs.

Every generator writes one row of a standard schema (`prompt` and `completion`, `messages`, or a preference
pair), so the tiny recipe travels the same road as a real one. Words are few and frequent: a small byte-level
tokenizer learns nearly each of them as one token, hence lengths are counted in words and punctuation marks.

    >>> next(generate("needles", num_rows=1, seed=0, num_tokens=24, num_queries=1))["completion"]
    ' Now: pet owl.'
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
Problem = tuple[int, list[tuple[str, int]]]  # a start and its chain: 3, [("+", 4), ("*", 2)]
Draw = Callable[[], Problem]

# An attribute has ten values of its own, so a guess is right one time in ten.
ATTRIBUTES = {
    "color": "red blue green pink gray gold black white tan teal",
    "pet": "cat dog cow pig hen fox bee ant owl bat",
    "fruit": "fig plum pear lime kiwi date peach mango apple lemon",
    "city": "rome paris oslo lima cairo kyoto delhi bern quito minsk",
    "tool": "saw axe hammer drill rasp wrench clamp level plane chisel",
    "metal": "iron tin zinc lead copper nickel cobalt steel brass bronze",
    "drink": "tea milk cola water juice wine beer cider cocoa coffee",
    "room": "hall attic cellar kitchen porch study closet garage bath loft",
    "sport": "golf polo judo chess rugby tennis hockey ski surf rowing",
    "plant": "oak elm ash fern moss rose lily ivy palm reed",
    "sky": "rain snow hail fog wind sun storm frost mist heat",
    "job": "cook nurse pilot clerk judge smith baker miner tailor guard",
}
VALUES = {attribute: words.split() for attribute, words in ATTRIBUTES.items()}
FILLER = [
    "the",
    "old",
    "road",
    "was",
    "long",
    "and",
    "we",
    "sat",
    "by",
    "a",
    "quiet",
    "lake",
    "then",
    "some",
    "birds",
    "came",
    "over",
    "it",
]
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: (a + b) % 10,
    "-": lambda a, b: (a - b) % 10,
    "*": lambda a, b: (a * b) % 10,
}
CALCULATOR = {
    "name": "calc",
    "description": "work it out",
    "parameters": {"type": "object", "properties": {"sum": {"type": "string"}}},
}
INSTRUCTION = "End with a dot."
PYTHON_CALCULATOR = "def calc(sum: str) -> int: work it out"


# ---------------------------------------------------------------- needle documents


def _facts(rng: random.Random, keys: list[str], max_overwrites: int) -> list[tuple[str, str]]:
    """Writes in document order: each key once, then up to `max_overwrites` times again with another value."""
    order = [key for key in keys for _ in range(1 + rng.randint(0, max_overwrites))]
    rng.shuffle(order)
    current: dict[str, str] = {}
    facts = []
    for key in order:
        current[key] = rng.choice([value for value in VALUES[key] if value != current.get(key)])
        facts.append((key, current[key]))
    return facts


def _haystack(rng: random.Random, facts: list[tuple[str, str]], num_tokens: int) -> str:
    """Facts of three tokens each, spread over filler, in all about `num_tokens`: `Notes: color red. we sat by.`"""
    spare = max(0, num_tokens - 2 - 3 * len(facts))
    pieces = [f" {key} {value}." for key, value in facts]
    while spare >= 3:
        length = min(spare, rng.randint(3, 7))
        sentence = "".join(f" {word}" for word in rng.choices(FILLER, k=length - 1)) + "."
        pieces.insert(rng.randint(0, len(pieces)), sentence)
        spare -= length
    return "Notes:" + "".join(pieces)


def _needle(
    rng: random.Random, num_tokens: int, num_keys: int, max_overwrites: int, num_queries: int
) -> tuple[str, list[tuple[str, str]]]:
    """The document without its questions, and the (key, last value) pairs that may be asked, in random order."""
    keys = rng.sample(list(VALUES), min(num_keys, len(VALUES)))
    room = num_tokens - 4 - 3 * num_queries
    facts = _facts(rng, keys, max_overwrites)[: max(1, room // 3)]
    asked = list(dict(facts).items())
    rng.shuffle(asked)
    return _haystack(rng, facts, room), asked[:num_queries]


def needles(
    rng: random.Random,
    *,
    num_tokens: int = 62,
    num_keys: int = 12,
    max_overwrites: int = 2,
    num_queries: int = 4,
) -> Row:
    """A document of notes, some overwritten (the last write wins), then questions; loss on the questions.

    `Notes: pet cat. the old lake. pet dog.` -> ` Now: pet dog.`
    """
    document, asked = _needle(rng, num_tokens, num_keys, max_overwrites, num_queries)
    answers = "".join(f" {key} {value}." for key, value in asked)
    return {"prompt": document, "completion": " Now:" + answers}


def needle_chats(
    rng: random.Random, *, num_tokens: int = 62, num_keys: int = 12, max_overwrites: int = 2
) -> Row:
    """The same as a no_think chat: user `Notes: pet cat. pet dog. Now: pet`, assistant `dog.`."""
    document, asked = _needle(rng, num_tokens, num_keys, max_overwrites, 1)
    key, value = asked[0]
    return _chat([_user(f"{document} Now: {key}"), _assistant(f"{value}.")], enable_thinking=False)


def needle_questions(
    rng: random.Random, *, num_tokens: int = 62, num_keys: int = 12, max_overwrites: int = 2
) -> Row:
    """One question about a document, with the text that must follow: `... Now: pet` -> ` dog.`"""
    document, asked = _needle(rng, num_tokens, num_keys, max_overwrites, 1)
    key, value = asked[0]
    return {"prompt": f"{document} Now: {key}", "answer": f" {value}."}


# ---------------------------------------------------------------- arithmetic


def _problem(rng: random.Random, min_steps: int, max_steps: int) -> Problem:
    """A start and its chain of operations, worked from left to right modulo 10."""
    chain = [(rng.choice("+-*"), rng.randint(0, 9)) for _ in range(rng.randint(min_steps, max_steps))]
    return rng.randint(0, 9), chain


def _question(start: int, chain: list[tuple[str, int]]) -> str:
    return f"{start}" + "".join(f"{sign}{number}" for sign, number in chain) + "?"


def _steps(start: int, chain: list[tuple[str, int]], wrong: tuple[int, int] | None = None) -> tuple[str, int]:
    """The written-out steps and the result; `wrong = (step, shift)` makes one slip, and carries it on.

    3, [+4, *2] -> `3+4=7;7*2=4`, 4.  With wrong (0, 1): `3+4=8;8*2=6`, 6.
    """
    lines, value = [], start
    for index, (sign, number) in enumerate(chain):
        result = OPERATIONS[sign](value, number)
        if wrong is not None and index == wrong[0]:
            result = (result + wrong[1]) % 10
        lines.append(f"{value}{sign}{number}={result}")
        value = result
    return ";".join(lines), value


def arithmetic_text(rng: random.Random, *, min_steps: int = 3, max_steps: int = 6) -> Row:
    """Raw reasoning, no chat: `3+4*2?` -> `3+4=7;7*2=4 so 4`, loss on the reasoning."""
    start, chain = _problem(rng, min_steps, max_steps)
    steps, result = _steps(start, chain)
    return {"prompt": _question(start, chain), "completion": f"{steps}\n{result}"}


def arithmetic_facts(rng: random.Random, *, num_facts: int = 8) -> Row:
    """Single steps, loss on all: `3+4=7;8*2=6`."""
    return {"text": ";".join(_steps(*_problem(rng, 1, 1))[0] for _ in range(num_facts))}


# ---------------------------------------------------------------- chats


def _user(content: str) -> Row:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Row:
    return {"role": "assistant", "content": content}


def _chat(messages: list[Row], **template_kwargs: Any) -> Row:
    return {"messages": messages, "chat_template_kwargs": template_kwargs}


def _slip(rng: random.Random, num_steps: int) -> tuple[int, int]:
    return rng.randrange(num_steps), rng.randint(1, 9)


def _reply(rng: random.Random, problem: Problem, think: bool, fault: str = "") -> str:
    """An answer: right, or with a `fault`: `slip` (one wrong step) or `mode` (not the mode that was asked for).

    think      `<think>\\n3+4=7\\n</think>\\n7`    mode fault: `7`
    no_think   `7`    mode fault, after the template's empty think block: `3+4=7\\n</think>\\n7`
    """
    steps, result = _steps(*problem, wrong=_slip(rng, len(problem[1])) if fault == "slip" else None)
    if think:
        return f"{result}" if fault == "mode" else f"<think>\n{steps}\n</think>\n{result}"
    return f"{steps}\n</think>\n{result}" if fault == "mode" else f"{result}"


def _fault(rng: random.Random, slip_share: float, mode_share: float) -> str:
    draw = rng.random()
    return "mode" if draw < mode_share else "slip" if draw < mode_share + slip_share else ""


def reasoning_chats(rng: random.Random, *, min_steps: int = 3, max_steps: int = 6) -> Row:
    """Mid-training: a question and a worked answer with its think block in the text."""
    problem = _problem(rng, min_steps, max_steps)
    return _chat(
        [_user(_question(*problem)), _assistant(_reply(rng, problem, think=True))], enable_thinking=True
    )


def _mode(rng: random.Random, think: bool, flag_share: float) -> tuple[list[Row], Row]:
    """How a row asks for its mode: by `enable_thinking`, or by a flag in the system message, which beats it."""
    if rng.random() >= flag_share:
        return [], {"enable_thinking": think}
    flag = "/think" if think else "/no_think"
    return [{"role": "system", "content": flag}], {"enable_thinking": rng.random() < 0.5}


def dual_mode_chats(
    rng: random.Random,
    *,
    think_share: float = 0.5,
    flag_share: float = 0.3,
    variant_share: float = 0.1,
    instruction_share: float = 0.1,
    slip_share: float = 0.0,
    mode_fault_share: float = 0.0,
    instruction_fault_share: float = 0.0,
    min_steps: int = 3,
    max_steps: int = 6,
) -> Row:
    """SFT: steps in a think block, or the bare answer, as the row's mode says.

    A share of rows are variants (several turns, `/system_override`, XML and Python tools) or carry a custom
    instruction. The fault shares make rows deliberately imperfect, so that preference training has work: wrong
    steps and wrong modes among the plain rows, ignored instructions among those that carry one.
    """
    think, draw = rng.random() < think_share, rng.random()
    if draw < variant_share:
        return rng.choice(VARIANTS)(rng, think, lambda: _problem(rng, min_steps, max_steps))
    problem = _problem(rng, min_steps, max_steps)
    if draw < variant_share + instruction_share:
        reply = _reply(rng, problem, think) + ("" if rng.random() < instruction_fault_share else ".")
        messages = [_user(_question(*problem)), _assistant(reply)]
        return _chat(messages, enable_thinking=think, custom_instructions=INSTRUCTION)
    fault = _fault(rng, slip_share, mode_fault_share)
    system, kwargs = _mode(rng, think, flag_share)
    return _chat(
        [*system, _user(_question(*problem)), _assistant(_reply(rng, problem, think, fault))], **kwargs
    )


def _several_turns(rng: random.Random, think: bool, draw: Draw) -> Row:
    messages = []
    for _ in range(rng.randint(2, 3)):
        problem = draw()
        messages += [_user(_question(*problem)), _assistant(_reply(rng, problem, think))]
    return _chat(messages, enable_thinking=think)


def _system_override(rng: random.Random, think: bool, draw: Draw) -> Row:
    problem, flag = draw(), "/think" if think else "/no_think"
    system = {"role": "system", "content": f"/system_override You work out sums. {flag}"}
    messages = [system, _user(_question(*problem)), _assistant(_reply(rng, problem, think))]
    return _chat(messages, enable_thinking=think)


def _xml_tools(rng: random.Random, think: bool, draw: Draw) -> Row:
    question, result = _solved(draw())
    call = {"type": "function", "function": {"name": "calc", "arguments": {"sum": question}}}
    messages = [
        _user(f"calc {question}?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        _assistant(result),
    ]
    return _chat(messages, enable_thinking=False, xml_tools=[CALCULATOR])


def _python_tools(rng: random.Random, think: bool, draw: Draw) -> Row:
    question, result = _solved(draw())
    code = f"<code>\ncalc('{question}')\n</code>"
    messages = [_user(f"calc {question}?"), _assistant(code), _user(result), _assistant(result)]
    return _chat(messages, enable_thinking=False, python_tools=[PYTHON_CALCULATOR])


def _solved(problem: Problem) -> tuple[str, str]:
    return _question(*problem)[:-1], str(_steps(*problem)[1])


VARIANTS = (_several_turns, _system_override, _xml_tools, _python_tools)


# ---------------------------------------------------------------- preferences and questions


def preference_pairs(
    rng: random.Random,
    *,
    think_share: float = 0.5,
    flag_share: float = 0.3,
    instruction_share: float = 0.2,
    mode_fault_share: float = 0.5,
    min_steps: int = 3,
    max_steps: int = 6,
) -> Row:
    """Chosen is right; rejected slips, answers in the wrong mode or ignores an instruction, as imperfect SFT rows do.

    A tiny model cannot work out the bare answer of no_think: there only mode and instruction are judged.
    """
    think, problem = rng.random() < think_share, _problem(rng, min_steps, max_steps)
    chosen = _reply(rng, problem, think)
    if not think and rng.random() < instruction_share:
        system, kwargs = [], {"enable_thinking": think, "custom_instructions": INSTRUCTION}
        chosen, rejected = f"{chosen}.", chosen
    else:
        system, kwargs = _mode(rng, think, flag_share)
        fault = "mode" if not think or rng.random() < mode_fault_share else "slip"
        rejected = _reply(rng, problem, think, fault)
    return {
        "prompt": [*system, _user(_question(*problem))],
        "chosen": [_assistant(chosen)],
        "rejected": [_assistant(rejected)],
        "chat_template_kwargs": kwargs,
    }


def arithmetic_questions(
    rng: random.Random,
    *,
    enable_thinking: bool = True,
    flag_share: float = 0.5,
    min_steps: int = 3,
    max_steps: int = 6,
) -> Row:
    """A question in one mode, with the answer that must stand, alone, after the think block (if any)."""
    problem = _problem(rng, min_steps, max_steps)
    system, kwargs = _mode(rng, enable_thinking, flag_share)
    row = _chat([*system, _user(_question(*problem))], **kwargs)
    return row | {"answer": f"{_steps(*problem)[1]}", "think": enable_thinking}


GENERATORS: dict[str, Callable[..., Row]] = {
    function.__name__: function
    for function in (
        needles,
        needle_chats,
        needle_questions,
        arithmetic_text,
        arithmetic_facts,
        arithmetic_questions,
        reasoning_chats,
        dual_mode_chats,
        preference_pairs,
    )
}


def generate(name: str, *, num_rows: int, seed: int, **options: Any) -> Iterator[Row]:
    """`num_rows` rows of one generator; the same arguments always give the same rows.

    >>> next(generate("arithmetic_text", num_rows=1, seed=1, min_steps=2, max_steps=2))
    {'prompt': '3+4*2?', 'completion': '3+4=7;7*2=4\\n4'}
    """
    if name not in GENERATORS:
        raise ValueError(f"unknown generator {name!r}; there are {', '.join(GENERATORS)}")
    known = list(inspect.signature(GENERATORS[name]).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(f"generator {name!r} has no option {option!r}; it has {', '.join(known)}")
    rng = random.Random(f"{name} {seed}")
    return (GENERATORS[name](rng, **options) for _ in range(num_rows))


def plain_text(row: Row) -> str:
    """A row as text, chats as bare ChatML: what a tokenizer is trained on when no template is at hand."""
    if "messages" not in row:
        return row.get("text", "") or row["prompt"] + row["completion"]
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"])
    return "".join(turns) + json.dumps(row["chat_template_kwargs"].get("xml_tools", ""))


def corpus(seed: int, *, num_rows: int = 2000, render: Callable[[Row], str] = plain_text) -> Iterator[str]:
    """Texts to train the tokenizer on; `render` turns a row into text (pass one that applies the template)."""
    sources: list[tuple[str, Row]] = [
        ("needles", {"num_tokens": 200}),
        ("arithmetic_text", {}),
        ("reasoning_chats", {}),
        ("dual_mode_chats", {}),
    ]
    for name, options in sources:
        yield from map(render, generate(name, num_rows=num_rows, seed=seed, **options))
