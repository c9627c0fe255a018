"""Chats to token ids: a dataset row and a template in, `input_ids` and the mask of trained tokens out."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smol_post.refusal import Refusal

Mode = Literal["think", "no_think"]

TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE_NAMES = ("smol_post", "chatml")
END_OF_TURN = "<|im_end|>"
TOOL_KEYS = ("tools", "xml_tools", "python_tools")
TEMPLATE_KEYS = ("enable_thinking", *TOOL_KEYS, "custom_instructions", "date_string")


@dataclass(frozen=True)
class EncodedRow:
    """A chat as token ids; `train_mask[i]` is 1 where token i carries loss. `text` is what was encoded."""

    input_ids: list[int]
    train_mask: list[int]
    mode: Mode
    text: str


@dataclass(frozen=True)
class EncodedPair:
    """A preference: the prompt up to where the model speaks, and two answers that end with `<|im_end|>`."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    mode: Mode


def load_template(name_or_path: str, *, folder: Path = Path()) -> str:
    """The text of a template: `smol_post`, `chatml`, or a .jinja file, relative to `folder` (the recipe's).

    Raises Refusal where there is no such template.
    """
    ours = name_or_path in TEMPLATE_NAMES
    path = TEMPLATES / f"{name_or_path}.jinja" if ours else folder / Path(name_or_path).expanduser()
    if path.suffix == ".jinja" and path.is_file():
        return path.read_text(encoding="utf-8")
    known = " or ".join(TEMPLATE_NAMES)
    raise Refusal(
        f"no chat template {name_or_path!r}: wanted {known}, or the path of an existing .jinja file"
    )


