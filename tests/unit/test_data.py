"""From rows to packs and pairs on disk: what is trained, what is counted, when the cache is right."""

import ast
import copy
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from smol_post import chat, data
from smol_post.config import ApoRecipe, LongContextRecipe, MidRecipe, SftRecipe, Source
from smol_post.data import IGNORED, PackReader, Prepared, Tokens
from smol_post.refusal import Refusal
from smol_post.sources import read_rows
from smol_post.vocabulary import Vocabulary

Row = dict[str, Any]
Prepare = Callable[..., Prepared]
END = "<|endoftext|>"
TEXTS: list[Row] = [{"text": f"row {number}"} for number in range(1, 9)]
STAGES = {"mid": MidRecipe, "sft": SftRecipe, "apo": ApoRecipe, "long_context": LongContextRecipe}
PACKINGS = ["bfd", "wrapped", "wrapped_cross_document"]
MIX = [
    Source(name="chats", generator="dual_mode_chats", num_rows=30, seed=1),
    Source(name="needles", generator="needles", num_rows=10, seed=1),
]


def write_lines(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_source(**changes: Any) -> list[Source]:
    return [Source(**{"name": "rows", "path": "rows.jsonl", **changes})]


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Path) -> Prepare:
    """Prepare rows.jsonl for mid-training; the keywords change one input."""
    write_lines(tmp_path / "rows.jsonl", TEXTS)

    def prepared(stage: str = "mid", **changes: Any) -> Prepared:
        where = {"folder": tmp_path, "cache_dir": tmp_path / "cache"}
        where |= {key: changes.pop(key) for key in ("folder", "num_workers") if key in changes}
        words = Vocabulary(
            changes.pop("tokenizer", tokenizer),
            changes.pop("template", tokenizer.chat_template),
            changes.pop("text_end", END),
            [],
        )
        given: Row = {"max_tokens": 32, "global_batch_size": 1, "sources": rows_source()}
        if stage == "mid" and "packing" not in changes:
            given["packing"] = "bfd"
        if "num_epochs" not in changes:
            given["num_steps"] = 1
        return data.prepare(STAGES[stage](stage=stage, **{**given, **changes}), words, **where)

    return prepared


def entries(tmp_path: Path) -> dict[str, set[str]]:
    """What lies in the cache, by kind."""
    return {
        kind: {path.name for path in (tmp_path / "cache" / kind).glob("*") if path.suffix != ".lock"}
        for kind in ("documents", "packs")
    }


def files(tmp_path: Path) -> dict[Path, int]:
    """Every file of the cache and when it was written."""
    whole = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.stat().st_mtime_ns for path in whole}


def as_lists(made: Prepared) -> list[Row]:
    keys = ("input_ids", "labels", "seq_lengths")
    return [{key: np.asarray(row[key]).tolist() for key in keys} for row in made.dataset]


def all_ids(made: Prepared) -> list[int]:
    return sorted(token for row in as_lists(made) for token in row["input_ids"])


@pytest.fixture
def stored(tmp_path: Path) -> Tokens:
    """The documents 5 6 7 with loss on 6 7, and 8 9 with loss on both."""
    np.array([~5, 6, 7, 8, 9], np.int32).tofile(tmp_path / "tokens.bin")
    return Tokens((str(tmp_path / "tokens.bin"),))


def test_two_documents_in_one_pack_by_eye(stored: Tokens) -> None:
    rows = PackReader(stored, isolate=True)({"address": [[0, 3]], "length": [[3, 2]]})
    assert [ids.tolist() for ids in rows["input_ids"]] == [[5, 6, 7, 8, 9]]
    assert [labels.tolist() for labels in rows["labels"]] == [[-100, 6, 7, -100, 9]]
    assert rows["seq_lengths"] == [[3, 2]]


def test_across_documents_only_the_first_token_of_a_pack_is_without_context(stored: Tokens) -> None:
    rows = PackReader(stored, isolate=False)({"address": [[3, 0], [1]], "length": [[2, 3], [2]]})
    assert [ids.tolist() for ids in rows["input_ids"]] == [[8, 9, 5, 6, 7], [6, 7]]
    assert [labels.tolist() for labels in rows["labels"]] == [[-100, 9, -100, 6, 7], [-100, 7]]
    assert rows["seq_lengths"] == [[5], [2]]


