"""Conversations of several turns: each adds a verifiable constraint, and modes switch between turns.

After Multi-IF (He et al., 2024, arXiv:2410.15553): the first turn asks with one constraint, each later
one adds another, and an answer is judged by all so far.

    plan  ->  Turn("How do magnets work? Your answer must contain a title, ...", "think", (title,))
              Turn("Rewrite your answer. Everything so far still holds. ...", "no_think", (title, no_comma))
    rows  ->  one row a turn where modes switch, as a person's live switch is seen; else one row
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from smol_post import constraints
from smol_post.chat import mode_of
from smol_post.constraints import Constraint
from smol_post.judging_config import Turns

Mode = Literal["think", "no_think"]
AGAIN = (
    "Rewrite your answer. Everything so far still holds.",
    "Now answer again, and keep to all that I asked before.",
    "One thing more for the same answer; what I asked so far stays.",
)


class Turn(NamedTuple):
    """What the user says, the mode of the answer, and every constraint that it must keep to."""

    user: str
    mode: Mode
    constraints: tuple[Constraint, ...]

    def holds(self, text: str) -> bool:
        """Whether an answer, its thought taken off, keeps to all of them."""
        return all(one.holds(text) for one in self.constraints)


def plan(
    rng: random.Random, messages: Sequence[Mapping[str, Any]], options: Turns, *, first: Mode | None = None
) -> list[Turn]:
    """The turns of a conversation, of which `messages` are the beginning up to the user's first question.

    first: the mode of the first turn, else drawn. Where constraints that contradict none so far run out,
    there are fewer turns. Raises ValueError for messages that do not end with the user's, or whose flag
    fixes the mode.
    """
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("messages: wanted a prompt that ends with a turn of the user")
    if mode_of(list(map(dict, messages)), {}) is not None:
        raise ValueError("messages[0] (system): a flag fixes the mode, which is to switch; take it out")
    kinds = constraints.KINDS if options.kinds is None else options.kinds
    constraints.check_kinds(kinds)
    mode: Mode = first or rng.choice(("think", "no_think"))
    turns: list[Turn] = []
    so_far: tuple[Constraint, ...] = ()
    for number in range(options.num_turns):
        if number and rng.random() < options.switch_share:
            mode = "no_think" if mode == "think" else "think"
        drawn = constraints.draw(rng, kinds=kinds, so_far=so_far)
        if drawn is None:
            break
        so_far = (*so_far, drawn)
        asked = rng.choice(AGAIN) if number else str(messages[-1]["content"]).rstrip()
        turns.append(Turn(f"{asked}\n\n{drawn.instruction}", mode, so_far))
    return turns


def rows(
    messages: Sequence[Mapping[str, Any]], turns: Sequence[Turn], answers: Sequence[str], **columns: Any
) -> list[dict[str, Any]]:
    """SFT rows of a conversation with all its answers, think blocks included; `columns` are of each row.

    In one mode throughout, one row, every turn trained. Else a row a turn with the messages up to it and
    its mode; answers of the turns before have weight 0, for they were said in another mode or are trained
    by a row before.
    """
    said, ends = [untrained(one) for one in messages[:-1]], list[int]()
    for turn, answer in zip(turns, answers, strict=True):
        said += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": answer}]
        ends.append(len(said))
    earlier = [untrained(one) for one in said]
    own = columns.pop("chat_template_kwargs", {})
    if len({turn.mode for turn in turns}) == 1:
        kept = [(said, turns[0].mode)]
    else:
        kept = [
            ([*earlier[: end - 1], said[end - 1]], turn.mode) for end, turn in zip(ends, turns, strict=True)
        ]
    return [
        {"messages": list(one), "chat_template_kwargs": own | {"enable_thinking": mode == "think"}, **columns}
        for one, mode in kept
    ]


def untrained(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message that carries no loss."""
    return {**message, "weight": 0} if message["role"] == "assistant" else dict(message)
