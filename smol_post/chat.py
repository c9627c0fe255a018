"""Chats to token ids: a dataset row and a template in, `input_ids` and which of them are trained out."""

import difflib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smol_post.refusal import Refusal

Mode = Literal["think", "no_think"]
Label = Literal["think", "no_think", "text"]  # text: a row without a mode, of a template that knows none
Row = Mapping[str, Any]
Messages = list[dict[str, Any]]
Intervals = list[tuple[int, int]]  # [start, stop), in order

TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE_NAMES = ("smol_post", "chatml")
END_OF_TURN = "<|im_end|>"
CONTROL_TOKENS = ("<|im_start|>", END_OF_TURN)
TOOL_KEYS = ("tools", "xml_tools", "python_tools")
TEMPLATE_KEYS = ("enable_thinking", *TOOL_KEYS, "custom_instructions", "date_string")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # transformers takes each for thoughts
_FLAG = re.compile(r"(?<!\S)(/think|/no_think|/system_override)(?!\S)")


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A chat as token ids; the tokens of the intervals `trained` carry loss. `text` is what was encoded.

    >>> EncodedRow([5, 6, 7, 8], [(1, 3)], "text", "abcd").train_mask
    [0, 1, 1, 0]
    """

    input_ids: list[int]
    trained: Intervals
    mode: Label
    text: str

    @property
    def train_mask(self) -> list[int]:
        """1 where a token carries loss."""
        mask = [0] * len(self.input_ids)
        for start, stop in self.trained:
            mask[start:stop] = [1] * (stop - start)
        return mask


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference: the prompt up to where the model speaks, and two answers that end with `<|im_end|>`."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    mode: Label


class _Chat(NamedTuple):
    """What a template is given of a row."""

    messages: Messages
    variables: dict[str, Any]
    mode: Label


class _How(NamedTuple):
    """What rows are rendered with; `mode` is that of rows that name none."""

    template: str
    date_string: str
    mode: Mode | None = None
    special_tokens: tuple[tuple[str, str], ...] = ()


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


def render_chat(row: Row, *, template: str, date_string: str, mode: Mode | None = None) -> str:
    """A dataset row as the text a template makes of it, without a tokenizer; ValueError as `encode_chats`."""
    how = _How(template, date_string, mode)
    return _render([_chat(*clean_row(row), how)], how)[0][0]


def encode_chat(row: Row, tokenizer: Any, **how: Any) -> EncodedRow:
    """Render a row once and encode it, as `encode_chats` does.

    A token is trained where its text lies in a generation span of the template. A span begins where the
    generation prompt ends and closes after `<|im_end|>`; in no_think mode:

        <|im_start|> assistant \\n <think> \\n\\n </think> \\n  5  <|im_end|> \\n
             0           0      0     0      0       0      0   1      1       0
    """
    return encode_chats([row], tokenizer, **how)[0]


def encode_chats(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    date_string: str,
    template: str | None = None,
    loss_on: Literal["assistant", "all"] = "assistant",
    mode: Mode | None = None,
) -> list[EncodedRow]:
    """Every row rendered and encoded, in order, with one call of the tokenizer.

    `template` is a template's text (`load_template`), by default the tokenizer's own. `date_string` pins
    today's date in the metadata, unless the row brings its own. `loss_on="all"` trains every token. `mode`
    is that of rows that name none; a template that knows modes wants one of each row.

    Raises ValueError: what `clean_row` and the template refuse, no mode, text that the template loses, no
    assistant turn, an answer that begins elsewhere than generation would, a token across a span's border.
    """
    how = _how(tokenizer, template, date_string, mode)
    chats = [_chat(*clean_row(row), how) for row in rows]
    rendered = _render(chats, how)
    if loss_on == "assistant":
        for chat, (text, spans) in zip(chats, rendered, strict=True):
            turns, prompt = _assistant_turns(chat, spans), _generation_prompt(how, chat.mode)
            for i, (start, _) in zip(turns, spans, strict=True):
                if not text.endswith(prompt, 0, start):
                    opening = _short(text[start : start + 20])
                    raise ValueError(
                        f"messages[{i}] (assistant): the answer begins {opening} before generation would: "
                        f"in mode {chat.mode} it begins after {prompt!r}"
                    )
    encoded = _encode(rendered, tokenizer)
    return [
        EncodedRow(ids, [(0, len(ids))] if loss_on == "all" else trained, chat.mode, text)
        for chat, (text, _), (ids, trained) in zip(chats, rendered, encoded, strict=True)
    ]


def encode_pair(row: Row, tokenizer: Any, **how: Any) -> EncodedPair:
    """A preference row as ids, as `encode_pairs` makes them.

    The columns are `prompt` (absent, text, messages), `chosen` and `rejected` (text, messages). Where chosen
    and rejected hold the whole conversation, the messages they share are the prompt:

        prompt_ids    <|im_start|> user \\n 2+3? <|im_end|> \\n <|im_start|> assistant \\n
        chosen_ids    5 <|im_end|>
        rejected_ids  6 <|im_end|>
    """
    return encode_pairs([row], tokenizer, **how)[0]


def encode_pairs(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    date_string: str,
    template: str | None = None,
    mode: Mode | None = None,
) -> list[EncodedPair]:
    """Every preference row as ids, in order, with one call of the tokenizer.

    Raises ValueError: as `encode_chats`, no prompt, answers that are equal or are not one assistant turn, or
    an answer that does not continue the generation prompt (in no_think mode: it opens with its own thoughts).
    """
    how = _how(tokenizer, template, date_string, mode)
    chats, answered = [], []  # the prompt of each row; with its chosen answer, with its rejected answer
    for row in rows:
        prompt, *answers = _split_pair(row)
        chats.append(_chat(prompt, _clean_variables(row), how))
        answered += [chats[-1]._replace(messages=[*prompt, answer]) for answer in answers]
    texts: list[tuple[str, Intervals]] = [(text, []) for text, _ in _render(chats, how, prompt=True)]
    for chat, (text, spans) in zip(answered, _render(answered, how), strict=True):
        texts.append((text, spans[_assistant_turns(chat, spans).index(len(chat.messages) - 1) :]))
    encoded = list(_encode(texts, tokenizer))
    answers, end_id = iter(encoded[len(chats) :]), tokenizer.convert_tokens_to_ids(END_OF_TURN)
    pairs = []
    for chat, (prompt_text, _), (prompt_ids, _) in zip(chats, texts, encoded, strict=False):
        both = []
        for name, (ids, [(start, stop)]) in zip(("chosen", "rejected"), islice(answers, 2), strict=True):
            if ids[:start] != prompt_ids:
                opening, end = tokenizer.decode(ids[start : min(stop, start + 8)]), prompt_text[-40:]
                raise ValueError(f"{name} begins {opening!r}, not where the generation prompt {end!r} ends")
            if ids[stop - 1] != end_id:
                raise ValueError(f"{name} does not end with one token {END_OF_TURN}: add it to the tokenizer")
            both.append(ids[start:stop])
        if both[0] == both[1]:
            raise ValueError("chosen and rejected are equal")
        pairs.append(EncodedPair(prompt_ids, both[0], both[1], chat.mode))
    return pairs


def prefix_mask(
    row: Row, tokenizer: Any, *, date_string: str, template: str | None = None, mode: Mode | None = None
) -> list[int]:
    """The train mask of a row found another way: by rendering prefixes, without generation spans.

    Assistant turn i is trained from the end of `messages[:i]` with a generation prompt, to the last
    `<|im_end|>` of `messages[:i + 1]`:

        <|im_start|>user\\n2+3?<|im_end|>\\n<|im_start|>assistant\\n
        <|im_start|>user\\n2+3?<|im_end|>\\n<|im_start|>assistant\\n5<|im_end|>\\n
        trained                                                -----------

    Raises ValueError where the render of a prefix is no prefix of the render.
    """
    how = _how(tokenizer, template, date_string, mode)
    chat = _chat(*clean_row(row), how)

    def render(num_messages: int, prompt: bool = False) -> str:
        return _render([chat._replace(messages=chat.messages[:num_messages])], how, prompt)[0][0]

    whole, turns = render(len(chat.messages)), []
    for i, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            before, turn = render(i, prompt=True), render(i + 1)
            turn = turn[: turn.rfind(END_OF_TURN) + len(END_OF_TURN)]
            if not (whole.startswith(before) and whole.startswith(turn)):
                raise ValueError(f"messages[{i}] (assistant): the render up to it is no prefix of the whole")
            turns.append((len(before), len(turn)))
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [int(any(start < right <= end for start, end in turns)) for _, right in encoding["offset_mapping"]]


def check_masks(rows: Iterable[Row], tokenizer: Any, **how: Any) -> None:
    """Holds the masks of `encode_chats` against `prefix_mask`; ValueError at the first token that differs."""
    rows, say = list(rows), ("not", "trained")
    for row, encoded in zip(rows, encode_chats(rows, tokenizer, **how), strict=True):
        masks = zip(encoded.input_ids, encoded.train_mask, prefix_mask(row, tokenizer, **how), strict=True)
        for i, (token, spans, prefixes) in enumerate(masks):
            if spans != prefixes:
                raise ValueError(
                    f"the template's generation spans and prefix rendering disagree at token {i} "
                    f"({tokenizer.decode(token)!r}): spans say {say[spans]}, prefixes say {say[prefixes]}"
                )


# Rows: what a dataset holds, made clean


def clean_row(row: Row) -> tuple[Messages, dict[str, Any]]:
    """Messages and template variables of a dataset row, free of what Arrow and JSON did to them.

    Arrow fills missing keys with nulls, and a null `enable_thinking` would read as false; so nulls go. Tools
    come as dicts, as a list of JSON texts or as one JSON text, and leave as dicts (`tools`) or one text each.
    Nulls inside JSON text were written by a person and stay.

    >>> clean_row({"messages": [{"role": "user", "content": "Hi", "tool_calls": None}], "source": "x",
    ...            "chat_template_kwargs": {"enable_thinking": None, "xml_tools": '[{"name":"f"}]'}})
    ([{'role': 'user', 'content': 'Hi'}], {'xml_tools': ['{"name": "f"}']})

    Raises ValueError: no messages, content that is not text or holds a control token, an unknown or
    contradictory variable, tools or calls that are not JSON objects.
    """
    if not row.get("messages"):
        found = f"messages is {row['messages']!r}" if "messages" in row else ", ".join(row) or "no columns"
        raise ValueError(f"no messages: the row has {found}")
    return _clean_messages(row["messages"], "messages"), _clean_variables(row)


def _clean_messages(messages: Any, where: str) -> Messages:
    """Messages without null keys; the arguments of tool calls as an object or as canonical JSON text."""
    if not isinstance(messages, list):
        raise ValueError(f"{where}: wanted a list of messages, found {_short(messages)}")
    cleaned = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}[{i}]: wanted a message, found {_short(message)}")
        message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where}[{i}]: no role, only {', '.join(message) or 'nulls'}")
        here = f"{where}[{i}] ({message['role']})"
        if message.get("tool_calls"):
            message["tool_calls"] = _clean_calls(message["tool_calls"], f"{here}: tool_calls")
        elif "content" not in message:
            raise ValueError(f"{here}: neither content nor tool calls")
        for key in ("content", *REASONING_KEYS):
            if key in message:
                _check_text(message[key], here, key)
        cleaned.append(message)
    return cleaned


def _clean_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"{where}: wanted a list of objects, found {_short(calls)}")
    calls = _without_nulls(calls)
    for call in calls:
        inner = _function(call)
        if not isinstance(inner.get("name"), str):
            raise ValueError(f"{where}: a tool call has no name, only {', '.join(inner) or 'nulls'}")
        if isinstance(inner.get("arguments"), str):
            inner["arguments"] = _json(_parse(inner["arguments"] or "{}", f"{where}: arguments"), where)
        elif not isinstance(inner.get("arguments", {}), dict):
            found = _short(inner["arguments"])
            raise ValueError(f"{where}: arguments: wanted an object or JSON text, found {found}")
        _check_text(_json(call, where), where, "JSON")
    return calls


def _clean_variables(row: Row) -> dict[str, Any]:
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
    variables: dict[str, Any] = {}
    for key in TEMPLATE_KEYS:
        value, column = given.get(key), row.get(key)
        if value is not None and column is not None and value != column:
            found = f"the column says {_short(column)}, chat_template_kwargs {_short(value)}"
            raise ValueError(f"{key}: {found}; drop one")
        value = column if value is None else value
        if value is None:
            continue
        if key in TOOL_KEYS:
            texts = list(_tool_texts(value, key))
            value = [json.loads(text) for text in texts] if key == "tools" else texts
        elif key != "enable_thinking":
            _check_text(value, key, "value")
        elif not isinstance(value, bool):
            raise ValueError(f"{key}: wanted true or false, found {_short(value)}")
        if value is False or value:
            variables[key] = value
    return variables


def _tool_texts(value: Any, key: str) -> Iterator[str]:
    """Every tool in `value`, however nested and encoded, as canonical JSON (python_tools: or plain text)."""
    text = value if isinstance(value, str) else None
    if text is not None:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if key != "python_tools":
                raise ValueError(f"{key}: not JSON ({error}): {_short(text)}") from None
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tool_texts(item, key)
        return
    if isinstance(value, Mapping):
        text = _json(value if text is not None else _without_nulls(value), key)
    elif value is not None and (text is None or key != "python_tools"):
        raise ValueError(f"{key}: wanted JSON objects, found {_short(value)}")
    if text is not None:
        _check_text(text, key, "tool")
        yield text


def _split_pair(row: Row) -> tuple[Messages, dict[str, Any], dict[str, Any]]:
    """The prompt's messages, and one assistant message each for chosen and rejected."""
    sides = {}
    for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        value = row.get(key) or []
        value = [{"role": role, "content": value}] if isinstance(value, str) else value
        sides[key] = _clean_messages(value, key)
    prompt, chosen, rejected = sides.values()
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and (not prompt or chosen[0]["role"] != "assistant"):
        one_of_them = isinstance(row.get("prompt"), str) and prompt[:1] and prompt[0] in chosen[:shared]
        if not one_of_them and prompt != chosen[: len(prompt)]:
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
    return prompt, chosen[0], rejected[0]


