import copy
import datetime
import doctest
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from smol_post import chat
from smol_post.chat import clean_row, encode_chat, encode_chats, encode_pair, load_template, mode_of
from smol_post.config import Refusal

DATE = "01 January 2026"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
WEATHER = {"name": "weather", "parameters": {"city": {"type": "string"}}}


@cache
def tokenizer(special: bool = True, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with tokens of several spaces and newlines; not `special`: no control words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if trim_offsets:
        bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL_TOKENS if special else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spaces = [
        "assistant\n\nx",
        "assistant\n  x",
        "</think>\n\n\n y",
        "<|im_end|>\n<|im_start|>",
        "a    b",
    ] * 20
    bpe.train_from_iterator([load_template("smol_post"), *spaces], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe)
    wrapped.chat_template = load_template("smol_post")
    return wrapped


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text_of(messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """What a user of the final tokenizer sees."""
    kwargs.setdefault("date_string", DATE)
    return tokenizer().apply_chat_template(messages, tokenize=False, **kwargs)


def encode(messages: list[dict[str, Any]], **columns: Any) -> chat.EncodedRow:
    return encode_chat({"messages": messages, **columns}, tokenizer(), date_string=DATE)


HI = [say("user", "Hi")]
CONVERSATIONS = {
    "plain": [
        say("user", "Hi"),
        say("assistant", "Yo"),
        say("user", " Again?\n"),
        say("assistant", "  \n Ja\n\n"),
    ],
    "thoughts": [
        say("user", "Hi"),
        say("assistant", "<think>\nHm\n</think>\nYo"),
        say("user", "?"),
        say("assistant", ""),
    ],
    "empty_block": [say("user", "Hi"), say("assistant", "<think>\n</think>\n\n  Yo"), say("user", "?")],
    "flag": [say("system", "Brief. /no_think"), say("user", "Hi"), say("assistant", "ä \n")],
    "only_system": [say("system", "/system_override x"), say("user", "Hi"), say("assistant", "Yo")],
    "tools": [
        say("user", "Hi"),
        say("assistant", "Look:", tool_calls=[{"function": {"name": "f", "arguments": {"x": "ü"}}}]),
        say("tool", "1"),
        say("tool", "2"),
        say("assistant", "3", reasoning_content="1 and 2"),
        say("system", "Now in French."),
        say("assistant", "trois"),
    ],
}
every_conversation = pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
both_modes = pytest.mark.parametrize("thinking", [True, False])


# The defects of templates in use


@pytest.mark.parametrize(
    "near", ["/thinking/", "a/think", "/think.", "see/no_think", "/no_thinking", "/THINK", "/think/no_think"]
)
@both_modes
def test_a_flag_inside_a_longer_word_is_left_alone(near: str, thinking: bool) -> None:
    messages = [say("system", f"Keep {near} here"), *HI]
    text = text_of(messages, enable_thinking=thinking)
    assert f"\nMode: {'/think' if thinking else '/no_think'}\n" in text
    assert f"\nKeep {near} here<|im_end|>" in text
    assert mode_of(messages, {"enable_thinking": thinking}) == ("think" if thinking else "no_think")


@pytest.mark.parametrize(
    ("system", "mode", "rest"),
    [
        ("/think", "think", "Think first, then answer."),
        ("/no_think", "no_think", "Answer directly."),
        ("Be brief. /no_think", "no_think", "Be brief."),
        ("/no_think\nBe brief.", "no_think", "Be brief."),
        ("Be\n/think\nbrief.\n", "think", "Be\nbrief."),
        ("Be\t/no_think\tbrief.", "no_think", "Be\tbrief."),
        ("/think /think is in /think/x /think", "think", "is in /think/x"),
        ("/think /no_think both", "no_think", "both"),
        ("Two  spaces\n\n/no_think stay", "no_think", "Two  spaces stay"),
    ],
)
@both_modes
def test_a_flag_word_beats_enable_thinking_and_leaves_the_text(
    system: str, mode: str, rest: str, thinking: bool
) -> None:
    messages = [say("system", system), *HI]
    text = text_of(messages, enable_thinking=thinking)
    assert f"\nMode: /{mode}\n\n## Custom Instructions\n{rest}<|im_end|>\n" in text
    assert mode_of(messages, {"enable_thinking": thinking}) == mode


def test_a_flag_of_the_user_or_of_a_later_system_turn_does_not_count() -> None:
    for messages in ([say("user", "/no_think")], [*HI, say("system", "x /no_think")]):
        assert "\nMode: /think\n" in text_of(messages)
        assert mode_of(messages, {}) == "think"
        assert "/no_think<|im_end|>" in text_of(messages)


def test_training_pins_the_date_and_use_has_today() -> None:
    assert f"\nToday: {DATE}\n" in encode([*HI, say("assistant", "Yo")]).text
    assert "\nToday: 4 May 1999\n" in encode([*HI, say("assistant", "Yo")], date_string="4 May 1999").text
    today = {datetime.datetime.now().strftime("%d %B %Y")}
    text = text_of(HI, date_string=None)
    today.add(datetime.datetime.now().strftime("%d %B %Y"))
    assert any(f"\nToday: {day}\n" in text for day in today)


@pytest.mark.parametrize("name", ["tools", "xml_tools"])
def test_tools_are_json_lines_and_never_a_python_list(name: str) -> None:
    tools: list[Any] = [WEATHER, {"name": "now", "about": "Zeit für <b>", "strict": True}]
    text = text_of(HI, **{name: tools})
    assert (
        '<tools>\n{"name": "weather", "parameters": {"city": {"type": "string"}}}\n'
        '{"name": "now", "about": "Zeit für <b>", "strict": true}\n</tools>\n'
    ) in text
    assert "['" not in text
    assert "[{" not in text


def test_tools_as_text_are_printed_unchanged() -> None:
    assert '<tools>\n{"name":"f"}\n</tools>' in text_of(HI, xml_tools=['{"name":"f"}'])
    assert '<tools>\n{"name":"f"}\n</tools>' in text_of(HI, xml_tools='{"name":"f"}')
    assert "Python Tools\ndef f(): ...\ndef g(): ...\nTo call" in text_of(
        HI, python_tools=["def f(): ...", "def g(): ..."]
    )
    assert 'Python Tools\n{"name": "f"}\nTo call' in text_of(HI, python_tools=[{"name": "f"}])
    assert "Tools" not in text_of(HI, xml_tools=[], python_tools=[], tools=[])


def test_python_functions_are_tools_as_in_transformers() -> None:
    def add(left: int) -> int:
        """Adds.

        Args:
            left: a number
        """
        return left

    assert '<tools>\n{"type": "function", "function": {"name": "add",' in text_of(HI, tools=[add])


@pytest.mark.parametrize("template", ["smol_post", "chatml"])
@pytest.mark.parametrize("arguments", [{"x": "ü"}, '{"x": "ü"}'])
@pytest.mark.parametrize("nested", [True, False])
def test_tool_calls_are_rendered_after_the_content(template: str, arguments: Any, nested: bool) -> None:
    call = {"name": "f", "arguments": arguments}
    for content, before in ((None, ""), ("", ""), ("Look:", "Look:\n"), ("Look:\n", "Look:\n")):
        message = say(
            "assistant", content, tool_calls=[{"function": call} if nested else call, {"name": "g"}]
        )
        text = text_of([*HI, message], chat_template=load_template(template))
        assert text.endswith(
            f'<|im_start|>assistant\n{before}<tool_call>\n{{"name": "f", "arguments": {{"x": "ü"}}}}\n'
            "</tool_call>\n"
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>\n'
        )


@pytest.mark.parametrize(
    "own", ["", "<think>\n\n</think>\n", "<think></think>", "\n<think> \n</think>\n\n  "]
)
def test_no_think_has_one_empty_block_outside_the_loss(own: str) -> None:
    row = encode(
        [*HI, say("assistant", f"{own}Yo"), *HI, say("assistant", f"{own}Ja")], enable_thinking=False
    )
    assert row.text.count("<|im_start|>assistant\n<think>\n\n</think>\n") == row.text.count("<think>") == 2
    trained = [token for token, bit in zip(row.input_ids, row.train_mask, strict=True) if bit]
    assert tokenizer().decode(trained) == "Yo<|im_end|>Ja<|im_end|>"


@pytest.mark.parametrize(
    "message", [say("assistant", "<think>\nHm\n</think>\nYo"), say("assistant", "Yo", reasoning_content="Hm")]
)
def test_no_think_keeps_the_rows_own_thoughts_and_adds_no_second_block(message: dict[str, Any]) -> None:
    row = encode([*HI, message], enable_thinking=False)
    assert row.text.endswith("<|im_start|>assistant\n<think>\nHm\n</think>\nYo<|im_end|>\n")


@both_modes
@pytest.mark.parametrize("kwargs", [{}, {"xml_tools": [WEATHER]}, {"python_tools": ["def f(): ..."]}])
@pytest.mark.parametrize("system", [[], [say("system", "/system_override x")], [say("system", "x")]])
def test_every_turn_is_opened_and_closed_once(
    thinking: bool, kwargs: dict[str, Any], system: list[Any]
) -> None:
    text = text_of([*system, *HI, say("assistant", "Yo")], enable_thinking=thinking, **kwargs)
    turns = text.split("<|im_start|>")
    assert [turn.split("\n")[0] for turn in turns] == ["", "system", "user", "assistant"]
    assert all(turn.endswith("<|im_end|>\n") and turn.count("<|im_end|>") == 1 for turn in turns[1:])


# The contract


def test_thinking_is_on_unless_it_is_false() -> None:
    assert text_of(HI) == text_of(HI, enable_thinking=None) == text_of(HI, enable_thinking=True)
    assert text_of(HI) != text_of(HI, enable_thinking=False)
    with pytest.raises(Exception, match="enable_thinking is neither true nor false"):
        text_of(HI, enable_thinking="false")


def test_the_generation_prompt_opens_the_turn_in_its_mode() -> None:
    user_turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(HI, add_generation_prompt=True).endswith(user_turn)
    silent = text_of(HI, add_generation_prompt=True, enable_thinking=False)
    assert silent.endswith(f"{user_turn}<think>\n\n</think>\n")
    plain = text_of(HI, add_generation_prompt=True, chat_template=load_template("chatml"))
    assert plain == user_turn


def test_system_override_is_the_whole_block() -> None:
    text = text_of([say("system", "You are /system_override a cat. /no_think"), *HI], xml_tools=[WEATHER])
    assert text.startswith("<|im_start|>system\nYou are a cat.<|im_end|>\n<|im_start|>user")
    assert "Metadata" in text_of([say("system", "x/system_override"), *HI])


def test_instructions_come_from_the_system_turn_then_the_variable_then_the_default() -> None:
    both = text_of([say("system", "From system."), *HI], custom_instructions="From variable.")
    assert "Instructions\nFrom system.<|im_end|>" in both
    only_flag = text_of([say("system", "/no_think"), *HI], custom_instructions="From variable.")
    assert "Instructions\nFrom variable.<|im_end|>" in only_flag
    assert "Instructions\nAnswer directly.<|im_end|>" in text_of(HI, enable_thinking=False)


def test_reasoning_stays_on_all_turns() -> None:
    turns = [
        *HI,
        say("assistant", "Yo", reasoning_content=" One\n"),
        *HI,
        say("assistant", "<think>\nTwo\n</think>\nJa"),
    ]
    text = text_of(turns)
    assert "assistant\n<think>\nOne\n</think>\nYo<|im_end|>" in text
    assert "assistant\n<think>\nTwo\n</think>\nJa<|im_end|>" in text


@pytest.mark.parametrize("template", ["smol_post", "chatml"])
@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (say("narrator", "x"), 'unknown role "narrator"'),
        (say("user", ["x"]), "content is not text"),
        (say("assistant", None), "content is not text"),
        (say("tool", {"x": 1}), "content is not text"),
        ({"role": "user"}, "content is not text"),
        (say("assistant", "x", tool_calls=[{"function": {"arguments": {}}}]), "tool call"),
        (
            say("assistant", "<think>\na\n</think>\nb", reasoning_content="c"),
            "both reasoning_content and a think block",
        ),
    ],
)
def test_what_a_template_cannot_render_it_refuses(
    template: str, message: dict[str, Any], complaint: str
) -> None:
    row = {"messages": [*HI, message, say("assistant", "Yo")]}
    with pytest.raises(ValueError, match=complaint) as caught:
        encode_chat(row, tokenizer(), date_string=DATE, template=load_template(template))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variable", [{"xml_tools": [WEATHER]}, {"tools": [WEATHER]}, {"custom_instructions": "x"}]
)
def test_chatml_refuses_what_it_would_drop(variable: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="no place for tools or custom_instructions"):
        text_of(HI, chat_template=load_template("chatml"), **variable)


