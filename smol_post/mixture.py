"""Documents of several sources -> the pieces to pack: repeats, shares, ratio of modes, long rows.

Pure arrays, one entry a piece; the tokens themselves stay where they are (`documents`).

    Pool.of(stores) -> repeated -> fitted (at most max_tokens) -> by_shares | by_ratio -> what to pack
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from smol_post.documents import MODES, RECORD, Store
from smol_post.packing import split


@dataclass(frozen=True)
class Pool:
    """Pieces of documents: where each lies and what it is. All of shape (num_pieces,)."""

    address: np.ndarray  # over all stores laid end to end
    length: np.ndarray
    num_trained: np.ndarray  # without the first token
    trains_first: np.ndarray
    mode: np.ndarray
    source: np.ndarray

    @classmethod
    def of(cls, stores: Sequence[Store]) -> "Pool":
        """Every document of the stores, in order."""
        bases = np.cumsum([0, *(len(store.tokens) for store in stores)])
        records = [np.asarray(store.records) for store in stores]
        every = {name: np.concatenate([one[name] for one in records]) for name in RECORD.names or ()}
        source = np.repeat(np.arange(len(stores)), [len(one) for one in records])
        return cls(
            address=every["address"] + bases[source],
            length=every["length"].astype(np.int64),
            num_trained=every["num_trained"].astype(np.int64),
            trains_first=every["trains_first"],
            mode=every["mode"],
            source=source,
        )

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self.address)

    def take(self, chosen: np.ndarray) -> "Pool":
        """The pieces at these indices, or where a mask is true."""
        return Pool(*(getattr(self, field.name)[chosen] for field in fields(self)))


def repeated(pool: Pool, repeats: Sequence[int]) -> Pool:
    """Each document as often as its source says."""
    return pool.take(np.repeat(np.arange(len(pool)), np.asarray(repeats)[pool.source]))


def by_shares(pool: Pool, shares: Sequence[float], *, seed: int) -> np.ndarray:
    """Which pieces to keep for the most tokens of which each source has its share (they sum to 1).

    Whole pieces, drawn with `seed`.

    Two sources of 60 and 300 tokens, shares .5 and .5: 60 and (up to the last whole document) 60 tokens.
    """
    have = np.bincount(pool.source, weights=pool.length, minlength=len(shares))
    total = (have / shares).min()
    return _within(pool, pool.source, np.asarray(shares) * total, seed=seed)


def by_ratio(pool: Pool, ratio: float, *, seed: int) -> np.ndarray:
    """Which pieces to keep for `ratio` tokens of think to one of no_think.

    Texts stay as they are. 300 think and 100 no_think tokens, ratio 2: 200 and 100.
    """
    have = np.bincount(pool.mode, weights=pool.length, minlength=len(MODES))
    think, no_think = MODES.index("think"), MODES.index("no_think")
    budgets = have.copy()
    budgets[think] = min(have[think], ratio * have[no_think])
    budgets[no_think] = min(have[no_think], have[think] / ratio)
    return _within(pool, pool.mode, budgets, seed=seed)


def _within(pool: Pool, kind: np.ndarray, budgets: np.ndarray, *, seed: int) -> np.ndarray:
    """Of each kind, pieces in random order while they stay within its budget of tokens."""
    keep = np.zeros(len(pool), bool)
    rng = np.random.default_rng(seed)
    for number, room in enumerate(budgets + 1e-6):
        order = rng.permutation(np.flatnonzero(kind == number))
        while len(order := order[pool.length[order] <= room]):  # one that is too long is passed over
            fits = np.cumsum(pool.length[order]) <= room
            keep[order[fits]] = True
            room -= pool.length[order[fits]].sum()
            order = order[~fits]
    return keep


def fitted(
    pool: Pool, *, max_tokens: int, overlong_rows: str, mask_of: Callable[[int, int], np.ndarray]
) -> tuple[Pool, dict[str, Pool]]:
    """Pieces of at most `max_tokens` with something to train, and the documents of which something is lost.

    overlong_rows: "drop"; "truncate" (also naming those cut inside a turn, whose end token is lost); "split"
    every `max_tokens`; "wrap" leaves them to the packing. `mask_of(address, length)` says which tokens there
    carry loss. A piece without loss is dropped: nothing would be learned from it.
    """
    long, lost = pool.length > max_tokens, {}
    if overlong_rows == "drop":
        lost["longer than max_tokens"] = pool.take(long)
        pool = pool.take(~long)
    elif overlong_rows == "truncate":
        lost["truncated"] = cut = pool.take(long)
        lost["turn cut"] = cut.take(_cut_turns(cut, max_tokens, max_tokens, mask_of))
        pool = _pieces(pool, np.arange(len(pool)), 0 * pool.length, pool.length.clip(max=max_tokens), mask_of)
    elif overlong_rows == "split":
        lost["split"] = cut = pool.take(long)
        longest = int(pool.length.max(initial=0))
        lost["turn cut"] = cut.take(_cut_turns(cut, max_tokens, longest, mask_of))
        pool = _pieces(pool, *split(pool.length, max_tokens), mask_of)
    idle = pool.num_trained == 0
    return pool.take(~idle), lost | {"nothing trained": pool.take(idle)}


def _cut_turns(
    cut: Pool, max_tokens: int, last: int, mask_of: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """Which documents are cut inside a turn, with a trained token on either side, at any cut up to `last`."""
    return np.array(
        [
            any(
                mask_of(address + at - 1, 2).all()
                for at in range(max_tokens, min(length, last + 1), max_tokens)
            )
            for address, length in zip(cut.address.tolist(), cut.length.tolist(), strict=True)
        ],
        bool,
    )


def _pieces(
    pool: Pool,
    document: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    mask_of: Callable[[int, int], np.ndarray],
) -> Pool:
    """The pieces (document, start, stop) as a pool of their own."""
    whole = pool.take(document)
    trained, first = trained_tokens(whole, start, stop, mask_of)
    return Pool(whole.address + start, stop - start, trained, first, whole.mode, whole.source)


def trained_tokens(
    whole: Pool, start: np.ndarray, stop: np.ndarray, mask_of: Callable[[int, int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Trained tokens of each piece `whole[i][start:stop]` without its first token, and whether that one is.

    Tokens are looked at only where a piece is a part of a document that is trained in part.
    """
    every = whole.num_trained + whole.trains_first == whole.length
    trained = np.where(every, stop - start - 1, whole.num_trained)
    first = every | whole.trains_first
    for at in np.flatnonzero(~every & (stop - start < whole.length)):
        mask = mask_of(int(whole.address[at] + start[at]), int(stop[at] - start[at]))
        trained[at], first[at] = mask[1:].sum(), mask[0]
    return trained, first
