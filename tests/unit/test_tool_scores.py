"""A question has the row's tools and no more than comes before its answer; right is what the row says."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from smol_post import chat, config, evals, loading, points, tool_scores
from smol_post.evals_config import ToolCalls
from smol_post.refusal import Refusal

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}},
}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
ASK = {"role": "user", "content": "?"}
XML, PYTHON = {"xml_tools": [json.dumps(TOOL)]}, {"python_tools": ["def f(x: int)"]}


def row(content: str, *before: Any, tools: Any = XML, **keys: Any) -> dict[str, Any]:
    said = [*(before or (ASK,)), {"role": "assistant", "content": content, **keys}]
    return {"messages": said, "chat_template_kwargs": {"enable_thinking": False, **tools}}


def recipe(**changes: Any) -> config.EvalsRecipe:
    return loading.validate(config.EvalsRecipe, {"stage": "evals", **changes}, where="evals.yaml")


@pytest.mark.parametrize(
    ("given", "text", "wanted"),
    [
        (row(CALL), CALL, (True, True)),
        (row(CALL), CALL.replace("1", "1.0"), (True, True)),
        (row(CALL), f"<think>\nf it is.\n</think>\n{CALL}", (True, True)),
        (row(CALL), f"<think>\n{CALL}\n</think>\nDone.", (False, False)),
        (row(CALL), CALL.replace("1", "2"), (False, True)),
        (row(CALL), CALL.replace("1", "true"), (False, False)),
        (row(CALL), CALL.replace('"f"', '"g"'), (False, False)),
        (row(CALL), f"{CALL}\n{CALL}", (False, True)),
        (row(CALL), CALL.removesuffix("</tool_call>"), (False, False)),
        (row(CALL), f"{CALL}<tool_call>", (False, False)),
        (row(CALL), "<code>f(1)</code>", (False, False)),
        (row(CALL), "", (False, False)),
        (row(CALL.replace("1", '"N/A"')), CALL.replace("1", '"N/A"'), (True, False)),  # BFCL has such rows
        (row("No."), "It is sunny.", (True, False)),
        (row("No."), "", (False, False)),
        (row("No."), "<think>\nIs it", (False, False)),
        (row("No."), CALL, (False, True)),
        (row("No."), "<tool_call>f</tool_call>", (False, False)),
        (row("<code>f(1)</code>", tools=PYTHON), "<code>f(x=1)</code>", (True, True)),
        (row("<code>f(1)</code>", tools=PYTHON), CALL, (False, False)),
        (row("", tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1}'}}]), CALL, (True, True)),
    ],
)
def test_a_turn_is_right_if_it_makes_the_calls_of_the_row(
    given: Any, text: str, wanted: tuple[bool, bool]
) -> None:
    question = tool_scores.read_question(given)
    assert question is not None
    assert question.messages == [ASK]
    assert tool_scores.judge(question, text, ended=True) == wanted
    assert tool_scores.judge(question, text, ended=False) == (False, False)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            row(CALL, {"role": "system", "content": "/no_think"}, ASK),
            "found /no_think, but the mode is asked",
        ),
        (row(CALL.replace('"f"', '"g"')), "there is no tool 'g'; there are: f"),
        (row(CALL.removesuffix("</tool_call>")), "</tool_call> is missing"),
        (row(CALL, tools={"xml_tools": ['{"name": "f", "parameters": {"type": 3}}']}), "no JSON schema"),
        ({"messages": [ASK], **XML}, "wanted a question and its answer, found the roles user"),
    ],
)
def test_a_row_that_is_no_question_is_refused_by_its_number(given: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row('No tools.', tools={}))}\n{json.dumps(given)}\n")
    with pytest.raises(Refusal, match="row 2: ") as refused:
        tool_scores.questions(ToolCalls(name="mine", path=str(path)), 0)
    assert says in str(refused.value)


def test_questions_are_drawn_by_the_seed_from_rows_with_tools(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = [row("No.", {**ASK, "content": str(i)}, tools=XML if i % 2 else {}) for i in range(20)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))

    def asked(seed: int = 0, **keys: Any) -> list[int]:
        found = tool_scores.questions(ToolCalls(name="mine", path=str(path), **keys), seed)
        return [int(one.messages[0]["content"]) for one in found]

    assert asked() == [*range(1, 20, 2)]
    assert asked(num_questions=4) == sorted(asked(num_questions=4)) == asked(num_questions=4)
    assert {*asked(num_questions=4)} < {*asked()}
    assert asked(num_questions=4) != asked(num_questions=4, seed=1)
    with pytest.raises(Refusal, match="found 10 rows with tools; lower num_questions"):
        asked(num_questions=11)


def test_a_generator_asks_as_many_as_are_wanted() -> None:
    options = {"variant_share": 1.0}
    asked = ToolCalls(name="tiny", generator="dual_mode_chats", num_questions=12, options=options)
    found = tool_scores.questions(asked, 5)
    assert (len(found), found == tool_scores.questions(asked, 5)) == (12, True)
    assert {tuple(one.tools) for one in found} == {("calc",)}
    assert {one.wanted[0].python for one in found} == {True, False}
    for one in found:
        assert one.wanted[0].arguments["sum"] in one.messages[0]["content"]


def test_metrics_have_names_before_they_are_measured_and_a_group_in_the_report() -> None:
    entry = {"name": "bfcl", "generator": "dual_mode_chats", "num_questions": 1, "modes": ["no_think"]}
    names = [name for name in recipe(tool_calls=[entry]).metric_names() if name.startswith("tool")]
    assert names == ["tool_calls_bfcl_no_think", "tool_calls_bfcl_no_think_valid"]
    assert {points.rank_metric(name)[0] for name in names} == {[*points.GROUPS].index("tool calls")}
    with pytest.raises(Refusal, match="tool_calls_bfcl_no_think is measured twice"):
        recipe(tool_calls=[entry, entry])


def test_what_is_asked_is_what_the_file_holds_wherever_it_is(tmp_path: Path) -> None:
    def digest(folder: str, text: str) -> Any:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "rows.jsonl").write_text(text)
        made = recipe(tool_calls=[{"name": "mine", "path": "rows.jsonl"}])
        return evals._what(made.located(tmp_path / folder / "evals.yaml"))

    assert digest("a", "{}") == digest("b", "{}")
    assert digest("a", "{}") != digest("a", "{} ")


def test_a_model_without_a_place_for_tools_is_not_asked_and_a_short_one_is_refused(
    build: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(CALL)))
    asked = ToolCalls(name="mine", path=str(path), max_new_tokens=500)
    with pytest.raises(Refusal, match=r"may take [0-9,]+ tokens, the model has 256; lower max_new_tokens"):
        tool_scores.evaluate(build(attention="sdpa"), tokenizer, asked, recipe(), mode="think")
    known = tokenizer.chat_template
    try:
        tokenizer.chat_template = chat.load_template("chatml").replace("tools", "none")
        assert tool_scores.evaluate(build(), tokenizer, asked, recipe(), mode="think") == ({}, [])
    finally:
        tokenizer.chat_template = known