@every_conversation
@both_modes
@pytest.mark.parametrize("template", ["smol_post", "chatml"])
def test_every_prefix_of_a_chat_renders_as_a_prefix(
    messages: list[Any], thinking: bool, template: str
) -> None:
    kwargs = {"enable_thinking": thinking, "chat_template": load_template(template)}
    whole = text_of(messages, **kwargs)
    for length in range(1, len(messages)):
        assert whole.startswith(text_of(messages[:length], **kwargs))


@every_conversation
@both_modes
@pytest.mark.parametrize("template", ["smol_post", "chatml"])
@pytest.mark.parametrize("trim_offsets", [True, False])
def test_the_mask_is_what_follows_the_generation_prompt(
    messages: list[Any], thinking: bool, template: str, trim_offsets: bool
) -> None:
    if template == "smol_post" and not thinking:
        messages = [m for m in messages if "Hm" not in m["content"] and "reasoning_content" not in m]
    vocabulary, text = tokenizer(trim_offsets=trim_offsets), load_template(template)
    kwargs = {"enable_thinking": thinking, "date_string": DATE, "chat_template": text, "return_dict": False}
    expected: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = vocabulary.apply_chat_template(messages[:i], add_generation_prompt=True, **kwargs)
            turn = vocabulary.apply_chat_template(messages[: i + 1], **kwargs)
            assert turn[: len(prompt)] == prompt
            expected += [0] * (len(prompt) - len(expected)) + [1] * (len(turn) - len(prompt) - 1) + [0]
    whole = vocabulary.apply_chat_template(messages, **kwargs)
    expected += [0] * (len(whole) - len(expected))
    row = {"messages": messages, "enable_thinking": thinking}
    encoded = encode_chat(row, vocabulary, date_string=DATE, template=text)
    assert encoded.input_ids == whole
    assert encoded.train_mask == expected


