"""Rows become documents on disk: by eye, by any number of processes, with every bad row named."""

import copy
import doctest
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smol_post import chat, documents, synthetic
from smol_post.config import COLUMNS, Source
from smol_post.documents import MODES, Encoder, Store, once, tokenise
from smol_post.refusal import Refusal
from smol_post.sources import Raw

Row = dict[str, Any]
DATE = "01 July 2025"
END = "<|endoftext|>"
SAY = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
CHAT: Row = {"messages": SAY, "enable_thinking": False}
PAIR: Row = {"prompt": SAY[:1], "chosen": "5", "rejected": "6", "enable_thinking": False}
Encoders = Callable[..., Encoder]
Build = Callable[..., Store]


@pytest.fixture
def encoder(tokenizer: Any) -> Encoders:
    """An encoder of SFT; the keywords change it."""

    def made(**changes: Any) -> Encoder:
        given: Row = {
            "tokenizer": tokenizer,
            "template": tokenizer.chat_template,
            "date_string": DATE,
            "text_end": END,
            "loss_on": "completion",
            "mode": None,
            "columns": {},
            "max_row_characters": 10_000_000,
            "pairs": False,
        }
        return Encoder(**{**given, **changes})

    return made


@pytest.fixture
def build(encoder: Encoders, tmp_path: Path) -> Build:
    """A store of rows (or of the lines of a file); the keywords change the encoder."""

    def made(
        rows: list[Row] | bytes, *, on_bad_rows: str = "refuse", workers: int = 1, **changes: Any
    ) -> Store:
        lines = (
            rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        )
        (tmp_path / "rows.jsonl").write_bytes(lines)
        target = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        tokenise(
            Source(name="mine", path="rows.jsonl"),
            encoder(**changes),
            folder=tmp_path,
            target=target,
            on_bad_rows=on_bad_rows,
            num_workers=workers,
        )
        return Store(target)

    return made


def documents_of(store: Store) -> list[tuple[list[int], list[bool]]]:
    """(ids, loss) of every document of a store."""
    found = []
    for record in store.records:
        stored = np.array(store.tokens[record["address"] : record["address"] + record["length"]])
        found.append((np.where(stored < 0, ~stored, stored).tolist(), (stored >= 0).tolist()))
    return found


def counts_of(store: Store) -> Row:
    """What a store's ledger says, but for how long it took."""
    return {key: value for key, value in store.ledger.items() if key != "seconds"}


def test_a_token_without_loss_is_stored_as_its_complement(build: Build, tokenizer: Any) -> None:
    store = build([{"prompt": "ab", "completion": "cd"}])
    a, b, c, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    end = tokenizer.convert_tokens_to_ids(END)
    assert store.tokens.tolist() == [~a, ~b, c, d, end]
    names = ["address", "row", "length", "num_trained", "trains_first", "mode"]
    assert store.records[names].tolist() == [(0, 1, 5, 3, False, MODES.index("text"))]
    assert counts_of(store) == {"num_rows": 1, "skipped": {}, "skipped_examples": {}}


def test_the_first_token_is_not_counted_as_trained_but_known_to_be(build: Build) -> None:
    (record,) = build([{"text": "ab"}]).records
    assert (record["length"], record["num_trained"], bool(record["trains_first"])) == (3, 2, True)


@pytest.mark.parametrize(
    ("row", "loss_on", "trained"),
    [
        ({"text": "ab"}, "completion", "ab<|endoftext|>"),
        ({"text": "ab"}, "all", "ab<|endoftext|>"),
        ({"prompt": "ab", "completion": "cd"}, "completion", "cd<|endoftext|>"),
        ({"prompt": "ab", "completion": "cd"}, "all", "abcd<|endoftext|>"),
        ({"prompt": "", "completion": "cd"}, "completion", "cd<|endoftext|>"),
        ({"prompt": "ab", "completion": ""}, "completion", "<|endoftext|>"),
        ({"text": ""}, "completion", "<|endoftext|>"),
    ],
)
def test_what_is_trained_of_a_text(
    build: Build, tokenizer: Any, row: Row, loss_on: str, trained: str
) -> None:
    ((ids, loss),) = documents_of(build([row], loss_on=loss_on))
    assert tokenizer.decode(ids) == "".join(row.values()) + END
    assert tokenizer.decode([token for token, one in zip(ids, loss, strict=True) if one]) == trained