def _check_text(text: Any, where: str, what: str) -> None:
    """ValueError where this is not text, or not text that is encoded as text."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: wanted text as {what}, found {_short(text)}")
    for token in CONTROL_TOKENS:
        if token in text:
            raise ValueError(
                f"{where}: the text holds the control token {token}; it would be encoded as one: take it out"
            )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            near = text[max(0, error.start - 10) : error.start + 10]
            raise ValueError(f"{where}: half a surrogate pair, which is no character: {near!r}") from None


def _parse(text: str, where: str) -> Any:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): {_short(text)}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: wanted a JSON object, found {_short(text)}")
    return parsed


def _json(value: Any, where: str = "") -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: not JSON ({error}): {_short(value)}") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """The inside of an OpenAI-style tool or tool call, or all of a flat one."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Text: what the template makes of a row, held against the row


def mode_of(messages: Messages, variables: Mapping[str, Any], declared: Mode | None = None) -> Mode | None:
    """The leading system message's flag, else the row's `enable_thinking`, else what its source declares.

    >>> mode_of([{"role": "system", "content": "Be brief. /no_think"}], {"enable_thinking": True}, "think")
    'no_think'
    >>> mode_of([{"role": "system", "content": "Logs are in /thinking/no_think."}], {}, "think")
    'think'

    Raises ValueError where both flags stand.
    """
    flags = _flags(messages)
    if "/think" in flags and "/no_think" in flags:
        raise ValueError("messages[0] (system): both /think and /no_think; keep one")
    if "/think" in flags or "/no_think" in flags:
        return "think" if "/think" in flags else "no_think"
    if "enable_thinking" in variables:
        return "think" if variables["enable_thinking"] else "no_think"
    return declared