def test_the_trained_tokens_are_those_of_the_worked_example() -> None:
    row = encode([say("user", "2+3?"), say("assistant", "5")], enable_thinking=False)
    tokens = tokenizer().convert_ids_to_tokens(row.input_ids)
    assert tokens[-3:] == ["5", "<|im_end|>", "\u010a"]
    assert row.train_mask == [0] * (len(tokens) - 3) + [1, 1, 0]
    assert row.mode == "no_think"


def test_loss_on_all_trains_every_token_and_needs_no_assistant() -> None:
    row = encode_chat({"messages": HI}, tokenizer(), date_string=DATE, loss_on="all")
    assert row.train_mask == [1] * len(row.input_ids)


def test_a_batch_is_its_rows_one_by_one() -> None:
    rows = [{"messages": m, "enable_thinking": t} for m in CONVERSATIONS.values() for t in (True, False)]
    assert encode_chats(rows, tokenizer(), date_string=DATE) == [
        encode_chat(row, tokenizer(), date_string=DATE) for row in rows
    ]


def test_no_token_is_added_around_a_chat() -> None:
    with_bos = copy.deepcopy(tokenizer())
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert with_bos("x").input_ids[0] == 0
    row = {"messages": CONVERSATIONS["plain"]}
    assert encode_chat(row, with_bos, date_string=DATE) == encode_chat(row, tokenizer(), date_string=DATE)


