"""Lengths -> packs. Pure: a pack is a list of pieces (document, start, stop), no token is touched.

    lengths [5, 3, 2], capacity 6
    best_fit_decreasing -> [[(0, 0, 5)], [(1, 0, 3), (2, 0, 2)]]          documents whole
    wrapped             -> [[(0, 0, 5), (1, 0, 1)], [(1, 1, 3), (2, 0, 2)]]  the stream cut every 6 tokens

Source: "Fewer Truncations Improve Language Modeling" (Ding et al., 2024), section 3, for best-fit decreasing.
"""

import bisect
from collections.abc import Sequence

Piece = tuple[int, int, int]
Pack = list[Piece]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[Pack]:
    """Exact best-fit decreasing over the whole set: longest first, each into the fullest pack with room.

    Documents keep their order of placement inside a pack. Raises ValueError for a document longer than
    `capacity` (truncate or drop it before) or of no tokens.

    >>> best_fit_decreasing([2, 5, 3], 6)
    [[(1, 0, 5)], [(2, 0, 3), (0, 0, 2)]]
    """
    packs: list[Pack] = []
    rooms: list[int] = []  # the distinct room sizes in use, sorted
    by_room: dict[int, list[int]] = {}
    for document in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[document]
        if not 0 < length <= capacity:
            raise ValueError(f"document {document} has {length} tokens; wanted 1 to {capacity}")
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            pack = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        packs[pack].append((document, 0, length))
        left = room - length
        if left:
            if left not in by_room:
                bisect.insort(rooms, left)
                by_room[left] = []
            by_room[left].append(pack)
    return packs


def wrapped(lengths: Sequence[int], capacity: int) -> list[Pack]:
    """The documents as one stream, cut every `capacity` tokens; only the last pack may be short.

    >>> wrapped([5, 3, 2], 6)
    [[(0, 0, 5), (1, 0, 1)], [(1, 1, 3), (2, 0, 2)]]
    """
    packs: list[Pack] = [[]]
    room = capacity
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                packs.append([])
                room = capacity
            stop = min(length, start + room)
            packs[-1].append((document, start, stop))
            room -= stop - start
            start = stop
    return [pack for pack in packs if pack]


def utilisation(packs: Sequence[Pack], capacity: int) -> float:
    """Share of the room of all packs that holds tokens, 0 to 1."""
    used = sum(stop - start for pack in packs for _, start, stop in pack)
    return used / (len(packs) * capacity) if packs else 0.0
