import copy
import datetime
import doctest
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from jinja2 import TemplateError
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from smol_post import chat, encoding
from smol_post import messages as rows
from smol_post.chat import (
    check_masks,
    clean_row,
    encode_chat,
    encode_chats,
    encode_pair,
    encode_pairs,
    load_template,
    mode_of,
    prefix_mask,
    render_chat,
)
from smol_post.refusal import Refusal

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


def encode(messages: Any, *, mode: Any = "think", **columns: Any) -> chat.EncodedRow:
    return encode_chat({"messages": messages, **columns}, tokenizer(), date_string=DATE, mode=mode)


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
        assert mode_of(messages, {}) is None
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


def test_no_think_shows_earlier_thoughts_without_a_second_block() -> None:
    for message in (
        say("assistant", "<think>\nHm\n</think>\nYo"),
        say("assistant", "Yo", reasoning_content="Hm"),
    ):
        text = text_of([*HI, message], enable_thinking=False)
        assert text.endswith("<|im_start|>assistant\n<think>\nHm\n</think>\nYo<|im_end|>\n")


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
        (say("assistant", "x", tool_calls=[{"name": "f", "arguments": [1]}]), "tool call"),
        (
            say("assistant", "<think>\na\n</think>\nb", reasoning_content="c"),
            "both reasoning_content and a think block",
        ),
    ],
)
def test_what_a_template_cannot_render_it_refuses(
    template: str, message: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TemplateError, match=complaint) as caught:
        text_of([*HI, message], chat_template=load_template(template))
    assert "\n" not in str(caught.value)


def test_both_flags_at_once_are_refused_in_training_and_in_use() -> None:
    messages = [say("system", "/think /no_think both"), *HI]
    with pytest.raises(TemplateError, match=r"^message 0 \(system\): both /think and /no_think$"):
        text_of(messages)
    for template in ("smol_post", "chatml"):
        row = {"messages": [*messages, say("assistant", "Yo")]}
        with pytest.raises(
            ValueError, match=r"^messages\[0\] \(system\): both /think and /no_think; keep one$"
        ):
            encode_chat(row, tokenizer(), date_string=DATE, template=load_template(template))


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
    row = {"messages": HI, "enable_thinking": True}
    encoded = encode_chat(row, tokenizer(), date_string=DATE, loss_on="all")
    assert encoded.trained == [(0, len(encoded.input_ids))]
    assert encoded.train_mask == [1] * len(encoded.input_ids)


def test_a_batch_is_its_rows_one_by_one() -> None:
    rows = [{"messages": m, "enable_thinking": True} for m in CONVERSATIONS.values()]
    rows += [{"messages": CONVERSATIONS[name], "enable_thinking": False} for name in ("plain", "flag")]
    rows = rows[::2] + rows[1::2]
    assert encode_chats(rows, tokenizer(), date_string=DATE) == [
        encode_chat(row, tokenizer(), date_string=DATE) for row in rows
    ]


def test_no_token_is_added_around_a_chat() -> None:
    with_bos = copy.deepcopy(tokenizer())
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert with_bos("x").input_ids[0] == 0
    row = {"messages": CONVERSATIONS["plain"], "enable_thinking": True}
    assert encode_chat(row, with_bos, date_string=DATE) == encode_chat(row, tokenizer(), date_string=DATE)


def test_encoding_leaves_the_row_as_it_was() -> None:
    call = {"function": {"name": "f", "arguments": '{"x":1}', "more": None}}
    row: dict[str, Any] = {
        "messages": [*HI, say("assistant", None, tool_calls=[call])],
        "tools": [{"name": "f", "x": None}],
        "enable_thinking": True,
    }
    before = repr(row)
    encode_chat(row, tokenizer(), date_string=DATE)
    assert repr(row) == before


# Spans to tokens


ALPHABET = set(pre_tokenizers.ByteLevel.alphabet())
ALPHABETS = [
    "ab 1\n.",
    "äßÜéñ",
    "漢字かな",
    "👩‍👩‍👧🏽😀",
    "e\u0301a\u0308\u20dd",
    "עברית",
    "\x00\x7f\u2028\ufeff",
    "<think>",
]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randint(0, 12)))