def test_a_text_ends_with_the_token_that_is_asked_for(build: Build, tokenizer: Any) -> None:
    ((ids, _),) = documents_of(build([{"text": "ab"}], text_end="<think>"))
    assert tokenizer.decode(ids) == "ab<think>"
    with pytest.raises(Refusal, match=r"text_end: a text would end with <\|im_end\|>; name the token"):
        build([{"text": "ab"}], text_end="<|im_end|>")


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_chat_is_stored_as_the_chat_module_encodes_it(build: Build, tokenizer: Any, loss_on: str) -> None:
    rows = list(synthetic.generate("dual_mode_chats", num_rows=20, seed=0))
    store = build(rows, loss_on=loss_on)
    how: Any = {"loss_on": "all"} if loss_on == "all" else {}
    wanted = [chat.encode_chat(row, tokenizer, date_string=DATE, **how) for row in rows]
    assert documents_of(store) == [(one.input_ids, list(map(bool, one.train_mask))) for one in wanted]
    assert [MODES[mode] for mode in store.records["mode"]] == [one.mode for one in wanted]


def test_rows_of_every_kind_keep_their_order_and_number(build: Build, tokenizer: Any) -> None:
    rows = [{"text": "one"}, CHAT, {"prompt": "two", "completion": "three"}, CHAT, {"text": "four"}] * 3
    alone = [documents_of(build([row]))[0] for row in rows[:5]]
    store = build(rows)
    assert documents_of(store) == alone * 3
    assert store.records["row"].tolist() == list(range(1, 16))
    assert [MODES[mode] for mode in store.records["mode"]] == [
        "text",
        "no_think",
        "text",
        "no_think",
        "text",
    ] * 3


def test_the_records_of_a_store_say_what_its_tokens_are(build: Build) -> None:
    rows = [*synthetic.generate("dual_mode_chats", num_rows=300, seed=1)]
    rows += synthetic.generate("needles", num_rows=300, seed=1)
    store = build(rows)
    assert store.records["address"].tolist() == [0, *np.cumsum(store.records["length"])[:-1].tolist()]
    assert store.records["length"].sum() == len(store.tokens)
    for record, (_, loss) in zip(store.records, documents_of(store), strict=True):
        assert (record["num_trained"], record["trains_first"]) == (sum(loss[1:]), loss[0])


def test_a_pair_is_two_documents_with_loss_on_the_answers(build: Build, tokenizer: Any) -> None:
    rows = list(synthetic.generate("preference_pairs", num_rows=10, seed=0))
    store = build(rows, pairs=True)
    pairs = [chat.encode_pair(row, tokenizer, date_string=DATE) for row in rows]
    assert documents_of(store) == [
        ([*one.prompt_ids, *answer], [False] * len(one.prompt_ids) + [True] * len(answer))
        for one in pairs
        for answer in (one.chosen_ids, one.rejected_ids)
    ]
    assert store.records["row"].tolist() == [number for number in range(1, 11) for _ in range(2)]