def test_encoding_leaves_the_row_as_it_was() -> None:
    call = {"function": {"name": "f", "arguments": '{"x":1}', "more": None}}
    row = {"messages": [*HI, say("assistant", None, tool_calls=[call])], "tools": [{"name": "f", "x": None}]}
    before = repr(row)
    encode_chat(row, tokenizer(), date_string=DATE)
    assert repr(row) == before


# Errors


def test_a_row_with_nobody_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^no assistant turn to train on: the roles are user$"):
        encode(HI)


def test_a_token_across_the_border_of_a_trained_span_is_refused() -> None:
    with pytest.raises(ValueError, match="lies across the border of a trained span"):
        chat._mask([(0, 2), (2, 4)], [(3, 4)], "abcd")
    plain = copy.deepcopy(tokenizer(special=False))
    plain.add_tokens([AddedToken(">\n", normalized=False)])
    with pytest.raises(ValueError, match=r"the token '>\\n' lies across the border"):
        encode_chat({"messages": [*HI, say("assistant", "Yo")]}, plain, date_string=DATE)


def test_a_template_without_generation_spans_is_refused() -> None:
    row = {"messages": [*HI, say("assistant", "Yo")]}
    with pytest.raises(ValueError, match="marks no assistant turn"):
        encode_chat(row, tokenizer(), date_string=DATE, template="{{ messages[0].content }}")
    with pytest.raises(ValueError, match="has no chat template"):
        encode_chat(row, PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer), date_string=DATE)


