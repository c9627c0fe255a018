"""From rows to packs and pairs on disk: what is trained, what is counted, when the cache is right."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from smol_post import chat, data
from smol_post.config import Source
from smol_post.data import Document, Prepared, encode_rows, fit_length, gather, load_rows
from smol_post.refusal import Refusal

DATE = "01 July 2025"
TEXTS = [{"text": f"row {number}"} for number in range(1, 9)]
Packs = Callable[..., Prepared]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def document(ids: list[int], mask: list[int], mode: str = "text", source: str = "s") -> Document:
    return Document(np.array(ids, np.int32), np.array(mask, np.int8), mode, source)


@pytest.fixture
def packs(tokenizer: Any, tmp_path: Path) -> Packs:
    """Prepare packs of rows.jsonl; the keywords change one input."""
    write_lines(tmp_path / "rows.jsonl", TEXTS)

    def prepare(**changes: Any) -> Prepared:
        given: dict[str, Any] = {
            "sources": [Source(name="rows", path="rows.jsonl")],
            "tokenizer": tokenizer,
            "folder": tmp_path,
            "cache_dir": tmp_path / "cache",
            "max_tokens": 32,
            "packing_strategy": "bfd",
            "loss_on": "all",
            "overlong_rows": "drop",
            "template": tokenizer.chat_template,
            "date_string": DATE,
            "text_end": "<|endoftext|>",
            "seed": 0,
        }
        given |= changes
        return data.prepare_packs(given.pop("sources"), given.pop("tokenizer"), **given)

    return prepare


def entries(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"}


def test_two_documents_in_one_pack_by_eye() -> None:
    documents = [document([5, 6, 7], [0, 1, 1], "think", "a"), document([8, 9], [1, 1], "no_think", "b")]
    table, counts = gather(documents, [[(0, 0, 3), (1, 0, 2)]], isolate=True)
    assert table.to_pylist() == [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]}
    ]
    first = {"num_rows": 1, "num_tokens": 3, "num_trained_tokens": 2}
    second = {"num_rows": 1, "num_tokens": 2, "num_trained_tokens": 1}
    assert counts == {
        "by_source": {"a": first, "b": second},
        "by_mode": {"think": first, "no_think": second},
    }


def test_a_cut_document_is_one_row_and_each_piece_starts_without_context() -> None:
    table, counts = gather([document([5, 6, 7], [1, 1, 1])], [[(0, 0, 2)], [(0, 2, 3)]], isolate=True)
    assert table.column("labels").to_pylist() == [[-100, 6], [-100]]
    assert counts["by_source"]["s"] == {"num_rows": 1, "num_tokens": 3, "num_trained_tokens": 1}


def test_across_documents_only_the_first_token_of_a_pack_is_without_context() -> None:
    table, _ = gather(
        [document([5, 6], [1, 1]), document([8, 9], [1, 1])], [[(0, 0, 2), (1, 0, 2)]], isolate=False
    )
    assert table.column("labels").to_pylist() == [[-100, 6, 8, 9]]
    assert table.column("seq_lengths").to_pylist() == [[4]]


@pytest.mark.parametrize(
    ("row", "loss_on", "trained"),
    [
        ({"text": "ab"}, "completion", "ab<|endoftext|>"),
        ({"prompt": "ab", "completion": "cd"}, "completion", "cd<|endoftext|>"),
        ({"prompt": "ab", "completion": "cd"}, "all", "abcd<|endoftext|>"),
    ],
)
def test_what_is_trained_of_a_row(tokenizer: Any, row: dict[str, str], loss_on: str, trained: str) -> None:
    (found,) = encode_rows(
        [(1, row)],
        tokenizer,
        source="s",
        loss_on=loss_on,
        template=None,
        date_string=DATE,
        text_end="<|endoftext|>",
    )
    assert tokenizer.decode(found.ids) == "".join(row.values()) + "<|endoftext|>"
    assert tokenizer.decode(found.ids[found.mask == 1]) == trained


@pytest.mark.parametrize("strategy", ["bfd", "wrapped", "wrapped_cross_document"])
def test_the_ledger_counts_what_is_in_the_packs(packs: Packs, strategy: str) -> None:
    sources = [
        Source(name="chats", generator="dual_mode_chats", num_rows=30, seed=1),
        Source(name="needles", generator="needles", num_rows=10, seed=1),
    ]
    made = packs(sources=sources, max_tokens=512, packing_strategy=strategy, loss_on="completion")
    rows = made.dataset[:]
    trained = sum(label != data.IGNORED for labels in rows["labels"] for label in labels)
    ledger = made.ledger
    assert ledger["num_trained_tokens"] == trained > 0
    assert ledger["num_tokens"] == sum(map(len, rows["input_ids"]))
    assert ledger["num_packs"] == len(made.dataset)
    for kind in ("by_source", "by_mode"):
        for key, total in (
            ("num_trained_tokens", trained),
            ("num_tokens", ledger["num_tokens"]),
            ("num_rows", 40),
        ):
            assert sum(one[key] for one in ledger[kind].values()) == total
    assert ledger["by_source"].keys() == {"chats", "needles"}
    assert ledger["by_mode"].keys() == {"think", "no_think", "text"}
    for ids, labels, lengths in zip(
        *(rows[key] for key in ("input_ids", "labels", "seq_lengths")), strict=True
    ):
        assert sum(lengths) == len(ids) == len(labels) <= 512
        assert all(label in (data.IGNORED, token) for token, label in zip(ids, labels, strict=True))
        starts = np.cumsum([0, *lengths[:-1]])
        assert all(labels[start] == data.IGNORED for start in starts)
    if strategy == "wrapped_cross_document":
        assert all(len(lengths) == 1 for lengths in rows["seq_lengths"])


def test_the_same_inputs_hit_the_cache(packs: Packs, tmp_path: Path) -> None:
    first = packs()
    (name,) = entries(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / name).iterdir()}
    again = packs()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / name).iterdir()} == before
    assert again.dataset[:] == first.dataset[:]
    assert again.ledger == first.ledger


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"max_tokens": 33},
        {"date_string": "02 July 2025"},
        {"template": chat.load_template("chatml")},
        {"packing_strategy": "wrapped"},
        {"loss_on": "completion"},
        {"overlong_rows": "truncate"},
        {"text_end": "<think>"},
        {"sources": [Source(name="other", path="rows.jsonl")]},
        {"sources": [Source(name="rows", path="rows.jsonl", keep_fraction=0.5)]},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_any_changed_input_misses_the_cache(packs: Packs, tmp_path: Path, changes: dict[str, Any]) -> None:
    packs()
    packs(**changes)
    assert len(entries(tmp_path)) == 2


def test_a_changed_file_misses_the_cache(packs: Packs, tmp_path: Path) -> None:
    first = packs()
    write_lines(tmp_path / "rows.jsonl", [*TEXTS[:-1], {"text": "another"}])
    assert packs().dataset[:] != first.dataset[:]
    assert len(entries(tmp_path)) == 2


def test_a_changed_vocabulary_misses_the_cache(packs: Packs, tmp_path: Path, tokenizer: Any) -> None:
    packs()
    wider = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
        tokenizer.backend_tokenizer.to_str()))  # fmt: skip
    wider.add_tokens(["row"])
    packs(tokenizer=wider)
    assert len(entries(tmp_path)) == 2


def test_a_refused_build_leaves_nothing_in_the_cache(packs: Packs, tmp_path: Path) -> None:
    write_lines(tmp_path / "bad.jsonl", [{"text": "fine"}, {"title": "no text"}])
    sources = [Source(name="rows", path="rows.jsonl"), Source(name="bad", path="bad.jsonl")]
    with pytest.raises(Refusal, match="source 'bad': row 2: found columns title"):
        packs(sources=sources)
    assert entries(tmp_path) == set()


def test_a_build_killed_halfway_is_made_anew(packs: Packs, tmp_path: Path) -> None:
    first = packs().dataset[:]
    (name,) = entries(tmp_path)
    whole = tmp_path / "cache" / name
    half = Path(shutil.move(whole, whole.with_suffix(".half")))
    (half / "ledger.json").unlink()
    next(half.glob("*.arrow")).write_bytes(b"torn")
    (half / "data-00001-of-00002.arrow").write_bytes(b"torn")
    assert packs().dataset[:] == first
    assert not (whole / "data-00001-of-00002.arrow").exists()
    assert entries(tmp_path) == {name}


def test_overlong_rows_are_dropped_or_cut_and_counted(packs: Packs, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"text": "x " * 99}, {"text": "short"}])
    made = packs()
    assert (made.ledger["num_documents"], made.ledger["num_dropped_rows"]) == (1, 1)
    assert made.ledger["dropped"] == {"longer than max_tokens": 1}
    cut = packs(overlong_rows="truncate")
    assert (cut.ledger["num_documents"], cut.ledger["num_truncated_rows"]) == (2, 1)
    assert cut.ledger["num_dropped_rows"] == 0
    assert sorted(length for lengths in cut.dataset["seq_lengths"] for length in lengths)[-1] == 32
    assert sum(packs(packing_strategy="wrapped").dataset["seq_lengths"][0]) == 32


def test_a_row_with_nothing_left_to_train_is_dropped_and_counted() -> None:
    long = document([1, 2, 3, 4], [0, 0, 1, 1])
    assert fit_length(long, max_tokens=2, overlong_rows="truncate") == (
        None,
        "nothing trained left after truncation",
    )
    assert fit_length(document([1, 2], [1, 0]), max_tokens=2, overlong_rows="drop") == (
        None,
        "nothing trained",
    )


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_keep_fraction_is_exact_repeatable_and_a_sample(tmp_path: Path, fraction: float) -> None:
    rows = [{"text": f"row {number}"} for number in range(40)]
    write_lines(tmp_path / "rows.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        source = Source(name="rows", path=name, keep_fraction=fraction, seed=3)
        kept = list(load_rows(source, folder=tmp_path))
        assert len(kept) == 40 * fraction
        assert kept == list(load_rows(source, folder=tmp_path))
        assert all(row == rows[number - 1] for number, row in kept)
        assert len({number for number, _ in kept}) == len(kept)
        if fraction < 1:
            other = source.model_copy(update={"seed": 4})
            assert kept != list(load_rows(other, folder=tmp_path))


def test_every_form_of_a_source_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "ä", "completion": "b"}, {"prompt": "c\n", "completion": "d"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    text = write_lines(tmp_path / "rows.jsonl", rows).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    for path in ("rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.parquet", "./saved", "./splits"):
        found = list(load_rows(Source(name="s", path=path), folder=tmp_path))
        assert found == list(enumerate(rows, 1)), path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"text": "a"}\n\n{"text": \n', r"r\.jsonl: row 3: not JSON"),
        ("r.jsonl", b'{"text": "a"}\n[1]\n', r"r\.jsonl: row 2: found list, wanted an object"),
        ("r.jsonl", b'{"text": "\xff"}\n', r"r\.jsonl: not readable"),
        ("r.jsonl.gz", b"no gzip", r"r\.jsonl\.gz: not readable"),
        ("r.json", b'{"text": "a"}', r"r\.json: found dict, wanted a list"),
        ("r.json", b"[", r"r\.json: not JSON"),
        ("r.jsonl", b"", r"sources 'r': no rows left to train on \(empty sources\)"),
        ("r.jsonl", b'{"text": null}\n', r"source 'r': row 1: found columns text"),
        ("r.jsonl", b'{"text": ""}\n', r"no rows left to train on \(1 rows dropped: nothing trained\)"),
        ("r.parquet", b"no parquet", r"source 'r': r\.parquet: could not be loaded"),
        (None, b"", r"source 'r': .* does not exist"),
    ],
)
def test_bad_rows_are_refused_with_their_number(
    packs: Packs, tmp_path: Path, name: str | None, content: bytes, message: str
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=message) as caught:
        packs(sources=[Source(name="r", path=name or "none.jsonl")])
    assert "\n" not in str(caught.value)


def test_a_chat_without_an_assistant_turn_is_refused_with_its_row(packs: Packs, tmp_path: Path) -> None:
    say = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    write_lines(tmp_path / "chats.jsonl", [{"messages": say}] * 3 + [{"messages": say[:1]}])
    with pytest.raises(Refusal, match=r"source 'chats': row 4: no assistant turn to train on"):
        packs(sources=[Source(name="chats", path="chats.jsonl")], loss_on="assistant", max_tokens=512)


def test_sources_of_other_kinds_mix_and_the_seed_decides_the_order(packs: Packs) -> None:
    first, same, other = packs(), packs(), packs(seed=1)
    assert first.dataset[:] == same.dataset[:] != other.dataset[:]

    def tokens(made: Prepared) -> list[int]:
        return sorted(token for ids in made.dataset["input_ids"] for token in ids)

    assert tokens(first) == tokens(other)


def test_pairs_end_their_turn_and_overlong_ones_are_dropped_and_counted(
    tokenizer: Any, tmp_path: Path
) -> None:
    prompt = [{"role": "user", "content": "2+3?"}]
    rows = [
        {"prompt": prompt, "chosen": "5", "rejected": "6", "enable_thinking": False},
        {"prompt": prompt, "chosen": "<think>\n2+3=5\n</think>\n5", "rejected": "6"},
        {"prompt": prompt, "chosen": "5", "rejected": "6 " * 600, "enable_thinking": False},
    ]
    write_lines(tmp_path / "pairs.jsonl", rows)
    made = data.prepare_pairs(
        [Source(name="pairs", path="pairs.jsonl")],
        tokenizer,
        folder=tmp_path,
        cache_dir=tmp_path / "cache",
        max_tokens=600,
        template=tokenizer.chat_template,
        date_string=DATE,
        seed=0,
    )
    assert made.ledger["dropped"] == {"longer than max_tokens": 1}
    assert made.ledger["num_pairs"] == len(made.dataset) == 2
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    total = trained = 0
    for row in made.dataset:
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == end
        assert "2+3?" in tokenizer.decode(row["prompt_ids"])
        trained += len(row["chosen_ids"]) + len(row["rejected_ids"])
        total += 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert (made.ledger["num_tokens"], made.ledger["num_trained_tokens"]) == (total, trained)
    assert {mode: one["num_rows"] for mode, one in made.ledger["by_mode"].items()} == {
        "think": 1,
        "no_think": 1,
    }


def test_other_code_misses_the_cache(packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of what makes tokens is part of the address; another list of files stands for an edit."""
    packs()
    monkeypatch.setattr(data, "_TOKEN_CODE", ("chat.py", "packing.py"))
    packs()
    assert len(entries(tmp_path)) == 2