def test_the_mode_of_a_source_holds_for_chats_that_name_none(build: Build) -> None:
    rows = [{"messages": SAY}, CHAT, {"text": "ab"}]
    store = build(rows, mode="think")
    assert [MODES[mode] for mode in store.records["mode"]] == ["think", "no_think", "text"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        # The end of the turn is outside of the span: the model would not learn to stop.
        ("{{- '<|im_end|>' -}}{%- endgeneration -%}", "{%- endgeneration -%}{{- '<|im_end|>' -}}"),
        # The line break after the turn is inside.
        ("{%- endgeneration -%}{{- '\\n' -}}", "{{- '\\n' -}}{%- endgeneration -%}"),
    ],
)
def test_a_template_with_wrong_spans_is_refused_and_not_the_row(
    build: Build, monkeypatch: pytest.MonkeyPatch, before: str, after: str, workers: int
) -> None:
    """No row is skipped for it, whatever `on_bad_rows` says."""
    fork = multiprocessing.get_context("fork")  # workers that start at once
    monkeypatch.setattr(documents, "get_context", lambda _: fork)
    turn = (
        "{{- '<|im_start|>assistant\\n' -}}{%- generation -%}{{- message.content -}}"
        "{{- '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
    )
    template = (
        "{%- for message in messages -%}{%- if message.role == 'assistant' -%}" + turn + "{%- else -%}"
        "{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
    rows = [{"text": "first"}, {"messages": SAY}]
    assert len(build(rows, template=template).records) == 2
    assert before in template
    wrong = template.replace(before, after)
    with pytest.raises(
        Refusal, match=r"'mine': rows\.jsonl: row 2: .*generation spans.*; mend the chat template"
    ):
        build(rows, template=wrong, on_bad_rows="skip", workers=workers)
    assert len(build(rows, template=wrong, loss_on="all").records) == 2  # no span is used


def test_a_chat_that_begins_with_an_answer_is_a_row_like_others(build: Build) -> None:
    """There is no prefix to render before it, so its mask is derived one way only."""
    made = build([{"messages": [SAY[1], *SAY]}, {"messages": SAY}], mode="think")
    assert len(made.records) == 2


def test_workers_write_the_very_same_bytes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_BATCH_ROWS", 7)  # of the process that reads: eight batches
    rows = [*synthetic.generate("dual_mode_chats", num_rows=25, seed=0), {"text": 5}, {"text": "b"}]
    rows += synthetic.generate("needles", num_rows=25, seed=0)
    one, two = (build(rows, on_bad_rows="skip", workers=workers) for workers in (1, 2))
    for name in ("tokens.bin", "documents.bin"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert counts_of(one) == counts_of(two)
    assert len(one.records) == 51


def test_batches_are_bounded_in_rows_and_in_characters() -> None:
    short = [Raw(number, b"x", 0.0) for number in range(2 * documents._BATCH_ROWS + 1)]
    assert [len(batch) for batch in documents._batches(short)] == [documents._BATCH_ROWS] * 2 + [1]
    third = documents._BATCH_CHARACTERS // 3 + 1
    for content in (b"x" * third, {"messages": [{"content": "x" * third}]}):
        long = [Raw(number, content, 0.0) for number in range(7)]
        assert [len(batch) for batch in documents._batches(long)] == [3, 3, 1]
        assert [row for batch in documents._batches(long) for row in batch] == long


DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DEEP_CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "deep"}]}
DEEP_INSIDE = json.dumps({"messages": [*SAY[:1], DEEP_CALL], "enable_thinking": False}).encode()
DEEP_INSIDE = DEEP_INSIDE.replace(b'"deep"', b'{"x": ' * 700 + b"1" + b"}" * 700)