def test_half_a_surrogate_pair_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        encode([say("user", "\ud800"), say("assistant", "Yo")])


def test_a_template_is_found_by_name_or_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("ä", encoding="utf-8")
    assert load_template(str(path)) == "ä"
    assert "{%- generation -%}" in load_template("chatml")
    for name in ("smolpost", str(tmp_path / "other.jinja"), str(tmp_path), "report.html"):
        with pytest.raises(Refusal, match="wanted smol_post or chatml, or the path of an existing"):
            load_template(name)


# Rows as they come


def test_nulls_of_arrow_are_no_settings() -> None:
    kwargs = {"enable_thinking": None, "xml_tools": None, "custom_instructions": None}
    for given in (None, {}, kwargs, '{"enable_thinking": null}'):
        row = {"messages": [say("user", "Hi", tool_calls=None, name=None)], "chat_template_kwargs": given}
        assert clean_row(row | {"tools": None}) == (HI, {})
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}, "id": None}
    messages, _ = clean_row({"messages": [say("assistant", None, tool_calls=[call])]})
    assert messages == [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    ]


def test_false_survives_cleaning_wherever_it_stands() -> None:
    for row in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert clean_row({"messages": HI, **row})[1] == {"enable_thinking": False}


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "f", "z": "ü", "a": {"b": None}}],
        ['{"name":"f","z":"\\u00fc","a":{}}'],
        '[{"name":"f","z":"ü","a":{}}]',
        '{"name":"f","z":"ü",\n"a":{}}',
        ['["{\\"name\\": \\"f\\", \\"z\\": \\"ü\\", \\"a\\": {}}"]'],
    ],
)
def test_tools_in_every_form_are_one_canonical_text(tools: Any) -> None:
    canonical = '{"name": "f", "z": "ü", "a": {}}'
    for key in ("xml_tools", "python_tools"):
        assert clean_row({"messages": HI, key: tools})[1] == {key: [canonical]}
    assert clean_row({"messages": HI, "tools": tools})[1] == {"tools": [{"name": "f", "z": "ü", "a": {}}]}
    rendered = {encode([*HI, say("assistant", "Yo")], **{key: tools}).text for key in ("tools", "xml_tools")}
    assert len(rendered) == 1
    assert f"<tools>\n{canonical}\n</tools>" in rendered.pop()


def test_nulls_in_json_text_were_meant() -> None:
    assert clean_row({"messages": HI, "xml_tools": ['{"default":null}']})[1] == {
        "xml_tools": ['{"default": null}']
    }


