"""Packing loses no token, overfills no pack, and is the algorithm it says it is."""

import doctest
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smol_post import packing
from smol_post.packing import Packs, best_fit_decreasing, split, wrapped

Piece = tuple[int, int, int]
quickly = settings(deadline=None, max_examples=100, derandomize=True)


@st.composite
def documents(draw: Any, *, shortest: int = 1, overlong: bool = False) -> tuple[np.ndarray, int]:
    """Lengths in any order, many of them equal, and a capacity."""
    capacity = draw(st.sampled_from([1, 2, 7, 16, 100, 300]))
    length = st.integers(shortest, 4 * capacity if overlong else capacity)
    kinds = draw(st.lists(st.tuples(length, st.integers(1, 9)), max_size=12))
    lengths = np.array([one for one, number in kinds for _ in range(number)], np.int64)
    return np.random.default_rng(draw(st.integers(0, 99))).permutation(lengths), capacity


fitting = documents()
streams = documents(shortest=0, overlong=True)


def tokens(packs: Iterable[list[Piece]]) -> list[tuple[int, int]]:
    """Every token as (document, position), in the order of the packs."""
    return [(document, at) for pack in packs for document, start, stop in pack for at in range(start, stop)]


def all_tokens(lengths: np.ndarray) -> list[tuple[int, int]]:
    return [(document, at) for document, length in enumerate(lengths) for at in range(length)]


def fill(packs: Iterable[list[Piece]]) -> list[int]:
    return [sum(stop - start for _, start, stop in pack) for pack in packs]


def slow_best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[int]:
    """The fill of packs made by the book: longest first, into the fullest pack with room, else a new."""
    packs: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [at for at, used in enumerate(packs) if used + length <= capacity]
        if fitting:
            packs[max(fitting, key=packs.__getitem__)] += length
        else:
            packs.append(length)
    return packs


@quickly
@given(fitting)
def test_best_fit_decreasing_puts_every_document_whole_into_one_pack(given: tuple[np.ndarray, int]) -> None:
    lengths, capacity = given
    packs = best_fit_decreasing(lengths, capacity)
    pieces = [piece for pack in packs for piece in pack]
    assert sorted(pieces) == [(document, 0, length) for document, length in enumerate(lengths)]
    assert all(0 < used <= capacity for used in fill(packs))


@quickly
@given(fitting)
@example((np.array([60, 60, 60, 20, 15, 15, 15, 15, 15]), 100))  # three packs alike, of which 20 takes one
def test_best_fit_decreasing_is_exact(given: tuple[np.ndarray, int]) -> None:
    """Packs with equal room are interchangeable, so the fill of the packs is what the algorithm decides."""
    lengths, capacity = given
    found = fill(best_fit_decreasing(lengths, capacity))
    assert sorted(found) == sorted(slow_best_fit_decreasing(lengths, capacity))


def test_best_fit_decreasing_is_exact_for_long_documents_of_many_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 70_001, 400)
    found = fill(best_fit_decreasing(lengths, 70_000))
    assert sorted(found) == sorted(slow_best_fit_decreasing(lengths, 70_000))


@quickly
@given(streams)
def test_wrapping_keeps_every_token_in_the_order_of_the_stream(given: tuple[np.ndarray, int]) -> None:
    lengths, capacity = given
    assert tokens(wrapped(lengths, capacity)) == all_tokens(lengths)


@quickly
@given(streams)
def test_wrapping_fills_every_pack_but_the_last(given: tuple[np.ndarray, int]) -> None:
    lengths, capacity = given
    used = fill(wrapped(lengths, capacity))
    assert all(number == capacity for number in used[:-1])
    assert all(0 < number <= capacity for number in used[-1:])


@quickly
@given(streams)
def test_wrapping_cuts_only_where_a_pack_or_a_document_ends(given: tuple[np.ndarray, int]) -> None:
    lengths, capacity = given
    for pack in wrapped(lengths, capacity):
        assert len({document for document, _, _ in pack}) == len(pack)
        assert all(start < stop for _, start, stop in pack)
        assert all(start == 0 for _, start, _ in pack[1:])
        assert all(stop == lengths[document] for document, _, stop in pack[:-1])


@quickly
@given(streams)
def test_splitting_keeps_every_token_in_full_pieces_and_one_rest(given: tuple[np.ndarray, int]) -> None:
    lengths, capacity = given
    pieces: list[Piece] = list(zip(*(each.tolist() for each in split(lengths, capacity)), strict=True))
    assert tokens([pieces]) == all_tokens(lengths)
    for document, start, stop in pieces:
        assert stop - start == capacity or (0 < stop - start < capacity and stop == lengths[document])


@quickly
@given(streams, st.integers(0, 3))
def test_packs_are_taken_whole_in_any_order(given: tuple[np.ndarray, int], seed: int) -> None:
    packs, order = wrapped(*given), np.random.default_rng(seed).permutation(len(wrapped(*given)))
    every = list(packs)
    for some in (order, order[::2]):
        taken, pieces = packs.take(some)
        assert list(taken) == [every[at] for at in some]
        assert packs.document[pieces].tolist() == taken.document.tolist()
        assert packs.start[pieces].tolist() == taken.start.tolist()


@pytest.mark.parametrize("pack", [best_fit_decreasing, wrapped])
def test_no_documents_make_no_packs(pack: Callable[[np.ndarray, int], Packs]) -> None:
    packs = pack(np.array([], np.int64), 6)
    assert (len(packs), list(packs), list(packs.take(np.arange(0))[0]), packs.utilisation(6)) == (
        0,
        [],
        [],
        0.0,
    )


@pytest.mark.parametrize("length", [0, 7])
def test_a_document_that_cannot_be_placed_whole_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens; wanted 1 to 6"):
        best_fit_decreasing(np.array([3, length]), 6)


@quickly
@given(fitting)
def test_utilisation_is_the_share_of_room_in_use(given: tuple[np.ndarray, int]) -> None:
    lengths, capacity = given
    packs = best_fit_decreasing(lengths, capacity)
    assert packs.utilisation(capacity) * len(packs) * capacity == pytest.approx(lengths.sum())


def test_the_examples_in_the_text_are_true() -> None:
    assert doctest.testmod(packing).failed == 0
    assert list(best_fit_decreasing(np.array([5, 3, 2]), 6)) == [[(0, 0, 5)], [(1, 0, 3), (2, 0, 2)]]
    assert list(wrapped(np.array([5, 3, 2]), 6)) == [[(0, 0, 5), (1, 0, 1)], [(1, 1, 3), (2, 0, 2)]]
