"""Generators against a real server on loopback: what is asked, tried again, written down and kept."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from smol_post import (
    answering,
    asking,
    generate,
    generate_config,
    judging,
    loading,
    locks,
    manifest,
    scripts,
    sifting,
    sources,
)
from smol_post.config import Source
from smol_post.journal import JOURNAL, Journal
from smol_post.refusal import Refusal
from tests.loopback import Loopback

QUICK = {"backoff_seconds": 0.02, "give_up_seconds": 5.0, "max_new_tokens": 100}


def reasoned(body: dict[str, Any]) -> dict[str, Any]:
    """An answer that follows from the question, the mode and the seed."""
    question = body["messages"][-1]["content"]
    think = body.get("chat_template_kwargs", {}).get("enable_thinking")
    thought = {"reasoning_content": f"let me work out {question} by way {body['seed']}"} if think else {}
    return {"content": f"to {question} I say {sum(map(ord, question)) + body['seed']}", **thought}


def recipe(server: Loopback, stage: str = "traces", *, number: int = 6, **keys: Any) -> dict[str, Any]:
    teacher = {"base_url": server.url, "model": "m", **QUICK, **keys.pop("teacher", {})}
    who = {"strong": teacher, "weak": teacher | {"model": "w"}} if stage == "pairs" else {"teacher": teacher}
    made = [{"name": "q", "generator": "dual_mode_chats", "num_rows": number, "seed": 3,
             "options": {"flag_share": 0.0, "variant_share": 0.0, "instruction_share": 0.0}}]  # fmt: skip
    return {"stage": stage, "modes": ["think"], "sources": made, "format": "jsonl",
            "deduplicate": {"near": False},
            **who, **keys}  # fmt: skip


def run(folder: Path, tree: dict[str, Any], *words: str) -> int:
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    return generate.generate(
        [tree["stage"], str(folder / "r.yaml"), "--run-dir", str(folder / "runs"), *words]
    )


def lines(folder: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / "r" / name).read_text().splitlines()]


def counts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "r" / "ledger.json").read_text())


def test_traces_are_rows_that_the_mixtures_read_with_their_thought_in_a_block(tmp_path: Path) -> None:
    with Loopback(reasoned) as server:
        assert run(tmp_path, recipe(server, num_samples=2, format="parquet")) == 0
    path = tmp_path / "runs" / "r" / "rows.parquet"
    rows = [one.content for one in sources.read_rows(Source(name="x", path=str(path)), folder=tmp_path)]
    assert len(rows) == 12
    messages, variables = asking.clean_row(rows[0])  # type: ignore[arg-type]
    question = messages[0]["content"]
    total = sum(map(ord, question))
    assert messages[1]["content"] == (
        f"<think>\nlet me work out {question} by way 0\n</think>\nto {question} I say {total}"
    )
    assert variables == {"enable_thinking": True}


def test_each_mode_is_asked_for_in_its_own_way(tmp_path: Path) -> None:
    for mode_by, says in (
        ("kwargs", lambda body: body["chat_template_kwargs"]["enable_thinking"]),
        ("system", lambda body: {"/think": True, "/no_think": False}[body["messages"][0]["content"]]),
    ):
        with Loopback(reasoned) as server:
            tree = recipe(server, modes=["think", "no_think"], number=2, teacher={"mode_by": mode_by})
            tree["teacher"] |= {"no_think": {"temperature": 0.7}, "extra_body": {"top_k": 20}}
            run(tmp_path, tree)
            asked = sorted((says(body), body["temperature"], body["top_k"]) for body in server.asked)
        assert asked == [(False, 0.7, 20)] * 2 + [(True, 0.6, 20)] * 2


def test_what_a_row_brings_is_carried_along(tmp_path: Path) -> None:
    tool = {"name": "calc", "parameters": {"type": "object"}}
    call = {"type": "function", "function": {"name": "calc", "arguments": {"sum": "2+3"}}}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"},
                {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "5"},
                {"role": "assistant", "content": "5"}]  # fmt: skip
    row = {"messages": messages, "chat_template_kwargs": {"xml_tools": [json.dumps(tool)]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with Loopback(reasoned) as server:
        assert run(tmp_path, recipe(server, sources=[{"name": "q", "path": "rows.jsonl"}])) == 0
        (asked,) = server.asked
    assert [one["role"] for one in asked["messages"]] == ["system", "user", "assistant", "tool"]
    assert asked["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"sum": "2+3"}'
    assert asked["tools"] == [{"type": "function", "function": tool}]
    (made,) = lines(tmp_path)
    assert [one["role"] for one in made["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert made["chat_template_kwargs"] == {"xml_tools": [json.dumps(tool)], "enable_thinking": True}


def test_of_a_conversation_the_question_that_is_open_is_asked_and_only_its_answer_is_trained(
    tmp_path: Path,
) -> None:
    said = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    row = {"messages": [*said, {"role": "user", "content": "and 4+4?"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with Loopback(reasoned) as server:
        assert run(tmp_path, recipe(server, sources=[{"name": "q", "path": "rows.jsonl"}])) == 0
        assert [body["messages"] for body in server.asked] == [row["messages"]]
    (made,) = lines(tmp_path)
    assert made["messages"][:3] == [said[0], said[1] | {"weight": 0}, row["messages"][2]]
    assert "weight" not in made["messages"][3]


@pytest.mark.parametrize("text", ["I say <|im_end|>", "half a pair: \ud83d"])
def test_an_answer_that_no_mixture_would_take_is_left_out(text: str, tmp_path: Path) -> None:
    with Loopback(lambda body: text) as server:
        assert run(tmp_path, recipe(server, modes=["no_think"], number=2)) == 0
    assert counts(tmp_path)["rejected"] == {"bad_text": 2}


@pytest.mark.parametrize(
    ("ids", "own", "wanted"),
    [(["a", "b"], ["b", "a"], ["b", "a"]), (["a", "b"], [None, None], ["a", "b"]),
     ([None, None], ["x", "y"], ["call_1_0", "call_1_1"])],
)  # fmt: skip
def test_every_result_goes_to_a_server_with_the_id_of_its_call(
    ids: list[Any], own: list[Any], wanted: list[str]
) -> None:
    calls = [{"id": one, "type": "function", "function": {"name": "f", "arguments": {}}} for one in ids]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "2+3, 4+4?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": "5"} | ({"tool_call_id": one} if one else {}) for one in own),
    ]
    teacher = generate_config.Teacher(base_url="http://a/v1", model="m")
    prompt = asking.Prompt("q", 1, "think", messages, {}, None, {})
    body = asking.request(teacher, "teacher", prompt, 0, model="m").body
    assert [one["tool_call_id"] for one in body["messages"][2:]] == wanted
    assert {one["id"] for one in body["messages"][1]["tool_calls"]} == set(wanted)


@pytest.mark.parametrize(
    ("message", "mode", "text", "ended"),
    [
        ({"content": "5", "reasoning": "2+3=5"}, "think", "<think>\n2+3=5\n</think>\n5", True),
        ({"content": "<think>2+3=5</think>\n\n5"}, "think", "<think>\n2+3=5\n</think>\n5", True),
        ({"content": "<think>\n\n</think>\n\n5"}, "no_think", "5", True),
        ({"content": None, "reasoning_content": "2+", "finish_reason": "length"}, "think",
         "<think>\n2+", False),
        ({"content": "It is", "finish_reason": "content_filter"}, "no_think", "It is", False),
        ({"content": "", "tool_calls": [{"id": "a", "type": "function", "function": {
            "name": "f", "arguments": "{}"}}], "finish_reason": "tool_calls"}, "no_think",
         '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', True),
    ],
)  # fmt: skip
def test_thoughts_and_calls_come_in_many_forms_and_leave_in_one(
    message: dict[str, Any], mode: str, text: str, ended: bool, tmp_path: Path
) -> None:
    with Loopback(lambda body: dict(message)) as server:
        run(tmp_path, recipe(server, modes=[mode], number=1))
    (found,) = lines(tmp_path, JOURNAL)
    assert (found["text"], found["ended"]) == (text, ended)


def test_a_request_has_the_id_of_what_is_asked_and_of_nothing_else() -> None:
    prompt = asking.Prompt("q", 1, "think", [{"role": "user", "content": "2+3?"}], {}, None, {})
    given = {"base_url": "http://a/v1", "model": "m"}

    def digest(prompt: asking.Prompt = prompt, sample: int = 0, **keys: Any) -> str:
        teacher = generate_config.Teacher(**given | keys)
        return asking.request(teacher, "teacher", prompt, sample, model=str(teacher.model)).id

    same = [{"base_url": "http://b/v1"}, {"concurrency": 3}, {"timeout_seconds": 9.0}, {"api_key_env": "KEY"}]
    assert {digest(**keys) for keys in same} == {digest()}
    assert digest(asking.Prompt("other", 9, "think", prompt.messages, {}, "5", {})) == digest()
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    teacher = generate_config.Teacher(**given)
    others = [
        asking.request(teacher, "weak", prompt, 0, model="m").id,  # of a server whose model is called alike
        *(digest(**keys) for keys in ({"model": "n"}, {"temperature": 0.1}, {"max_new_tokens": 9},
                                      {"extra_body": {"top_k": 1}}, {"seed": 1}, {"mode_by": "system"})),
        digest(sample=1),
        digest(asking.Prompt("q", 1, "no_think", prompt.messages, {}, None, {})),
        digest(asking.Prompt("q", 1, "think", prompt.messages, tools, None, {})),
    ]  # fmt: skip
    assert len({digest(), *others}) == 1 + len(others)


def test_a_server_that_flaps_is_asked_until_it_answers(tmp_path: Path, capsys: Any) -> None:
    faults = ["503", "reset", "torn", "html", "500", "429;0.05", "408", "hang"]
    with Loopback(reasoned, faults=faults) as server:
        assert run(tmp_path, recipe(server, teacher={"timeout_seconds": 0.5, "concurrency": 2})) == 0
        assert len(server.asked) == 6 + len(faults)
        assert max(server.answered.values()) == 1
    assert len(lines(tmp_path)) == 6
    assert "trying again" in capsys.readouterr().err


def test_retry_after_holds_for_all_requests(tmp_path: Path) -> None:
    with Loopback(reasoned, faults=["429;0.6"]) as server:
        assert run(tmp_path, recipe(server, teacher={"concurrency": 1})) == 0
        assert server.times[1] - server.times[0] >= 0.6


def test_nothing_but_failures_ends_in_one_line_and_what_was_answered_is_kept(
    tmp_path: Path, capsys: Any
) -> None:
    def dies(body: dict[str, Any]) -> str | None:
        return "503" if len(server.answered) >= 3 else None

    with Loopback(reasoned, fault=dies) as server:
        tree = recipe(server, teacher={"concurrency": 1, "give_up_seconds": 0.3})
        assert run(tmp_path, tree) == 1
        said = capsys.readouterr().err
        assert sum(line.startswith("failed: ") for line in said.splitlines()) == 1
        assert "nothing but failures" in said
        assert not manifest.is_whole(tmp_path / "runs" / "r")
        assert len(lines(tmp_path, JOURNAL)) == 3
        server.fault = lambda body: None
        assert run(tmp_path, tree) == 0
        assert sorted(server.answered.values()) == [1] * 6
    assert len(lines(tmp_path)) == 6


@pytest.mark.parametrize("fault", ["401", "403", "404", "400"])
def test_errors_that_no_retry_mends_end_at_once(fault: str, tmp_path: Path, capsys: Any) -> None:
    with Loopback(reasoned, fault=lambda body: fault) as server:
        assert run(tmp_path, recipe(server, number=40, teacher={"concurrency": 2})) == 1
        assert len(server.asked) <= answering.HOPELESS_AFTER + 4
    assert capsys.readouterr().err.count("failed: ") == 1
    assert (tmp_path / "runs" / "r" / JOURNAL).read_text() == ""


@pytest.mark.parametrize("code", ["400", "403"])  # too long; not moderated kindly
def test_one_request_that_is_refused_is_written_down_and_the_run_goes_on(code: str, tmp_path: Path) -> None:
    def second(body: dict[str, Any]) -> str | None:
        return code if len(server.asked) == 2 else None

    with Loopback(reasoned, fault=second) as server:
        assert run(tmp_path, recipe(server, teacher={"concurrency": 1})) == 0
        assert run(tmp_path, recipe(server), "filters.max_tokens=5000") == 0
        assert len(server.asked) == 6
    assert counts(tmp_path)["rejected"] == {"failed": 1}
    (failed,) = (line for line in lines(tmp_path, JOURNAL) if "failed" in line)
    assert failed["failed"] == f"status {code}: Error code: {code} - fault {code}"


def test_a_refusal_is_told_in_the_servers_own_words_whatever_their_key(tmp_path: Path, capsys: Any) -> None:
    with Loopback(reasoned, fault=lambda body: "detail") as server:
        assert run(tmp_path, recipe(server)) == 1
    assert "only serves" in capsys.readouterr().err


def test_it_says_at_the_start_how_much_of_this_recipe_is_answered(tmp_path: Path, capsys: Any) -> None:
    with Loopback(reasoned) as server:
        assert run(tmp_path, recipe(server)) == 0
        assert "6 requests at most, 0 of them answered before" in capsys.readouterr().out
        assert run(tmp_path, recipe(server, num_samples=2)) == 0
        assert "12 requests at most, 6 of them answered before" in capsys.readouterr().out
        assert run(tmp_path, recipe(server, teacher={"temperature": 0.5})) == 0
        assert "6 requests at most, 0 of them answered before" in capsys.readouterr().out


def test_where_half_is_left_out_for_one_fault_it_says_what_mends_it(tmp_path: Path, capsys: Any) -> None:
    with Loopback(lambda body: {"content": f"I think not, {body['messages'][-1]['content']}"}) as server:
        assert run(tmp_path, recipe(server)) == 0
        assert "6 of 6 answers are wrong_mode: try mode_by: system" in capsys.readouterr().err
        assert run(tmp_path, recipe(server, modes=["no_think"], teacher={"mode_by": "none"})) == 0
        assert capsys.readouterr().err == ""


def test_no_more_requests_are_under_way_than_the_recipe_allows(tmp_path: Path) -> None:
    with Loopback(reasoned, seconds=0.02) as server:
        run(tmp_path, recipe(server, number=20, teacher={"concurrency": 3}))
        assert server.most_at_once == 3


def test_requests_keep_to_their_rate(tmp_path: Path) -> None:
    with Loopback(reasoned) as server:
        run(tmp_path, recipe(server, teacher={"requests_per_minute": 600.0}))
        assert min(b - a for a, b in zip(server.times, server.times[1:], strict=False)) > 0.05
        assert server.times[-1] - server.times[0] >= 0.45
    with Loopback(
        reasoned
    ) as server:  # 100 tokens are taken for the first; each later one is like those before
        start = time.monotonic()
        tree = recipe(server, number=4, teacher={"tokens_per_minute": 12000.0, "concurrency": 1})
        run(tmp_path, tree)
        used = sum(line["tokens"] + line["prompt_tokens"] for line in lines(tmp_path, JOURNAL)[-4:])
        assert used < 12000
        assert time.monotonic() - start < 5


def test_a_key_is_read_from_the_environment_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    key = "planted-key-of-nobody-123456"
    with Loopback(reasoned, faults=["400", "503"]) as server:
        tree = recipe(server, teacher={"api_key_env": "MY_TEACHER_KEY"})
        assert run(tmp_path, tree) == 2
        assert "the environment has no MY_TEACHER_KEY" in capsys.readouterr().err
        monkeypatch.setenv("MY_TEACHER_KEY", key)
        assert run(tmp_path, tree) == 0
        assert {one["authorization"] for one in server.headers} == {f"Bearer {key}"}
        monkeypatch.setenv("MY_TEACHER_KEY", f"{key}\n")  # as files of secrets end
        assert run(tmp_path, tree, "teacher.temperature=0.5") == 0
        monkeypatch.setenv("MY_TEACHER_KEY", f"{key}\nx")
        assert run(tmp_path, tree, "teacher.temperature=0.4") == 2
    said = capsys.readouterr()
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(key in text for text in [*texts, said.out, said.err])


def test_a_second_run_keeps_all_and_other_filters_sift_anew_without_asking(
    tmp_path: Path, capsys: Any
) -> None:
    with Loopback(reasoned) as server:
        tree = recipe(server, num_samples=2)
        assert run(tmp_path, tree) == 0
        before = (tmp_path / "runs" / "r" / "manifest.json").read_bytes()
        assert run(tmp_path, tree, f"teacher.base_url={server.url}/") == 0
        assert "whole already, kept" in capsys.readouterr().out
        assert (tmp_path / "runs" / "r" / "manifest.json").read_bytes() == before
        assert run(tmp_path, tree, "filters.max_tokens=1") == 0
        assert counts(tmp_path)["rejected"] == {"too_long": 12}
        assert run(tmp_path, tree, "max_kept=1", "num_rows=4") == 0
        assert len({row["messages"][0]["content"] for row in lines(tmp_path)}) == len(lines(tmp_path)) == 4
        assert len(server.asked) == 12
        assert run(tmp_path, tree, "teacher.temperature=0.5") == 0
        assert len(server.asked) == 24
    manifest.verify(tmp_path / "runs" / "r")


def test_asking_stops_when_there_are_rows_enough(tmp_path: Path) -> None:
    with Loopback(reasoned) as server:
        assert run(tmp_path, recipe(server, number=50, num_rows=5, teacher={"concurrency": 2})) == 0
        assert 5 <= len(server.asked) <= 12
    assert len(lines(tmp_path)) == 5


def test_prompts_that_are_alike_are_asked_once_and_their_copies_left_out(tmp_path: Path) -> None:
    row = {"prompt": "Is 2+3 equal to 5, and if so, why is that so?"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 5)
    with Loopback(reasoned, seconds=0.05) as server:
        assert run(tmp_path, recipe(server, sources=[{"name": "q", "path": "rows.jsonl"}])) == 0
        assert len(server.asked) == 1
    assert (counts(tmp_path)["kept"], counts(tmp_path)["rejected"]) == (1, {"duplicate": 4})


def test_prompts_of_a_suite_are_not_asked_and_counted_by_suite(tmp_path: Path) -> None:
    words = "the old road was long and we sat by a quiet lake then some birds came over it"
    rows = [{"prompt": f"Tell me why {words}."}, {"prompt": "Why is the sky blue?"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "held_out.txt").write_text(words)
    with Loopback(reasoned) as server:
        tree = recipe(server, sources=[{"name": "q", "path": "rows.jsonl"}])
        assert run(tmp_path, tree | {"decontaminate": {"paths": ["held_out.txt"]}}) == 0
        assert len(server.asked) == 1
    assert counts(tmp_path)["rejected"] == {"contaminated": 1}
    assert counts(tmp_path)["contaminated"] == {"held_out.txt": 1}


def test_answers_are_held_against_a_column_that_training_does_not_read(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["2+3?", "4+4?"], "result": ["5", "9"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    with Loopback(
        lambda body: {"content": str(sum(map(int, body["messages"][-1]["content"][:-1].split("+"))))}
    ) as server:
        tree = recipe(server, modes=["no_think"], sources=[{"name": "q", "path": "rows.parquet"}])
        tree["checks"] = {"q": {"kind": "numeric", "column": "result"}}
        assert run(tmp_path, tree) == 0
    assert counts(tmp_path)["rejected"] == {"wrong_answer": 1}


def test_a_row_without_its_reference_is_a_bad_row_as_any_other(tmp_path: Path, capsys: Any) -> None:
    pq.write_table(pa.table({"prompt": ["2+3?", "4+4?"], "result": ["5", None]}), tmp_path / "rows.parquet")
    with Loopback(lambda body: "5") as server:
        tree = recipe(server, modes=["no_think"], sources=[{"name": "q", "path": "rows.parquet"}])
        tree["checks"] = {"q": {"kind": "numeric", "column": "result"}}
        assert run(tmp_path, tree) == 2
        assert "source 'q': row 2: result: missing" in capsys.readouterr().err
        assert run(tmp_path, tree | {"on_bad_rows": "skip"}) == 0
        assert len(server.asked) == 1
    assert counts(tmp_path)["sources"] == {"q": {"bad_row": 1, "kept": 1}}


@pytest.mark.parametrize("row", [{"prompt": " "}, {"messages": [{"role": "user", "content": ""}]}])
def test_an_empty_question_is_not_asked(row: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with Loopback(reasoned) as server:
        assert run(tmp_path, recipe(server, sources=[{"name": "q", "path": "rows.jsonl"}])) == 2
        assert server.asked == []
    assert "row 1: no prompt: the question is empty" in capsys.readouterr().err


def test_pairs_set_the_strong_answer_over_the_weak_one_and_report_their_lengths(
    tmp_path: Path, capsys: Any
) -> None:
    def said(body: dict[str, Any]) -> str:
        number = len(body["messages"][-1]["content"])
        return "alike" if number % 7 == 0 else "well " * number if body["model"] == "m" else "no"

    with Loopback(said) as server:
        tree = recipe(server, "pairs", modes=["no_think"], number=12, filters={"max_repetition": 1.0})
        assert run(tmp_path, tree) == 0
    rows, gap = lines(tmp_path), counts(tmp_path)["length_gap"]
    assert rows
    assert all(row["chosen"][0]["content"] != row["rejected"][0]["content"] for row in rows)
    assert set(counts(tmp_path)["rejected"]) <= {"equal", "duplicate"}
    assert gap["auc"] == gap["chosen_longer"] == 1.0
    assert "length alone tells chosen from rejected (AUC 1.00)" in capsys.readouterr().err
    assert "length alone tells chosen" in (tmp_path / "runs" / "r" / "README.md").read_text()


def test_without_a_strong_teacher_the_rows_own_answers_are_chosen_in_their_own_mode(tmp_path: Path) -> None:
    with Loopback(reasoned) as server:
        tree = recipe(server, "pairs", modes=["think", "no_think"], number=8, deduplicate=None)
        tree["sources"][0]["options"]["think_share"] = 0.5
        del tree["strong"]
        assert run(tmp_path, tree) == 0
        assert len(server.asked) == 8
    made = list(sources.read_rows(Source(**tree["sources"][0]), folder=tmp_path))
    rows = {row["prompt"][0]["content"]: row for row in lines(tmp_path)}
    for one in made:
        content: Any = one.content
        question, answer = content["messages"]
        assert rows[question["content"]]["chosen"][0]["content"] == answer["content"]
        assert rows[question["content"]]["chat_template_kwargs"] == content["chat_template_kwargs"]


def test_conversations_go_on_turn_by_turn_with_what_was_answered(tmp_path: Path, capsys: Any) -> None:
    with Loopback(lambda body: reasoned(body) | {"content": f"answer {len(body['messages'])}"}) as server:
        tree = recipe(server, "turns", modes=["think", "no_think"], number=3, deduplicate=None)
        tree["turns"] = {"num_turns": 3, "kinds": ["punctuation:no_comma"]}
        assert run(tmp_path, tree) == 0
        asked = len(server.asked)
        assert run(tmp_path, tree, "filters.max_tokens=9999") == 0
        assert len(server.asked) == asked
        assert f" {asked} of them answered before" in capsys.readouterr().out
    assert counts(tmp_path)["kept"] == 6
    assert asked == sum(len(entry["ids"]) for entry in lines(tmp_path, "ledger.jsonl"))
    for row in lines(tmp_path):
        said = [one["content"] for one in row["messages"] if one["role"] == "assistant"]
        assert [one.rpartition("answer ")[2] for one in said] == [str(2 * at + 1) for at in range(len(said))]


def forked(work: Callable[[], int]) -> int:
    """The process of a fork of this one that does some work and exits with what it returns."""
    if number := os.fork():
        return number
    code = 99
    try:
        code = work()
    finally:
        os._exit(code)


def killed(after: int, call: Callable[[], int]) -> int:
    """How a fork ends that is killed when so many answers are written; of an odd number, and half a line."""

    class Dying(Journal):
        left = after

        def add(self, answer: Any) -> None:
            super().add(answer)
            self.left -= 1
            if not self.left:
                if after % 2:
                    os.pwrite(self._number or 0, b'{"id": "half', self._end)
                os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        setattr(generate, "Journal", Dying)  # noqa: B010  in the fork
        return call()

    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])


@pytest.mark.parametrize(("stage", "concurrency"), [("traces", 1), ("pairs", 3)])
def test_killed_and_restarted_nothing_is_asked_again_and_the_rows_are_those_of_an_undisturbed_run(
    stage: str, concurrency: int, tmp_path: Path
) -> None:
    """Of one at a time nothing is under way at the kill; else what was, was not finished."""
    (tmp_path / "calm").mkdir()
    with Loopback(reasoned, seconds=0.002) as server:
        tree = recipe(server, stage, number=10, num_samples=2, teacher={"concurrency": concurrency})
        assert run(tmp_path / "calm", tree) == 0
        whole = len(server.asked)
        server.answered.clear()
        for after in (1, 8):
            assert killed(after, lambda: run(tmp_path, tree)) == -signal.SIGKILL
        assert len(Journal(tmp_path / "runs" / "r")) == 9
        assert run(tmp_path, tree) == 0
        under_way = 2 * (concurrency - 1) * (1 if stage == "traces" else 2)
        assert len(server.answered) == whole
        assert sum(server.answered.values()) <= whole + under_way + (stage == "pairs") * 2
    ids = [line["id"] for line in lines(tmp_path, JOURNAL)]
    assert len(ids) == len(set(ids)) == whole
    for name in ("rows.jsonl", "ledger.jsonl", "ledger.json"):
        assert (tmp_path / "runs/r" / name).read_text() == (tmp_path / "calm/runs/r" / name).read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_the_code_of_all_commands_and_what_is_answered_is_kept(
    number: int, code: int, tmp_path: Path
) -> None:
    with Loopback(reasoned, seconds=0.05) as server:
        tree = recipe(server, number=200, teacher={"concurrency": 2})

        def work() -> int:
            os.dup2(os.open(tmp_path / "said", os.O_CREAT | os.O_WRONLY), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            return run(tmp_path, tree)

        child = forked(work)
        while len(server.asked) < 5:
            time.sleep(0.01)
        os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
        said = (tmp_path / "said").read_text()
        assert said == "generate: interrupted; what was answered is kept, the same command goes on\n"
        assert len(Journal(tmp_path / "runs" / "r")) >= 2


def test_two_at_once_are_refused_and_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "runs" / "r"
    out.mkdir(parents=True)
    with Loopback(reasoned) as server, locks.take(out, what="a generation"):
        assert run(tmp_path, recipe(server)) == 2
        assert "a generation is under way, by process" in capsys.readouterr().err
        (out / "thesis.tex").write_text("years of work")
        assert run(tmp_path, recipe(server)) == 2
        assert "exists and is no folder of ours" in capsys.readouterr().err
        assert server.asked == []


def test_a_torn_last_line_is_cut_off_and_a_broken_one_elsewhere_refused(tmp_path: Path) -> None:
    line = {"id": "a", "text": "5", "ended": True}
    (tmp_path / JOURNAL).write_text(f'{json.dumps(line)}\n{{"id": "b", "te')
    journal = Journal(tmp_path).open()
    assert len(journal) == 1
    journal.add(line | {"id": "b", "text": "half a pair: \ud83d"})
    journal.close()
    again = Journal(tmp_path)
    assert (again["a"]["text"], again["b"]["text"], again.num_answered) == ("5", "half a pair: \ud83d", 2)
    (tmp_path / JOURNAL).write_text(f'{json.dumps(line)}\n{{"id": "b"}}\n{json.dumps(line)}\n')
    with pytest.raises(
        Refusal, match=r"answers.jsonl: line 2: not an answer as we write it; remove the line"
    ):
        Journal(tmp_path)


def test_the_length_gap_is_that_of_the_definition() -> None:
    lengths = [(4, 2), (3, 3), (9, 1), (2, 8)]
    above = [(c > r) + (c == r) / 2 for c, _ in lengths for _, r in lengths]
    gap = sifting.length_gap(lengths)
    assert gap["auc"] == round(sum(above) / len(above), 3)
    assert sifting.length_warning(gap) is None
    assert "chosen answers are shorter" in str(sifting.length_warning(sifting.length_gap([(1, 5), (2, 6)])))


def test_a_journal_that_is_no_file_and_sources_without_a_row_are_refused(tmp_path: Path, capsys: Any) -> None:
    with Loopback(reasoned) as server:
        tree = recipe(server)
        (tmp_path / "runs" / "r" / JOURNAL).mkdir(parents=True)
        assert run(tmp_path, tree) == 2
        assert "answers.jsonl: is no file" in capsys.readouterr().err
        (tmp_path / "runs" / "r" / JOURNAL).rmdir()
        tree["sources"] = [{"name": "q", "path": "none.jsonl"}]
        (tmp_path / "none.jsonl").write_text("")
        assert run(tmp_path, tree) == 2
        assert "found no row" in capsys.readouterr().err
        assert not server.asked


def test_a_rejected_answer_that_training_would_refuse_is_left_out_whatever_it_may_be() -> None:
    tree = {"stage": "pairs", "rejected_may_be": ["wrong_mode"], "weak": {"checkpoint": "../sft"},
            "sources": [{"name": "q", "path": "q.jsonl"}]}  # fmt: skip
    asked = loading.validate(generate_config.PairsRecipe, tree, where="r.yaml")
    question = [{"role": "user", "content": "3+4?"}]
    cases: list[tuple[Any, str | None]] = [("no_think", "rejected_wrong_mode"), ("think", None)]
    for mode, wanted in cases:
        prompt = asking.Prompt("q", 1, mode, question, {}, "7", {})
        text = "7" if mode == "no_think" else "<think>\n3+4=7\n</think>\n7"
        chosen = judging.Answer(text, True, 9)
        rejected = judging.Answer("<think>\n3+4=8\n</think>\n8", True, 9)
        assert scripts._of_pair(asked, prompt, chosen, rejected, None) == wanted
        other = judging.Answer("3+4=8\n</think>\n8", True, 9)
        assert scripts._of_pair(asked, prompt, chosen, other, None) is None