def random_chats(rng: random.Random, num_texts: int) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts of several turns, each closed by a control token or a line, with spans around some of them."""
    chats = []
    for _ in range(num_texts):
        text, spans = "", []
        for _ in range(rng.randint(0, 5)):
            text += random_text(rng) + "<|im_start|>"
            start, text = len(text), text + random_text(rng) + rng.choice(["<|im_end|>", "</think>"])
            if rng.random() < 0.8:
                spans.append((start, len(text)))
        chats.append((text + random_text(rng), spans))
    return chats


@pytest.mark.parametrize("digits", [False, True])
def test_tokens_found_by_bytes_are_those_found_by_characters(digits: bool) -> None:
    vocabulary = copy.deepcopy(tokenizer())
    if digits:  # as Llama 3 and SmolLM have it
        split = [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        vocabulary.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    vocabulary.add_tokens(["漢字", AddedToken("é.", normalized=False)])
    chats = random_chats(random.Random(0), 400)
    assert sum(not text.isascii() for text, _ in chats) > 200
    encoded = list(encoding.encode(chats, vocabulary))
    assert encoded == list(encoding._encode_by_offsets(chats, vocabulary))
    texts = [text for text, _ in chats]
    assert [ids for ids, _ in encoded] == vocabulary(texts, add_special_tokens=False)["input_ids"]


def without_offsets(vocabulary: PreTrainedTokenizerFast) -> SimpleNamespace:
    """What the way by bytes needs of a tokenizer; the way by offsets calls it."""
    return SimpleNamespace(backend_tokenizer=vocabulary.backend_tokenizer, split_special_tokens=False)


def test_a_byte_level_vocabulary_needs_no_offsets() -> None:
    chats = random_chats(random.Random(1), 50)
    expected = list(encoding._encode_by_offsets(chats, tokenizer()))
    assert list(encoding.encode(chats, without_offsets(tokenizer()))) == expected


def test_tokens_added_later_have_their_own_bytes() -> None:
    vocabulary, chats = copy.deepcopy(tokenizer()), [("größer <|im_start|>größte<|im_end|>", [(19, 35)])]
    before = list(encoding.encode(chats, vocabulary))
    vocabulary.add_tokens(["größ"])
    after = list(encoding.encode(chats, without_offsets(vocabulary)))
    assert after == list(encoding._encode_by_offsets(chats, vocabulary))
    assert len(after[0][0]) < len(before[0][0])


def odd(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers whose tokens' bytes do not follow from the vocabulary, all or in some texts."""
    vocabulary = copy.deepcopy(tokenizer())
    backend = vocabulary.backend_tokenizer
    if kind == "normalizer":
        backend.normalizer = normalizers.NFC()
    elif kind == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "swallows spaces":
        vocabulary.add_tokens([AddedToken("<|x|>", lstrip=True, rstrip=True)])
    elif kind == "bytes are missing":
        model = {token: i for i, token in enumerate(sorted("abcdefghijklmnopqrstuvwxyz<|>_"))}
        bpe = Tokenizer(models.BPE(model, [], unk_token="_"))
        bpe.pre_tokenizer, bpe.decoder = backend.pre_tokenizer, backend.decoder
        vocabulary = PreTrainedTokenizerFast(tokenizer_object=bpe)
    elif kind == "word pieces":
        bpe = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        bpe.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        vocabulary = PreTrainedTokenizerFast(tokenizer_object=bpe)
    return vocabulary


@pytest.mark.parametrize(
    "kind", ["normalizer", "prefix space", "swallows spaces", "bytes are missing", "word pieces"]
)
def test_other_tokenizers_are_exact_too(kind: str) -> None:
    chats = [
        ("a <|x|> b ä. <|im_start|>c <|x|>\u0061\u0308 d<|im_end|>\n", [(25, 46)]),
        ("ab <|im_start|>c<|im_end|>", [(15, 26)]),
        ("cba", []),
    ]
    vocabulary = odd(kind)
    encoded = list(encoding.encode(chats, vocabulary))
    assert encoded == list(encoding._encode_by_offsets(chats, vocabulary))
    ids = vocabulary([text for text, _ in chats], add_special_tokens=False)["input_ids"]
    assert [one for one, _ in encoded] == ids
    assert all(spans or not trained for (_, spans), (_, trained) in zip(chats, encoded, strict=True))


@pytest.mark.parametrize("kind", ["prefix space", "unknown bytes", "word starts", "normalizer"])
def test_bytes_that_only_add_up_by_chance_are_not_believed(kind: str) -> None:
    """A token that is longer than its text, then one that swallows as many spaces."""
    entries = sorted(ALPHABET - ({"Z"} if kind == "unknown bytes" else set()))
    entries += ["<unk>", *(f"##{entry}" for entry in ALPHABET)]
    ids = {entry: i for i, entry in enumerate(entries)}
    marks: Any = {"continuing_subword_prefix": "##"} if kind == "word starts" else {}
    bpe = Tokenizer(models.BPE(ids, [], unk_token="<unk>", **marks))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix space")
    bpe.decoder = decoders.ByteLevel()
    if kind == "normalizer":
        bpe.normalizer = normalizers.Replace("a", "bb")
    bpe.add_tokens([AddedToken("<|x|>", lstrip=True)])
    vocabulary = PreTrainedTokenizerFast(tokenizer_object=bpe)
    text = {"prefix space": "ab", "unknown bytes": "Z   ", "word starts": "ab ", "normalizer": "a"}[
        kind
    ] + " <|x|>"
    start = text.index("<")
    with pytest.raises(ValueError, match="lies across the border"):
        list(encoding.encode([(text, [(start, start + 5)])], vocabulary))


@pytest.mark.parametrize("order", [1, -1])
def test_a_text_shorter_than_its_tokens_takes_none_of_its_neighbours(order: int) -> None:
    chats = [("a <|x|>b<|im_end|>", [(7, 18)]), ("b <|im_end|>", [(0, 12)])][::order]
    vocabulary = odd("swallows spaces")
    assert list(encoding.encode(chats, vocabulary)) == list(encoding._encode_by_offsets(chats, vocabulary))


def test_nothing_is_cut_or_padded_or_split_otherwise_than_the_tokenizer_does() -> None:
    texts = ["<|im_start|>a", "b <|im_end|> and more of it"]
    expected, chats = (
        tokenizer()(texts, add_special_tokens=False)["input_ids"],
        [(text, []) for text in texts],
    )

    def spoilt(how: Callable[[Tokenizer], None]) -> PreTrainedTokenizerFast:
        vocabulary = copy.deepcopy(tokenizer())
        how(vocabulary.backend_tokenizer)
        return vocabulary

    for how in (lambda backend: backend.enable_truncation(3), lambda backend: backend.enable_padding()):
        assert [ids for ids, _ in encoding.encode(chats, without_offsets(spoilt(how)))] == expected
    split = spoilt(lambda backend: setattr(backend, "encode_special_tokens", True))
    assert [ids for ids, _ in encoding.encode(chats, split)] == expected


