"""Rows of chats as data sets hold them -> clean messages and template variables, or what is wrong."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]

END_OF_TURN = "<|im_end|>"
CONTROL_TOKENS = ("<|im_start|>", END_OF_TURN)
THINK, END_THINK = "<think>", "</think>"
_THINK = re.compile(r"\s*<think>\s*\S.*?</think>(?P<answer>.*)", re.DOTALL)
TOOL_KEYS = ("tools", "xml_tools", "python_tools")
TEMPLATE_KEYS = ("enable_thinking", *TOOL_KEYS, "custom_instructions", "date_string")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # transformers takes each for thoughts


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
    return _clean_messages(row["messages"], "messages"), clean_variables(row)


def _clean_messages(messages: Any, where: str) -> Messages:
    """Messages without null keys; the arguments of tool calls as an object or as canonical JSON text."""
    if not isinstance(messages, list):
        raise ValueError(f"{where}: wanted a list of messages, found {short(messages)}")
    cleaned = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}[{i}]: wanted a message, found {short(message)}")
        message = {key: value for key, value in message.items() if value is not None}
        if "role" not in message:
            raise ValueError(f"{where}[{i}]: no role, only {', '.join(message) or 'nulls'}")
        if not isinstance(message["role"], str):
            raise ValueError(f"{where}[{i}]: role: wanted text, found {short(message['role'])}")
        here = f"{where}[{i}] ({message['role']})"
        if "weight" in message:
            _check_weight(message, here)
        if message.get("tool_calls", []) != []:
            message["tool_calls"] = _clean_calls(message["tool_calls"], f"{here}: tool_calls")
        elif "content" not in message:
            raise ValueError(f"{here}: neither content nor tool calls")
        for key in ("content", *REASONING_KEYS):
            if key in message:
                check_text(message[key], here, key)
        cleaned.append(message)
    return cleaned


def _check_weight(message: dict[str, Any], here: str) -> None:
    """OpenAI's key of fine-tuning rows: 0 for a turn that carries no loss; 1, as any turn has it, goes."""
    if message["role"] != "assistant":
        raise ValueError(f"{here}: weight: only turns of the assistant have one; remove it")
    if isinstance(message["weight"], bool) or message["weight"] not in (0, 1):
        raise ValueError(f"{here}: weight: wanted 0 or 1, found {short(message['weight'])}")
    if message["weight"] == 1:
        del message["weight"]


def _clean_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"{where}: wanted a list of objects, found {short(calls)}")
    calls = _without_nulls(calls)
    for call in calls:
        inner = function_of(call)
        if not isinstance(inner.get("name"), str):
            raise ValueError(f"{where}: a tool call has no name, only {', '.join(inner) or 'nulls'}")
        if isinstance(inner.get("arguments"), str):
            inner["arguments"] = json_text(_parse(inner["arguments"] or "{}", f"{where}: arguments"), where)
        elif not isinstance(inner.get("arguments", {}), dict):
            found = short(inner["arguments"])
            raise ValueError(f"{where}: arguments: wanted an object or JSON text, found {found}")
        check_text(json_text(call, where), where, "JSON")
    return calls


def clean_variables(row: Row) -> dict[str, Any]:
    """Template variables from `chat_template_kwargs` (dict, JSON text, null) and columns so named."""
    given = row.get("chat_template_kwargs") or {}
    given = _parse(given, "chat_template_kwargs") if isinstance(given, str) else given
    if not isinstance(given, Mapping):
        raise ValueError(f"chat_template_kwargs: wanted an object, found {short(given)}")
    for key in given:
        if key not in TEMPLATE_KEYS:
            close = difflib.get_close_matches(key, TEMPLATE_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(TEMPLATE_KEYS)}"
            raise ValueError(f"chat_template_kwargs: unknown key {key!r}; {hint}")
    variables: dict[str, Any] = {}
    for key in TEMPLATE_KEYS:
        value, column = given.get(key), row.get(key)
        if value is not None and column is not None and value != column:
            found = f"the column says {short(column)}, chat_template_kwargs {short(value)}"
            raise ValueError(f"{key}: {found}; drop one")
        value = column if value is None else value
        if value is None:
            continue
        if key in TOOL_KEYS:
            texts = list(_tool_texts(value, key))
            value = [json.loads(text) for text in texts] if key == "tools" else texts
        elif key != "enable_thinking":
            check_text(value, key, "value")
        elif not isinstance(value, bool):
            raise ValueError(f"{key}: wanted true or false, found {short(value)}")
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
                raise ValueError(f"{key}: not JSON ({error}): {short(text)}") from None
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tool_texts(item, key)
        return
    if isinstance(value, Mapping):
        text = json_text(value if text is not None else _without_nulls(value), key)
    elif value is not None and (text is None or key != "python_tools"):
        raise ValueError(f"{key}: wanted JSON objects, found {short(value)}")
    if text is not None:
        check_text(text, key, "tool")
        yield text


def split_pair(row: Row) -> tuple[Messages, dict[str, Any], dict[str, Any]]:
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
        if any("weight" in message for message in answer):
            raise ValueError(f"{name}: weight 0: a pair is judged by its answers; remove it")
        if [message["role"] for message in answer] != ["assistant"]:
            found = ", ".join(message["role"] for message in answer) or "nothing"
            raise ValueError(f"{name}: wanted one assistant turn after the shared prompt, found {found}")
    return prompt, chosen[0], rejected[0]


def check_text(text: Any, where: str, what: str) -> None:
    """ValueError where this is not text, or not text that is encoded as text."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: wanted text as {what}, found {short(text)}")
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
        raise ValueError(f"{where}: not JSON ({error}): {short(text)}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: wanted a JSON object, found {short(text)}")
    return parsed


def json_text(value: Any, where: str = "") -> str:
    """A value as JSON text; ValueError, naming the place, where it is none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: not JSON ({error}): {short(value)}") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """The inside of an OpenAI-style tool or tool call, or all of a flat one."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def short(value: Any) -> str:
    """A value for an error, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def well_formed(text: str, mode: str, *, ended: bool) -> str | None:
    """The answer of a generation that obeys its mode and stops; None where it does not.

    think: one block with something in it, closed once, then text without tags; no_think: text without tags.

    >>> well_formed("<think>\\n3+4=7\\n</think>\\n7", "think", ended=True)
    '7'
    """
    if not ended:
        return None
    if mode == "think":
        match = _THINK.fullmatch(text)
        if match is None or text.count("<think>") != 1:
            return None
        text = match["answer"]
    answer = text.strip()
    return answer if answer and "<think>" not in answer and "</think>" not in answer else None