def test_rows_become_packs_by_eye(prepare: Prepare, tokenizer: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"text": "e"}, {"prompt": "ab", "completion": "cd"}])
    (row,) = as_lists(prepare(loss_on="completion"))
    a, b, c, d, e = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcde")
    end = tokenizer.convert_tokens_to_ids(END)
    assert row == {
        "input_ids": [a, b, c, d, end, e, end],
        "labels": [-100, -100, c, d, end, -100, end],
        "seq_lengths": [5, 2],
    }


def test_a_row_is_what_torch_needs(prepare: Prepare) -> None:
    made = prepare()
    for row in (made.dataset[0], next(iter(made.dataset)), {k: v[0] for k, v in made.dataset[:1].items()}):
        assert row.keys() == {"input_ids", "labels", "seq_lengths", "address"}
        for key in ("input_ids", "labels"):
            assert torch.as_tensor(row[key]).dtype == torch.int64
            assert torch.as_tensor(row[key]).tolist() == row[key].tolist()
        assert all(type(length) is int for length in row["seq_lengths"])


def test_a_set_is_sent_to_a_worker_as_paths(prepare: Prepare) -> None:
    made = prepare(sources=MIX, max_tokens=512)
    first = as_lists(made)  # the files are open now
    sent = pickle.dumps(made.dataset.format["format_kwargs"]["transform"])
    assert len(sent) < 1000 < sum(len(row["input_ids"]) for row in first)
    again = replace(made, dataset=pickle.loads(pickle.dumps(made.dataset)))
    assert as_lists(again) == first


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_the_ledger_counts_what_is_in_the_packs(prepare: Prepare, packing: str, loss_on: str) -> None:
    made = prepare(sources=MIX, max_tokens=512, packing=packing, loss_on=loss_on)
    rows, ledger = as_lists(made), made.ledger
    totals = {
        "num_trained_tokens": sum(label != data.IGNORED for row in rows for label in row["labels"]),
        "num_tokens": sum(len(row["input_ids"]) for row in rows),
        "num_documents": 40,
    }
    assert {key: ledger[key] for key in totals} == totals
    assert ledger["num_packs"] == len(rows)
    assert ledger["utilisation"] == pytest.approx(totals["num_tokens"] / (512 * len(rows)), abs=1e-4)
    for kind in ("by_source", "by_mode"):
        for key, total in totals.items():
            assert sum(one[key] for one in ledger[kind].values()) == total
    assert {name: one["num_rows"] for name, one in ledger["by_source"].items()} == {
        "chats": 30,
        "needles": 10,
    }
    assert ledger["by_mode"].keys() == {"think", "no_think", "text"}
    for row in rows:
        ids, labels, lengths = row.values()
        assert sum(lengths) == len(ids) == len(labels) <= 512
        assert all(label in (data.IGNORED, token) for token, label in zip(ids, labels, strict=True))
        assert all(labels[start] == data.IGNORED for start in np.cumsum([0, *lengths[:-1]]))
        assert packing != "wrapped_cross_document" or len(lengths) == 1


def test_a_source_is_counted_in_a_mixture_as_it_is_alone(prepare: Prepare) -> None:
    both = prepare(sources=MIX, max_tokens=512).ledger
    for source in MIX:
        alone = prepare(sources=[source], max_tokens=512).ledger
        for key in ("num_rows", "num_documents", "num_tokens", "num_trained_tokens"):
            assert both["by_source"][source.name][key] == alone[key] > 0
    needles = both["by_source"]["needles"]["num_tokens"]
    assert both["by_mode"]["text"]["num_tokens"] == needles


def test_no_token_is_lost_or_doubled_by_any_packing(prepare: Prepare) -> None:
    found = [all_ids(prepare(packing=packing)) for packing in PACKINGS]
    assert found[0] == found[1] == found[2]
    assert all_ids(prepare(sources=rows_source(repeat=3))) == sorted(found[0] * 3)