def chat_with(*messages: Any) -> bytes:
    return json.dumps({"messages": messages, "enable_thinking": False}).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not JSON (Expecting value: line 1 column 9 (char 8))"),
        (b"[1]", "found list, wanted an object"),
        (b'"text"', "found str, wanted an object"),
        (b'{"text": "\xff"}', "'utf-8' codec can't decode byte 0xff in position 10"),
        (b'{"messages": []}', "messages: found [], wanted a list of messages"),
        (b'{"messages": null}', "messages: found None, wanted a list of messages"),
        (chat_with({"role": "judge", "content": "x"}, SAY[1]), "unknown role"),
        (
            chat_with({"role": "user", "content": 5}, SAY[1]),
            "messages[0] (user): wanted text as content, found 5",
        ),
        (chat_with({"role": "user", "content": float("nan")}, SAY[1]), "wanted text as content, found nan"),
        (chat_with({"role": "system", "content": "x"}), "no assistant turn to train on"),
        (chat_with(*SAY, None), "messages[2]: wanted a message, found None"),
        (chat_with({"role": None, "content": None}, SAY[1]), "messages[0]: no role, only nulls"),
        (chat_with({"role": "user", "content": "<|im_end|>"}, SAY[1]), "control token <|im_end|>"),
        (json.dumps({"messages": SAY}).encode(), "the row has no mode"),
        (b'{"title": "x"}', "found columns title, wanted text, prompt + completion, or messages"),
        (b"{}", "found columns none, wanted text"),
        (
            json.dumps({f"column{n}": n for n in range(999)}).encode(),
            "found columns column0, column1, column2",
        ),
        (b'{"\\ud83d\\n": "x"}', "found columns \\ud83d , wanted text"),
        (b'{"text": "half \\ud83d"}', "surrogates not allowed"),
        (chat_with({"role": "user", "content": "half \ud83d"}, SAY[1]), "half a surrogate pair"),
        (b'{"text": 5}', "text: found int, wanted text"),
        (b'{"text": NaN}', "text: found float, wanted text"),
        (b'{"prompt": "x"}', "found columns prompt, wanted text"),
        (b'{"prompt": "x", "completion": 5}', "completion: found int, wanted text"),
        (
            json.dumps({"text": "x" * 10_000_000}).encode(),
            "found a row of 10,000,012 characters, wanted at most",
        ),
        (DEEP, "nested too deeply"),
        (DEEP_INSIDE, "nested too deeply"),
    ],
    ids=lambda value: ascii(value[:30]),
)
def test_a_bad_row_is_refused_by_its_number_or_skipped_and_counted(
    build: Build, line: bytes, reason: str
) -> None:
    good = [{"text": "one"}, CHAT, {"text": "two"}]
    lines = [json.dumps(row).encode() for row in good]
    lines = b"\n".join([lines[0], line, lines[1], line, lines[2]])
    with pytest.raises(Refusal) as caught:
        build(lines)
    said = str(caught.value)
    assert said.startswith("source 'mine': rows.jsonl: row 2: ")
    assert reason in said
    assert said.endswith("; mend or remove the row, or set on_bad_rows: skip")
    assert "\n" not in said
    assert len(said.encode()) < 600
    store = build(lines, on_bad_rows="skip")
    assert documents_of(store) == documents_of(build(good))
    assert store.records["row"].tolist() == [1, 3, 5]
    assert store.ledger["num_rows"] == 5
    ((kind, number),) = store.ledger["skipped"].items()
    assert number == 2
    example = store.ledger["skipped_examples"][kind]
    assert example.startswith("row 2: ")
    assert reason in example


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": "5"}, "chosen and rejected are equal"),
        (
            {"chosen": SAY, "rejected": [SAY[0], {"role": "assistant", "content": "6"}], "prompt": [SAY[1]]},
            "another one than prompt",
        ),
        ({"prompt": []}, "no prompt"),
        ({"chosen": None}, "chosen: wanted one assistant turn after the shared prompt, found nothing"),
        ({"chosen": "half \ud83d"}, "half a surrogate pair"),
        ({"rejected": 5}, "rejected: wanted a list of messages, found 5"),
        ({"rejected": "<think>\nHm\n</think>\n6"}, "not where the generation prompt"),
    ],
)
def test_a_bad_pair_is_refused_by_its_number_or_skipped_and_counted(
    build: Build, change: Row, reason: str
) -> None:
    rows = [PAIR, {**PAIR, **change}, {**PAIR, "chosen": "7"}]
    with pytest.raises(Refusal, match=r"source 'mine': rows\.jsonl: row 2: ") as caught:
        build(rows, pairs=True)
    assert reason in str(caught.value)
    store = build(rows, pairs=True, on_bad_rows="skip")
    assert documents_of(store) == documents_of(build([rows[0], rows[2]], pairs=True))
    assert store.records["row"].tolist() == [1, 1, 3, 3]
    assert list(store.ledger["skipped"].values()) == [1]


def test_a_row_is_as_long_as_it_may_be_and_no_longer(build: Build) -> None:
    row = {"text": "x" * 80}
    size = len(json.dumps(row))
    assert len(build([row], max_row_characters=size).records) == 1
    with pytest.raises(
        Refusal, match=rf"found a row of {size} characters, wanted at most {size - 1} \(max_row"
    ):
        build([row], max_row_characters=size - 1)


