"""Seeded data for the tiny recipe: needle documents, chained arithmetic, dual-mode chats, preference pairs.

Every generator writes rows of a standard schema (`prompt` and `completion`, `text`, `messages`, or preference
pairs), so the tiny recipe travels the same road as a real one. Words are few and frequent: a small byte-level
tokenizer learns each as one token, hence lengths are counted in words and punctuation marks.

    >>> next(generate("arithmetic_text", num_rows=1, seed=7, min_steps=2, max_steps=2))
    {'prompt': '2-4+1?', 'completion': '2-4=8;8+1=9\\n9'}
"""

import inspect
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

from smol_post.refusal import describe

Row = dict[str, Any]
Problem = tuple[int, list[tuple[str, int]]]  # a start and its chain: 3, [("+", 4), ("*", 2)]

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
FILLER_TEXT = "the old road was long and we sat by a quiet lake then some birds came over it"
FILLER = FILLER_TEXT.split()
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
INSTRUCTION = "End with a dot."
XML_TOOL = {
    "name": "calc",
    "description": "work it out",
    "parameters": {"type": "object", "properties": {"sum": {"type": "string"}}},
}
PYTHON_TOOL = "def calc(sum: str) -> int: work it out"


def _needle(
    rng: random.Random, num_tokens: int, num_keys: int, max_overwrites: int, num_queries: int
) -> tuple[str, list[tuple[str, str]]]:
    """A document that leaves room for the questions, and the (key, last value) pairs to ask, in random order.

    Each of `num_keys` attributes is written once and up to `max_overwrites` times more; filler is the rest:
    `Notes: color red. the old lake. color blue.`, [("color", "blue")]
    """
    keys = rng.sample(list(VALUES), min(num_keys, len(VALUES)))
    room = num_tokens - 4 - 3 * num_queries
    order = [key for key in keys for _ in range(1 + rng.randint(0, max_overwrites))]
    rng.shuffle(order)
    last: dict[str, str] = {}
    pieces = []
    for key in order[: max(1, room // 3)]:
        last[key] = rng.choice([value for value in VALUES[key] if value != last.get(key)])
        pieces.append(f" {key} {last[key]}.")
    spare = max(0, room - 2 - 3 * len(pieces))
    while spare >= 3:
        length = min(spare, rng.randint(3, 7))
        sentence = "".join(f" {word}" for word in rng.choices(FILLER, k=length - 1))
        pieces.insert(rng.randint(0, len(pieces)), f"{sentence}.")
        spare -= length
    asked = list(last.items())
    rng.shuffle(asked)
    return "Notes:" + "".join(pieces), asked[:num_queries]


def needles(
    rng: random.Random,
    *,
    num_tokens: int = 60,
    num_keys: int = 12,
    max_overwrites: int = 2,
    num_queries: int = 4,
) -> Row:
    """A document of notes, some overwritten (the last write wins), then questions; loss on the questions.

    `Notes: pet cat. the old lake. pet dog.` -> ` Now: pet dog.`
    """
    document, asked = _needle(rng, num_tokens, num_keys, max_overwrites, num_queries)
    return {"prompt": document, "completion": " Now:" + "".join(f" {key} {value}." for key, value in asked)}


def needle_questions(
    rng: random.Random, *, num_tokens: int = 60, num_keys: int = 12, max_overwrites: int = 2
) -> Row:
    """One question about a document, with the text that must follow: `... Now: pet` -> ` dog.`"""
    document, [(key, value)] = _needle(rng, num_tokens, num_keys, max_overwrites, 1)
    return {"prompt": f"{document} Now: {key}", "answer": f" {value}."}


def needle_chats(
    rng: random.Random, *, num_tokens: int = 60, num_keys: int = 12, max_overwrites: int = 2
) -> Row:
    """The same as a no_think chat: user `Notes: pet cat. pet dog. Now: pet`, assistant `dog.`"""
    document, [(key, value)] = _needle(rng, num_tokens, num_keys, max_overwrites, 1)
    return _chat([_user(f"{document} Now: {key}"), _assistant(f"{value}.")], enable_thinking=False)


def _problem(rng: random.Random, min_steps: int, max_steps: int) -> Problem:
    """A start and its chain of operations, worked from left to right modulo 10."""
    chain = [(rng.choice("+-*"), rng.randint(0, 9)) for _ in range(rng.randint(min_steps, max_steps))]
    return rng.randint(0, 9), chain


def _question(problem: Problem) -> str:
    return str(problem[0]) + "".join(f"{sign}{number}" for sign, number in problem[1])


def _steps(problem: Problem, slip: tuple[int, int] | None = None) -> tuple[str, str]:
    """The written-out steps and the result; `slip = (step, shift)` makes one step wrong, and carries it on.

    3, [+4, *2] -> `3+4=7;7*2=4`, `4`.  With slip (0, 1): `3+4=8;8*2=6`, `6`.
    """
    value, chain = problem
    steps = []
    for index, (sign, number) in enumerate(chain):
        shift = slip[1] if slip and index == slip[0] else 0
        result = (OPERATIONS[sign](value, number) + shift) % 10
        steps.append(f"{value}{sign}{number}={result}")
        value = result
    return ";".join(steps), str(value)


def arithmetic_text(rng: random.Random, *, min_steps: int = 3, max_steps: int = 6) -> Row:
    """Raw reasoning, no chat: `3+4*2?` -> `3+4=7;7*2=4`, newline, `4`; loss on the reasoning."""
    problem = _problem(rng, min_steps, max_steps)
    return {"prompt": f"{_question(problem)}?", "completion": "\n".join(_steps(problem))}


def arithmetic_facts(rng: random.Random, *, num_facts: int = 8) -> Row:
    """Single steps, loss on all: `3+4=7;8*2=6`."""
    return {"text": ";".join(_steps(_problem(rng, 1, 1))[0] for _ in range(num_facts))}


def _user(content: str) -> Row:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Row:
    return {"role": "assistant", "content": content}


def _chat(messages: list[Row], **template_kwargs: Any) -> Row:
    return {"messages": messages, "chat_template_kwargs": template_kwargs}


def _ask(problem: Problem) -> Row:
    return _user(f"{_question(problem)}?")


def _reply(rng: random.Random, problem: Problem, think: bool, fault: str = "") -> str:
    """An answer: right, or with a `fault`: `slip` (one wrong step) or `mode` (not the mode asked for).

    think      `<think>`, newline, `3+4=7`, newline, `</think>`, newline, `7`    mode fault: `7`
    no_think   `7`    mode fault, after the template's empty think block: `3+4=7`, newline, `</think>` ... `7`
    """
    num_steps = len(problem[1])
    slip = (rng.randrange(num_steps), rng.randint(1, 9)) if fault == "slip" else None
    steps, result = _steps(problem, slip)
    if think:
        return result if fault == "mode" else f"<think>\n{steps}\n</think>\n{result}"
    return f"{steps}\n</think>\n{result}" if fault == "mode" else result


def _mode(rng: random.Random, think: bool, flag_share: float) -> tuple[list[Row], Row]:
    """How a row asks for its mode: by `enable_thinking`, or by a flag in the system message, which wins."""
    if rng.random() >= flag_share:
        return [], {"enable_thinking": think}
    flag = "/think" if think else "/no_think"
    return [{"role": "system", "content": flag}], {"enable_thinking": rng.random() < 0.5}


def reasoning_chats(rng: random.Random, *, min_steps: int = 3, max_steps: int = 6) -> Row:
    """Mid-training: a question and a worked answer with its think block in the text."""
    problem = _problem(rng, min_steps, max_steps)
    return _chat([_ask(problem), _assistant(_reply(rng, problem, think=True))], enable_thinking=True)


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
    instruction. The fault shares make rows deliberately imperfect, so that preference training has work:
    wrong steps and wrong modes among the plain rows, ignored instructions among the rows that have one.
    """
    think, draw = rng.random() < think_share, rng.random()
    if draw < variant_share:
        return rng.choice(VARIANTS)(rng, think, min_steps, max_steps)
    problem = _problem(rng, min_steps, max_steps)
    if draw < variant_share + instruction_share:
        reply = _reply(rng, problem, think) + ("" if rng.random() < instruction_fault_share else ".")
        messages = [_ask(problem), _assistant(reply)]
        return _chat(messages, enable_thinking=think, custom_instructions=INSTRUCTION)
    draw = rng.random()
    fault = "mode" if draw < mode_fault_share else "slip" if draw < mode_fault_share + slip_share else ""
    system, kwargs = _mode(rng, think, flag_share)
    return _chat([*system, _ask(problem), _assistant(_reply(rng, problem, think, fault))], **kwargs)


def _several_turns(rng: random.Random, think: bool, min_steps: int, max_steps: int) -> Row:
    messages = []
    for _ in range(rng.randint(2, 3)):
        problem = _problem(rng, min_steps, max_steps)
        messages += [_ask(problem), _assistant(_reply(rng, problem, think))]
    return _chat(messages, enable_thinking=think)


def _system_override(rng: random.Random, think: bool, min_steps: int, max_steps: int) -> Row:
    problem, flag = _problem(rng, min_steps, max_steps), "/think" if think else "/no_think"
    system = {"role": "system", "content": f"/system_override You work out sums. {flag}"}
    return _chat([system, _ask(problem), _assistant(_reply(rng, problem, think))], enable_thinking=think)


def _xml_tools(rng: random.Random, think: bool, min_steps: int, max_steps: int) -> Row:
    messages = _call(_problem(rng, min_steps, max_steps), think=False, python=False)
    return _chat(messages, enable_thinking=False, **_tools(python=False))


def _python_tools(rng: random.Random, think: bool, min_steps: int, max_steps: int) -> Row:
    messages = _call(_problem(rng, min_steps, max_steps), think=False, python=True)
    return _chat(messages, enable_thinking=False, **_tools(python=True))


def _call(problem: Problem, *, think: bool, python: bool) -> list[Row]:
    """The user asks for calc; it is called, and its result told; thoughts are `calc`, then the result."""
    question, (_, result) = _question(problem), _steps(problem)
    before, after = (f"<think>\n{thought}\n</think>\n" if think else "" for thought in ("calc", result))
    ask, answer = _user(f"calc {question}?"), _assistant(f"{after}{result}")
    if python:
        return [ask, _assistant(f"{before}<code>\ncalc('{question}')\n</code>"), _user(result), answer]
    call = {"type": "function", "function": {"name": "calc", "arguments": {"sum": question}}}
    return [ask, _assistant(before) | {"tool_calls": [call]}, {"role": "tool", "content": result}, answer]


VARIANTS = (_several_turns, _system_override, _xml_tools, _python_tools)


def tool_chats(
    rng: random.Random,
    *,
    think_share: float = 0.4,
    python_share: float = 0.3,
    plain_share: float = 0.3,
    max_turns: int = 3,
    min_steps: int = 1,
    max_steps: int = 2,
) -> Row:
    """SFT: up to `max_turns` questions with a calculator at hand, as an XML or a Python tool.

    `calc 3+4*2?` -> a call of calc with `3+4*2`; its result `4` -> `4`.  Plain `3+4*2?` (`plain_share`), of
    one to six steps, is answered without it, as in other chats. Short sums are what a tiny model can copy.
    """
    think, python = rng.random() < think_share, rng.random() < python_share
    messages = []
    for _ in range(rng.randint(1, max_turns)):
        if rng.random() < plain_share:
            problem = _problem(rng, 1, 6)
            messages += [_ask(problem), _assistant(_reply(rng, problem, think))]
        else:
            messages += _call(_problem(rng, min_steps, max_steps), think=think, python=python)
    return _chat(messages, enable_thinking=think, **_tools(python))


def _tools(python: bool) -> Row:
    return {"python_tools": [PYTHON_TOOL]} if python else {"xml_tools": [XML_TOOL]}


def preference_pairs(
    rng: random.Random,
    *,
    think_share: float = 0.5,
    flag_share: float = 0.3,
    instruction_share: float = 0.4,
    mode_fault_share: float = 0.4,
    min_steps: int = 3,
    max_steps: int = 6,
) -> Row:
    """Chosen is right; rejected has a fault of the imperfect SFT rows, so it is roughly what the model says.

    think: a wrong step, or the wrong mode (`mode_fault_share`). no_think: the wrong mode, or an ignored
    instruction (`instruction_share`); a tiny model cannot work out the bare answer, so it is not judged.
    """
    think, problem = rng.random() < think_share, _problem(rng, min_steps, max_steps)
    chosen = _reply(rng, problem, think)
    if not think and rng.random() < instruction_share:
        # Not in think mode: two answers that share a long trace would push on the trace itself.
        system, kwargs = [], {"enable_thinking": think, "custom_instructions": INSTRUCTION}
        chosen, rejected = f"{chosen}.", chosen
    else:
        system, kwargs = _mode(rng, think, flag_share)
        fault = "mode" if not think or rng.random() < mode_fault_share else "slip"
        rejected = _reply(rng, problem, think, fault)
    return {
        "prompt": [*system, _ask(problem)],
        "chosen": [_assistant(chosen)],
        "rejected": [_assistant(rejected)],
        "chat_template_kwargs": kwargs,
    }


def tool_pairs(
    rng: random.Random,
    *,
    think_share: float = 0.4,
    python_share: float = 0.3,
    plain_share: float = 0.3,
    answer_share: float = 0.4,
    min_steps: int = 1,
    max_steps: int = 2,
) -> Row:
    """Chosen calls calc where the user asks for it, tells its result, and answers plain questions itself.

    `calc 3+4*2?`: a call of calc with `3+4*2` is chosen, `4` rejected.  Plain `3+4*2?` (`plain_share`): the
    reverse. Of the asked ones, `answer_share` go on to calc's result `4`: the answer `4` is chosen, the same
    call again rejected. APO without pairs of a kind unlearns what SFT taught: the call, or the answer.
    """
    think, python = rng.random() < think_share, rng.random() < python_share
    plain, problem = rng.random() < plain_share, _problem(rng, min_steps, max_steps)
    ask, call, result, answer = _call(problem, think=think, python=python)
    reply = _assistant(_reply(rng, problem, think))
    if plain:
        prompt, chosen, rejected = [_ask(problem)], reply, call
    elif rng.random() < answer_share:
        prompt, chosen, rejected = [ask, call, result], answer, call
    else:
        prompt, chosen, rejected = [ask], call, reply
    return {
        "prompt": prompt,
        "chosen": [chosen],
        "rejected": [rejected],
        "chat_template_kwargs": {"enable_thinking": think, **_tools(python)},
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
    return _chat([*system, _ask(problem)], **kwargs) | {"answer": _steps(problem)[1]}


GENERATORS: dict[str, Callable[..., Row]] = {
    "needles": needles,
    "needle_chats": needle_chats,
    "needle_questions": needle_questions,
    "arithmetic_text": arithmetic_text,
    "arithmetic_facts": arithmetic_facts,
    "arithmetic_questions": arithmetic_questions,
    "reasoning_chats": reasoning_chats,
    "dual_mode_chats": dual_mode_chats,
    "tool_chats": tool_chats,
    "preference_pairs": preference_pairs,
    "tool_pairs": tool_pairs,
}


# The least of whole numbers; a needle, its question and what frames them are ten words and marks.
LEAST = {"num_tokens": 10, "num_keys": 1, "max_overwrites": 0, "num_queries": 1, "num_facts": 1,
         "max_turns": 1, "min_steps": 1, "max_steps": 1}  # fmt: skip


def check_options(name: str, options: Row, *, given: tuple[str, ...] = ()) -> None:
    """ValueError where there is no such generator, or it has no such option or value.

    `given` are options that the caller sets itself.
    """
    if name not in GENERATORS:
        raise ValueError(f"unknown generator {name!r}; known: {', '.join(GENERATORS)}")
    _, *parameters = inspect.signature(GENERATORS[name]).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.name not in given}
    for option, value in options.items():
        where = f"generator {name!r}: option {option!r}"
        if option in given:
            raise ValueError(f"{where} is not to be chosen here; remove it")
        if option not in defaults:
            raise ValueError(f"generator {name!r} has no option {option!r}; known: {', '.join(defaults)}")
        if wanted := _unlike(defaults[option], value, LEAST.get(option)):
            raise ValueError(f"{where}: found {describe(value)}, wanted {wanted}")
    least, most = ((defaults | options).get(key) for key in ("min_steps", "max_steps"))
    if least is not None and least > most:
        raise ValueError(f"generator {name!r}: min_steps {least} is more than max_steps {most}")


def _unlike(default: Any, value: Any, least: int | None) -> str:
    """What is wanted of an option where `value` is not of its default's kind or range, else ""."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, float):
        return "" if number and 0 <= value <= 1 else "a share, from 0 to 1"
    return (
        "" if number and isinstance(value, int) and value >= (least or 0) else f"a whole number from {least}"
    )


def generate(name: str, *, num_rows: int, seed: int, **options: Any) -> Iterator[Row]:
    """`num_rows` rows of one generator; the same arguments always give the same rows.

    Raises ValueError: an unknown generator, or an option or value that it does not have.
    """
    check_options(name, options)
    rng = random.Random(f"{name} {seed}")
    return (GENERATORS[name](rng, **options) for _ in range(num_rows))