# Modes


ROW = {"messages": [say("user", "2+3?"), say("assistant", "5")]}


@pytest.mark.parametrize("declared", ["think", "no_think"])
def test_a_row_without_a_mode_has_that_of_its_source(declared: Any) -> None:
    for row in (ROW, ROW | {"enable_thinking": None}, ROW | {"chat_template_kwargs": None}):
        encoded = encode_chat(row, tokenizer(), date_string=DATE, mode=declared)
        assert encoded.mode == declared
        assert f"\nMode: /{declared}\n" in encoded.text
        rendered = render_chat(row, template=load_template("smol_post"), date_string=DATE, mode=declared)
        assert rendered == encoded.text


@pytest.mark.parametrize("declared", ["think", "no_think", None])
def test_the_flag_beats_the_row_and_the_row_beats_its_source(declared: Any) -> None:
    flagged = {"messages": [say("system", "/think"), *ROW["messages"]], "enable_thinking": False}
    for row, mode in ((flagged, "think"), (ROW | {"enable_thinking": False}, "no_think")):
        encoded = encode_chat(row, tokenizer(), date_string=DATE, mode=declared)
        assert (encoded.mode, f"\nMode: /{mode}\n" in encoded.text) == (mode, True)


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_no_mode_is_refused_where_the_template_knows_modes(loss_on: Any) -> None:
    with pytest.raises(ValueError, match=r"^the row has no mode: give the row enable_thinking, .*`mode:`"):
        encode_chat(ROW, tokenizer(), date_string=DATE, loss_on=loss_on)
    with pytest.raises(ValueError, match="the row has no mode"):
        render_chat(ROW, template=load_template("smol_post"), date_string=DATE)


def test_a_template_without_modes_has_the_label_that_the_row_or_its_source_says() -> None:
    how: Any = {"date_string": DATE, "template": load_template("chatml")}
    assert encode_chat(ROW, tokenizer(), **how).mode == "text"
    assert encode_chat(ROW, tokenizer(), mode="no_think", **how).mode == "no_think"
    assert encode_chat(ROW | {"enable_thinking": True}, tokenizer(), **how).mode == "think"
    pair = {"prompt": "Hi", "chosen": "5", "rejected": "6"}
    assert encode_pair(pair, tokenizer(), **how).mode == "text"


def test_a_template_that_reads_no_flags_is_told_the_mode_of_the_flag() -> None:
    chatml = load_template("chatml")
    end = "{%- if add_generation_prompt -%}"
    deaf = chatml.replace(end, "{#- enable_thinking -#}" + end).replace("'<|im_start|>assistant\\n'",
        "'<|im_start|>assistant\\n' ~ ('' if enable_thinking else '<think></think>')")  # fmt: skip
    row = {"messages": [say("system", "/no_think"), *ROW["messages"]], "enable_thinking": True}
    assert (
        "assistant\n<think></think>5" in encode_chat(row, tokenizer(), date_string=DATE, template=deaf).text
    )


def test_a_key_that_arrow_filled_in_is_no_mode() -> None:
    told = {
        "messages": ROW["messages"],
        "chat_template_kwargs": {"enable_thinking": False},
        "enable_thinking": False,
    }
    untold = {"messages": ROW["messages"], "chat_template_kwargs": {"xml_tools": ['{"name":"f"}']}}
    rows: Any = list(Dataset.from_list([told, untold]))
    assert rows[1]["enable_thinking"] is None
    assert "enable_thinking" in rows[1]["chat_template_kwargs"]
    for declared in ("think", "no_think"):
        encoded = encode_chats(rows, tokenizer(), date_string=DATE, mode=declared)
        assert [row.mode for row in encoded] == ["no_think", declared]
    with pytest.raises(ValueError, match="the row has no mode"):
        encode_chats(rows, tokenizer(), date_string=DATE)


# Nothing is lost


CALL = {"name": "f", "arguments": {"city": "Köln"}}
FULL_ROW: dict[str, Any] = {
    "messages": [
        say("system", "Be brief. /think Be kind."),
        say("user", "Where?"),
        say("assistant", "<think>\nHm.\n</think>\nLook:", tool_calls=[CALL]),
        say("tool", "noon"),
        say("assistant", "There.", reasoning_content="So."),
    ],
    "tools": [{"name": "tool_one"}],
    "xml_tools": [{"name": "tool_two"}],
    "python_tools": ["def tool_three(): ..."],
}


def test_a_row_with_everything_in_it_is_kept() -> None:
    encode_chat(FULL_ROW, tokenizer(), date_string=DATE)
    encode_chat(FULL_ROW | {"messages": FULL_ROW["messages"][1:], "custom_instructions": " Shout.\n"},
                tokenizer(), date_string=DATE, mode="think")  # fmt: skip


