"""Tool calls of a checkpoint: are they the ones that a row makes, and can they be made at all.

    row        user: "Weather in Paris?"   assistant: <tool_call> weather(city="Paris")
    generated  <tool_call> weather(city="Paris")                        right, valid
    generated  <tool_call> weather(city="Rome")                         valid
    generated  "It is sunny."                                           neither

Right as in BFCL (Patil et al., 2025): the same tools with the same arguments, parallel calls in any order;
where none is wanted, none. Stricter: values are equal as JSON, and the turn has to end.
"""

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smol_post import messages, scoring, sources, synthetic, tool_calls
from smol_post.config import Source
from smol_post.evals_config import EvalsRecipe, ToolCalls
from smol_post.refusal import Refusal
from smol_post.tool_calls import Call, Tool


class Question(NamedTuple):
    """What comes before a row's first answer, the tools on offer, and the calls that this answer makes."""

    messages: messages.Messages
    variables: dict[str, Any]
    tools: dict[str, Tool]
    wanted: list[Call]


def evaluate(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: ToolCalls,
    recipe: EvalsRecipe,
    *,
    mode: str,
) -> tuple[dict[str, scoring.Metric], list[dict[str, Any]]]:
    """The metrics of one entry in one mode, and transcripts; nothing where the template has no tools.

    Accuracy is over all questions. `_valid` is over those that want calls: some are made, and all of them
    parse, are of a known tool and hold by its schema.
    """
    every = questions(asked, recipe.seed)
    prompts = []
    for one in every:
        try:
            how = tool_calls.given(str(tokenizer.chat_template), one.variables)
        except ValueError:
            return {}, []
        how = {"date_string": recipe.date_string} | how | {"enable_thinking": mode == "think"}
        remedy = f"leave tool_calls '{asked.name}' out"
        prompts.append(str(scoring.render(tokenizer, one.messages, remedy=remedy, tokenize=False, **how)))
    encoded: Any = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(map(len, encoded)) + asked.max_new_tokens
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > context:
        raise Refusal(
            f"tool_calls '{asked.name}': a question and its answer may take {longest:,} tokens, the model "
            f"has {context:,}; lower max_new_tokens, or leave it out"
        )
    said = scoring.generate(
        lm, tokenizer, encoded, max_new_tokens=asked.max_new_tokens, batch_size=recipe.batch_size
    )
    judged = [
        judge(one, text, ended=ended, opened=prompt.rstrip().endswith(messages.THINK))
        for one, prompt, (text, ended) in zip(every, prompts, said, strict=True)
    ]
    right, valid = asked.metrics(mode)
    found = {right: scoring.share([one for one, _ in judged])}
    if able := [able for one, (_, able) in zip(every, judged, strict=True) if one.wanted]:
        found[valid] = scoring.share(able)
    samples = [
        {"mode": mode, "prompt": one.messages[-1].get("content", ""), "output": text, "right": hit}
        for one, (text, _), (hit, _) in zip(every[: recipe.num_samples], said, judged, strict=False)
    ]
    return found, samples


def judge(question: Question, text: str, *, ended: bool, opened: bool = False) -> tuple[bool, bool]:
    """Whether a turn makes the wanted calls, or answers where none is, and whether its calls are sound."""
    python = any(one.python for one in question.tools.values())
    calls = tool_calls.parse(text, python=python, opened=opened)
    bound = [tool_calls.bind(one, question.tools) for one in calls]
    able = all(not tool_calls.check(one, question.tools).problem for one in calls)
    right = tool_calls.equal(bound, question.wanted)
    says = bool(calls or scoring.answer(text, opened=opened).strip())  # silence is no answer
    return ended and right and says, ended and bool(calls) and able


def questions(asked: ToolCalls, seed: int) -> list[Question]:
    """The questions of an entry in the order of their rows; Refusal for a bad row, or for too few of them."""
    found = list(islice(_questions(asked, seed), asked.num_questions if asked.generator else None))
    where = asked.path or f"generator {asked.generator}"
    if len(found) < (asked.num_questions or 1):
        raise Refusal(
            f"tool_calls '{asked.name}': {where}: found {len(found)} rows with tools; lower num_questions"
        )
    if asked.num_questions and asked.num_questions < len(found):
        chosen = random.Random(f"tool_calls {seed}").sample(range(len(found)), asked.num_questions)
        found = [found[index] for index in sorted(chosen)]
    return found


def _questions(asked: ToolCalls, seed: int) -> Iterator[Question]:
    source = Source(name=asked.name, path=asked.path) if asked.path else None
    rows: Any = (
        ((raw.number, raw.content) for raw in sources.read_rows(source, folder=Path()))
        if source
        else enumerate(
            synthetic.generate(
                str(asked.generator), num_rows=20 * (asked.num_questions or 0), seed=seed, **asked.options
            ),
            1,
        )
    )
    for number, content in rows:
        try:
            if question := read_question(sources.parse_row(content, columns={})):
                yield question
        except ValueError as error:
            where = f"tool_calls '{asked.name}': {asked.path or asked.generator}: row {number}"
            raise Refusal(f"{where}: {error}; mend the row") from None


def read_question(row: Mapping[str, Any]) -> Question | None:
    """The question of a row; None where it has no tools.

    Raises ValueError: what `clean_row` refuses, a broken tool, the flag of a mode in the system message, no
    question or answer, an answer that does not parse or calls what is not on offer.
    """
    said, variables = messages.clean_row(row)
    tools = tool_calls.offered(variables)
    if not tools:
        return None
    roles = [one["role"] for one in said]
    first = roles.index("assistant") if "assistant" in roles else 0
    if not first:
        raise ValueError(f"wanted a question and its answer, found the roles {', '.join(roles)}")
    system = str(said[0].get("content", "")).split() if roles[0] == "system" else []
    if flags := {"/think", "/no_think"} & set(system):
        raise ValueError(f"messages[0] (system): found {flags.pop()}, but the mode is asked for; take it out")
    python = any(one.python for one in tools.values())
    wanted = [tool_calls.bind(one, tools) for one in tool_calls.of_message(said[first], python=python)]
    if wrong := [one.problem for one in wanted if one.problem]:
        raise ValueError(f"messages[{first}] (assistant): {wrong[0]}")
    return Question(said[:first], variables, tools, wanted)