def _flags(messages: Messages) -> list[str]:
    """The words /think, /no_think and /system_override of a leading system message."""
    return _FLAG.findall(messages[0].get("content", "")) if messages[0]["role"] == "system" else []


def _how(tokenizer: Any, template: str | None, date_string: str, mode: Mode | None) -> _How:
    template = template or tokenizer.chat_template
    if not template:
        raise ValueError(
            "the tokenizer has no chat template; set chat_template: smol_post, chatml or a .jinja file"
        )
    return _How(template, date_string, mode, tuple(tokenizer.special_tokens_map.items()))


def _chat(messages: Messages, variables: dict[str, Any], how: _How) -> _Chat:
    """The chat with its mode, which the template is told; ValueError where it wants one and there is none."""
    mode = mode_of(messages, variables, how.mode)
    if mode is not None:
        return _Chat(messages, {**variables, "enable_thinking": mode == "think"}, mode)
    if "enable_thinking" in how.template:
        raise ValueError(
            "the row has no mode: give the row enable_thinking, or its system message the flag /think or "
            "/no_think, or set `mode:` of the source"
        )
    return _Chat(messages, variables, "text")


def _render(chats: Sequence[_Chat], how: _How, prompt: bool = False) -> list[tuple[str, Intervals]]:
    """The text of each chat, nothing lost, and its generation spans in characters; `prompt` to generate from.

    Chats of equal variables are rendered in one call: each call reads the whole template.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    alike: dict[str, list[int]] = {}
    for i, chat in enumerate(chats):
        alike.setdefault(repr(chat.variables), []).append(i)
    rendered: list[Any] = [None] * len(chats)
    for indices in alike.values():
        variables = {"date_string": how.date_string, **chats[indices[0]].variables}
        try:
            texts, spans = render_jinja_template(
                [chats[i].messages for i in indices],
                chat_template=how.template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **{**dict(how.special_tokens), **variables},
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the row: {error}") from None
        for i, text, marked in zip(indices, texts, spans, strict=True):
            _check_kept(chats[i], text)
            rendered[i] = text, marked
    return rendered


def _check_kept(chat: _Chat, text: str) -> None:
    """ValueError where the template lost a part of the row.

    The parts of a message stand in order: within its turn, if the template heads turns with their roles, else
    after the message before.
    """
    position = 0
    for i, message in enumerate(chat.messages):
        header, end = f"<|im_start|>{message['role']}\n", len(text)
        start = text.find(header, position)
        if start >= 0:
            position, end = start + len(header), text.find(END_OF_TURN, start)
        for part in _parts(message, leading=i == 0):
            part = part.strip()
            found = text.find(part, position, end)
            if found < 0:
                raise ValueError(f"messages[{i}] ({message['role']}): the chat template lost {_short(part)}")
            position = found + len(part)
    for key, value in chat.variables.items():
        parts = [value] if key == "custom_instructions" else []
        if key in TOOL_KEYS and "/system_override" not in _flags(chat.messages):
            parts = [
                tool if isinstance(tool, str) else str(_function(tool).get("name", "")) for tool in value
            ]
        for part in parts:
            if part.strip() not in text:
                raise ValueError(f"{key}: the chat template lost {_short(part)}")


def _parts(message: dict[str, Any], *, leading: bool) -> list[str]:
    """What must be in the text of a message: thoughts, content between think tags or flags, tool calls.

    >>> call = {"name": "f", "arguments": {"x": "y"}}
    >>> message = {"role": "assistant", "content": "<think>Hm</think>Look:", "tool_calls": [call]}
    >>> _parts(message, leading=False)
    ['', 'Hm', 'Look:', 'f', '{"x": "y"}']
    """
    parts = [message.get("content", "")]
    if message["role"] == "assistant":
        thoughts = dict.fromkeys(message[key] for key in REASONING_KEYS if key in message)
        parts = [*thoughts, *parts[0].replace("</think>", "<think>").split("<think>")]
    elif leading and message["role"] == "system":
        parts = _FLAG.split(parts[0])[::2]
    for call in message.get("tool_calls", ()):
        name, arguments = _function(call)["name"], _function(call).get("arguments") or ""
        parts += [_json(name)[1:-1], arguments if isinstance(arguments, str) else _json(arguments)]
    return parts


def _assistant_turns(chat: _Chat, spans: Intervals) -> list[int]:
    """Which messages are trained; ValueError unless there are some, and the template marks each."""
    roles = [message["role"] for message in chat.messages]
    turns = [i for i, role in enumerate(roles) if role == "assistant"]
    if not turns:
        raise ValueError(f"no assistant turn to train on: the roles are {', '.join(roles)}")
    if len(spans) != len(turns):
        found = f"the chat template marks {len(spans)} of {len(turns)} assistant turns"
        raise ValueError(f"{found}: wanted {{% generation %}} around each")
    return turns


@lru_cache(maxsize=32)
def _generation_prompt(how: _How, mode: Label) -> str:
    """What the template writes where the model is to speak: in no_think, with an empty think block."""
    variables = {} if mode == "text" else {"enable_thinking": mode == "think"}
    chats = [_Chat([{"role": "user", "content": "x"}], variables, mode)]
    (without, _), (text, _) = _render(chats, how)[0], _render(chats, how, prompt=True)[0]
    if text == without or not text.startswith(without):
        raise ValueError("the chat template adds nothing to the end of a chat for add_generation_prompt")
    return text[len(without) :]


# Tokens: what the tokenizer makes of texts, and where their spans lie


def _encode(
    rendered: Sequence[tuple[str, Intervals]], tokenizer: Any
) -> Iterator[tuple[list[int], Intervals]]:
    """Token ids of each text, nothing added and nothing cut, and the tokens of its spans of characters.

    Where a token's bytes follow from its id, their sums are the borders of the tokens of all texts. Here the
    token u umlaut has two; the span of the characters [2, 13) is [3, 14) in bytes and [2, 4) in tokens:

        token          a  u  b  <|im_end|>  \\n  next text ...
        bytes before   0  1  3  4           14  15

    A text whose sum is not its length, and one with a border inside a token, is encoded by offsets.
    """
    from numpy import concatenate, fromiter, where

    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    lengths = _byte_lengths(backend, tuple((i, token.content) for i, token in added.items()))
    if lengths is None:
        yield from _encode_by_offsets(rendered, tokenizer)
        return
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast([text for text, _ in rendered], add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    starts = list(accumulate(map(len, ids), initial=0))
    before = concatenate([[0], lengths[fromiter(chain.from_iterable(ids), int)].cumsum()])
    first_bytes = zip(before[starts].tolist(), rendered, strict=False)
    borders = [[first + border for border in _byte_borders(*one)] for first, one in first_bytes]
    wanted = list(chain.from_iterable(borders))
    tokens = before.searchsorted(wanted).clip(max=len(before) - 1)
    tokens = iter(where(before[tokens] == wanted, tokens, -1).tolist())
    for i, one in enumerate(rendered):
        *inner, last = (token - starts[i] for token in islice(tokens, len(borders[i])))
        if last == len(ids[i]) and min(inner, default=0) >= 0:
            yield ids[i], list(zip(inner[::2], inner[1::2], strict=True))
        else:
            yield from _encode_by_offsets([one], tokenizer)


def _byte_borders(text: str, spans: Intervals) -> list[int]:
    """The borders of the spans and the end of the text, in bytes.

    >>> _byte_borders("a\\u00fcb", [(1, 2)])
    [1, 3, 4]
    """
    borders = [*chain.from_iterable(spans), len(text)]
    if text.isascii():
        return borders
    return list(accumulate(len(text[start:stop].encode()) for start, stop in pairwise([0, *borders])))


@lru_cache(maxsize=4)
def _byte_lengths(backend: Any, added: tuple[tuple[int, str], ...]) -> Any:
    """How many bytes of text each token id stands for (an array); None where the vocabulary does not say.

    A byte-level vocabulary writes each byte as one character (a space as U+0120), so an entry of four
    characters is four bytes. An added token is written as it is.
    """
    from numpy import fromiter, zeros
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = backend.get_vocab(with_added_tokens=False)
    if not (
        isinstance(backend.model, models.BPE)
        and not (backend.model.continuing_subword_prefix or backend.model.end_of_word_suffix)
        and backend.normalizer is None
        and isinstance(backend.decoder, decoders.ByteLevel)
        and "ByteLevel(add_prefix_space=False" in repr(backend.pre_tokenizer)
        and vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    ):
        return None
    lengths = zeros(1 + max([*vocabulary.values(), *(i for i, _ in added)]), int)
    lengths[fromiter(vocabulary.values(), int)] = fromiter(map(len, vocabulary), int)
    for i, content in added:
        lengths[i] = len(content.encode())
    return lengths


def _encode_by_offsets(
    rendered: Sequence[tuple[str, Intervals]], tokenizer: Any
) -> Iterator[tuple[list[int], Intervals]]:
    """The same with any fast tokenizer, by the characters of each token; ValueError for one across a border.

    A token of no width (the tokenizer trimmed its spaces) lies before its offset.
    """
    texts = [text for text, _ in rendered]
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    parts = zip(rendered, encoding["input_ids"], encoding["offset_mapping"], strict=True)
    for (text, spans), ids, offsets in parts:
        borders, rights = list(chain.from_iterable(spans)), [right for _, right in offsets]
        tokens = [bisect_right(rights, border) for border in borders]
        for border, i in zip(borders, tokens, strict=True):
            if i < len(offsets) and offsets[i][0] < border:
                left, right = offsets[i]
                token, near = text[left:right], text[max(0, left - 20) : right + 20]
                raise ValueError(f"the token {token!r} lies across the border of a trained span: {near!r}")
        yield ids, list(zip(tokens[::2], tokens[1::2], strict=True))
