"""What a prompt is asked, wave after wave, and what comes of the answers: traces, pairs, conversations.

    traces with num_samples: 2     yields [Request, Request], is sent two answers, returns two Candidates

A script is a function of recipe, prompt and answers, so asking and sifting play the very same one: the first
with a teacher, the second with the journal.
"""

import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from smol_post import turns
from smol_post.asking import Prompt, Request
from smol_post.generate_config import Generation, PairsRecipe, TurnsRecipe
from smol_post.judging import Answer, make_check, reject, reject_pair
from smol_post.messages import END_THINK, THINK, Messages

Script = Generator[list[Request], list[Mapping[str, Any]], "list[Candidate]"]


class Ask(Protocol):
    """Make a request of a teacher of the recipe."""

    def __call__(
        self, teacher: str, prompt: Prompt, sample: int, *, messages: Messages | None = None
    ) -> Request:
        """The request for one sample of a prompt, or of a later turn with these messages."""
        ...


class Candidate(NamedTuple):
    """What may become rows: why not, if not, and of pairs how long both answers are."""

    ids: list[str]
    sample: int
    reason: str | None
    tokens: int
    text: str = ""  # of the answer, or answers, as duplicates are looked for
    rows: tuple[dict[str, Any], ...] = ()
    lengths: tuple[int, int] | None = None


class Unit(NamedTuple):
    """One prompt with what is to be asked of it, or why nothing is (`reason`)."""

    source: str
    row: int
    mode: str | None
    reason: str | None
    prompt: Prompt | None = None
    script: Callable[[], Script] | None = None


def answer_of(reply: Mapping[str, Any]) -> Answer:
    """A line of the journal as what is judged; a request that failed has no text and no end."""
    return Answer(reply.get("text", ""), reply.get("ended", False), reply.get("tokens", 0))


def traces(recipe: Generation, prompt: Prompt, ask: Ask) -> Script:
    """Samples of one teacher, each a row of its own; turns that the prompt brings are not trained."""
    asked = [ask("teacher", prompt, sample) for sample in range(recipe.num_samples)]
    check, earlier = _check(recipe, prompt), [turns.untrained(one) for one in prompt.messages]
    found = []
    for one, reply in zip(asked, (yield asked), strict=True):
        answer = answer_of(reply)
        reason = "failed" if "failed" in reply else None
        reason = reason or reject(answer, mode=prompt.mode, limits=recipe.filters, check=check)
        row = {
            "messages": [*earlier, {"role": "assistant", "content": answer.text}],
            "chat_template_kwargs": prompt.kwargs(),
            "source": prompt.source,
        }
        found.append(Candidate([one.id], one.sample, reason, answer.num_tokens, answer.text, (row,)))
    return found


def pairs(recipe: PairsRecipe, prompt: Prompt, ask: Ask, count: Callable[[str], int]) -> Script:
    """Samples of strong and weak, the first with the first; the row's own answer where there is no strong.

    count: tokens of a text, for answers of the row, beside which the weak ones are counted alike. Where a
    source has a check, chosen is right and rejected is not.
    """
    numbers = range(recipe.num_samples)
    weak = [ask("weak", prompt, sample) for sample in numbers]
    strong = [ask("strong", prompt, sample) for sample in numbers] if recipe.strong else []
    check = _check(recipe, prompt)
    replies = yield [*strong, *weak]
    found = []
    for sample in numbers:
        reply, other = replies[sample - len(weak)], replies[sample] if strong else {}
        rejected = answer_of(reply)
        if strong:
            chosen = answer_of(other)
        else:
            assert prompt.own is not None
            chosen = Answer(prompt.own, True, count(prompt.own))
            rejected = rejected._replace(num_tokens=count(rejected.text))
        reason = "failed" if "failed" in reply or "failed" in other else None
        reason = reason or _of_pair(recipe, prompt, chosen, rejected, check)
        row = {
            "prompt": prompt.messages,
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "chat_template_kwargs": prompt.kwargs(),
            "source": prompt.source,
        }
        ids = [one[sample].id for one in (strong, weak) if one]
        tokens = chosen.num_tokens + rejected.num_tokens
        text = f"{chosen.text}\n{rejected.text}"
        lengths = chosen.num_tokens, rejected.num_tokens
        found.append(Candidate(ids, sample, reason, tokens, text, (row,), lengths))
    return found


def _of_pair(
    recipe: PairsRecipe, prompt: Prompt, chosen: Answer, rejected: Answer, check: Callable[[str], bool] | None
) -> str | None:
    if reason := reject(chosen, mode=prompt.mode, limits=recipe.filters, check=check):
        return f"chosen_{reason}"
    if prompt.mode == "no_think" and rejected.text.startswith(THINK):
        return "rejected_wrong_mode"  # whatever it may be: there the template has begun the answer
    fault = reject(rejected, mode=prompt.mode, limits=recipe.filters, check=check)
    if fault == "empty" or (fault not in (None, "wrong_answer", *recipe.rejected_may_be)):
        return f"rejected_{fault}"
    if check is not None and fault is None:
        return "both_right"
    return reject_pair(chosen, rejected, limits=recipe.filters)


def conversations(recipe: TurnsRecipe, prompt: Prompt, ask: Ask) -> Script:
    """One conversation a sample, turn after turn; it ends with the first answer that is left out.

    The teacher is told its earlier answers without their thoughts, unless it is a checkpoint, whose template
    decides.
    """
    found = []
    check = _check(recipe, prompt)
    for sample in range(recipe.num_samples):
        rng = random.Random(f"{recipe.seed} {prompt.source} {prompt.row} {prompt.mode} {sample}")
        planned = turns.plan(rng, prompt.messages, recipe.turns, first=prompt.mode)
        told, answers, ids = prompt.messages[:-1], list[Answer](), list[str]()
        reason = None
        for turn in planned:
            told = [*told, {"role": "user", "content": turn.user}]
            one = ask("teacher", replace(prompt, mode=turn.mode), sample, messages=told)
            (reply,) = yield [one]
            ids.append(one.id)
            answers.append(answer_of(reply))

            def holds(text: str, turn: turns.Turn = turn) -> bool:
                return turn.holds(text) and (check is None or check(text))

            reason = "failed" if "failed" in reply else None
            reason = reason or reject(answers[-1], mode=turn.mode, limits=recipe.filters, check=holds)
            if reason:
                break
            text = answers[-1].text
            if recipe.teacher.checkpoint is None:
                text = text.rpartition(END_THINK)[2].lstrip()
            told = [*told, {"role": "assistant", "content": text}]
        texts = [one.text for one in answers]
        columns = {"chat_template_kwargs": prompt.kwargs(), "source": prompt.source}
        rows = () if reason else tuple(turns.rows(prompt.messages, planned, texts, **columns))
        tokens = sum(one.num_tokens for one in answers)
        found.append(Candidate(ids, sample, reason, tokens, "\n".join(texts), rows))
    return found


def _check(recipe: Generation, prompt: Prompt) -> Callable[[str], bool] | None:
    check = recipe.checks.get(prompt.source)
    where = f"source '{prompt.source}': row {prompt.row}"
    return make_check(check, prompt.raw, where=where) if check else None