@pytest.mark.parametrize(
    ("lost", "complaint"),
    [
        ("Be brief.", r"messages\[0\] \(system\): the chat template lost 'Be brief.'"),
        ("Be kind.", r"messages\[0\] \(system\): the chat template lost 'Be kind.'"),
        ("Where?", r"messages\[1\] \(user\): the chat template lost 'Where\?'"),
        ("Hm.", r"messages\[2\] \(assistant\): the chat template lost 'Hm.'"),
        ("Look:", r"messages\[2\] \(assistant\): the chat template lost 'Look:'"),
        ('"f"', r"messages\[2\] \(assistant\): the chat template lost 'f'"),
        ("Köln", r"messages\[2\] \(assistant\): the chat template lost '{\"city\": \"Köln\"}'"),
        ("noon", r"messages\[3\] \(tool\): the chat template lost 'noon'"),
        ("So.", r"messages\[4\] \(assistant\): the chat template lost 'So.'"),
        ("There.", r"messages\[4\] \(assistant\): the chat template lost 'There.'"),
        ("tool_one", "tools: the chat template lost 'tool_one'"),
        ("tool_two", 'xml_tools: the chat template lost \'{"name": "tool_two"}\''),
        ("tool_three", r"python_tools: the chat template lost 'def tool_three\(\): ...'"),
        ("Shout.", "custom_instructions: the chat template lost 'Shout.'"),
    ],
)
def test_what_a_template_loses_is_told_by_name(lost: str, complaint: str) -> None:
    row = FULL_ROW
    if lost == "Shout.":
        row = FULL_ROW | {
            "messages": FULL_ROW["messages"][1:],
            "custom_instructions": lost,
            "enable_thinking": True,
        }
    lossy = (
        "{%- set text -%}"
        + load_template("smol_post")
        + "{%- endset -%}{{- text.replace('"
        + lost
        + "', '') -}}"
    )
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        encode_chat(row, tokenizer(), date_string=DATE, template=lossy)
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        render_chat(row, date_string=DATE, template=lossy)


@pytest.mark.parametrize(("turn", "role"), [(1, "user"), (2, "assistant")])
def test_text_that_only_stands_in_other_turns_is_lost(turn: int, role: str) -> None:
    row = {
        "messages": [say("system", "yes"), say("user", "yes"), say("assistant", "yes"), say("user", "yes")]
    }
    content = "message['content']"
    lossy = load_template("chatml").replace(content, f"('' if loop.index0 == {turn} else {content})")
    with pytest.raises(ValueError, match=rf"^messages\[{turn}\] \({role}\): the chat template lost 'yes'$"):
        encode_chat(row, tokenizer(), date_string=DATE, template=lossy)


def test_parts_are_found_in_templates_without_our_headers() -> None:
    plain = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% endfor %}"
    row = {"messages": [say("user", "1"), say("assistant", "<think>2</think>3"), say("user", "4")]}
    assert render_chat(row, template=plain, date_string=DATE) == "user: 1assistant: <think>2</think>3user: 4"
    lossy = plain.replace("m.content", "m.content.replace('3', '')")
    for answer in ("<think>2</think>3", "<think>3</think>3"):
        row["messages"][1] = say("assistant", answer)
        with pytest.raises(ValueError, match=r"^messages\[1\] \(assistant\): the chat template lost '3'$"):
            render_chat(row, template=lossy, date_string=DATE)
    once = plain.replace("m.content", "m.content.replace('</think>3', '</think>')")
    with pytest.raises(ValueError, match=r"^messages\[1\] \(assistant\): the chat template lost '3'$"):
        render_chat(row, template=once, date_string=DATE)


@pytest.mark.parametrize("system", ["Whisper.", "/system_override", "/system_override Whisper."])
def test_instructions_given_twice_are_refused(system: str) -> None:
    row = {"messages": [say("system", system), *ROW["messages"]], "custom_instructions": "Shout."}
    with pytest.raises(ValueError, match=r"^custom_instructions: the chat template lost 'Shout.'$"):
        encode_chat(row, tokenizer(), date_string=DATE, mode="think")


def test_an_override_stands_for_the_tools_too() -> None:
    row = FULL_ROW | {"messages": [say("system", "/system_override x"), *ROW["messages"]]}
    assert "tool_" not in encode_chat(row, tokenizer(), date_string=DATE, mode="think").text


def test_two_names_of_one_reasoning_are_one_and_two_reasonings_are_refused() -> None:
    message = say("assistant", "5", reasoning_content="Hm.", thinking="Hm.")
    assert "<think>\nHm.\n</think>\n5" in encode([*HI, message]).text
    with pytest.raises(ValueError, match=r"^messages\[1\] \(assistant\): the chat template lost 'Oh.'$"):
        encode([*HI, message | {"reasoning": "Oh."}])


CONTROL = r": the text holds the control token <\|im_(start|end)\|>; it would be encoded as one: take it out$"


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>"])
@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"messages": [say("system", "TOKEN"), *ROW["messages"]]}, r"messages\[0\] \(system\)"),
        ({"messages": [say("user", "a TOKEN b"), say("assistant", "5")]}, r"messages\[0\] \(user\)"),
        ({"messages": [*HI, say("assistant", "5TOKEN")]}, r"messages\[1\] \(assistant\)"),
        (
            {"messages": [*HI, say("assistant", "5", reasoning_content="TOKEN")]},
            r"messages\[1\] \(assistant\)",
        ),
        ({"messages": [*HI, say("assistant", "5", thinking="TOKEN")]}, r"messages\[1\] \(assistant\)"),
        (
            {
                "messages": [
                    *HI,
                    say("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": "TOKEN"}}]),
                ]
            },
            r"messages\[1\] \(assistant\): tool_calls",
        ),
        (
            {
                "messages": [
                    *HI,
                    say("assistant", "", tool_calls=[{"name": "f", "arguments": '{"x": "\\u003cEND"}'}]),
                ]
            },
            r"messages\[1\] \(assistant\): tool_calls",
        ),
        ({"tools": [{"name": "TOKEN"}]}, "tools"),
        ({"xml_tools": ['{"name": "TOKEN"}']}, "xml_tools"),
        ({"python_tools": "TOKEN"}, "python_tools"),
        ({"custom_instructions": "TOKEN"}, "custom_instructions"),
    ],
)
def test_a_control_token_in_a_text_is_refused(change: dict[str, Any], where: str, token: str) -> None:
    def planted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: planted(item) for key, item in value.items()}
        if isinstance(value, list):
            return [planted(item) for item in value]
        return value.replace("TOKEN", token).replace("END", token[1:]) if isinstance(value, str) else value

    with pytest.raises(ValueError, match=f"^{where}{CONTROL}"):
        encode_chat(ROW | planted(change), tokenizer(), date_string=DATE, mode="think")


