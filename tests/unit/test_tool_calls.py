"""Calls are read as they were written, and nothing else is taken for one; what cannot be made says why."""

import doctest
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from smol_post import chat, synthetic, talk, tool_calls, toolbox
from smol_post.refusal import Refusal
from smol_post.tool_calls import Call

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TOOLS = tool_calls.offered({"tools": [WEATHER], "python_tools": [synthetic.PYTHON_TOOL]})
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TAGGED = '<tool_call>{"name": "say", "arguments": {"text": "</think></tool_call><code>"}}</tool_call>'


@pytest.mark.parametrize("module", [tool_calls, talk])
def test_the_examples_are_true(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It is sunny.", []),
        (PARIS, ["weather"]),
        (f"Let me see. {PARIS}\n{PARIS} Done.", ["weather", "weather"]),
        (f"<think>\nI could call\n{PARIS}\n</think>\nNo.", []),
        (f"<think>\nI could call\n{PARIS}", []),
        (f"I could call\n{PARIS}\n</think>\nNo.", []),
        (f"<think>\nYes.\n</think>\n{PARIS}", ["weather"]),
        (TAGGED, ["say"]),
        ('<tool_call>{"name": "f"}</tool_call>', ["f"]),
        ("Use <code>f(1)</code> in HTML.", []),
    ],
)
def test_calls_are_what_stands_between_the_tags_and_not_in_thoughts(text: str, wanted: list[str]) -> None:
    calls = tool_calls.parse(text)
    assert [call.name for call in calls] == wanted
    assert not any(call.problem for call in calls)


def test_a_thought_that_the_prompt_has_begun_holds_no_calls() -> None:
    assert tool_calls.parse(f"{PARIS}</think>no", opened=True) == []
    assert tool_calls.parse(PARIS, opened=True) == []
    assert [call.name for call in tool_calls.parse(f"so</think>{PARIS}", opened=True)] == ["weather"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PARIS.removesuffix("</tool_call>"), "</tool_call> is missing"),
        (PARIS.replace("}}", "}"), "not JSON: Expecting"),
        ("<tool_call>", "not JSON: Expecting value"),
        ('<tool_call>["weather"]</tool_call>', "found ['weather'], wanted"),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', 'wanted {"name": ...'),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "found 'x', wanted"),
        ('<tool_call>{"name": "f", "parameters": {}}</tool_call>', "found ['parameters'], wanted"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN is no JSON number"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', "not JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', "not JSON"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "not JSON"),
        ("<code>weather('Paris')", "</code> is missing"),
        ("<code>weather('Paris'</code>", "not Python"),
        ("<code>for</code>", "not Python"),
        (f"<code>{'(' * 5000}</code>", "not Python"),
        (f"<code>{'-' * 50_000}1</code>", "not Python"),
        ("<code>x = weather('Paris')</code>", "wanted calls of tools and nothing else"),
        ("<code>import os</code>", "found 'import os', wanted calls"),
        ("<code>weather(city)</code>", "its arguments are no literals"),
        ("<code>weather(open('/etc/passwd').read())</code>", "its arguments are no literals"),
        ("<code>weather(*['Paris'])</code>", "its arguments are no literals"),
        ("<code>weather(**{'city': 'Paris'})</code>", "** unpacks"),
        ("<code>weather({1, 2})</code>", "its arguments are no literals"),
        ("<code>weather(b'x')</code>", "its arguments are no literals"),
        ("<code>weather(1e999)</code>", "its arguments are no literals"),
        ("<code>(lambda: 1)()</code>", "wanted calls of tools and nothing else"),
        ("<code>f()()</code>", "wanted calls of tools and nothing else"),
    ],
)
def test_a_broken_call_says_what_is_wrong_with_it(text: str, says: str) -> None:
    [call] = tool_calls.parse(text, python=True)
    assert says in call.problem


def test_a_broken_call_does_not_swallow_the_next() -> None:
    first, second = tool_calls.parse(f'<tool_call>\n{{"name": "f"}}\n{PARIS}')
    assert (first.problem != "", second.name) == (True, "weather")
    first, second = tool_calls.parse(f"<tool_call>broken</tool_call>{PARIS}")
    assert (first.problem != "", second.name) == (True, "weather")


