"""Conversations of several turns with verifiable constraints and modes that switch."""

import os
import random
import sys
from itertools import pairwise
from typing import Any

import pytest

from smol_post import chat, constraints, turns
from smol_post.constraints import KINDS, Constraint, draw
from smol_post.judging_config import Turns
from smol_post.turns import plan, rows

PROMPT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How do magnets work?"}]


def constraint(kind: str, **kwargs: Any) -> Constraint:
    return Constraint(kind, kwargs)


def planned(seed: int, **options: Any) -> list[turns.Turn]:
    return plan(random.Random(seed), PROMPT, Turns(**options))


@pytest.mark.parametrize(
    ("one", "good", "bad"),
    [
        (constraint("punctuation:no_comma"), "No commas here.", "Well, no."),
        (constraint("keywords:existence", keywords=["tide", "moon"]), "The Moon and the tide.", "The moon."),
        (constraint("keywords:forbidden_words", forbidden_words=["moon"]), "moonlight", "The moon."),
        (constraint("length_constraints:number_paragraphs", num_paragraphs=2), "a\n***\nb", "a\n\nb"),
        (constraint("detectable_format:number_bullet_lists", num_bullets=2), "* a\n* b", "* a"),
        (constraint("detectable_format:title"), "<<Tides>>\nThe moon.", "Tides"),
        (
            constraint("startend:end_checker", end_phrase="That is all."),
            "So. That is all.",
            "That is all. So.",
        ),
        (constraint("startend:quotation"), '"So."', "So."),
        (constraint("change_case:english_lowercase"), "the tides come and go every day", "The tides"),
    ],
)
def test_a_constraint_holds_where_a_person_says_so(one: Constraint, good: str, bad: str) -> None:
    assert one.holds(good)
    assert not one.holds(bad)
    assert not one.holds(" ")


def test_what_is_asked_is_what_is_checked() -> None:
    one = draw(random.Random(3), kinds=["detectable_format:number_bullet_lists"])
    assert one is not None
    number = one.kwargs["num_bullets"]
    assert f"exactly {number} bullet points" in one.instruction
    assert one.holds("* a\n" * number)
    assert not one.holds("* a\n" * (number + 1))


def test_a_draw_depends_on_its_generator_alone_and_leaves_the_global_one() -> None:
    random.seed(0)
    state = random.getstate()
    first = [draw(random.Random(seed)) for seed in range(20)]
    assert random.getstate() == state
    random.seed(1)
    assert [draw(random.Random(seed)) for seed in range(20)] == first
    assert len({one.id for one in first if one}) > 5


def test_no_conversation_contradicts_itself() -> None:
    conflicts = constraints._registry().INSTRUCTION_CONFLICTS
    for seed in range(200):
        last = planned(seed, num_turns=5)[-1].constraints
        for i, one in enumerate(last):
            for other in last[i + 1 :]:
                assert other.id != one.id
                assert other.id not in conflicts[one.id]
                assert one.id not in conflicts[other.id]


def test_a_word_is_not_both_demanded_and_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = constraint("keywords:existence", keywords=["Moon", "tide"])
    ends = constraint("startend:end_checker", end_phrase="Any other questions?")
    for one, word in ((wanted, "moon"), (ends, "questions")):
        assert constraints._forbids([one, constraint("keywords:forbidden_words", forbidden_words=[word])])
        assert not constraints._forbids(
            [one, constraint("keywords:forbidden_words", forbidden_words=["sun"])]
        )
    kinds = ["keywords:forbidden_words"]
    util = sys.modules["lm_eval.tasks.ifeval.instructions_util"]
    monkeypatch.setattr(util, "WORD_LIST", ["moon"] * 9)
    assert draw(random.Random(0), kinds=kinds, so_far=[wanted]) is None
    assert draw(random.Random(0), kinds=kinds, so_far=[ends]) is not None