@pytest.mark.parametrize(
    "message", [say("assistant", "<think>\nHm\n</think>\nYo"), say("assistant", "Yo", reasoning_content="Hm")]
)
def test_an_answer_that_begins_before_generation_would_is_refused(message: dict[str, Any]) -> None:
    complaint = (
        r"^messages\[3\] \(assistant\): the answer begins '<think>\\nHm\\n.*' before generation would: in "
        r"mode no_think it begins after '<\|im_start\|>assistant\\n<think>\\n\\n</think>\\n'$"
    )
    row = {"messages": [*HI, say("assistant", "Yo"), *HI, message], "enable_thinking": False}
    with pytest.raises(ValueError, match=complaint):
        encode_chat(row, tokenizer(), date_string=DATE)
    assert encode_chat(row, tokenizer(), date_string=DATE, loss_on="all").mode == "no_think"
    assert encode_chat(row | {"enable_thinking": True}, tokenizer(), date_string=DATE).mode == "think"


def test_a_template_that_adds_nothing_for_generation_is_refused() -> None:
    chatml = load_template("chatml")
    always = chatml[: chatml.rindex("{%- if add_generation_prompt")]
    with pytest.raises(ValueError, match="adds nothing to the end of a chat for add_generation_prompt"):
        encode_chat(ROW, tokenizer(), date_string=DATE, template=always)


# Masks, found a second way


def planted(old: str, new: str, name: str = "smol_post") -> str:
    template = load_template(name)
    assert template.count(old) == 1
    return template.replace(old, new)


@every_conversation
@pytest.mark.parametrize("template", ["smol_post", "chatml"])
def test_spans_and_prefixes_give_one_mask(messages: list[Any], template: str) -> None:
    row = {"messages": messages}
    how: Any = {"date_string": DATE, "template": load_template(template), "mode": "think"}
    check_masks([row], tokenizer(), **how)
    assert prefix_mask(row, tokenizer(), **how) == encode_chat(row, tokenizer(), **how).train_mask


def test_the_end_of_a_turn_left_untrained_is_caught() -> None:
    end = "      {{- '<|im_end|>' -}}\n    {%- endgeneration -%}"
    template = planted(end, "    {%- endgeneration -%}{{- '<|im_end|>' -}}")
    complaint = r"disagree at token \d+ \('<\|im_end\|>'\): spans say not, prefixes say trained$"
    with pytest.raises(ValueError, match=complaint):
        check_masks([ROW], tokenizer(), date_string=DATE, template=template, mode="no_think")


def test_a_line_after_the_turn_left_trained_is_caught() -> None:
    template = planted(
        "{%- endgeneration -%}\n    {{- '\\n' -}}", "{{- '\\n' -}}{%- endgeneration -%}", "chatml"
    )
    complaint = r"disagree at token \d+ \('\\n'\): spans say trained, prefixes say not$"
    with pytest.raises(ValueError, match=complaint):
        check_masks([ROW], tokenizer(), date_string=DATE, template=template)


def test_a_header_inside_the_span_is_caught() -> None:
    header = "    {{- '<|im_start|>assistant\\n' ~ opening -}}\n    {%- generation -%}"
    template = planted(header, "    {%- generation -%}{{- '<|im_start|>assistant\\n' ~ opening -}}")
    with pytest.raises(ValueError, match=r"the answer begins '<\|im_start\|>assist"):
        check_masks([ROW], tokenizer(), date_string=DATE, template=template, mode="think")


def test_a_template_that_rewrites_earlier_turns_has_no_prefix_mask() -> None:
    template = planted(
        "{%- if role == 'assistant' -%}",
        "{%- if role == 'assistant' -%}{{- '!' if loop.last -}}",
        "chatml",
    )
    row = {"messages": [*ROW["messages"], *ROW["messages"]]}
    with pytest.raises(ValueError, match=r"^messages\[1\] \(assistant\): the render up to it is no prefix"):
        prefix_mask(row, tokenizer(), date_string=DATE, template=template)


# Turns of weight 0


def trained_text(row: chat.EncodedRow) -> str:
    return tokenizer().decode(
        [token for token, bit in zip(row.input_ids, row.train_mask, strict=True) if bit]
    )


@both_modes
@pytest.mark.parametrize("template", ["smol_post", "chatml"])
@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_turn_of_weight_0_is_rendered_the_same_and_carries_no_loss(
    thinking: bool, template: str, trim_offsets: bool
) -> None:
    how: Any = {"date_string": DATE, "template": load_template(template)}
    vocabulary = tokenizer(trim_offsets=trim_offsets)
    turns = [[*HI, say("assistant", word)] for word in ("Yo", "Ja", "Si")]
    row = {"messages": [one for turn in turns for one in turn], "enable_thinking": thinking}
    whole = encode_chat(row, vocabulary, **how)
    for weights in ([0, 0, 1], [0, 1, 0], [1, 0, None], [0.0, 1.0, 0.0]):
        for (_, turn), weight in zip(turns, weights, strict=True):
            turn["weight"] = weight
        before, encoded = copy.deepcopy(row), encode_chat(row, vocabulary, **how)
        assert (encoded.input_ids, encoded.text) == (whole.input_ids, whole.text)
        said = [turn["content"] for (_, turn) in turns if turn["weight"] != 0]
        assert trained_text(encoded) == "".join(f"{word}<|im_end|>" for word in said)
        assert prefix_mask(row, vocabulary, **how) == encoded.train_mask
        assert row == before


