"""The tiny recipe's data: right by its own arithmetic, faulty where it says so, the same on every machine."""

import os
import re
import subprocess
import sys

import pytest

from smol_post import chat, synthetic, vocabulary

NUM_ROWS = 200
MODES = {"/think": True, "/no_think": False}


def rows(name, *, num_rows=NUM_ROWS, seed=3, **options):
    return list(synthetic.generate(name, num_rows=num_rows, seed=seed, **options))


def last_writes(document):
    """What a reader of the notes believes: `Notes: pet cat. the lake. pet dog.` -> {"pet": "dog"}"""
    written = re.findall(r" (\w+) (\w+)(?=\.)", document)
    return {key: value for key, value in written if value in synthetic.VALUES.get(key, ())}


def wrong_steps(trace):
    """Steps that are wrong modulo 10; a step must start from the result before it."""
    wrong, previous = 0, None
    for step in trace.split(";"):
        left, sign, right, result = re.fullmatch(r"(\d)([-+*])(\d)=(\d)", step).groups()
        assert previous in (None, left)
        wrong += synthetic.OPERATIONS[sign](int(left), int(right)) % 10 != int(result)
        previous = result
    return wrong


def thinks(row, messages):
    """The mode a row asks for: a flag in the system message beats `enable_thinking`."""
    words = messages[0]["content"].split() if messages[0]["role"] == "system" else []
    return next(
        (MODES[word] for word in words if word in MODES), row["chat_template_kwargs"]["enable_thinking"]
    )