def test_python_is_read_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "written"
    for code in (f"open({str(path)!r}, 'w')", f"calc(sum=open({str(path)!r}, 'w'))", f"calc('{path}')"):
        calls = tool_calls.parse(f"<code>{code}</code>", python=True)
        [tool_calls.check(call, TOOLS) for call in calls]
    assert not path.exists()


@pytest.mark.parametrize(
    ("signature", "code", "wanted"),
    [
        ("def calc(sum: str) -> int: work it out", "calc('1+1')", {"sum": "1+1"}),
        ("def calc(sum: str, base: int = max(2, (3)))", "calc('1', base=2)", {"sum": "1", "base": 2}),
        ("def calc(a, /, b: float, *, c: list[int] = ()):", "calc(1, 2, c=[3])", {"a": 1, "b": 2, "c": [3]}),
        (
            '{"name": "calc", "parameters": {"properties": {"x": {}, "y": {}}}}',
            "calc(-1, y=(2,))",
            {"x": -1, "y": [2]},
        ),
        ("def calc(x: int | None = None)", "calc(None)", {"x": None}),
        ("def calc(x: Thing)", "calc({'a': True})", {"x": {"a": True}}),
        ("def calc(**more)", "calc(a=1)", {"a": 1}),
    ],
)
def test_arguments_get_the_names_of_the_signature(signature: str, code: str, wanted: dict[str, Any]) -> None:
    tools = tool_calls.offered({"python_tools": [signature]})
    [call] = tool_calls.parse(f"<code>\n{code}\n</code>", python=True)
    assert tool_calls.check(call, tools) == Call("calc", wanted, python=True)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (Call("wether", {}), "there is no tool 'wether'; there are: weather"),
        (Call("calc", {"sum": "1"}), "there is no tool 'calc'"),  # it is called in Python
        (Call("weather", {}), "arguments: 'city' is a required property"),
        (Call("weather", {"city": "Paris", "days": "2"}), "arguments.days: '2' is not of type 'integer'"),
        (Call("weather", {"city": "Paris", "days": True}), "arguments.days: True is not of type 'integer'"),
        (Call("calc", {"0": "1", "1": 2}, python=True), "calc takes 1 arguments: sum"),
        (Call("calc", {"0": "1", "sum": "1"}, python=True), "calc is given 'sum' twice"),
        (Call("calc", {"0": 1}, python=True), "arguments.sum: 1 is not of type 'string'"),
        (Call("calc", {"0": "1", "x": 1}, python=True), "'x' was unexpected"),
    ],
)
def test_a_call_that_its_tool_does_not_take_says_why(call: Call, says: str) -> None:
    assert says in tool_calls.check(call, TOOLS).problem


def test_a_schema_is_never_fetched_and_one_that_turns_in_a_circle_ends(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("{}")
    for reference in ((tmp_path / "schema.json").as_uri(), "#"):
        tools = tool_calls.offered({"tools": [{"name": "f", "parameters": {"$ref": reference}}]})
        assert "the schema of 'f' cannot be used" in tool_calls.check(Call("f", {}), tools).problem


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("before", ["", "Let me see.", "Let me see.\n"])
def test_structured_calls_are_written_by_the_template_as_they_were_said(before: str, think: bool) -> None:
    arguments = {"city": 'Orléans, "42" </tool_call>', "days": 2, "deep": {"x": [1.5, True, {}]}}
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": one}} for one in (arguments, {})
    ]
    thought = "<think>\nHm.\n</think>\n" if think else ""
    text = tool_calls.write(thought + before, calls)

    def render(message: dict[str, Any]) -> str:
        row = {"messages": [{"role": "user", "content": "?"}, message], "enable_thinking": think}
        return chat.render_chat(row, template=chat.load_template("smol_post"), date_string="1 July 2025")

    made = tool_calls.as_message(text, tool_calls.parse(text))
    assert made["tool_calls"] == calls
    assert render(made) == render({"role": "assistant", "content": text})
    assert tool_calls.of_message(made) == tool_calls.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        f"{PARIS} Done.",
        f"see:{PARIS}",
        PARIS.replace(": ", ":"),
        PARIS.replace('"Paris"', "null"),
        f"{PARIS}<tool_call>",
    ],
)
def test_what_structure_cannot_say_stays_as_it_was_said(text: str) -> None:
    assert tool_calls.as_message(text, tool_calls.parse(text)) == {"role": "assistant", "content": text}