def clean_row(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and template variables of a dataset row, free of what Arrow and JSON did to them.

    Arrow fills missing keys with nulls, and a null `enable_thinking` would read as false; so nulls go. Tools
    come as dicts, as a list of JSON texts or as one JSON text, and leave as dicts (`tools`) or one text each.
    Nulls inside JSON text were written by a person and stay.

    >>> clean_row({"messages": [{"role": "user", "content": "Hi", "tool_calls": None}], "source": "x",
    ...            "chat_template_kwargs": {"enable_thinking": None, "xml_tools": '[{"name":"f"}]'}})
    ([{'role': 'user', 'content': 'Hi'}], {'xml_tools': ['{"name": "f"}']})

    Raises ValueError: no messages, an unknown or contradictory variable, tools that are not JSON objects.
    """
    if not row.get("messages"):
        raise ValueError(f"no messages: the row has {', '.join(row) or 'no columns'}")
    return _clean_messages(row["messages"], "messages"), _clean_variables(row)


def mode_of(messages: list[dict[str, Any]], kwargs: Mapping[str, Any]) -> Mode:
    """The mode the template renders: the leading system message's flag, else `enable_thinking`, else think.

    >>> mode_of([{"role": "system", "content": "Be brief. /no_think"}], {"enable_thinking": True})
    'no_think'
    >>> mode_of([{"role": "system", "content": "Logs are in /thinking/no_think."}], {})
    'think'
    """
    first = messages[0] if messages else {}
    words = str(first.get("content", "")).split() if first.get("role") == "system" else []
    if "/no_think" in words:
        return "no_think"
    if "/think" in words:
        return "think"
    return "no_think" if kwargs.get("enable_thinking") is False else "think"


def render_chat(row: Mapping[str, Any], *, template: str, date_string: str) -> str:
    """A dataset row as the text a template makes of it, without a tokenizer; ValueError as `clean_row`."""
    messages, kwargs = clean_row(row)
    return _render(messages, kwargs, {}, template, date_string)[0]


def encode_chat(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    date_string: str,
    template: str | None = None,
    loss_on: Literal["assistant", "all"] = "assistant",
) -> EncodedRow:
    """Render a row once and encode it; a token is trained where its characters lie in a generation span.

    A span begins where the generation prompt ends and closes after `<|im_end|>`; in no_think mode:

        <|im_start|> assistant \\n <think> \\n\\n </think> \\n  5  <|im_end|> \\n
             0           0      0     0      0       0      0   1      1       0

    `template` is a template's text (`load_template`), by default the tokenizer's own. `date_string` pins
    today's date in the metadata, unless the row brings its own. `loss_on="all"` trains every token.

    Raises ValueError: what `clean_row` and the template refuse, no assistant turn, a token across a border.
    """
    return encode_chats([row], tokenizer, date_string=date_string, template=template, loss_on=loss_on)[0]


def encode_chats(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    date_string: str,
    template: str | None = None,
    loss_on: Literal["assistant", "all"] = "assistant",
) -> list[EncodedRow]:
    """`encode_chat` of every row, in order, with one call of the tokenizer."""
    template = _template_of(tokenizer, template)
    chats = [clean_row(row) for row in rows]
    for messages, _ in chats:
        roles = [message["role"] for message in messages]
        if loss_on == "assistant" and "assistant" not in roles:
            raise ValueError(f"no assistant turn to train on: the roles are {', '.join(roles)}")
    known = tokenizer.special_tokens_map
    rendered = [_render(*chat, known, template, date_string) for chat in chats]
    encoded = _encode([text for text, _ in rendered], tokenizer)
    rows_out = []
    for chat, (text, spans), (ids, offsets) in zip(chats, rendered, encoded, strict=True):
        mask = [1] * len(ids) if loss_on == "all" else _mask(offsets, spans, text)
        rows_out.append(EncodedRow(ids, mask, mode_of(*chat), text))
    return rows_out


def encode_pair(
    row: Mapping[str, Any], tokenizer: Any, *, date_string: str, template: str | None = None
) -> EncodedPair:
    """A preference row as ids: `prompt` (absent, text, messages), `chosen` and `rejected` (text, messages).

    Where chosen and rejected hold the whole conversation, the messages they share are the prompt (and a
    prompt given as text is not read):

        prompt_ids    <|im_start|> user \\n 2+3? <|im_end|> \\n <|im_start|> assistant \\n
        chosen_ids    5 <|im_end|>
        rejected_ids  6 <|im_end|>

    Raises ValueError: no prompt, answers that are equal or are not one assistant turn, or an answer whose
    tokens do not continue the generation prompt (in no_think mode: one that opens with its own thoughts).
    """
    template = _template_of(tokenizer, template)
    prompt, answers = _split_pair(row)
    kwargs = _clean_variables(row)
    prompt_text, _ = _render(
        prompt, kwargs, tokenizer.special_tokens_map, template, date_string, add_generation_prompt=True
    )
    rendered = [
        _render([*prompt, answer], kwargs, tokenizer.special_tokens_map, template, date_string)
        for answer in answers
    ]
    (prompt_ids, _), *encoded = _encode([prompt_text, *(text for text, _ in rendered)], tokenizer)
    completions = []
    for name, (text, spans), (ids, offsets) in zip(("chosen", "rejected"), rendered, encoded, strict=True):
        trained = [i for i, bit in enumerate(_mask(offsets, spans[-1:], text)) if bit]
        completion = ids[trained[0] : trained[-1] + 1]
        if ids[: trained[0]] != prompt_ids:
            opening = tokenizer.decode(completion[:8])
            raise ValueError(
                f"{name} begins {opening!r}, not where the generation prompt {prompt_text[-40:]!r} ends"
            )
        if completion[-1] != tokenizer.convert_tokens_to_ids(END_OF_TURN):
            raise ValueError(f"{name} does not end with one token {END_OF_TURN}: add it to the tokenizer")
        completions.append(completion)
    return EncodedPair(prompt_ids, completions[0], completions[1], mode_of(prompt, kwargs))


def _clean_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Messages without null keys; the arguments of tool calls as an object or as canonical JSON text."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{where}: wanted a list of messages, found {_short(messages)}")
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for i, message in enumerate(cleaned):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where}[{i}]: no role, only {', '.join(message) or 'nulls'}")
        if message.get("tool_calls"):
            message["tool_calls"] = _clean_calls(message["tool_calls"], f"{where}[{i}].tool_calls")
    return cleaned


def _clean_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"{where}: wanted a list of objects, found {_short(calls)}")
    calls = _without_nulls(calls)
    for call in calls:
        inner = call["function"] if isinstance(call.get("function"), dict) else call
        if isinstance(inner.get("arguments"), str):
            arguments = _parse(inner["arguments"] or "{}", f"{where}: arguments")
            inner["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return calls


def _clean_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """Template variables from `chat_template_kwargs` (dict, JSON text, null) and columns so named."""
    given = row.get("chat_template_kwargs") or {}
    given = _parse(given, "chat_template_kwargs") if isinstance(given, str) else given
    if not isinstance(given, Mapping):
        raise ValueError(f"chat_template_kwargs: wanted an object, found {_short(given)}")
    for key in given:
        if key not in TEMPLATE_KEYS:
            close = difflib.get_close_matches(key, TEMPLATE_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(TEMPLATE_KEYS)}"
            raise ValueError(f"chat_template_kwargs: unknown key {key!r}; {hint}")
    kwargs: dict[str, Any] = {}
    for key in TEMPLATE_KEYS:
        value, column = given.get(key), row.get(key)
        if value is not None and column is not None and value != column:
            found = f"the column says {_short(column)}, chat_template_kwargs {_short(value)}"
            raise ValueError(f"{key}: {found}; drop one")
        value = column if value is None else value
        wanted = (bool, "true or false") if key == "enable_thinking" else (str, "text")
        if key in TOOL_KEYS:
            texts = list(_tool_texts(value, key))
            value = [json.loads(text) for text in texts] if key == "tools" else texts
        elif value is not None and not isinstance(value, wanted[0]):
            raise ValueError(f"{key}: wanted {wanted[1]}, found {_short(value)}")
        if value is False or value:
            kwargs[key] = value
    return kwargs


def _tool_texts(value: Any, key: str) -> Iterator[str]:
    """Every tool in `value`, however nested and encoded, as canonical JSON (python_tools: or plain text)."""
    text = value if isinstance(value, str) else None
    if text is not None:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if key != "python_tools":
                raise ValueError(f"{key}: not JSON ({error}): {_short(text)}") from None
    if isinstance(value, Mapping):
        yield json.dumps(value if text is not None else _without_nulls(value), ensure_ascii=False)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tool_texts(item, key)
    elif text is not None and key == "python_tools":
        yield text
    elif value is not None:
        raise ValueError(f"{key}: wanted JSON objects, found {_short(value)}")


def _split_pair(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The prompt's messages, and one assistant message each for chosen and rejected."""
    sides = {}
    for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        value = row.get(key) or []
        sides[key] = _clean_messages(
            [{"role": role, "content": value}] if isinstance(value, str) else value, key
        )
    prompt, chosen, rejected = sides.values()
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and (not prompt or chosen[0]["role"] != "assistant"):
        if not isinstance(row.get("prompt"), str) and prompt != chosen[: len(prompt)]:
            raise ValueError("chosen and rejected hold the whole conversation, but another one than prompt")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise ValueError("no prompt: give the column prompt, or whole conversations in chosen and rejected")
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if [message["role"] for message in answer] != ["assistant"]:
            found = ", ".join(message["role"] for message in answer) or "nothing"
            raise ValueError(f"{name}: wanted one assistant turn after the shared prompt, found {found}")
    return prompt, [chosen[0], rejected[0]]


def _template_of(tokenizer: Any, template: str | None) -> str:
    template = template or tokenizer.chat_template
    if not template:
        raise ValueError(
            "the tokenizer has no chat template; set chat_template: smol_post, chatml or a .jinja file"
        )
    return template


def _render(
    messages: list[dict[str, Any]],
    kwargs: Mapping[str, Any],
    special_tokens: Mapping[str, Any],
    template: str,
    date_string: str,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat and its generation spans [start, end) in characters, in order."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **{**special_tokens, "date_string": date_string, **kwargs},
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the row: {error}") from None
    (text,), (spans,) = rendered
    text.encode()  # half a surrogate pair, which no tokenizer takes, is a ValueError here
    return text, spans


def _encode(texts: list[str], tokenizer: Any) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids and their character offsets for each text, nothing added and nothing cut."""
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)


def _mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]], text: str) -> list[int]:
    """1 for each token inside a span; offsets and spans in order.

    >>> _mask([(0, 2), (2, 3), (3, 5), (5, 6)], [(2, 5)], "ab5cd.")
    [0, 1, 1, 0]

    A token of no width (the tokenizer trimmed its spaces) lies before its offset. Raises ValueError for a
    token across a border, and where the template marked nothing.
    """
    if not spans:
        raise ValueError("the chat template marks no assistant turn: wanted {% generation %} around each")
    mask, remaining = [], iter([*spans, (len(text) + 1, len(text) + 1)])
    start, end = next(remaining)
    for left, right in offsets:
        while left >= end:
            start, end = next(remaining)
        inside = right > start
        if inside and (left < start or right > end):
            near = text[max(0, left - 20) : right + 20]
            raise ValueError(
                f"the token {text[left:right]!r} lies across the border of a trained span: {near!r}"
            )
        mask.append(int(inside))
    return mask


def _parse(text: str, where: str) -> Any:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): {_short(text)}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: wanted a JSON object, found {_short(text)}")
    return parsed


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
