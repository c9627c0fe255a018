"""Renders of both templates, kept as text; what is trained stands between {+ and +}.

`python tests/golden/test_chat.py` writes the files anew; read the diff.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template

from smol_post.chat import EncodedRow, check_masks, clean_row, encode_chat, encode_pair, load_template

FOLDER = Path(__file__).parent
DATE = "01 January 2026"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter & <mehr>: °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


TURNS = [
    user("2 + 3?"),
    assistant("<think>\n2 + 3 = 5\n</think>\n5"),
    user("Twice that?"),
    assistant("\n\n<think>\n2 * 5 = 10\n</think>\n10"),
]
TOOL_TURNS = [
    user("Warm in Bonn and Köln?"),
    assistant(
        "Let me look.",
        tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
    ),
    {"role": "tool", "content": '{"celsius": 21}'},
    assistant(
        None,
        tool_calls=[{"name": "weather", "arguments": '{"city":"Bonn"}'}, {"name": "now", "arguments": {}}],
    ),
    {"role": "tool", "content": "19"},
    {"role": "tool", "content": "noon"},
    assistant("Köln is warmer."),
]
CASES: dict[str, dict[str, Any]] = {
    "think": {"messages": TURNS},
    "think_reasoning_content": {
        "messages": [user("2 + 3?"), assistant("5", reasoning_content="2 + 3 = 5\n")],
        "enable_thinking": None,
    },
    "no_think": {
        "messages": [user("2 + 3?"), assistant("5"), user("Twice?"), assistant("\n  10\n")],
        "enable_thinking": False,
    },
    "no_think_own_blocks": {
        "messages": [
            user("2 + 3?"),
            assistant("<think>\n\n</think>\n\n5"),
            user("Twice?"),
            assistant("<think></think>10"),
            user("And?"),
            assistant("<think>\n\n</think>\n<think>\n2 * 20\n</think>\n40"),
        ],
        "enable_thinking": False,
    },
    "empty_think": {
        "messages": [user("2 + 3?"), assistant("<think>\n\n</think>\n5"), user("Hm?"), assistant("Yes.")],
        "enable_thinking": True,
    },
    "think_flag": {
        "messages": [system("/think"), user("2 + 3?"), assistant("<think>\n2 + 3 = 5\n</think>\n5")],
        "enable_thinking": False,
    },
    "no_think_flag_and_instructions": {
        "messages": [system("Be brief. /no_think\nNo lists."), user("/think 2 + 3?"), assistant("5")],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    "flags_inside_words": {
        "messages": [
            system("Logs: /thinking, a/no_think/b, x/system_override."),
            user("/think"),
            assistant("Ok"),
        ],
        "enable_thinking": False,
    },
    "custom_instructions": {
        "messages": [user("2 + 3?"), assistant("5!")],
        "chat_template_kwargs": '{"custom_instructions": "Shout.", "enable_thinking": false}',
    },
    "system_override": {
        "messages": [
            system("/system_override You are a pirate. /no_think"),
            user("2 + 3?"),
            assistant("5, arr"),
        ],
        "xml_tools": [WEATHER],
    },
    "later_system_turn": {
        "messages": [user("2 + 3?"), system("Speak French. /no_think"), assistant("cinq")],
    },
    "xml_tools": {
        "messages": TOOL_TURNS,
        "xml_tools": [WEATHER, '{"name":"now","about":null}'],
        "enable_thinking": False,
    },
    "python_tools": {
        "messages": [user("Hot?"), assistant("<think>\nAsk.\n</think>\n<code>\nweather('Bonn')\n</code>")],
        "python_tools": ['def weather(city: str) -> float:\n    """Celsius."""', "def now() -> str: ..."],
    },
    "unicode": {
        "messages": [
            system("Antworte auf Deutsch: äöüß."),
            user("漢字 e\u0301 👩\u200d👧🏽 \u05e2\u05d1\u05e8\u05d9\u05ea?"),
            assistant("<think>\nn\u0303 ist ñ 😀\n</think>\n„Ja“\u00a0…\u2028"),
            user("\u00a0\t?"),
            assistant("\u00a0\u3000漢\u0308"),
        ],
    },
    "both_tools": {
        "messages": [user("Hot?"), assistant("21")],
        "chat_template_kwargs": {
            "tools": [WEATHER],
            "python_tools": "def now() -> str: ...",
            "enable_thinking": False,
        },
    },
}
CHATML_CASES: dict[str, dict[str, Any]] = {
    "chatml": {"messages": [system("Be brief. /think"), *TURNS]},
    "chatml_unicode": {"messages": CASES["unicode"]["messages"]},
    "chatml_tool_calls": {"messages": TOOL_TURNS},
    "chatml_reasoning_content": {"messages": CASES["think_reasoning_content"]["messages"]},
}
PAIR: dict[str, Any] = {
    "chosen": [user("2 + 3?"), assistant("5")],
    "rejected": [user("2 + 3?"), assistant("6")],
    "enable_thinking": False,
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([load_template("smol_post"), "\n\n\n  \n\n two\n\n  2 + 3 = 5.\n5\n"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def shown(ids: list[int], mask: list[int]) -> str:
    """The decoded tokens, each run of trained ones between {+ and +}."""
    runs: list[tuple[int, list[int]]] = []
    for token, bit in zip(ids, mask, strict=True):
        if not runs or runs[-1][0] != bit:
            runs.append((bit, []))
        runs[-1][1].append(token)
    return "".join(
        f"{{+{tokenizer().decode(run)}+}}" if bit else tokenizer().decode(run) for bit, run in runs
    )


def encoded(name: str) -> EncodedRow:
    """A case in the template it is for; where the row has no mode, the source of ours says think."""
    row = (CASES | CHATML_CASES)[name]
    how: Any = {"template": load_template("chatml")}
    if name in CASES:
        how = {"template": load_template("smol_post"), "mode": "think"}
    return encode_chat(row, tokenizer(), date_string=DATE, **how)


def render(name: str) -> str:
    one = encoded(name)
    return f"mode: {one.mode}\n{shown(one.input_ids, one.train_mask)}"


def render_pair() -> str:
    pair = encode_pair(PAIR, tokenizer(), date_string=DATE, template=load_template("smol_post"))
    parts = {"prompt": pair.prompt_ids, "chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
    texts = [f"{name}: {tokenizer().decode(ids)!r}\n" for name, ids in parts.items()]
    return f"mode: {pair.mode}\n{''.join(texts)}"


every_case = pytest.mark.parametrize("name", [*CASES, *CHATML_CASES])


@every_case
def test_a_chat_renders_and_is_trained_as_the_file_shows(name: str) -> None:
    assert render(name) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def test_a_pair_is_split_as_the_file_shows() -> None:
    assert render_pair() == (FOLDER / "pair_no_think.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("template", ["smol_post", "chatml"])
def test_generation_spans_and_prefixes_train_the_same_tokens(template: str) -> None:
    rows = list((CASES | CHATML_CASES).values())
    if template == "chatml":  # it has no place for tools and instructions
        rows = [row for row in rows if clean_row(row)[1].keys() <= {"enable_thinking"}]
    assert len(rows) > 8
    check_masks(rows, tokenizer(), date_string=DATE, template=load_template(template), mode="think")


@every_case
def test_trl_renders_and_masks_the_same(name: str) -> None:
    ours, (messages, variables) = encoded(name), clean_row((CASES | CHATML_CASES)[name])
    trls = copy.deepcopy(tokenizer())
    trls.chat_template = load_template("chatml" if name in CHATML_CASES else "smol_post")
    tools: Any = variables.pop("tools", None)
    kwargs = variables | {"date_string": DATE}
    if ours.mode != "text":
        kwargs["enable_thinking"] = ours.mode == "think"
    example: Any = {"messages": messages, "chat_template_kwargs": kwargs}
    assert apply_chat_template(example, trls, tools=tools) == {"text": ours.text}
    tokenized: Any = trls.apply_chat_template(
        messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True, **kwargs
    )
    assert tokenized["input_ids"] == ours.input_ids
    assert tokenized["assistant_masks"] == ours.train_mask


def test_trl_splits_a_pair_the_same() -> None:
    ours = encode_pair(PAIR, tokenizer(), date_string=DATE, template=load_template("smol_post"))
    trls = copy.deepcopy(tokenizer())
    trls.chat_template = load_template("smol_post")
    example: Any = {
        "prompt": PAIR["chosen"][:1],
        "chosen": PAIR["chosen"][1:],
        "rejected": PAIR["rejected"][1:],
        "chat_template_kwargs": {"enable_thinking": False, "date_string": DATE},
    }
    texts = apply_chat_template(example, trls)
    assert texts["prompt"] == trls.decode(ours.prompt_ids)
    assert texts["chosen"] == trls.decode(ours.chosen_ids) + "\n"
    assert texts["rejected"] == trls.decode(ours.rejected_ids) + "\n"


if __name__ == "__main__":
    for each in [*CASES, *CHATML_CASES]:
        (FOLDER / f"{each}.txt").write_text(render(each), encoding="utf-8")
    (FOLDER / "pair_no_think.txt").write_text(render_pair(), encoding="utf-8")