def test_python_tools_may_be_plain_text() -> None:
    for tools in ("def f(): ...", ["def f(): ..."]):
        assert clean_row({"messages": HI, "python_tools": tools})[1] == {"python_tools": ["def f(): ..."]}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "x"}, "no messages: the row has text"),
        ({"messages": []}, "no messages: the row has messages"),
        ({"messages": "Hi"}, "messages: wanted a list of messages, found 'Hi'"),
        ({"messages": [{"content": "x", "role": None}]}, r"messages\[0\]: no role, only content"),
        ({"messages": [say("assistant", "", tool_calls="f()")]}, "tool_calls: wanted a list of objects"),
        (
            {"messages": [say("assistant", "", tool_calls=[{"name": "f", "arguments": "x"}])]},
            "arguments: not JSON",
        ),
        (
            {"messages": HI, "chat_template_kwargs": {"enabel_thinking": True}},
            "did you mean 'enable_thinking'",
        ),
        (
            {"messages": HI, "chat_template_kwargs": {"zzz": True}},
            "unknown key 'zzz'; known are enable_thinking",
        ),
        ({"messages": HI, "chat_template_kwargs": [1]}, "chat_template_kwargs: wanted an object"),
        ({"messages": HI, "chat_template_kwargs": "{"}, "chat_template_kwargs: not JSON"),
        (
            {"messages": HI, "enable_thinking": "false"},
            "enable_thinking: wanted true or false, found 'false'",
        ),
        ({"messages": HI, "custom_instructions": ["x"]}, "custom_instructions: wanted text"),
        ({"messages": HI, "xml_tools": ["def f(): ..."]}, "xml_tools: not JSON"),
        ({"messages": HI, "tools": ["3"]}, "tools: wanted JSON objects, found 3"),
        (
            {"messages": HI, "enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "enable_thinking: the column says True, chat_template_kwargs False; drop one",
        ),
    ],
)
def test_a_bad_row_is_one_clear_line(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        clean_row(row)
    assert "\n" not in str(caught.value)


# Pairs


def pair(**row: Any) -> list[str]:
    encoded = encode_pair(row, tokenizer(), date_string=DATE)
    return [tokenizer().decode(ids) for ids in (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids)]


@both_modes
def test_a_pair_reads_the_same_in_every_form(thinking: bool) -> None:
    chosen, rejected = [say("assistant", "\n 5")], [say("assistant", "6")]
    expected = [
        text_of(HI, add_generation_prompt=True, enable_thinking=thinking),
        "5<|im_end|>",
        "6<|im_end|>",
    ]
    mode = {"enable_thinking": thinking}
    assert pair(prompt=HI, chosen=chosen, rejected=rejected, **mode) == expected
    assert pair(prompt="Hi", chosen="5", rejected="6", **mode) == expected
    assert pair(chosen=HI + chosen, rejected=HI + rejected, **mode) == expected
    assert (
        pair(prompt="Hi", chosen=HI + chosen, rejected=HI + rejected, chat_template_kwargs=mode) == expected
    )
    assert pair(prompt=HI, chosen=HI + chosen, rejected=HI + rejected, **mode) == expected


def test_the_prompt_of_a_pair_is_all_turns_that_both_share() -> None:
    shared = [say("system", "/no_think"), *HI, say("assistant", "Yo"), say("user", "And?")]
    row = {"chosen": [*shared, say("assistant", "A")], "rejected": [*shared, say("assistant", "B")]}
    assert pair(**row) == [text_of(shared, add_generation_prompt=True), "A<|im_end|>", "B<|im_end|>"]
    assert encode_pair(row, tokenizer(), date_string=DATE).mode == "no_think"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"chosen": "5", "rejected": "6"}, "no prompt"),
        ({"prompt": "Hi", "chosen": "5", "rejected": "5"}, "chosen and rejected are equal"),
        (
            {"prompt": "Hi", "chosen": "5"},
            "rejected: wanted one assistant turn after the shared prompt, found nothing",
        ),
        ({"prompt": "Hi", "chosen": HI, "rejected": "6"}, "chosen: wanted one assistant turn .* found user"),
        (
            {
                "prompt": [say("user", "Ho")],
                "chosen": [*HI, say("assistant", "5")],
                "rejected": [*HI, say("assistant", "6")],
            },
            "another one than prompt",
        ),
        (
            {"prompt": "Hi", "chosen": "5", "rejected": "<think>\nHm\n</think>\n6", "enable_thinking": False},
            "rejected begins '<think>.*not where the generation prompt .* ends",
        ),
    ],
)
def test_a_bad_pair_is_one_clear_line(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        encode_pair(row, tokenizer(), date_string=DATE)
    assert "\n" not in str(caught.value)


def test_a_pair_needs_an_end_of_turn_that_is_one_token() -> None:
    row = {"prompt": "Hi", "chosen": "5", "rejected": "6"}
    with pytest.raises(ValueError, match=r"chosen does not end with one token <\|im_end\|>"):
        encode_pair(row, tokenizer(special=False), date_string=DATE)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(chat).failed == 0
    assert doctest.testmod(chat).attempted >= 4


def test_importing_chat_loads_no_heavy_library() -> None:
    code = (
        "import sys, smol_post.chat; sys.exit(bool({'torch', 'transformers', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
