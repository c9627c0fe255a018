"""Mixtures reach what the recipe asks for, and what is counted of the pieces is what the reader returns."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smol_post import data
from smol_post.config import MidRecipe, Source
from smol_post.documents import MODES, RECORD, Store
from smol_post.mixture import Pool, by_ratio, by_shares, fitted, repeated, trained_tokens

quickly = settings(deadline=None, max_examples=100, derandomize=True)


class Document(NamedTuple):
    """Which tokens of a document carry loss, its mode and the number of its source."""

    mask: list[bool]
    mode: int = 0
    source: int = 0


def pool_of(documents: list[Document]) -> Pool:
    """Documents laid end to end."""
    lengths = np.array([len(one.mask) for one in documents], np.int64)
    return Pool(
        address=np.cumsum(lengths) - lengths,
        length=lengths,
        num_trained=np.array([sum(one.mask[1:]) for one in documents], np.int64),
        trains_first=np.array([one.mask[0] for one in documents], bool),
        mode=np.array([one.mode for one in documents], np.uint8),
        source=np.array([one.source for one in documents], np.int64),
    )


def whole(lengths: list[int], *, modes: list[int] | None = None, sources: list[int] | None = None) -> Pool:
    """A pool of documents that are trained whole."""
    count = len(lengths)
    each = zip(lengths, modes or [0] * count, sources or [0] * count, strict=True)
    return pool_of([Document([True] * length, mode, source) for length, mode, source in each])


def tokens_of(pool: Pool, kind: np.ndarray, number: int) -> int:
    return int(pool.length[kind == number].sum())


def mask_of(documents: list[Document]) -> Any:
    mask = np.array([token for one in documents for token in one.mask], bool)
    return lambda address, length: mask[address : address + length]


masks = st.one_of(
    st.lists(st.booleans(), min_size=1, max_size=30),
    st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda n: [False] * n[0] + [True] * n[1]),
    st.tuples(st.integers(1, 20), st.integers(1, 20)).map(lambda n: [True] * n[0] + [False] * n[1]),
    st.integers(1, 40).map(lambda number: [True] * number),
    st.integers(1, 40).map(lambda number: [False] * number),
)
some_documents = st.lists(
    st.builds(Document, masks, st.integers(0, len(MODES) - 1), st.integers(0, 2)), min_size=1, max_size=12
)


def test_repeat_multiplies_the_documents_of_its_source() -> None:
    pool = repeated(whole([5, 6, 7], sources=[0, 1, 0]), [1, 3])
    assert pool.length.tolist() == [5, 6, 6, 6, 7]
    assert pool.address.tolist() == [0, 5, 5, 5, 11]
    assert pool.source.tolist() == [0, 1, 1, 1, 0]


sources_of_lengths = st.lists(
    st.lists(st.integers(1, 50), min_size=1, max_size=20), min_size=2, max_size=4
).flatmap(
    lambda lengths: st.tuples(
        st.just(lengths), st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths))
    )
)


@quickly
@given(sources_of_lengths, st.integers(0, 3))
def test_shares_are_reached_as_far_as_whole_documents_allow(
    given: tuple[list[list[int]], list[int]], seed: int
) -> None:
    """The source that is the scarcest for its share is used whole; the others to within one document."""
    lengths, weights = given
    shares = [weight / sum(weights) for weight in weights]
    pool = whole(
        [length for one in lengths for length in one],
        sources=[number for number, one in enumerate(lengths) for _ in one],
    )
    mixed = pool.take(by_shares(pool, shares, seed=seed))
    total = min(sum(one) / share for one, share in zip(lengths, shares, strict=True))
    for number, (one, share) in enumerate(zip(lengths, shares, strict=True)):
        found = tokens_of(mixed, mixed.source, number)
        assert found <= share * total + 1e-3
        assert found == sum(one) or found > share * total - max(one) - 1e-3
    assert any(tokens_of(mixed, mixed.source, number) == sum(one) for number, one in enumerate(lengths))
    assert set(mixed.address) <= set(pool.address)
    assert mixed.address.tolist() == sorted(set(mixed.address.tolist()))


def test_shares_by_eye() -> None:
    pool = whole([20, 40, *[10] * 30], sources=[0, 0, *[1] * 30])
    mixed = pool.take(by_shares(pool, [0.5, 0.5], seed=0))
    assert [tokens_of(mixed, mixed.source, number) for number in (0, 1)] == [60, 60]
    third = pool.take(by_shares(pool, [0.25, 0.75], seed=0))
    assert [tokens_of(third, third.source, number) for number in (0, 1)] == [60, 180]


@pytest.mark.parametrize("cut", ["shares", "ratio"])
def test_the_seed_decides_which_documents_a_mixture_leaves_out(cut: str) -> None:
    pool = whole([10] * 40, sources=[0] * 10 + [1] * 30, modes=[2] * 10 + [1] * 30)

    def kept(seed: int) -> list[int]:
        keep = by_ratio(pool, 1, seed=seed) if cut == "ratio" else by_shares(pool, [0.5, 0.5], seed=seed)
        mixed = pool.take(keep)
        return mixed.address.tolist()

    assert kept(0) == kept(0)
    assert len({str(kept(seed)) for seed in range(5)}) == 5
    assert all(len(kept(seed)) == 20 for seed in range(5))


def test_a_repeated_document_counts_as_often_in_its_share() -> None:
    pool = repeated(whole([10, *[10] * 9], sources=[0, *[1] * 9]), [3, 1])
    mixed = pool.take(by_shares(pool, [0.5, 0.5], seed=0))
    assert [tokens_of(mixed, mixed.source, number) for number in (0, 1)] == [30, 30]


@quickly
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.5]),
)
def test_the_ratio_of_modes_is_reached_by_leaving_out_of_one_of_them(
    think: list[int], no_think: list[int], ratio: float
) -> None:
    pool = whole([*think, *no_think, 30, 40], modes=[1] * len(think) + [2] * len(no_think) + [0, 0])
    mixed = pool.take(by_ratio(pool, ratio, seed=0))
    found = {mode: tokens_of(mixed, mixed.mode, number) for number, mode in enumerate(MODES)}
    assert found["text"] == 70
    have_think, have_no_think = sum(think), sum(no_think)
    if have_think > ratio * have_no_think:
        wanted = ratio * have_no_think
        assert found["no_think"] == have_no_think
        assert wanted - max(think) < found["think"] <= wanted + 1e-3
    else:
        wanted = have_think / ratio
        assert found["think"] == have_think
        assert min(have_no_think, wanted - max(no_think)) <= found["no_think"] <= wanted + 1e-3


def test_the_ratio_of_modes_by_eye() -> None:
    pool = whole([10] * 40, modes=[1] * 30 + [2] * 10)
    for ratio, think, no_think in ((2, 200, 100), (3, 300, 100), (6, 300, 50)):
        mixed = pool.take(by_ratio(pool, ratio, seed=0))
        assert [tokens_of(mixed, mixed.mode, mode) for mode in (1, 2)] == [think, no_think]


LONG = Document([False, True, True, False, True, True])


@pytest.mark.parametrize(
    ("document", "max_tokens", "turn_cut"),
    [(LONG, 2, True), (LONG, 3, False), (LONG, 4, False), (LONG, 5, True), (LONG, 6, None)],
)
def test_a_turn_is_cut_where_the_tokens_on_both_sides_of_the_cut_carry_loss(
    document: Document, max_tokens: int, turn_cut: bool | None
) -> None:
    """A document that fits (None) is not cut at all."""
    pool, lost = fitted(
        pool_of([document]), max_tokens=max_tokens, overlong_rows="truncate", mask_of=mask_of([document])
    )
    assert pool.length.tolist() == [max_tokens]
    assert len(lost["truncated"]) == (turn_cut is not None)
    assert len(lost["turn cut"]) == bool(turn_cut)


def test_overlong_documents_by_eye() -> None:
    documents = [Document([True] * 5), Document([False, False, True, True, False]), Document([True, True])]
    pool, how = pool_of(documents), {"max_tokens": 2, "mask_of": mask_of(documents)}
    dropped, lost = fitted(pool, overlong_rows="drop", **how)
    assert (dropped.address.tolist(), lost["longer than max_tokens"].address.tolist()) == ([10], [0, 5])
    cut, lost = fitted(pool, overlong_rows="truncate", **how)
    assert list(zip(cut.address, cut.length, cut.num_trained, strict=True)) == [(0, 2, 1), (10, 2, 1)]
    assert [len(lost[kind]) for kind in ("truncated", "turn cut", "nothing trained")] == [2, 1, 1]
    parts, lost = fitted(pool, overlong_rows="split", **how)
    assert list(zip(parts.address, parts.length, parts.num_trained, strict=True)) == [
        (0, 2, 1),
        (2, 2, 1),
        (7, 2, 1),
        (10, 2, 1),
    ]
    assert [len(lost[kind]) for kind in ("split", "nothing trained")] == [2, 3]
    wrap, lost = fitted(pool, overlong_rows="wrap", **how)
    assert (wrap.length.tolist(), len(lost["nothing trained"])) == ([5, 5, 2], 0)


@quickly
@given(some_documents, st.integers(2, 20), st.sampled_from(["drop", "truncate", "split", "wrap"]))
def test_nothing_that_would_be_trained_is_dropped_as_untrained(
    documents: list[Document], max_tokens: int, overlong_rows: str
) -> None:
    read = mask_of(documents)
    pool, lost = fitted(pool_of(documents), max_tokens=max_tokens, overlong_rows=overlong_rows, mask_of=read)
    for piece in (pool, lost["nothing trained"]):
        for at in range(len(piece)):
            mask = read(piece.address[at], piece.length[at])
            assert (piece.num_trained[at], piece.trains_first[at]) == (mask[1:].sum(), mask[0])
    assert (pool.num_trained > 0).all()
    assert (lost["nothing trained"].num_trained == 0).all()
    assert overlong_rows == "wrap" or (pool.length <= max_tokens).all()
    # Every document is still there, whole or in pieces, or named as lost.
    kept = sum(map(len, (pool, lost["nothing trained"], lost.get("longer than max_tokens", ()))))
    pieces = [-(-len(one.mask) // max_tokens) if overlong_rows == "split" else 1 for one in documents]
    assert kept == sum(pieces)
    if overlong_rows in ("truncate", "split"):
        long = [one for one in documents if len(one.mask) > max_tokens]
        assert len(lost["truncated" if overlong_rows == "truncate" else "split"]) == len(long)
        if overlong_rows == "truncate":
            cut = [one for one in long if all(one.mask[max_tokens - 1 : max_tokens + 1])]
            assert len(lost["turn cut"]) == len(cut)


@quickly
@given(some_documents, st.data())
def test_what_is_trained_of_any_part_is_the_sum_of_its_mask(documents: list[Document], data: Any) -> None:
    read, pool = mask_of(documents), pool_of(documents)
    start = np.array([data.draw(st.integers(0, length - 1)) for length in pool.length])
    stop = np.array(
        [data.draw(st.integers(low + 1, high)) for low, high in zip(start, pool.length, strict=True)]
    )
    trained, first = trained_tokens(pool, start, stop, read)
    for at, one in enumerate(documents):
        part = one.mask[start[at] : stop[at]]
        assert (trained[at], first[at]) == (sum(part[1:]), part[0])


def test_tokens_are_looked_at_only_where_a_part_of_a_document_trains_in_part() -> None:
    documents = [Document([True] * 9), Document([False] * 3 + [True] * 6), Document([False, True])]
    read = mask_of(documents)
    looked_at = []

    def watched(address: int, length: int) -> np.ndarray:
        looked_at.append((address, length))
        return read(address, length)

    trained_tokens(pool_of(documents), np.array([2, 2, 0]), np.array([5, 5, 2]), watched)
    assert looked_at == [(11, 3)]


def write_store(folder: Path, documents: list[Document], first_id: int) -> Store:
    """A store of documents whose tokens are numbered from `first_id` on, each number once."""
    folder.mkdir()
    pool = pool_of(documents)
    records = np.zeros(len(documents), RECORD)
    for name in ("address", "length", "num_trained", "trains_first", "mode"):
        records[name] = getattr(pool, name)
    ids = np.arange(first_id, first_id + pool.length.sum(), dtype=np.int32)
    np.where(np.array([token for one in documents for token in one.mask], bool), ids, ~ids).tofile(
        folder / "tokens.bin"
    )
    records.tofile(folder / "documents.bin")
    ledger = {"num_rows": len(documents), "skipped": {}, "skipped_examples": {}, "seconds": 0.0}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    return Store(folder)


@pytest.mark.parametrize(
    ("packing", "overlong_rows"),
    [
        ("bfd", "drop"),
        ("bfd", "truncate"),
        ("bfd", "split"),
        ("wrapped", None),
        ("wrapped_cross_document", None),
    ],
)
@settings(quickly, max_examples=60)
@given(documents=some_documents, max_tokens=st.integers(2, 24), repeat=st.integers(1, 2))
def test_the_ledger_counts_what_the_reader_returns(
    packing: str, overlong_rows: str | None, documents: list[Document], max_tokens: int, repeat: int
) -> None:
    """For whatever loss and cuts: labels, tokens and documents, in all, by source and by mode."""
    names = ["a", "b", "c"]
    recipe = MidRecipe(
        stage="mid",
        max_tokens=max_tokens,
        global_batch_size=1,
        num_steps=1,
        packing=packing,
        sources=[Source(name=name, path=f"{name}.jsonl", repeat=repeat) for name in names],
        **({"overlong_rows": overlong_rows} if overlong_rows else {}),
    )
    by_source = [[one for one in documents if one.source == number] for number in range(3)]
    documents = [one for several in by_source for one in several]
    owner = np.repeat(np.arange(len(documents)), [len(one.mask) for one in documents])
    position = np.concatenate([np.arange(len(one.mask)) for one in documents])
    with tempfile.TemporaryDirectory() as folder:
        stores, first_id = [], 0
        for name, several in zip(names, by_source, strict=True):
            stores.append(write_store(Path(folder) / name, several, first_id))
            first_id += len(stores[-1].tokens)
        tokens = data.Tokens.of(stores)
        table, counts = data._pack_index(recipe, stores, tokens)
        reader = data.PackReader(tokens, packing != "wrapped_cross_document")
        rows = reader(table.to_pydict())
        ledger = data._ledger(counts, stores, names)
    found = {
        key: {"by_source": dict.fromkeys(names, 0), "by_mode": dict.fromkeys(MODES, 0)}
        for key in ("num_tokens", "num_trained_tokens")
    }
    read = (rows[key] for key in ("input_ids", "labels", "seq_lengths"))
    for ids, labels, lengths in zip(*read, strict=True):
        assert len(ids) == len(labels) == sum(lengths) <= max_tokens
        no_context = set(np.cumsum([0, *lengths[:-1]]).tolist())
        for at, (token, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
            one = documents[owner[token]]
            trained = one.mask[position[token]] and at not in no_context
            assert label == (token if trained else data.IGNORED)
            for key, number in (("num_tokens", 1), ("num_trained_tokens", int(trained))):
                found[key]["by_source"][names[one.source]] += number
                found[key]["by_mode"][MODES[one.mode]] += number
    for key, groups in found.items():
        for group, sums in groups.items():
            assert {name: ledger[group][name][key] if name in ledger[group] else 0 for name in sums} == sums
            assert ledger[key] == sum(sums.values())
    if packing != "bfd":
        kept = [one for one in documents if any(one.mask[1:])]
        idle = ledger["dropped"].get("in packs with nothing trained", 0)
        assert ledger["num_documents"] + idle == repeat * len(kept)
        whole = repeat * sum(len(one.mask) for one in kept)
        assert ledger["num_tokens"] <= whole
        assert all((labels != data.IGNORED).any() for labels in rows["labels"])