def test_no_kind_is_drawn_that_needs_data_of_nltk() -> None:
    constraints.check_kinds(KINDS)
    for kind in ("length_constraints:number_sentences", "combination:repeat_prompt"):
        with pytest.raises(ValueError, match=f"^kinds: '{kind}' needs"):
            constraints.check_kinds([kind])
    with pytest.raises(ValueError, match=r"^kinds: lm-eval knows no 'no_comma'"):
        constraints.check_kinds(["no_comma"])
    assert "LOCAL_RANK" not in os.environ
    for seed in range(100):
        one = draw(random.Random(seed))
        assert one is not None
        one.holds("A word, and another.")


def test_each_turn_adds_a_constraint_and_keeps_those_before() -> None:
    said = planned(1, num_turns=4)
    assert [len(turn.constraints) for turn in said] == [1, 2, 3, 4]
    for before, turn in pairwise(said):
        assert turn.constraints[:-1] == before.constraints
        assert turn.user.endswith(turn.constraints[-1].instruction)
    assert said[0].user.startswith("How do magnets work?\n\n")
    assert planned(1, num_turns=4) == said


def test_a_turn_is_judged_by_all_constraints_so_far() -> None:
    both = (constraint("punctuation:no_comma"), constraint("startend:quotation"))
    assert turns.Turn("", "think", both).holds('"Good."')
    assert not turns.Turn("", "think", both).holds("Good.")
    assert not turns.Turn("", "think", both).holds('"Good, but."')


def test_modes_switch_as_often_as_is_asked() -> None:
    def switches(share: float) -> float:
        found = [planned(seed, switch_share=share) for seed in range(200)]
        pairs = [(a.mode, b.mode) for one in found for a, b in pairwise(one)]
        return sum(a != b for a, b in pairs) / len(pairs)

    assert (switches(0.0), switches(1.0)) == (0, 1)
    assert 0.4 < switches(0.5) < 0.6


def test_constraints_that_run_out_end_the_conversation() -> None:
    assert len(planned(0, num_turns=3, kinds=["punctuation:no_comma"])) == 1


def turn(mode: Any, number: int) -> turns.Turn:
    return turns.Turn(f"question {number}", mode, ())


ANSWERS = {"think": "<think>\nHm\n</think>\nYes", "no_think": "No"}


def test_a_conversation_of_one_mode_is_one_row_trained_on_every_answer() -> None:
    (row,) = rows(PROMPT, [turn("think", i) for i in range(3)], [ANSWERS["think"]] * 3, source="x")
    assert [one["role"] for one in row["messages"]] == ["system", *["user", "assistant"] * 3]
    assert not any("weight" in one for one in row["messages"])
    assert row["chat_template_kwargs"] == {"enable_thinking": True}
    assert row["source"] == "x"


def test_a_conversation_that_switches_is_a_row_a_turn_trained_on_its_last_answer(tokenizer: Any) -> None:
    modes: list[Any] = ["think", "no_think", "no_think"]
    made = rows(
        [*PROMPT, {"role": "assistant", "content": "So."}, PROMPT[1]],
        [turn(mode, i) for i, mode in enumerate(modes)],
        [ANSWERS[mode] for mode in modes],
        chat_template_kwargs={"xml_tools": ['{"name": "f"}']},
    )
    assert [row["chat_template_kwargs"]["enable_thinking"] for row in made] == [True, False, False]
    for number, (row, mode) in enumerate(zip(made, modes, strict=True)):
        assert len(row["messages"]) == 3 + 2 * (number + 1)
        assert row["messages"][1]["content"] == PROMPT[1]["content"]
        (encoded,) = chat.encode_chats([row], tokenizer, date_string="01 July 2025")
        trained = [i for i, bit in zip(encoded.input_ids, encoded.train_mask, strict=True) if bit]
        assert tokenizer.decode(trained) == ANSWERS[mode] + "<|im_end|>"
        chat.check_masks([row], tokenizer, date_string="01 July 2025")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "^messages: wanted a prompt that ends with a turn of the user"),
        ([{"role": "assistant", "content": "Hi"}], "^messages: wanted a prompt that ends"),
        (
            [{"role": "system", "content": "/think"}, PROMPT[1]],
            r"^messages\[0\] \(system\): a flag fixes the mode",
        ),
    ],
)
def test_a_prompt_that_cannot_go_on_is_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(random.Random(0), messages, Turns())