def test_sources_are_read_at_their_own_addresses(prepare: Prepare, tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": f"other {number}"} for number in range(5)])
    write_lines(tmp_path / "c.jsonl", [{"text": "third"}, {"text": 5}])
    a, b, c = (Source(name=name, path=f"{name}.jsonl") for name in ("rows", "b", "c"))
    alone = [all_ids(prepare(sources=[one], on_bad_rows="skip")) for one in (a, b, c)]
    for sources in ([c, a, b], [a, c, b], [a, b, c]):
        made = prepare(sources=sources, on_bad_rows="skip")
        assert all_ids(made) == sorted(ids for each in alone for ids in each)
        assert made.ledger["by_source"]["c"]["num_skipped_rows"] == made.ledger["num_skipped_rows"] == 1


def test_one_file_under_two_names_is_tokenised_once_and_counted_twice(
    prepare: Prepare, tmp_path: Path
) -> None:
    sources = [*rows_source(), *rows_source(name="again", repeat=2)]
    made = prepare(sources=sources)
    assert all_ids(made) == sorted(all_ids(prepare()) * 3)
    assert {name: one["num_documents"] for name, one in made.ledger["by_source"].items()} == {
        "rows": 8,
        "again": 16,
    }
    assert len(entries(tmp_path)["documents"]) == 1


def test_the_seed_decides_the_order_and_nothing_else(prepare: Prepare) -> None:
    first, same, other = prepare(), prepare(), prepare(seed=1)
    assert as_lists(first) == as_lists(same) != as_lists(other)
    assert all_ids(first) == all_ids(other)


def test_the_first_packs_are_a_sample_of_the_set(prepare: Prepare, tmp_path: Path) -> None:
    """Best-fit decreasing makes the packs of the longest documents first; the seed says which come first."""
    write_lines(tmp_path / "rows.jsonl", [{"text": "x" * (9 + number // 20)} for number in range(100)])
    first, other = (
        [row["seq_lengths"] for row in as_lists(prepare(max_tokens=17, seed=seed))] for seed in (0, 1)
    )
    assert sorted(first) == sorted(other)
    assert len({str(packs) for packs in (first, other, sorted(first, reverse=True))}) == 3


def test_tokens_of_modes_are_mixed_in_the_ratio_asked_for(prepare: Prepare) -> None:
    found = prepare(sources=MIX[:1], max_tokens=512).ledger["by_mode"]
    mixed = prepare(sources=MIX[:1], max_tokens=512, think_to_no_think=0.5).ledger["by_mode"]
    assert found["think"]["num_tokens"] > found["no_think"]["num_tokens"]
    ratio = mixed["think"]["num_tokens"] / mixed["no_think"]["num_tokens"]
    assert 0.4 < ratio <= 0.5
    assert mixed["no_think"] == found["no_think"]


def test_tokens_of_sources_are_mixed_in_the_shares_asked_for(prepare: Prepare) -> None:
    shares = {"chats": 0.4, "needles": 0.6}
    many = [source.model_copy(update={"repeat": 8}) for source in MIX]
    sources = [source.model_copy(update={"token_share": shares[source.name]}) for source in many]
    plain, mixed = (prepare(sources=one, max_tokens=512).ledger for one in (many, sources))
    for name, share in shares.items():
        before, after = (one["by_source"][name]["num_tokens"] / one["num_tokens"] for one in (plain, mixed))
        assert after == pytest.approx(share, abs=0.05)
        assert before != pytest.approx(share, abs=0.2)


def test_overlong_rows_are_dropped_cut_or_split_and_counted(prepare: Prepare, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"text": "x" * 99}, {"text": "short"}])
    whole = all_ids(prepare(max_tokens=128))
    dropped, cut, parts = (prepare(overlong_rows=how) for how in ("drop", "truncate", "split"))
    assert (dropped.ledger["num_documents"], dropped.ledger["num_dropped_rows"]) == (1, 1)
    assert dropped.ledger["dropped"] == {"longer than max_tokens": 1}
    assert dropped.ledger["by_source"]["rows"]["num_dropped_rows"] == 1
    assert (cut.ledger["num_documents"], cut.ledger["num_truncated_rows"], cut.ledger["num_turns_cut"]) == (
        2,
        1,
        1,
    )
    assert cut.ledger["num_dropped_rows"] == 0
    assert len(all_ids(cut)) == len(all_ids(dropped)) + 32
    assert parts.ledger["num_split_rows"] == 1
    assert all_ids(parts) == all_ids(prepare(packing="wrapped")) == whole


def test_an_answer_that_is_cut_is_counted_and_one_cut_before_is_not(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "x" * 99}, {"prompt": "a" * 99, "completion": "x"}]
    write_lines(tmp_path / "rows.jsonl", rows)
    ledger = prepare(overlong_rows="truncate", loss_on="completion").ledger
    assert (ledger["num_truncated_rows"], ledger["num_turns_cut"]) == (2, 1)
    assert ledger["dropped"] == {"nothing trained": 1}


def test_packs_with_nothing_trained_are_left_out_and_counted(prepare: Prepare, tmp_path: Path) -> None:
    """A step on such packs alone would have no loss to take."""
    rows = [{"prompt": "a " * 99, "completion": "b"}, {"prompt": "c", "completion": "d"}]
    write_lines(tmp_path / "rows.jsonl", rows)
    made = prepare(packing="wrapped", loss_on="completion", max_tokens=16)
    assert all((np.array(labels) != data.IGNORED).any() for labels in made.dataset[:]["labels"])
    assert made.ledger["num_tokens"] < 200
    assert made.ledger["dropped"] == {"in packs with nothing trained": 1}


def test_shares_hold_for_what_is_left_after_long_rows_are_dropped(prepare: Prepare, tmp_path: Path) -> None:
    write_lines(tmp_path / "long.jsonl", [{"text": "x " * 99}] * 20 + [{"text": "short one"}] * 20)
    sources = [Source(name="long", path="long.jsonl", token_share=0.5), *rows_source(token_share=0.5)]
    ledger = prepare(sources=sources).ledger
    shares = [one["num_tokens"] for one in ledger["by_source"].values()]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)
    assert ledger["dropped"].keys() == {
        "longer than max_tokens",
        "left out by token_share or think_to_no_think",
    }


def test_the_same_inputs_hit_the_cache(prepare: Prepare, tmp_path: Path) -> None:
    first = prepare()
    before = files(tmp_path)
    again = prepare()
    assert files(tmp_path) == before
    assert as_lists(again) == as_lists(first)
    assert (again.ledger, again.path) == (first.ledger, first.path)


def with_added_token(tokenizer: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["row"])
    return other


def with_another_end(tokenizer: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|im_end|>"
    return other


GENERATED = {"name": "rows", "path": None, "generator": "needles", "num_rows": 4}
# Each input that decides what is trained, and whether rows must be tokenised again for it.
CHANGES: dict[str, tuple[Row, Row, bool]] = {
    "seed": ({}, {"seed": 1}, False),
    "max_tokens": ({}, {"max_tokens": 33}, False),
    "packing": ({}, {"packing": "wrapped"}, False),
    "wrapped packing": ({"packing": "wrapped"}, {"packing": "wrapped_cross_document"}, False),
    "overlong_rows": ({}, {"overlong_rows": "truncate"}, False),
    "think_to_no_think": (
        {"sources": MIX[:1], "max_tokens": 512},
        {"sources": MIX[:1], "max_tokens": 512, "think_to_no_think": 1.0},
        False,
    ),
    "source name": ({}, {"sources": rows_source(name="other")}, False),
    "repeat": ({}, {"sources": rows_source(repeat=2)}, False),
    "token_share": ({}, {"sources": rows_source(token_share=1.0)}, False),
    "loss_on": ({}, {"loss_on": "completion"}, True),
    "source loss_on": ({}, {"sources": rows_source(loss_on="completion")}, True),
    "date_string": ({}, {"date_string": "02 July 2025"}, True),
    "template": ({}, {"template": chat.load_template("chatml")}, True),
    "text_end": ({}, {"text_end": "<think>"}, True),
    "tokenizer": ({}, {"tokenizer": with_added_token}, True),
    "special token": ({}, {"tokenizer": with_another_end}, True),
    "columns": ({}, {"sources": rows_source(columns={"text": "text"})}, True),
    "mode": ({}, {"sources": rows_source(mode="think")}, True),
    "keep_fraction": ({}, {"sources": rows_source(keep_fraction=0.5)}, True),
    "source seed": (
        {"sources": rows_source(keep_fraction=0.5)},
        {"sources": rows_source(keep_fraction=0.5, seed=1)},
        True,
    ),
    "on_bad_rows": ({}, {"on_bad_rows": "skip"}, True),
    "max_row_characters": ({}, {"max_row_characters": 99}, True),
    "file format": ({}, {"sources": rows_source(path="rows.json")}, True),
    "split": (
        {"sources": rows_source(path="./splits")},
        {"sources": rows_source(path="./splits", split="test")},
        True,
    ),
    "generator": (
        {"sources": rows_source(**GENERATED)},
        {"sources": rows_source(**GENERATED | {"generator": "arithmetic_text"})},
        True,
    ),
    "num_rows": (
        {"sources": rows_source(**GENERATED)},
        {"sources": rows_source(**GENERATED | {"num_rows": 5})},
        True,
    ),
    "options": (
        {"sources": rows_source(**GENERATED)},
        {"sources": rows_source(**GENERATED, options={"num_tokens": 40})},
        True,
    ),
}


@pytest.mark.parametrize(("before", "after", "retokenised"), CHANGES.values(), ids=CHANGES)
def test_any_changed_input_misses_the_cache(
    prepare: Prepare, tmp_path: Path, tokenizer: Any, before: Row, after: Row, retokenised: bool
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(TEXTS))
    table = datasets.Dataset.from_list(TEXTS)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    if "tokenizer" in after:
        after = {**after, "tokenizer": after["tokenizer"](tokenizer)}
    roomy = {"max_tokens": 256} if "generator" in str(before) else {}
    first = prepare(**{**roomy, **before})
    other = prepare(**{**roomy, **after})
    assert first.ledger["fingerprint"] != other.ledger["fingerprint"]
    found = {kind: len(names) for kind, names in entries(tmp_path).items()}
    assert found == {"documents": 1 + retokenised, "packs": 2}


def test_a_changed_file_misses_the_cache(prepare: Prepare, tmp_path: Path) -> None:
    first = prepare()
    write_lines(tmp_path / "rows.jsonl", [*TEXTS[:-1], {"text": "another"}])
    assert as_lists(prepare()) != as_lists(first)
    assert {kind: len(names) for kind, names in entries(tmp_path).items()} == {"documents": 2, "packs": 2}


def imported_by(name: str, known: set[str]) -> set[str]:
    """The modules of the package that a module imports, and those that these do, but for `known` ones."""
    tree = ast.parse((Path(data.__file__).parent / f"{name}.py").read_text())
    found = {name}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smol_post"):
            inner = node.module.removeprefix("smol_post").strip(".")
            for one in {inner} if inner else {alias.name for alias in node.names}:
                found |= imported_by(one, known) if one not in known | {name} else set()
    return found


def test_the_address_covers_all_code_that_makes_tokens_and_packs() -> None:
    """What is read, checked and written down around them decides neither."""
    around = {"config", "strict", "disk", "hub", "launch", "manifest", "refusal"}
    tokens = imported_by("documents", around)
    assert {f"{name}.py" for name in tokens} == set(data._TOKEN_CODE)
    packs = imported_by("data", around | tokens | {"vocabulary"})
    assert {f"{name}.py" for name in packs} == set(data._PACK_CODE)


@pytest.mark.parametrize(("name", "documents"), [("_TOKEN_CODE", 2), ("_PACK_CODE", 1)])
def test_other_code_misses_the_cache(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, documents: int
) -> None:
    """The source of what makes tokens, and packs, is part of the address; another list stands for an edit."""
    prepare()
    monkeypatch.setattr(data, name, ("config.py",))
    prepare()
    found = {kind: len(names) for kind, names in entries(tmp_path).items()}
    assert found == {"documents": documents, "packs": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"global_batch_size": 2},
        {"global_batch_size": 2, "micro_batch_size": 2},
        {"num_steps": 7},
        {"num_epochs": 2.0},
        {"trainer": {"learning_rate": 1e-3}},
        {"attention": "sdpa"},
        {"num_threads": 1},
        {"num_workers": 2},
        {"chat_template": "another.jinja", "add_tokens": ["<a>"]},  # the vocabulary says what they make
        {"sources": rows_source(path="copy.jsonl")},
        {"sources": rows_source(path="sub/../rows.jsonl")},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_decides_nothing_of_the_data_hits_the_cache(
    prepare: Prepare, tmp_path: Path, changes: Row
) -> None:
    write_lines(tmp_path / "copy.jsonl", TEXTS)
    path = prepare().path
    before = files(tmp_path)
    assert prepare(**changes).path == path
    assert files(tmp_path) == before


def test_a_name_that_decides_how_a_file_is_read_is_no_other_name_for_it(
    prepare: Prepare, tmp_path: Path
) -> None:
    for name in ("list.json", "list.jsonl"):
        (tmp_path / name).write_text('[{"text": "a"}]')
    prepare(sources=rows_source(path="list.json"))
    with pytest.raises(Refusal, match=r"list\.jsonl: row 1: found list, wanted an object"):
        prepare(sources=rows_source(path="list.jsonl"))


def test_a_recipe_that_moved_hits_the_cache(prepare: Prepare, tmp_path: Path) -> None:
    path = prepare().path
    before = files(tmp_path)
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "rows.jsonl", tmp_path / "moved" / "rows.jsonl")
    assert prepare(folder=tmp_path / "moved").path == path
    assert {one: when for one, when in files(tmp_path).items() if one in before} == before


def test_another_length_does_not_tokenise_again(prepare: Prepare, tmp_path: Path) -> None:
    prepare()
    documents = {one: when for one, when in files(tmp_path).items() if "documents" in one.parts}
    prepare(max_tokens=64)
    again = {one: when for one, when in files(tmp_path).items() if "documents" in one.parts}
    assert again == documents
    assert len(entries(tmp_path)["packs"]) == 2


def test_a_refused_build_leaves_nothing_in_the_cache(prepare: Prepare, tmp_path: Path) -> None:
    write_lines(tmp_path / "bad.jsonl", [{"text": "fine"}, {"title": "no text"}])
    with pytest.raises(Refusal, match=r"source 'bad': bad\.jsonl: row 2: found columns title"):
        prepare(sources=[Source(name="bad", path="bad.jsonl")])
    assert entries(tmp_path) == {"documents": set(), "packs": set()}
    with pytest.raises(Refusal, match="no rows left to train on"):
        prepare(max_tokens=2)
    assert {kind: len(names) for kind, names in entries(tmp_path).items()} == {"documents": 1, "packs": 0}


def test_a_build_killed_halfway_is_made_anew(prepare: Prepare, tmp_path: Path) -> None:
    made = prepare()
    first = as_lists(made)
    for whole in (made.path, made.stores[0].folder):
        half = Path(shutil.move(whole, whole.with_suffix(".half")))
        (half / "ledger.json").unlink()
        (half / "torn").write_bytes(b"torn")
    assert as_lists(prepare()) == first
    assert not list((tmp_path / "cache").rglob("torn"))
    assert entries(tmp_path) == {"documents": {made.stores[0].folder.name}, "packs": {made.path.name}}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_set_is_cut_to_whole_batches(prepare: Prepare, batch: int) -> None:
    every = as_lists(prepare(max_tokens=8))
    made = prepare(max_tokens=8, global_batch_size=batch)
    ledger = made.ledger
    assert ledger["num_packs"] == len(every) > 3
    assert ledger["updates_per_epoch"] * batch + ledger["num_unused"] == len(every)
    assert ledger["num_unused"] < batch
    assert as_lists(made) == every[: ledger["updates_per_epoch"] * batch]


def test_a_set_of_less_than_one_batch_is_refused(prepare: Prepare) -> None:
    number = prepare().ledger["num_packs"]
    assert len(prepare(global_batch_size=number).dataset) == number
    message = f"global_batch_size: found {number + 1}, wanted at most {number}, the number of packs; lower it"
    with pytest.raises(Refusal, match=message):
        prepare(global_batch_size=number + 1)


@pytest.mark.parametrize(
    ("lines", "changes", "why"),
    [
        (b'{"text": ""}\n', {}, "1 rows dropped: nothing trained"),
        (b'{"text": "long long long"}\n', {"max_tokens": 2}, "1 rows dropped: longer than max_tokens"),
    ],
)
def test_rows_that_leave_nothing_to_train_on_are_refused_with_the_reason(
    prepare: Prepare, tmp_path: Path, lines: bytes, changes: Row, why: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines)
    with pytest.raises(Refusal) as caught:
        prepare(**changes)
    assert (
        str(caught.value) == f"sources 'rows': no rows left to train on ({why}); check sources and max_tokens"
    )


CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        (b"", {}, "source 'none': none.jsonl: no rows to train on (it is empty); mend or remove it"),
        (b'{"text": 5}\n', {"on_bad_rows": "skip"}, "(1 skipped: text: found int, wanted text); mend or"),
        (CHAT, {"think_to_no_think": 1.0}, "think_to_no_think: mode no_think has no tokens that fit"),
        (CHAT, {"max_tokens": 16, "shares": [0.5, 0.5]}, "token_share: source 'none' has no tokens that fit"),
    ],
)
def test_a_source_or_mode_of_nothing_beside_others_is_refused(
    prepare: Prepare, tmp_path: Path, lines: bytes, changes: Row, message: str
) -> None:
    (tmp_path / "none.jsonl").write_bytes(lines)
    shares = changes.get("shares", [None, None])
    none = Source(name="none", path="none.jsonl", mode="think", token_share=shares[0])
    given = {"max_tokens": 512, **{key: value for key, value in changes.items() if key != "shares"}}
    with pytest.raises(Refusal) as caught:
        prepare(sources=[none, *rows_source(token_share=shares[1])], **given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"text": "a"}\n\n{"text": \n', r"source 'r': r\.jsonl: row 3: not JSON"),
        ("r.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"row 2: columns: found body, wanted 'text'"),
        ("r.json", b'[{"text": "a"}, 5]', r"source 'r': r\.json: row 2: found int, wanted an object"),
        ("r.jsonl.gz", b"no gzip", r"r\.jsonl\.gz: not readable"),
        ("r.parquet", b"no parquet", r"source 'r': r\.parquet: could not be loaded"),
        (None, b"", r"source 'r': .*none\.jsonl does not exist; paths count from the recipe's folder"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_in_one_line(
    prepare: Prepare, tmp_path: Path, name: str | None, content: bytes, message: str
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=message) as caught:
        prepare(sources=[Source(name="r", path=name or "none.jsonl", columns={"text": "text"})])
    assert "\n" not in str(caught.value)


def test_skipped_rows_are_counted_with_their_reason_and_the_first_of_them(
    prepare: Prepare, tmp_path: Path
) -> None:
    write_lines(tmp_path / "rows.jsonl", [*TEXTS, {"text": 5}, {"text": 6}, {"title": "x"}])
    made = prepare(on_bad_rows="skip")
    assert made.ledger["skipped"] == {
        "rows: text: found int, wanted text": {
            "num_rows": 2,
            "example": "row 9: text: found int, wanted text",
        },
        "rows: found columns title, wanted text, prompt + completion, or messages": {
            "num_rows": 1,
            "example": "row 11: found columns title, wanted text, prompt + completion, or messages",
        },
    }
    counts = {"num_rows": 11, "num_skipped_rows": 3, "num_documents": 8}
    assert {key: made.ledger["by_source"]["rows"][key] for key in counts} == counts
    assert {key: made.ledger[key] for key in counts} == counts
    write_lines(tmp_path / "good.jsonl", TEXTS)
    assert as_lists(made) == as_lists(prepare(sources=rows_source(path="good.jsonl")))


@pytest.mark.parametrize("stage", ["mid", "sft", "long_context"])
def test_every_stage_trains_what_it_says(prepare: Prepare, tokenizer: Any, stage: str) -> None:
    """Mid-training and long context train all tokens but the first of a document, SFT the assistant's."""
    extra = {"rope_theta": 1e6} if stage == "long_context" else {}
    made = prepare(stage, sources=MIX[:1], max_tokens=4096, **extra)
    chats = [raw.content for raw in read_rows(MIX[0], folder=Path())]
    masks = {}
    for row in chats:
        one = chat.encode_chat(row, tokenizer, date_string="01 July 2025")
        masks[tuple(one.input_ids)] = (
            one.train_mask if stage == "sft" else [0] + [1] * (len(one.input_ids) - 1)
        )
    found = {}
    for row in as_lists(made):
        ends = np.cumsum(row["seq_lengths"]).tolist()
        for start, stop in zip([0, *ends], ends, strict=False):
            mask = [int(label != data.IGNORED) for label in row["labels"][start:stop]]
            found[tuple(row["input_ids"][start:stop])] = mask
    if stage == "sft":
        assert found == masks
    whole = found.keys() & masks.keys()  # those that no pack cuts
    assert len(whole) > 20
    assert {one: found[one] for one in whole} == {one: masks[one] for one in whole}


def pairs_file(tmp_path: Path) -> list[Row]:
    prompt = [{"role": "user", "content": "2+3?"}]
    rows = [
        {"prompt": prompt, "chosen": "5", "rejected": "6 or 7", "enable_thinking": False},
        {"prompt": prompt, "chosen": "<think>\n2+3=5\n</think>\n5", "rejected": "6", "enable_thinking": True},
        {"prompt": prompt, "chosen": "5", "rejected": "6 " * 600, "enable_thinking": False},
        {"prompt": prompt, "chosen": "5 " * 600, "rejected": "6", "enable_thinking": True},
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    return rows


def test_pairs_are_what_the_chat_module_encodes_and_overlong_ones_are_dropped_and_counted(
    prepare: Prepare, tokenizer: Any, tmp_path: Path
) -> None:
    rows = pairs_file(tmp_path)
    made = prepare("apo", max_tokens=600)
    wanted = [chat.encode_pair(row, tokenizer, date_string="01 July 2025") for row in rows[:2]]
    found = {tuple(row["input_ids"]): row for row in made.dataset}
    for one in wanted:
        sides = [one.prompt_ids + answer for answer in (one.chosen_ids, one.rejected_ids)]
        row = found.pop((*sides[0], *sides[1]))
        untrained = [IGNORED] * len(one.prompt_ids)
        assert list(row["labels"]) == [*untrained, *one.chosen_ids, *untrained, *one.rejected_ids]
        assert row["seq_lengths"] == [len(side) for side in sides]
    assert not found
    assert made.ledger["dropped"] == {"longer than max_tokens": 2}
    assert made.ledger["num_pairs"] == made.ledger["num_documents"] == 2
    assert made.ledger["by_source"]["rows"]["num_rows"] == 4
    answers = {one.mode: len(one.chosen_ids) + len(one.rejected_ids) for one in wanted}
    tokens = {one.mode: answers[one.mode] + 2 * len(one.prompt_ids) for one in wanted}
    for key, sums in (("num_trained_tokens", answers), ("num_tokens", tokens)):
        assert made.ledger[key] == sum(sums.values())
        assert {mode: one[key] for mode, one in made.ledger["by_mode"].items()} == sums
    longest = max(len(one.prompt_ids) + max(len(one.chosen_ids), len(one.rejected_ids)) for one in wanted)
    assert prepare("apo", max_tokens=longest).ledger["num_pairs"] == 2
    assert prepare("apo", max_tokens=longest - 1).ledger["num_pairs"] == 1


def test_pairs_repeat_mix_and_fill_whole_batches_as_packs_do(prepare: Prepare, tmp_path: Path) -> None:
    pairs_file(tmp_path)
    repeated = prepare("apo", max_tokens=600, sources=rows_source(repeat=3), global_batch_size=4)
    assert (len(repeated.dataset), repeated.ledger["num_unused"], repeated.ledger["num_pairs"]) == (4, 2, 6)
    assert len({str(row) for row in repeated.dataset}) == 2
    with pytest.raises(Refusal, match="found 9, wanted at most 6, the number of pairs"):
        prepare("apo", max_tokens=600, sources=rows_source(repeat=3), global_batch_size=9)


def test_other_columns_of_a_pack_are_passed_on(tmp_path: Path) -> None:
    np.array([~1, ~2, 3, ~1, ~2, 4, 5], np.int32).tofile(tmp_path / "tokens.bin")
    reader = PackReader(Tokens((str(tmp_path / "tokens.bin"),)))
    row = {"address": [[0, 3]], "length": [[3, 4]], "reference": [[-0.5, -1.5]]}
    found = {key: [list(one) for one in values] for key, values in reader(row).items()}
    assert found == {
        "address": [[0, 3]],
        "reference": [[-0.5, -1.5]],
        "input_ids": [[1, 2, 3, 1, 2, 4, 5]],
        "labels": [[IGNORED, IGNORED, 3, IGNORED, IGNORED, 4, 5]],
        "seq_lengths": [[3, 4]],
    }


def test_a_column_is_added_to_all_packs_and_read_with_those_that_are_trained(
    prepare: Prepare, tmp_path: Path
) -> None:
    pairs_file(tmp_path)
    made = prepare("apo", max_tokens=600, sources=rows_source(repeat=3), global_batch_size=4)
    values = np.arange(12.0).reshape(6, 2)
    widened = made.with_column("reference", values)
    assert [row["reference"] for row in widened.dataset] == values[:4].tolist()
    for old, new in zip(made.dataset, widened.dataset, strict=True):
        assert list(old["input_ids"]) == list(new["input_ids"])
    with pytest.raises(ValueError, match=r"length|rows"):
        made.with_column("reference", values[:4])