def test_a_row_with_a_turn_of_weight_0_changes_nothing_of_its_batch() -> None:
    weighed = {"messages": [*HI, YO | {"weight": 0}, *HI, YO], "enable_thinking": True}
    rows = [{"messages": [*HI, YO], "enable_thinking": True}, weighed] * 2
    assert encode_chats(rows, tokenizer(), date_string=DATE) == [
        encode_chat(row, tokenizer(), date_string=DATE) for row in rows
    ]


def test_weight_1_is_what_a_turn_has_without_one() -> None:
    for weight in (1, 1.0, None):
        assert encode([*HI, YO | {"weight": weight}]) == encode([*HI, YO])


@both_modes
def test_a_live_switch_of_modes_is_a_row_that_trains_its_last_turn(thinking: bool) -> None:
    """Earlier turns were said in the other mode, which a trained turn could not be."""
    thought = say("assistant", "<think>\nHm\n</think>\nYo")
    earlier, last = (YO, thought) if thinking else (thought, YO)
    row = {"messages": [*HI, earlier | {"weight": 0}, *HI, last], "enable_thinking": thinking}
    encoded = encode_chat(row, tokenizer(), date_string=DATE)
    assert trained_text(encoded) == last["content"] + "<|im_end|>"
    assert encoded.text.endswith(text_of([*HI, earlier, *HI, last], enable_thinking=thinking)[-60:])
    check_masks([row], tokenizer(), date_string=DATE)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_answer_of_a_pair_has_no_weight_0(side: str) -> None:
    pair: dict[str, Any] = {
        "prompt": HI,
        "chosen": [YO],
        "rejected": [say("assistant", "Ja")],
        "enable_thinking": True,
    }
    weighed = pair | {side: [pair[side][0] | {"weight": 0}]}
    with pytest.raises(ValueError, match=f"^{side}: weight 0: a pair is judged by its answers; remove it$"):
        encode_pair(weighed, tokenizer(), date_string=DATE)


def test_a_pair_may_say_that_its_prompt_is_not_trained() -> None:
    prompt = [*HI, YO, *HI]
    pair = {"prompt": prompt, "chosen": [YO], "rejected": [say("assistant", "Ja")], "enable_thinking": True}
    weighed = pair | {"prompt": [*HI, YO | {"weight": 0}, *HI]}
    assert encode_pair(weighed, tokenizer(), date_string=DATE) == encode_pair(
        pair, tokenizer(), date_string=DATE
    )


# Errors


def test_a_row_with_nobody_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^no assistant turn to train on: the roles are user$"):
        encode(HI)
    with pytest.raises(ValueError, match=r"^no assistant turn to train on: each has weight 0$"):
        encode([*HI, YO | {"weight": 0}])


def test_a_weight_where_every_token_is_trained_is_refused() -> None:
    row = {"messages": [*HI, YO | {"weight": 0}, *HI, YO], "enable_thinking": True}
    with pytest.raises(ValueError, match=r"^weight: loss_on: all trains every token, the row has turns of"):
        encode_chat(row, tokenizer(), date_string=DATE, loss_on="all")


def test_a_token_across_the_border_of_a_trained_span_is_refused() -> None:
    plain = copy.deepcopy(tokenizer(special=False))
    plain.add_tokens([AddedToken("\nYo", normalized=False)])
    with pytest.raises(
        ValueError, match=r"the token '\\nYo' lies across the border of a trained span: .*assistant"
    ):
        encode_chat({"messages": [*HI, say("assistant", "Yo")]}, plain, date_string=DATE, mode="think")


def test_a_template_without_generation_spans_is_refused() -> None:
    row = {"messages": [*HI, say("assistant", "Yo"), *HI, say("assistant", "Ja")]}
    chatml = load_template("chatml")
    unmarked = chatml.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    with pytest.raises(ValueError, match=r"the chat template marks 0 of 2 assistant turns: wanted {% gen"):
        encode_chat(row, tokenizer(), date_string=DATE, template=unmarked)
    with pytest.raises(ValueError, match="marks 0 of 1 assistant turns"):
        encode_pair(PAIR, tokenizer(), date_string=DATE, template=unmarked)
    with pytest.raises(ValueError, match="has no chat template"):
        encode_chat(row, PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer), date_string=DATE)


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
        {"name": "f", "z": "ü", "a": {}},
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


@pytest.mark.parametrize("key", ["tools", "xml_tools"])
def test_two_tools_render_alike_as_dicts_texts_or_one_text(key: str) -> None:
    forms = [[{"name": "f"}, {"name": "g"}], ['{"name":"f"}', '{"name":"g"}'], '[{"name":"f"},{"name":"g"}]']
    texts = {encode([*HI, say("assistant", "Yo")], **{key: form}).text for form in forms}
    assert len(texts) == 1
    assert '<tools>\n{"name": "f"}\n{"name": "g"}\n</tools>' in texts.pop()


def test_nulls_in_json_text_were_meant() -> None:
    assert clean_row({"messages": HI, "xml_tools": ['{"default":null}']})[1] == {
        "xml_tools": ['{"default": null}']
    }