@pytest.mark.parametrize("name", synthetic.GENERATORS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(name):
    assert rows(name, num_rows=20) == rows(name, num_rows=20)
    assert rows(name, num_rows=20) != rows(name, num_rows=20, seed=4)
    assert rows(name, num_rows=5) == rows(name, num_rows=20)[:5]


def test_rows_do_not_depend_on_the_hash_seed_or_on_the_global_random_state():
    code = """import random, sys; from smol_post import synthetic, vocabulary; random.seed(sys.argv[1])
print([list(synthetic.generate(name, num_rows=20, seed=3)) for name in synthetic.GENERATORS])"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, seed],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_the_shortest_documents_are_no_longer_than_asked():
    least = synthetic.LEAST["num_tokens"]
    for num_tokens in range(least, least + 12):
        for row in rows("needle_questions", num_tokens=num_tokens):
            assert len(re.findall(r"\w+|[^\w\s]", row["prompt"] + row["answer"])) <= num_tokens


def test_an_unknown_generator_or_option_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown generator 'needle'; known: needles"):
        synthetic.generate("needle", num_rows=1, seed=0)
    with pytest.raises(ValueError, match="'needles' has no option 'num_token'; known: num_tokens"):
        synthetic.generate("needles", num_rows=1, seed=0, num_token=9)


def test_the_worked_example_of_the_module_holds():
    row = rows("arithmetic_text", num_rows=1, seed=7, min_steps=2, max_steps=2)[0]
    assert repr(row) in synthetic.__doc__


@pytest.mark.parametrize("num_tokens", [40, 62, 254, 510])
def test_needle_documents_have_the_asked_length_in_words_and_marks(num_tokens):
    for row in rows("needles", num_tokens=num_tokens, num_queries=4):
        found = len(re.findall(r"\w+|[.:]", row["prompt"] + row["completion"]))
        assert num_tokens - 5 <= found <= num_tokens


def test_the_last_write_is_the_answer():
    overwritten = 0
    for row in rows("needles", num_tokens=254, max_overwrites=4, num_queries=12):
        truth, answers = last_writes(row["prompt"]), re.findall(r" (\w+) (\w+)\.", row["completion"])
        assert dict(answers) == truth
        overwritten += any(row["prompt"].count(f" {key} ") > 1 for key in truth)
    assert overwritten == NUM_ROWS


def test_a_needle_question_is_answered_by_the_document():
    for row in rows("needle_questions", num_tokens=254):
        document, key = row["prompt"].split(" Now: ")
        assert row["answer"] == f" {last_writes(document)[key]}."


def test_a_needle_chat_is_answered_by_the_document():
    for row in rows("needle_chats"):
        user, assistant = (message["content"] for message in row["messages"])
        document, key = user.split(" Now: ")
        assert assistant == f"{last_writes(document)[key]}."


def test_values_belong_to_one_attribute_so_a_guess_is_right_one_time_in_ten():
    words = [value for values in synthetic.VALUES.values() for value in values]
    assert len(words) == len(set(words)) == 10 * len(synthetic.VALUES)
    assert not set(words) & (set(synthetic.FILLER) | set(synthetic.VALUES))


def test_arithmetic_is_right():
    for row in rows("arithmetic_text"):
        steps, answer = row["completion"].split("\n")
        assert wrong_steps(steps) == 0
        assert steps[-1] == answer
        assert re.sub(r"=\d;\d", "", steps)[:-2] + "?" == row["prompt"]
    assert all(wrong_steps(fact) == 0 for row in rows("arithmetic_facts") for fact in row["text"].split(";"))


def test_perfect_chats_keep_their_mode():
    for row in rows("dual_mode_chats", variant_share=0.0, instruction_share=0.0):
        answer = row["messages"][-1]["content"]
        assert thinks(row, row["messages"]) == ("<think>" in answer)
        assert re.fullmatch(r"(<think>\n\S+\n</think>\n)?\d", answer)


def test_the_shares_of_faults_are_those_asked_for():
    options = {"slip_share": 0.2, "mode_fault_share": 0.1, "variant_share": 0.0, "instruction_share": 0.0}
    slips = modes = num_thinking = 0
    for row in rows("dual_mode_chats", num_rows=4000, **options):
        answer, think = row["messages"][-1]["content"], thinks(row, row["messages"])
        modes += think != answer.startswith("<think>") or (not think and "</think>" in answer)
        if think and answer.startswith("<think>"):
            num_thinking += 1
            slips += wrong_steps(answer.split("\n")[1]) > 0
    assert modes / 4000 == pytest.approx(0.1, abs=0.02)
    assert slips / num_thinking == pytest.approx(0.2 / 0.9, abs=0.03)


def test_chats_show_every_feature_of_the_template():
    chats = rows("dual_mode_chats", num_rows=2000)
    kwargs = {key for row in chats for key in row["chat_template_kwargs"]}
    assert kwargs == {"enable_thinking", "custom_instructions", "xml_tools", "python_tools"}
    systems = {
        row["messages"][0]["content"].split()[0] for row in chats if row["messages"][0]["role"] == "system"
    }
    assert systems == {"/think", "/no_think", "/system_override"}
    assert any("tool_calls" in message for row in chats for message in row["messages"])
    assert max(len(row["messages"]) for row in chats) == 6


CALLS = {
    "xml_tools": r'<tool_call>\n\{"name": "calc", "arguments": \{"sum": "(\S+)"\}\}\n</tool_call>',
    "python_tools": r"<code>\ncalc\('(\S+)'\)\n</code>",
}


def trained_turns(row, tokenizer):
    """What the template puts under the loss, turn by turn."""
    encoded = chat.encode_chat(row, tokenizer, template=tokenizer.chat_template, date_string="01 July 2025")
    trained = [token for token, bit in zip(encoded.input_ids, encoded.train_mask, strict=True) if bit]
    *turns, after = tokenizer.decode(trained).split("<|im_end|>")
    assert not after
    return turns


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("think", [False, True])
def test_a_tool_is_called_with_the_sum_that_was_asked_and_its_result_is_told(think, kind, tokenizer):
    call = r"<think>\ncalc\n</think>\n" * think + CALLS[kind]
    shares = {"think_share": float(think), "python_share": float(kind == "python_tools"), "plain_share": 0.0}
    for row in synthetic.generate("tool_chats", num_rows=40, seed=3, **shares):
        assert list(row["chat_template_kwargs"]) == ["enable_thinking", kind]
        assert row["chat_template_kwargs"]["enable_thinking"] is think
        asked = [message["content"] for message in row["messages"][::4]]
        turns = trained_turns(row, tokenizer)
        assert [f"calc {re.fullmatch(call, turn)[1]}?" for turn in turns[::2]] == asked
        for question, result, answer in zip(asked, row["messages"][2::4], turns[1::2], strict=True):
            value = int(question[5])
            for sign, number in re.findall(r"([-+*])(\d)", question):
                value = synthetic.OPERATIONS[sign](value, int(number)) % 10
            assert result["content"] == str(value)
            assert answer == (f"<think>\n{value}\n</think>\n" if think else "") + str(value)


def test_a_tool_at_hand_is_left_alone_where_the_user_does_not_ask_for_it(tokenizer):
    found = rows("tool_chats", num_rows=1000, plain_share=0.3, max_turns=1)
    plain = [row for row in found if not row["messages"][0]["content"].startswith("calc")]
    assert len(plain) / len(found) == pytest.approx(0.3, abs=0.05)
    for row in plain[:40]:
        assert {"xml_tools", "python_tools"} & row["chat_template_kwargs"].keys()
        (answer,) = trained_turns(row, tokenizer)
        assert re.fullmatch(r"(<think>\n\S+\n</think>\n)?\d", answer)
        assert row["chat_template_kwargs"]["enable_thinking"] is answer.startswith("<think>")


def test_a_pair_about_a_tool_prefers_the_call_that_is_asked_for_and_no_other(tokenizer):
    calls = 0
    for row in rows("tool_pairs", plain_share=0.5, answer_share=0.0):
        turns = {"chosen": "", "rejected": ""}
        for side in turns:
            one = {"messages": row["prompt"] + row[side], "chat_template_kwargs": row["chat_template_kwargs"]}
            (turns[side],) = trained_turns(one, tokenizer)
        *_, kind = row["chat_template_kwargs"]
        asked = row["prompt"][0]["content"]
        wanted = asked.startswith("calc ")
        found = re.search(CALLS[kind], turns["chosen" if wanted else "rejected"])
        assert found[1] == asked.removeprefix("calc ").removesuffix("?")
        answer = turns["rejected" if wanted else "chosen"]
        assert re.fullmatch(r"(<think>\n\S+\n</think>\n)?\d", answer)
        assert row["chat_template_kwargs"]["enable_thinking"] is answer.startswith("<think>")
        calls += wanted
    assert calls / NUM_ROWS == pytest.approx(0.5, abs=0.1)


def test_a_pair_about_a_result_prefers_telling_it_over_another_call(tokenizer):
    found = rows("tool_pairs", plain_share=0.0, answer_share=0.4)
    told = [row for row in found if len(row["prompt"]) > 1]
    assert len(told) / NUM_ROWS == pytest.approx(0.4, abs=0.1)
    for row in told:
        (call, answer), rejected = (
            trained_turns({**row, "messages": row["prompt"] + row[side]}, tokenizer)
            for side in ("chosen", "rejected")
        )
        think, value = row["chat_template_kwargs"]["enable_thinking"], row["prompt"][2]["content"]
        assert answer == (f"<think>\n{value}\n</think>\n" if think else "") + value
        assert rejected == [call, call]


def test_a_fault_makes_a_pair():
    kinds = set()
    for row in rows("preference_pairs", num_rows=1000):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        think = thinks(row, row["prompt"])
        assert chosen != rejected
        if think:
            assert wrong_steps(chosen.split("\n")[1]) == 0
            slip = "<think>" in rejected
            assert not slip or wrong_steps(rejected.split("\n")[1]) == 1
            kinds.add("slip" if slip else "mode")
        else:
            instruction = "custom_instructions" in row["chat_template_kwargs"]
            assert chosen == f"{rejected}." if instruction else rejected.endswith(f"</think>\n{chosen}")
            assert not rejected.startswith("<think>"), "the generation prompt has opened and closed the block"
            kinds.add("instruction" if instruction else "leak")
    assert kinds == {"slip", "mode", "instruction", "leak"}


def test_questions_carry_the_answer_that_must_stand():
    for row in rows("arithmetic_questions", enable_thinking=False):
        question = row["messages"][-1]["content"]
        value, chain = int(question[0]), re.findall(r"([-+*])(\d)", question)
        for sign, number in chain:
            value = synthetic.OPERATIONS[sign](value, int(number)) % 10
        assert row["answer"] == str(value)
        assert thinks(row, row["messages"]) is False


def test_the_tokenizer_sees_every_word_of_the_recipe():
    words = set(re.findall(r"\w+", " ".join(vocabulary._corpus(0, date_string="01 July 2025", num_rows=300))))
    assert words >= set(synthetic.VALUES) | set(synthetic.FILLER) | {"Metadata", "Custom", "calc", "Now"}