def test_calls_are_equal_in_any_order_as_json() -> None:
    one, two = Call("f", {"x": 1}), Call("f", {"x": [True]})
    assert tool_calls.equal([two, one], [one, two])
    assert tool_calls.equal([Call("f", {"x": 1.0})], [one])
    assert not tool_calls.equal([one, one], [one, two])
    assert not tool_calls.equal([one], [one, one])
    assert not tool_calls.equal([Call("f", {"x": [1]})], [two])
    assert not tool_calls.equal([one._replace(python=True)], [one])
    assert not tool_calls.equal([one._replace(problem="?")], [one])


def tool(tmp_path: Path, code: str, **keys: Any) -> toolbox.Command:
    (tmp_path / "tool.py").write_text(code)
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([WEATHER | {"command": [sys.executable, "-S", "tool.py"]} | keys]))
    return toolbox.load(path).commands["weather"]


def test_a_command_reads_arguments_and_says_the_result(tmp_path: Path) -> None:
    code = "import json, sys, os\nprint(json.load(sys.stdin)['city'], sys.argv[1:], os.getcwd())"
    found = toolbox.run(tool(tmp_path, code), {"city": "é; rm -rf / $(touch x) `x`"})
    assert found.endswith(f"[] {tmp_path}")
    assert "rm -rf / $(touch x) `x`" in found


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; sys.exit('no such city\\n')", "exit code 1: no such city"),
        ("print('x' * 200_000)", "the tool said 200,001 bytes"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", "\ufffd"),
        ("", ""),
    ],
)
def test_a_tool_that_fails_is_a_result_that_says_so(tmp_path: Path, code: str, says: str) -> None:
    found = toolbox.run(tool(tmp_path, code), {"city": "Paris"})
    assert says in found
    assert found.startswith("error: ") == ("exit" in code or "kill" in code or "200_000" in code)


def test_a_tool_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    code = "import os, time\nos.fork()\ntime.sleep(0.8)\nopen('alive', 'w')"
    assert "did not end within 0.3 seconds" in toolbox.run(tool(tmp_path, code, timeout=0.3), {})
    time.sleep(0.8)
    assert not (tmp_path / "alive").exists()


def test_a_tool_that_cannot_be_started_is_a_result_that_says_so(tmp_path: Path) -> None:
    assert "could not be started (No such file" in toolbox.run(tool(tmp_path, "", command=["./none"]), {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable as JSON"),
        ("[]", "wanted a JSON list of tools"),
        ('["def f(): ..."]', "wanted an object such as OpenAI's tools"),
        ('[{"command": ["x"]}]', "a tool has no name"),
        ('[{"name": "f"}, {"name": "f"}]', "tool 2: the name 'f' stands twice"),
        ('[{"name": "f", "command": "rm -rf /"}]', "command: found"),
        ('[{"name": "f", "command": []}]', "wanted a list of words"),
        ('[{"name": "f", "command": ["x\\u0000"]}]', "wanted a list of words"),
        ('[{"name": "f", "command": ["x"], "timeout": 0}]', "timeout: found 0"),
        ('[{"name": "f", "parameters": {"type": "dict"}}]', "its parameters are no JSON schema"),
    ],
)
def test_a_bad_file_of_tools_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "tools.json").write_text(text)
    with pytest.raises(Refusal, match=r"tools\.json") as refused:
        toolbox.load(tmp_path / "tools.json")
    assert says in str(refused.value)


def test_python_tools_come_as_signatures_too(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"signature": "def f(x: int)", "command": ["f"]}, "def g()", {"name": "h"}]))
    box = toolbox.load(path, python=True)
    assert box.tools == ["def f(x: int)", "def g()", {"name": "h"}]
    assert list(box.commands) == ["f"]


@pytest.mark.parametrize(
    ("template", "key"), [("{{ xml_tools }}{{ tools }}", "xml_tools"), ("{{ tools }}", "tools")]
)
def test_tools_come_under_the_name_that_the_template_knows(template: str, key: str) -> None:
    variables = {"xml_tools": [json.dumps(WEATHER)]}
    assert tool_calls.given(template, variables) == {key: [WEATHER]}
    with pytest.raises(ValueError, match="no place for python_tools"):
        tool_calls.given(template, {"python_tools": ["def f()"]})
