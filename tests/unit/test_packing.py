"""Packing loses no token, overfills no pack, and is the algorithm it says it is."""

import doctest
import random
from collections.abc import Callable

import pytest

from smol_post import packing
from smol_post.packing import Pack, best_fit_decreasing, utilisation, wrapped

CASES = range(30)


def lengths_of(seed: int) -> tuple[list[int], int]:
    """Random lengths, many of them equal or filling a pack exactly, and a capacity."""
    rng = random.Random(seed)
    capacity = rng.choice([1, 7, 16, 100])
    return [rng.randint(1, capacity) for _ in range(rng.randint(0, 200))], capacity


def slow_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """By the book: the longest first, each into the pack that it fills best, else into a new one."""
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            packs.append([length])
    return packs


def tokens(packs: list[Pack]) -> list[tuple[int, int]]:
    return [(document, at) for pack in packs for document, start, stop in pack for at in range(start, stop)]


@pytest.mark.parametrize("seed", CASES)
def test_best_fit_decreasing_is_exact(seed: int) -> None:
    lengths, capacity = lengths_of(seed)
    packs = best_fit_decreasing(lengths, capacity)
    # Packs with equal room are interchangeable, so the fill of the packs is what the algorithm decides.
    found = sorted(sum(stop - start for _, start, stop in pack) for pack in packs)
    assert found == sorted(map(sum, slow_best_fit_decreasing(lengths, capacity)))


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("pack", [best_fit_decreasing, wrapped])
def test_every_token_is_in_exactly_one_pack(pack: Callable[[list[int], int], list[Pack]], seed: int) -> None:
    lengths, capacity = lengths_of(seed)
    packs = pack(lengths, capacity)
    every = [(document, at) for document, length in enumerate(lengths) for at in range(length)]
    assert sorted(tokens(packs)) == every
    assert all(0 < sum(stop - start for _, start, stop in pack) <= capacity for pack in packs)
    assert pack(lengths, capacity) == packs


@pytest.mark.parametrize("seed", CASES)
def test_best_fit_decreasing_cuts_no_document(seed: int) -> None:
    lengths, capacity = lengths_of(seed)
    packs = best_fit_decreasing(lengths, capacity)
    assert all((start, stop) == (0, lengths[document]) for pack in packs for document, start, stop in pack)


@pytest.mark.parametrize("seed", CASES)
def test_wrapped_keeps_the_order_and_fills_every_pack_but_the_last(seed: int) -> None:
    lengths, capacity = lengths_of(seed)
    packs = wrapped(lengths, capacity)
    assert tokens(packs) == sorted(tokens(packs))
    assert all(sum(stop - start for _, start, stop in pack) == capacity for pack in packs[:-1])


@pytest.mark.parametrize("length", [0, 7])
def test_a_document_that_cannot_be_placed_whole_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens; wanted 1 to 6"):
        best_fit_decreasing([3, length], 6)


def test_utilisation_is_the_share_of_room_in_use() -> None:
    assert utilisation([[(0, 0, 5)], [(1, 0, 3), (2, 0, 2)]], 6) == pytest.approx(10 / 12)
    assert utilisation([], 6) == 0.0


def test_the_examples_in_the_text_are_true() -> None:
    assert doctest.testmod(packing).failed == 0