def test_a_row_of_a_table_is_as_long_as_its_texts(encoder: Encoders, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x" * 80}, SAY[1]], "enable_thinking": False}
    size = len("user" + "x" * 80 + "assistant" + "5")
    for limit, number in ((size, 0), (size - 1, 1)):
        encoded = encoder(max_row_characters=limit).encode([Raw(1, row, 1.0)])
        assert len(encoded.bad_rows) == number


def test_of_several_bad_rows_the_first_is_named(build: Build) -> None:
    """Whether it cannot be read or cannot be encoded."""
    unreadable, unknown = b'{"text": ', b'{"text": 5}'
    for lines in ([unreadable, unknown], [unknown, unreadable]):
        with pytest.raises(Refusal, match=r"rows\.jsonl: row 2: "):
            build(b"\n".join([b'{"text": "a"}', *lines]))


def test_alike_reasons_are_counted_together_whatever_their_numbers(build: Build) -> None:
    lines = b"\n".join([b'{"text": "a"}', b'{"text": ', b'{"texts": ', b'{"a": 1}', b'{"b": 1}'])
    skipped = build(lines, on_bad_rows="skip").ledger["skipped"]
    assert sorted(skipped.values()) == [1, 1, 2]
    assert sum(kind.startswith("not JSON") for kind in skipped) == 1


def test_a_bad_row_changes_nothing_of_the_others_in_its_batch(encoder: Encoders) -> None:
    rows = [Raw(number, json.dumps(CHAT).encode(), 0.0) for number in range(1, 5)]
    rows[2] = rows[2]._replace(content=b'{"text": 1}')
    encoded = encoder().encode(rows, check=True)
    whole = encoder().encode([rows[0], rows[1], rows[3]])
    assert encoded.tokens.tolist() == whole.tokens.tolist()
    assert encoded.records["row"].tolist() == [1, 2, 4]
    assert encoded.bad_rows == [(3, "text: found int, wanted text")]


TEXTS = ["", "a", "user", "assistant", "/think", "<think>", "</think>", "<|im_end|>", "{}", '["x"]', "\ud83d"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.sampled_from(TEXTS),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "name", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
WITH_TOOLS: Row = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        SAY[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "5", "reasoning_content": "x"},
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "python_tools": ["def f(): x"],
    "chat_template_kwargs": {"enable_thinking": True, "custom_instructions": "End."},
}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in inner for path in [(*at, key), *places(item, (*at, key))]]


@st.composite
def spoilt(draw: Any) -> tuple[Row, bool]:
    """A good row with one thing put where it does not belong, and whether it is a pair."""
    row, pairs = draw(
        st.sampled_from([(CHAT, False), (WITH_TOOLS, False), ({"text": "a"}, False), (PAIR, True)])
    )
    row = copy.deepcopy(row)
    if draw(st.booleans()):
        row[draw(st.sampled_from(COLUMNS))] = draw(JSON)
    else:
        *path, last = draw(st.sampled_from(places(row)))
        node = row
        for key in path:
            node = node[key]
        node[last] = draw(JSON)
    return row, pairs


@settings(deadline=None, max_examples=150, derandomize=True)
@given(spoilt())
def test_whatever_a_row_holds_it_is_encoded_or_named(tokenizer: Any, given: tuple[Row, bool]) -> None:
    row, pairs = given
    encoder = Encoder(tokenizer, tokenizer.chat_template, DATE, END, "completion", None, {}, 10**7, pairs)
    for content in (row, json.dumps(row).encode()):
        encoded = encoder.encode([Raw(7, content, 1.0)])
        assert len(encoded.records) == (0 if encoded.bad_rows else 1 + pairs)
        assert all(number == 7 and reason.encode() for number, reason in encoded.bad_rows)


