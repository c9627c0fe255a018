"""Tool calls as a model writes them -> structured calls, checked against their tools; and back into text.

    <tool_call>\\n{"name": "weather", "arguments": {"city": "Paris"}}\\n</tool_call>
    <code>\\nweather("Paris")\\n</code>

Each is a `Call`. Python is read, never run: calls of literal arguments alone. What cannot be made stands
among the calls with its `problem`, in words that a model can act on.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from smol_post.messages import END_THINK, THINK, function_of, json_text, short

_MARK = re.compile(r"</?think>|<tool_call>|<code>")
_CLOSED = re.compile(r"\s*</tool_call>")
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
          "dict": "object", "tuple": "array", "None": "null"}  # fmt: skip


class Call(NamedTuple):
    """A call as it was written, in Python or not; `problem` says why it cannot be made."""

    name: str
    arguments: dict[str, Any]
    problem: str = ""
    python: bool = False


class Tool(NamedTuple):
    """A tool on offer; `parameters` is the JSON schema of its arguments, in the order of its signature."""

    name: str
    parameters: dict[str, Any]
    python: bool = False


def parse(text: str, *, python: bool = False, opened: bool = False) -> list[Call]:
    r"""The calls of a turn in order, thoughts left out; with `python`, those between <code> and </code> too.

    `opened`: the prompt has begun the think block. A block that is not closed holds all that follows it.
    Arguments by position have their numbers for names until `check` knows the tool.

    >>> parse('<think>\n<tool_call>\n</think>\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
    [Call(name='f', arguments={'x': 1}, problem='', python=False)]
    >>> parse("<code>\nf(1, y=[2])\n</code>", python=True)
    [Call(name='f', arguments={'0': 1, 'y': [2]}, problem='', python=True)]
    """
    text = THINK + text if opened else text
    calls, at = list[Call](), 0
    while mark := _MARK.search(text, at):
        at = mark.end()
        if mark[0] == END_THINK:
            calls = []  # the block was begun by the prompt, or by nothing: all before its end is thought
        elif mark[0] == THINK:
            end = text.find(END_THINK, at)
            at = len(text) if end < 0 else end + len(END_THINK)
        elif mark[0] == "<tool_call>":
            call, at = _tool_call(text, at)
            calls.append(call)
        elif python:
            end = text.find("</code>", at)
            if end < 0:
                return [*calls, Call("", {}, "the code does not end: </code> is missing", python=True)]
            calls += _python_calls(text[at:end])
            at = end + len("</code>")
    return calls


def _tool_call(text: str, at: int) -> tuple[Call, int]:
    """The call whose JSON begins at a place of the text, and the place to go on from."""
    start = at + len(text[at:]) - len(text[at:].lstrip())
    try:
        found, at = _DECODER.raw_decode(text, start)
        json_text(found).encode()
    except (ValueError, RecursionError) as error:
        return Call("", {}, f"not JSON: {str(error) or type(error).__name__}"), _resume(text, at)
    closed = _CLOSED.match(text, at)
    at = closed.end() if closed else _resume(text, at)
    if not closed:
        return Call("", {}, "the call does not end: </tool_call> is missing after the JSON object"), at
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return Call("", {}, f'found {short(found)}, wanted {{"name": ..., "arguments": {{...}}}}'), at
    arguments = found.pop("arguments", {})
    if not isinstance(arguments, dict) or len(found) > 1:
        wrong = arguments if len(found) == 1 else sorted(found.keys() - {"name"})
        return Call(found["name"], {}, f'found {short(wrong)}, wanted "name" and an object "arguments"'), at
    return Call(found["name"], arguments), at


def _resume(text: str, at: int) -> int:
    """Where to read on after a broken call: behind its closing tag, or at the next opening one."""
    tag = re.compile("</?tool_call>").search(text, at)
    return len(text) if tag is None else tag.end() if tag[0] == "</tool_call>" else tag.start()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _python_calls(code: str) -> list[Call]:
    """A call for every statement of the code."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return [_python_call(statement) for statement in ast.parse(code.strip()).body]
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return [Call("", {}, f"not Python: {str(error) or type(error).__name__}", python=True)]


def _python_call(statement: ast.stmt) -> Call:
    node = statement.value if isinstance(statement, ast.Expr) else None
    written = short(ast.unparse(statement))
    if not isinstance(node, ast.Call) or not _NAME.fullmatch(name := ast.unparse(node.func)):
        return Call("", {}, f"found {written}, wanted calls of tools and nothing else", python=True)
    try:
        pairs = [(str(place), ast.literal_eval(one)) for place, one in enumerate(node.args)]
        pairs += [(one.arg or _unpacked(), ast.literal_eval(one.value)) for one in node.keywords]
        text = json_text(dict(pairs))
        text.encode()
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        reason = f"its arguments are no literals: {short(str(error))}"
        return Call(name, {}, f"found {written}; {reason}", python=True)
    return Call(name, json.loads(text), python=True)


def _unpacked() -> str:
    raise ValueError("** unpacks what is not written out")


def offered(variables: Mapping[str, Any]) -> dict[str, Tool]:
    """The tools of a row's template variables (`clean_variables`), by name.

    Raises ValueError: a tool without a name, or parameters that are no JSON schema.
    """
    found = dict[str, Tool]()
    for key in ("tools", "xml_tools", "python_tools"):
        for one in variables.get(key, []):
            tool = read_tool(one, python=key == "python_tools")
            found.setdefault(tool.name, tool)
    return found


def given(template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The tools of a row's variables under the names that a template knows; ValueError where it knows none.

    >>> given("{{ tools }}", {"xml_tools": ['{"name": "f"}']})
    {'tools': [{'name': 'f'}]}
    """
    made = {key: value for key, value in variables.items() if key not in ("tools", "xml_tools")}
    objects = [*variables.get("tools", []), *map(json.loads, variables.get("xml_tools", []))]
    key = next((one for one in ("xml_tools", "tools") if re.search(rf"\b{one}\b", template)), None)
    for wanted, lacking in (
        (objects, key is None),
        (made.get("python_tools"), "python_tools" not in template),
    ):
        if wanted and lacking:
            raise ValueError(f"the chat template has no place for {'python_' * (wanted is not objects)}tools")
    return made | ({key: objects} if objects and key else {})


def read_tool(given: str | Mapping[str, Any], *, python: bool = False) -> Tool:
    """A tool from its OpenAI-style object, from that as JSON text, or (python) from a signature.

    Raises ValueError as `offered`.
    """
    from jsonschema import Draft202012Validator, SchemaError

    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            if not python:
                raise ValueError(f"wanted a JSON object, found {short(given)}") from None
    if not isinstance(given, Mapping):
        return _signature(str(given))
    inner = function_of(dict(given))
    name, parameters = inner.get("name"), inner.get("parameters") or {}
    if not isinstance(name, str) or not name:
        raise ValueError(f"a tool has no name: {short(given)}")
    try:
        Draft202012Validator.check_schema(parameters)
    except SchemaError as error:
        raise ValueError(f"tool {name!r}: its parameters are no JSON schema: {error.message}") from None
    return Tool(name, dict(parameters), python)


def _signature(text: str) -> Tool:
    """The tool of a line such as `def calc(sum: str, base: int = 10) -> int: work it out`."""
    begun = re.search(r"\bdef\s+(\w+)\s*\(", text)
    for end in re.finditer(r"\)", text[begun.end() :] if begun else ""):
        assert begun is not None
        try:
            [made] = ast.parse(f"def f({text[begun.end() :][: end.start()]}): ...").body
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue  # a parenthesis of a default, not the last
        assert isinstance(made, ast.FunctionDef)
        given = made.args
        ordered = [*given.posonlyargs, *given.args]
        free = len(ordered) - len(given.defaults)
        required = [one.arg for one in ordered[:free]]
        required += [
            one.arg for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if not default
        ]
        properties = {one.arg: _schema(one.annotation) for one in [*ordered, *given.kwonlyargs]}
        schema = {"type": "object", "properties": properties, "required": required}
        return Tool(begun[1], schema | {"additionalProperties": given.kwarg is not None}, python=True)
    raise ValueError(f"wanted def name(...), found {short(text)}")


def _schema(annotation: ast.expr | None) -> dict[str, Any]:
    """JSON schema of a type; {} takes anything, as where a type is not one of JSON's.

    >>> _schema(ast.parse("list[int] | None", mode="eval").body)
    {'anyOf': [{'type': 'array', 'items': {'type': 'integer'}}, {'type': 'null'}]}
    """
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return {"anyOf": [_schema(annotation.left), _schema(annotation.right)]}
    if isinstance(annotation, ast.Subscript):
        made = _schema(annotation.value)
        return (
            made | {"items": _schema(annotation.slice)} if ast.unparse(annotation.value) == "list" else made
        )
    name = ast.unparse(annotation) if annotation else ""
    return {"type": _TYPES[name]} if name in _TYPES else {}


def check(call: Call, tools: Mapping[str, Tool]) -> Call:
    """The call as `bind` has it, or with what the schema of its tool has against its arguments."""
    call = bind(call, tools)
    return call if call.problem else call._replace(problem=_mismatch(call.arguments, tools[call.name]))


def bind(call: Call, tools: Mapping[str, Tool]) -> Call:
    """The call with its arguments by name; or with its problem, where no tool takes such ones."""
    if call.problem:
        return call
    tool = tools.get(call.name)
    if tool is None or tool.python != call.python:
        known = [name for name, one in tools.items() if one.python == call.python]
        return call._replace(
            problem=f"there is no tool {call.name!r}; there are: {', '.join(known) or 'none'}"
        )
    names, arguments = list(tool.parameters.get("properties", {})), dict[str, Any]()
    for key, value in call.arguments.items():
        if call.python and key.isdecimal():
            if int(key) >= len(names):
                return call._replace(problem=f"{call.name} takes {len(names)} arguments: {', '.join(names)}")
            key = names[int(key)]
        if key in arguments:
            return call._replace(problem=f"{call.name} is given {key!r} twice")
        arguments[key] = value
    return call._replace(arguments=arguments)


def _mismatch(arguments: dict[str, Any], tool: Tool) -> str:
    """What the schema has against arguments, three points at most; nothing is fetched that it refers to."""
    from jsonschema import Draft202012Validator
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        errors = list(Draft202012Validator(tool.parameters, registry=Registry()).iter_errors(arguments))
    except (Unresolvable, RecursionError, re.error) as error:
        return f"the schema of {tool.name!r} cannot be used: {short(str(error))}"
    points = [f"{error.json_path.replace('$', 'arguments', 1)}: {error.message}" for error in errors[:3]]
    return "; ".join(point if len(point) <= 300 else f"{point[:297]}..." for point in points)


def write(content: str, calls: Iterable[Mapping[str, Any]]) -> str:
    """What our template writes of a turn with OpenAI's `tool_calls`, up to the end of the turn."""
    for call in calls:
        inner = call["function"]
        content += "\n" if content and content[-1] != "\n" else ""
        content += f'<tool_call>\n{{"name": {json_text(inner["name"])}, "arguments": '
        content += f"{json_text(inner['arguments'])}}}\n</tool_call>"
    return content


def as_message(text: str, calls: Iterable[Call]) -> dict[str, Any]:
    r"""A turn as a message with `tool_calls`, as OpenAI has them, where that says exactly the same.

    Else (calls in Python, broken ones, words between or after them, nulls, which rows lose) all is content.

    >>> said = 'Look.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    >>> as_message(said, parse(said))["tool_calls"]
    [{'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}]
    """
    calls = list(calls)
    made = [{"type": "function", "function": {"name": one.name, "arguments": one.arguments}} for one in calls]
    message = {"role": "assistant", "content": text}
    if not calls or any(one.problem or one.python or _has_null(one.arguments) for one in calls):
        return message
    for content in (text[: -len(write("", made))], text[: -len(write("", made))].removesuffix("\n")):
        if write(content, made) == text:
            return message | {"content": content, "tool_calls": made}
    return message


def _has_null(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_has_null, inside))


def of_message(message: Mapping[str, Any], *, python: bool = False) -> list[Call]:
    """The calls of an assistant message, be they in `tool_calls` or in its text."""
    found = parse(message.get("content") or "", python=python)
    for one in message.get("tool_calls") or []:
        inner = function_of(one)
        given = inner.get("arguments") or {}
        found.append(Call(inner["name"], json.loads(given) if isinstance(given, str) else given))
    return found


def same(one: Any, other: Any) -> bool:
    """JSON equality: 1 is 1.0, but true is not 1.

    >>> same({"x": [1, None]}, {"x": [1.0, None]}), same(True, 1)
    (True, False)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def equal(calls: Iterable[Call], wanted: Iterable[Call]) -> bool:
    """Whether the calls are the wanted ones, in any order; a broken call is none that is wanted."""
    left = list(wanted)
    for call in calls:
        found = (
            index
            for index, one in enumerate(left)
            if not call.problem and call[0] == one[0] and call.python == one.python
            if same(call.arguments, one.arguments)
        )
        index = next(found, None)
        if index is None:
            return False
        del left[index]
    return not left
