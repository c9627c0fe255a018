"""What a teacher is asked, and what its reply says: prompt -> request with an id -> text with its thought.

    Prompt(messages=[user "2+3?"], mode="think")  ->  Request(id="5f0c...", body={"model": ..., ...})
    {"reasoning_content": "2+3=5", "content": "5"}  ->  "<think>\\n2+3=5\\n</think>\\n5"

A request's id is a digest of all that could change its answer, and of nothing else: where the server is, and
how often it was tried, is no part of it. Which teacher it is for is: two servers may call their models alike.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from smol_post import chat, manifest
from smol_post.generate_config import Generation, Mode, Teacher
from smol_post.messages import (
    END_THINK,
    REASONING_KEYS,
    THINK,
    Messages,
    clean_row,
    clean_variables,
    function_of,
    split_pair,
)
from smol_post.refusal import Refusal


@dataclass(frozen=True)
class Prompt:
    """What a row asks, in one mode; `own` is the answer that the row brings, `raw` the row itself."""

    source: str
    row: int
    mode: Mode
    messages: Messages
    variables: dict[str, Any]
    own: str | None
    raw: Mapping[str, Any] = field(repr=False)

    def kwargs(self) -> dict[str, Any]:
        """The `chat_template_kwargs` of a row made of this prompt: tools, as texts, and the mode."""
        tools = {key: [json.dumps(one, ensure_ascii=False) for one in value] if key == "tools" else value
                 for key, value in self.variables.items()}  # fmt: skip
        return tools | {"enable_thinking": self.mode == "think"}


@dataclass(frozen=True)
class Request:
    """One thing to ask of one teacher; `body` is what it is sent, `sample` which of several alike it is."""

    teacher: str
    prompt: Prompt
    sample: int
    body: dict[str, Any]

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits; the same wherever, whenever and of whichever row the same is asked."""
        return manifest.digest_tree([self.teacher, self.body, self.prompt.mode, self.sample])[7:39]


def prompts(
    recipe: Generation, name: str, number: int, raw: Mapping[str, Any], *, own_mode: bool = False
) -> Iterator[tuple[Mode, Prompt | None]]:
    """The prompts of a row, by mode; None where the row fixes the other mode.

    `own_mode`: only in the mode that the row is in, None if the recipe does not have it. Raises ValueError
    where the row holds no prompt.
    """
    source = next(one for one in recipe.sources if one.name == name)
    messages, variables, own = _split(raw)
    own_kind = chat.mode_of(messages, variables, source.mode)
    flagged = chat.mode_of(messages, {})
    if own_mode and own_kind is None:
        raise ValueError("the row names no mode; give its source one (mode: think or no_think)")
    variables.pop("enable_thinking", None)
    modes: list[Mode] = [own_kind] if own_mode and own_kind else recipe.modes
    for mode in modes:
        fits = mode in recipe.modes and flagged in (None, mode)
        yield mode, Prompt(name, number, mode, messages, variables, own, raw) if fits else None


def _split(raw: Mapping[str, Any]) -> tuple[Messages, dict[str, Any], str | None]:
    """The messages to answer, the template's variables and the row's own answer, if it has one."""
    if raw.get("chosen") is not None and raw.get("rejected") is not None:
        messages, chosen, _ = split_pair(raw)
        return messages, clean_variables(raw), _text(chosen)
    given = raw.get("messages") or raw.get("prompt")
    given = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages, variables = clean_row({**raw, "messages": given})
    if messages[-1]["role"] != "assistant":
        own = raw.get("completion")
        return _ending(messages), variables, own if isinstance(own, str) else None
    return _ending(messages[:-1]), variables, _text(messages[-1])


def _ending(messages: Messages) -> Messages:
    if not messages or messages[-1]["role"] in ("system", "assistant"):
        found = ", ".join(one["role"] for one in messages) or "nothing"
        raise ValueError(f"no prompt: before the answer stands {found}, wanted a question at the end")
    if not messages[-1].get("content", "").strip():
        raise ValueError("no prompt: the question is empty")
    return messages


def _text(message: Mapping[str, Any]) -> str | None:
    """An assistant message as text; None where it calls tools by OpenAI's keys."""
    if message.get("tool_calls"):
        return None
    thought = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    return with_thought(str(message.get("content", "")), thought, "think" if thought else "no_think")


def request(
    teacher: Teacher, name: str, prompt: Prompt, sample: int, *, model: str, messages: Messages | None = None
) -> Request:
    """The request for one sample; `model`: as the server calls it, or the digest of a checkpoint.

    messages: of a later turn, in place of the prompt's.
    """
    how = teacher.sampling(prompt.mode)
    asked = messages or prompt.messages
    body: dict[str, Any] = {"model": model, "temperature": how["temperature"], "top_p": how["top_p"],
                            "max_tokens": how["max_new_tokens"]}  # fmt: skip
    if teacher.seed is not None:
        body["seed"] = (teacher.seed + sample) % 2**31
    if teacher.checkpoint is not None:
        body |= {"messages": asked, "variables": prompt.kwargs(), "date_string": teacher.date_string}
        return Request(name, prompt, sample, body)
    system = [prompt.variables["custom_instructions"]] if "custom_instructions" in prompt.variables else []
    system += [f"/{prompt.mode}"] if teacher.mode_by == "system" else []
    body["messages"] = _wire(asked, system)
    if tools := _tools(prompt.variables):
        body["tools"] = tools
    extra = dict(how["extra_body"])
    if teacher.mode_by == "kwargs":
        said = extra.get("chat_template_kwargs", {})
        extra["chat_template_kwargs"] = {**said, "enable_thinking": prompt.mode == "think"}
    return Request(name, prompt, sample, body | extra)