def test_null_structs_of_a_table_are_named(encoder: Encoders, tmp_path: Path) -> None:
    rows = [CHAT, {"messages": [SAY[0], None], "enable_thinking": False}, {**CHAT, "messages": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "store").mkdir()
    tokenise(Source(name="s", path="rows.parquet"), encoder(), folder=tmp_path, target=tmp_path / "store",
             on_bad_rows="skip")  # fmt: skip
    store = Store(tmp_path / "store")
    assert store.records["row"].tolist() == [1]
    assert sorted(store.ledger["skipped_examples"].values()) == [
        "row 2: messages[1]: wanted a message, found None",
        "row 3: messages: found None, wanted a list of messages",
    ]


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_the_weight_of_a_turn_reaches_the_store_from_every_file(
    encoder: Encoders, tmp_path: Path, end: str
) -> None:
    """A table has the column `weight` in every message: null where none was written."""
    ask, answers = SAY[0], [{"role": "assistant", "content": word} for word in ("one", "two")]
    rows = [
        {"messages": [ask, answers[0] | {"weight": 0}, ask, answers[1]], "enable_thinking": False},
        {"messages": [ask, answers[0], ask, answers[1]], "enable_thinking": False},
    ]
    table = datasets.Dataset.from_list(rows)
    assert table[1]["messages"][1]["weight"] is None
    table.to_parquet(tmp_path / "rows.parquet") if end == "parquet" else table.to_json(
        tmp_path / "rows.jsonl"
    )
    (tmp_path / "store").mkdir()
    tokenise(
        Source(name="s", path=f"rows.{end}"), encoder(), folder=tmp_path, target=tmp_path / "store",
        on_bad_rows="refuse",
    )  # fmt: skip
    (first, first_loss), (second, second_loss) = documents_of(Store(tmp_path / "store"))
    assert first == second
    said = [np.array(first)[np.array(loss)].tolist() for loss in (first_loss, second_loss)]
    assert said[0] == said[1][len(said[1]) // 2 :]


def test_a_source_of_no_rows_is_refused(build: Build) -> None:
    with pytest.raises(Refusal, match=r"'mine': rows\.jsonl: no rows to train on \(it is empty\); mend or"):
        build(b"")


@pytest.mark.parametrize("damage", ["deleted", "cut short", "unsealed"])
def test_what_was_lost_from_the_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    def build(target: Path) -> None:
        (target / "tokens.bin").write_bytes(b"12345678")

    made = once(tmp_path, "abc", build)
    if damage == "deleted":
        (made / "tokens.bin").unlink()
    if damage == "cut short":
        (made / "tokens.bin").write_bytes(b"1234")
    if damage == "unsealed":
        (made / "whole.json").unlink()
    assert (once(tmp_path, "abc", build) / "tokens.bin").read_bytes() == b"12345678"


def test_a_whole_cache_is_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    made = once(tmp_path / "cache", "abc", lambda target: (target / "a").write_text("x") and None)
    (tmp_path / "cache" / "abc.lock").unlink()
    (tmp_path / "cache" / "abc.lock").mkdir()  # a lock that cannot be opened, for root too
    assert once(tmp_path / "cache", "abc", lambda target: None) == made
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refusal, match=r"file: cannot be written .*; choose another --run-dir"):
        once(tmp_path / "file", "abc", lambda target: None)


class Interrupted(BaseException):
    """As Ctrl-C, not an Exception."""


def test_an_interrupted_build_leaves_nothing_and_is_made_anew(tmp_path: Path) -> None:
    def interrupted(target: Path) -> None:
        (target / "half").write_text("x")
        raise Interrupted

    with pytest.raises(Interrupted):
        once(tmp_path, "sha256:abc", interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["abc.lock"]
    made = once(tmp_path, "sha256:abc", lambda target: (target / "whole").write_text("x") and None)
    assert made == tmp_path / "abc"
    assert sorted(path.name for path in made.iterdir()) == ["whole", "whole.json"]


def test_what_a_killed_build_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "abc.half").mkdir()
    (tmp_path / "abc.half" / "torn").write_text("x")
    made = once(tmp_path, "abc", lambda target: (target / "whole").write_text("x") and None)
    assert sorted(path.name for path in made.iterdir()) == ["whole", "whole.json"]
    assert not (tmp_path / "abc.half").exists()


def test_what_is_built_is_not_built_again(tmp_path: Path) -> None:
    made = once(tmp_path, "abc", lambda target: (target / "whole").write_text("first") and None)
    again = once(tmp_path, "abc", lambda target: (target / "whole").write_text("second") and None)
    assert (again / "whole").read_text() == "first"
    assert again == made != once(tmp_path, "other", lambda target: None)


def test_two_processes_at_the_same_time_build_once_and_read_the_same(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")  # they run the functions below, without an import
    together, found = processes.Barrier(2), processes.Queue()

    def build(target: Path) -> None:
        with (tmp_path / "builds").open("a") as builds:
            builds.write("one\n")
        (target / "part").write_text("half")
        time.sleep(0.3)
        (target / "part").write_text("whole")

    def work() -> None:
        together.wait(timeout=30)
        found.put((once(tmp_path / "cache", "abc", build) / "part").read_text())

    workers = [processes.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [found.get(timeout=30) for _ in workers] == ["whole", "whole"]
    for worker in workers:
        worker.join(timeout=30)
        assert worker.exitcode == 0
    assert (tmp_path / "builds").read_text() == "one\n"


def test_the_examples_in_the_text_are_true() -> None:
    assert doctest.testmod(documents).failed == 0


def test_what_another_caller_padded_and_cut_changes_no_address(encoder: Encoders, tokenizer: Any) -> None:
    before = encoder().identity()
    tokenizer(["one", "two words"], padding=True, truncation=True, max_length=4)
    assert encoder().identity() == before