def test_python_tools_may_be_plain_text() -> None:
    for tools in ("def f(): ...", ["def f(): ..."]):
        assert clean_row({"messages": HI, "python_tools": tools})[1] == {"python_tools": ["def f(): ..."]}


def calling(arguments: Any) -> list[dict[str, Any]]:
    return [*HI, say("assistant", "", tool_calls=[{"name": "f", "arguments": arguments}])]


YO = say("assistant", "Yo")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "x"}, "^no messages: the row has text$"),
        ({}, "^no messages: the row has no columns$"),
        ({"messages": []}, r"^no messages: the row has messages is \[\]$"),
        ({"messages": None}, "^no messages: the row has messages is None$"),
        ({"messages": "Hi"}, "^messages: wanted a list of messages, found 'Hi'$"),
        ({"messages": [*HI, None]}, r"^messages\[1\]: wanted a message, found None$"),
        ({"messages": [{"content": "x", "role": None}]}, r"^messages\[0\]: no role, only content$"),
        ({"messages": [{"content": None, "role": None}]}, r"^messages\[0\]: no role, only nulls$"),
        (
            {"messages": [say("narrator", "x"), YO]},
            '^the chat template refuses the row: .* unknown role "narrator"$',
        ),
        ({"messages": [say("user", 5), YO]}, r"^messages\[0\] \(user\): wanted text as content, found 5$"),
        (
            {"messages": [say("user", float("nan")), YO]},
            r"^messages\[0\] .*: wanted text as content, found nan$",
        ),
        (
            {"messages": [say("user", ["x"]), YO]},
            r"^messages\[0\] \(user\): wanted text as content, found \['x'\]$",
        ),
        (
            {"messages": [say("user", {"x": 1}), YO]},
            r"^messages\[0\] .*: wanted text as content, found {'x': 1}$",
        ),
        ({"messages": [say("user", None), YO]}, r"^messages\[0\] \(user\): neither content nor tool calls$"),
        ({"messages": [*HI, {"role": "assistant"}]}, r"^messages\[1\] .*: neither content nor tool calls$"),
        ({"messages": [*HI, YO | {"tool_calls": [], "content": None}]}, "neither content nor tool calls$"),
        ({"messages": [*HI, YO | {"tool_calls": 0}]}, "tool_calls: wanted a list of objects, found 0$"),
        ({"messages": [*HI, say("assistant", "x <|endoftext|> y")]}, "holds the special token <|endoftext|>"),
        ({"messages": [*HI, {"role": 5, "content": "x"}]}, "role: wanted text, found 5$"),
        (
            {"messages": [*HI, YO | {"reasoning": 1}]},
            r"^messages\[1\] .*: wanted text as reasoning, found 1$",
        ),
        ({"messages": [say("system", "Brief.")]}, "^no assistant turn to train on: the roles are system$"),
        (
            {"messages": [say("user", "\ud800x"), YO]},
            r"^messages\[0\] \(user\): half a surrogate pair, .*'\\ud800x'$",
        ),
        ({"messages": [say("user", None, tool_calls=[{"name": "g"}]), YO]}, "the chat template lost 'g'$"),
        ({"messages": [say("assistant", "", tool_calls="f()")]}, "tool_calls: wanted a list of objects"),
        ({"messages": [say("assistant", "", tool_calls=[{"id": "1"}])]}, "a tool call has no name, only id$"),
        ({"messages": calling("x")}, r"^messages\[1\] \(assistant\): tool_calls: arguments: not JSON"),
        ({"messages": calling("[1]")}, "tool_calls: arguments: wanted a JSON object, found '\\[1\\]'$"),
        ({"messages": calling([1])}, r"tool_calls: arguments: wanted an object or JSON text, found \[1\]$"),
        ({"messages": calling('{"x": NaN}')}, "tool_calls: not JSON .Out of range float"),
        ({"messages": calling({"x": float("nan")})}, "tool_calls: not JSON .Out of range float"),
        ({"messages": calling({"x": datetime.date(2026, 1, 1)})}, "tool_calls: not JSON .*date"),
        ({"messages": [*HI, YO | {"weight": 2}]}, r"^messages\[1\] .*: weight: wanted 0 or 1, found 2$"),
        ({"messages": [*HI, YO | {"weight": False}]}, "weight: wanted 0 or 1, found False$"),
        ({"messages": [*HI, YO | {"weight": "0"}]}, "weight: wanted 0 or 1, found '0'$"),
        ({"messages": [*HI, YO | {"weight": float("nan")}]}, "weight: wanted 0 or 1, found nan$"),
        (
            {"messages": [HI[0] | {"weight": 0}, YO]},
            r"^messages\[0\] \(user\): weight: only turns of the assis",
        ),
        (ROW | {"xml_tools": ['{"x": NaN}']}, "^xml_tools: not JSON .Out of range float"),
        (ROW | {"chat_template_kwargs": {"enabel_thinking": True}}, "did you mean 'enable_thinking'"),
        (ROW | {"chat_template_kwargs": {"zzz": True}}, "unknown key 'zzz'; known are enable_thinking"),
        (ROW | {"chat_template_kwargs": [1]}, "chat_template_kwargs: wanted an object"),
        (ROW | {"chat_template_kwargs": "{"}, "chat_template_kwargs: not JSON"),
        (ROW | {"enable_thinking": "false"}, "^enable_thinking: wanted true or false, found 'false'$"),
        (ROW | {"custom_instructions": ["x"]}, "^custom_instructions: wanted text as value, found"),
        (ROW | {"xml_tools": ["def f(): ..."]}, "xml_tools: not JSON"),
        (ROW | {"tools": ["3"]}, "tools: wanted JSON objects, found 3"),
        (
            ROW | {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "enable_thinking: the column says True, chat_template_kwargs False; drop one",
        ),
    ],
)
def test_a_bad_row_is_one_clear_line(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        encode_chats([row], tokenizer(), date_string=DATE, mode="think")
    assert "\n" not in str(caught.value)


# Pairs


PAIR = {"prompt": "Hi", "chosen": "5", "rejected": "6", "enable_thinking": True}


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


@both_modes
def test_a_batch_of_pairs_is_its_pairs_one_by_one(thinking: bool) -> None:
    flag = [say("system", "/no_think"), *HI]
    rows: list[dict[str, Any]] = [
        PAIR | {"enable_thinking": thinking},
        {"prompt": flag, "chosen": "ä", "rejected": [say("assistant", "b\n")]},
        {
            "chosen": [*HI, say("assistant", "x")],
            "rejected": [*HI, say("assistant", "y")],
            "xml_tools": [WEATHER],
        },
    ]
    how: Any = {"date_string": DATE, "mode": "think" if thinking else "no_think"}
    assert encode_pairs(rows, tokenizer(), **how) == [encode_pair(row, tokenizer(), **how) for row in rows]
    assert [one.mode for one in encode_pairs(rows, tokenizer(), **how)] == [
        how["mode"],
        "no_think",
        how["mode"],
    ]
    assert encode_pairs([], tokenizer(), **how) == []


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"chosen": "5", "rejected": "6"}, "^no prompt: give the column prompt"),
        (PAIR | {"rejected": "5"}, "^chosen and rejected are equal$"),
        (PAIR | {"rejected": "\n 5"}, "^chosen and rejected are equal$"),
        (PAIR | {"chosen": [*HI, YO], "rejected": [*HI, YO]}, "^chosen and rejected are equal$"),
        (
            {"prompt": "Hi", "chosen": "5"},
            "^rejected: wanted one assistant turn after the shared prompt, found nothing$",
        ),
        (PAIR | {"chosen": HI}, "^chosen: wanted one assistant turn .* found user$"),
        (
            {
                "prompt": [say("user", "Ho")],
                "chosen": [*HI, say("assistant", "5")],
                "rejected": [*HI, say("assistant", "6")],
            },
            "another one than prompt",
        ),
        (
            {
                "prompt": "Ho",
                "chosen": [*HI, say("assistant", "5")],
                "rejected": [*HI, say("assistant", "6")],
            },
            "another one than prompt",
        ),
        (
            PAIR | {"rejected": "<think>\nHm\n</think>\n6", "enable_thinking": False},
            "^rejected begins '<think>.*not where the generation prompt .* ends$",
        ),
        (PAIR | {"enable_thinking": None}, "^the row has no mode: "),
        (PAIR | {"prompt": 5}, "^prompt: wanted a list of messages, found 5$"),
        (PAIR | {"prompt": "<|im_end|>"}, r"^prompt\[0\] \(user\): the text holds the control token <\|im_e"),
        (PAIR | {"chosen": "<|im_start|>"}, r"^chosen\[0\] \(assistant\): the text holds the control token"),
        (PAIR | {"rejected": "x<|im_end|>"}, r"^rejected\[0\] \(assistant\): the text holds the control to"),
        (PAIR | {"rejected": "\ud800"}, r"^rejected\[0\] \(assistant\): half a surrogate pair"),
        (PAIR | {"chosen": [None]}, r"^chosen\[0\]: wanted a message, found None$"),
        (PAIR | {"chosen": [say("assistant", float("nan"))]}, r"^chosen\[0\] .* text as content, found nan$"),
        (
            PAIR | {"prompt": [say("system", "Brief."), *HI], "custom_instructions": "Shout."},
            "^custom_instructions: the chat template lost 'Shout.'$",
        ),
    ],
)
def test_a_bad_pair_is_one_clear_line(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        encode_pairs([row], tokenizer(), date_string=DATE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["prompt", "chosen", "rejected"])
def test_what_the_template_loses_of_a_pair_is_told(lost: str) -> None:
    row = {"prompt": "In", "chosen": "Good", "rejected": "Bad"} | {lost: "Lost"}
    lossy = load_template("chatml").replace("~ content ~", "~ content.replace('Lost', '') ~")
    lossy = lossy.replace("{{- body -}}", "{{- body.replace('Lost', '') -}}")
    with pytest.raises(ValueError, match=r"^messages\[[01]\] .*: the chat template lost 'Lost'$"):
        encode_pair(row, tokenizer(), date_string=DATE, template=lossy)


def test_the_text_prompt_of_whole_conversations_is_one_of_their_messages() -> None:
    shared = [say("system", "Brief."), *HI]
    chosen, rejected = [[*shared, say("assistant", answer)] for answer in "56"]
    whole = {"chosen": chosen, "rejected": rejected, "enable_thinking": True}
    assert pair(prompt="Hi", **whole) == pair(prompt=shared, **whole) == pair(**whole)


def test_a_pair_needs_an_end_of_turn_that_is_one_token() -> None:
    with pytest.raises(ValueError, match=r"chosen does not end with one token <\|im_end\|>"):
        encode_pair(PAIR, tokenizer(special=False), date_string=DATE)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(chat).failed == 0
    assert doctest.testmod(rows).failed == 0


def test_importing_chat_loads_no_heavy_library() -> None:
    code = (
        "import sys, smol_post.chat; heavy = {'torch', 'transformers', 'jinja2', 'numpy', 'tokenizers'}; "
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