def _wire(messages: Messages, system: list[str]) -> Messages:
    """Messages as OpenAI's schema has them, with lines added to the system message."""
    found = [{key: one for key, one in message.items() if key != "weight"} for message in messages]
    waiting: list[str] = []  # ids of calls without a result; without ids of their own, results are in order
    for number, message in enumerate(found):
        if calls := message.get("tool_calls"):
            waiting = [str(call.get("id") or f"call_{number}_{at}") for at, call in enumerate(calls)]
            message["tool_calls"] = [
                {"id": key, "type": "function",
                 "function": {"name": function_of(call)["name"], "arguments": _arguments(function_of(call))}}
                for key, call in zip(waiting, calls, strict=True)
            ]  # fmt: skip
        elif message["role"] == "tool":
            own = message.get("tool_call_id")
            key = own if own in waiting else waiting[0] if waiting else own or "call_0"
            waiting = [one for one in waiting if one != key]
            message["tool_call_id"] = key
    if not system:
        return found
    if found and found[0]["role"] == "system":
        return [{**found[0], "content": "\n".join([found[0]["content"], *system])}, *found[1:]]
    return [{"role": "system", "content": "\n".join(system)}, *found]


def _arguments(call: Mapping[str, Any]) -> str:
    given = call.get("arguments", {})
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _tools(variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tools of a row as OpenAI's schema has them."""
    found = [*variables.get("tools", []), *(json.loads(one) for one in variables.get("xml_tools", []))]
    return [one if "function" in one else {"type": "function", "function": one} for one in found]


def with_thought(content: str, thought: str | None, mode: str) -> str:
    r"""An answer as a row has it, its thought in one block before it, wherever the teacher put that.

    >>> with_thought("5", "2+3=5", "think"), with_thought("<think>\n\n</think>\n\n5", None, "no_think")
    ('<think>\n2+3=5\n</think>\n5', '5')
    >>> with_thought("2+3=5\n</think>\n5", None, "think")  # where the prompt ends with <think>
    '<think>\n2+3=5\n</think>\n5'
    """
    if thought and thought.strip() and THINK not in content:
        if not content.strip():  # cut within its thought
            return f"{THINK}\n{thought.strip()}"
        return f"{THINK}\n{thought.strip()}\n{END_THINK}\n{content.strip()}"
    if mode == "think" and END_THINK in content and THINK not in content:
        content = THINK + content
    before, ended, after = content.partition(END_THINK)
    if ended and before.lstrip().startswith(THINK):
        inner = before.replace(THINK, "", 1).strip()
        return f"{THINK}\n{inner}\n{END_THINK}\n{after.strip()}" if inner else after.strip()
    return content.strip()


def called(calls: list[tuple[str, str]]) -> str:
    r"""Tool calls as the text that rows with `xml_tools` hold.

    >>> called([("calc", '{"sum": "2+3"}')])
    '<tool_call>\n{"name": "calc", "arguments": {"sum": "2+3"}}\n</tool_call>'
    """
    found = []
    for name, arguments in calls:
        try:
            inner = json.loads(arguments or "{}")
        except ValueError:
            inner = arguments
        text = json.dumps({"name": name, "arguments": inner}, ensure_ascii=False)
        found.append(f"<tool_call>\n{text}\n</tool_call>")
    return "\n".join(found)


def unaskable(prompt: Prompt, teachers: Mapping[str, Teacher]) -> str | None:
    """Why a prompt cannot be put to these teachers; None: it can."""
    served = any(teacher.checkpoint is None for teacher in teachers.values())
    return "python_tools" if served and "python_tools" in prompt.variables else None


def about(one: Request) -> dict[str, Any]:
    """What a line of the journal says of its request."""
    prompt = one.prompt
    return {"id": one.id, "source": prompt.source, "row": prompt.row, "mode": prompt.mode,
            "sample": one.sample, "teacher": one.teacher}  # fmt: skip


def key_of(teacher: Teacher, *, where: Path) -> str:
    """The key of a server, from the environment; Refusal where the variable is not set."""
    import os

    if teacher.api_key_env is None:
        return "none"
    if not (key := os.environ.get(teacher.api_key_env, "").strip()):
        raise Refusal(
            f"{where}: api_key_env: the environment has no {teacher.api_key_env}; export it, or "
            "leave api_key_env out"
        )
    if not (key.isascii() and key.isprintable()):  # an error of the client would quote it
        raise Refusal(f"{where}: api_key_env: {teacher.api_key_env} holds what no header takes; mend it")
    return key
