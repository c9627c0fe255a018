"""Lengths -> packs. Pure: a pack is a run of pieces (document, start, stop), no token is touched.

    lengths [5, 3, 2], capacity 6
    best_fit_decreasing -> [[(0, 0, 5)], [(1, 0, 3), (2, 0, 2)]]          documents whole
    wrapped             -> [[(0, 0, 5), (1, 0, 1)], [(1, 1, 3), (2, 0, 2)]]  the stream cut every 6 tokens

Rows longer than a pack are cut before (`truncated`, `split`), so that what happens to them is counted.
Source: "Fewer Truncations Improve Language Modeling" (Ding et al., 2024), section 3, for best-fit decreasing.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Pieces in the order of their packs; pack p is the pieces bounds[p] to bounds[p + 1].

    document, start, stop: (num_pieces,); bounds: (num_packs + 1,)
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        """The number of packs."""
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Each pack as a list of (document, start, stop)."""
        pieces = zip(self.document.tolist(), self.start.tolist(), self.stop.tolist(), strict=True)
        return ([next(pieces) for _ in range(number)] for number in np.diff(self.bounds).tolist())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, (num_pieces,)."""
        return self.stop - self.start

    def utilisation(self, capacity: int) -> float:
        """Share of the room of all packs that holds tokens, 0 to 1."""
        return float(self.lengths.sum()) / (len(self) * capacity) if len(self) else 0.0

    def take(self, order: np.ndarray) -> tuple["Packs", np.ndarray]:
        """The packs of these numbers, in this order, and the numbers of their pieces here."""
        sizes = np.diff(self.bounds)[order]
        bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        pieces = np.repeat(self.bounds[:-1][order] - bounds[:-1], sizes) + np.arange(bounds[-1])
        return Packs(self.document[pieces], self.start[pieces], self.stop[pieces], bounds), pieces


def split(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut every `capacity` tokens: (document, start, stop) of every piece, in order.

    >>> [each.tolist() for each in split(np.array([5, 3]), 4)]
    [[0, 0, 1], [0, 4, 0], [4, 5, 3]]
    """
    numbers = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), numbers)
    first = np.repeat(np.cumsum(numbers) - numbers, numbers)
    start = (np.arange(len(document)) - first) * capacity
    return document, start, np.minimum(start + capacity, lengths[document])


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> Packs:
    """Exact best-fit decreasing over the whole set: longest first, each into the fullest pack with room.

    Documents of equal length are placed together: of the packs with the least sufficient room r, each takes
    r // length of them, which is what one at a time would do, since a pack that still has room is then the
    fullest. The work grows with the number of distinct lengths and rooms. Raises ValueError for a document
    longer than `capacity` (cut or drop it before) or of no tokens.

    >>> list(best_fit_decreasing(np.array([2, 5, 3]), 6))
    [[(1, 0, 5)], [(2, 0, 3), (0, 0, 2)]]
    """
    lengths = np.asarray(lengths)
    bad = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(bad):
        raise ValueError(f"document {bad[0]} has {lengths[bad[0]]} tokens; wanted 1 to {capacity}")
    order = _stable_order(capacity - lengths, capacity)
    pack_of = np.empty(len(lengths), np.int64)  # of the documents in `order`
    rooms: list[int] = []  # the distinct rooms of open packs, sorted
    packs_with: dict[int, list[np.ndarray]] = {}
    num_packs = done = 0
    per_length = np.bincount(lengths, minlength=1)
    for length in np.flatnonzero(per_length)[::-1].tolist():
        left = int(per_length[length])
        while left:
            at = bisect.bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else capacity
            each = room // length
            wanted = -(-left // each)
            if at < len(rooms):
                packs = packs_with[room].pop()
                if len(packs) > wanted:
                    packs_with[room].append(packs[wanted:])
                    packs = packs[:wanted]
                if not packs_with[room]:
                    del packs_with[room], rooms[at]
            else:
                packs = np.arange(num_packs, num_packs + wanted)
                num_packs += wanted
            placed = min(left, len(packs) * each)
            pack_of[done : done + placed] = np.repeat(packs, each)[:placed]
            full, rest = divmod(placed, each)
            for packs_now, number in ((packs[:full], each), (packs[full:], rest)):
                room_now = room - number * length
                if len(packs_now) and room_now:
                    if room_now not in packs_with:
                        bisect.insort(rooms, room_now)
                        packs_with[room_now] = []
                    packs_with[room_now].append(packs_now)
            done += placed
            left -= placed
    by_pack = _stable_order(pack_of, num_packs)
    document = order[by_pack]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=num_packs))])
    return Packs(document, np.zeros(len(document), np.int64), lengths[document].astype(np.int64), bounds)


def wrapped(lengths: np.ndarray, capacity: int) -> Packs:
    """The documents as one stream, cut every `capacity` tokens; only the last pack may be short.

    >>> list(wrapped(np.array([5, 3, 2]), 6))
    [[(0, 0, 5), (1, 0, 1)], [(1, 1, 3), (2, 0, 2)]]
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(0, total, capacity)
    starts = np.union1d(cuts, ends[:-1]) if total else cuts
    starts = starts[starts < total]
    stops = np.append(starts[1:], total)[: len(starts)]
    document = np.searchsorted(ends, starts, side="right")
    base = (ends - lengths)[document]
    bounds = np.append(np.searchsorted(starts, cuts), len(starts))
    return Packs(document, starts - base, stops - base, bounds)


def _stable_order(keys: np.ndarray, limit: int) -> np.ndarray:
    """A stable argsort of numbers in [0, limit); those of 16 bits are sorted by radix, in linear time."""
    return np.argsort(keys.astype(np.min_scalar_type(max(0, limit - 1))), kind="stable")
