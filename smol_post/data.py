"""Sources -> documents -> packs (or preference pairs), addressed by what made them, gathered when read.

    rows       {"text"} | {"prompt", "completion"} | {"messages", ...} | {"prompt", "chosen", "rejected", ...}
      |  documents: ids and loss of each row, on disk, one store a source       cache/documents/<key>
      |  mixture, packing: pieces of documents, at most max_tokens a pack       cache/packs/<key>, no tokens
      v
    packs      {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]}

Labels are unshifted (Hugging Face convention); the first token of every piece has no context and is never
trained.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import datasets.table
import numpy as np
import pyarrow as pa

from smol_post import manifest, mixture, packing
from smol_post.config import COLUMNS, ApoRecipe, Source, Training
from smol_post.documents import MODES, Chain, Encoder, Store, folder_of, laid_out, once, tokenise
from smol_post.mixture import Pool
from smol_post.refusal import Refusal
from smol_post.sources import pin
from smol_post.vocabulary import Vocabulary

IGNORED = -100
DOCUMENTS = "documents"  # of the cache
# The source text of what makes tokens, and of what makes packs of them, is part of the address.
_TOKEN_CODE = ("sources.py", "messages.py", "chat.py", "encoding.py", "documents.py", "synthetic.py")
_PACK_CODE = ("mixture.py", "packing.py", "data.py")


@dataclass(frozen=True)
class Prepared:
    """A data set ready for the trainer, the ledger of what is in it, where it lies, what it is made of.

    `index` has all packs, unread; `reader` gathers their tokens. `dataset` is cut to whole global batches
    (the ledger says what is left over, `num_unused`). Else the last step of an epoch would be a smaller one,
    and with several processes accelerate would repeat packs to fill it: what comes out would depend on the
    launch.
    """

    dataset: datasets.Dataset
    ledger: dict[str, Any]
    path: Path
    stores: list[Store]
    index: datasets.Dataset
    reader: "PackReader"

    def with_column(self, name: str, values: np.ndarray) -> "Prepared":
        """The same with one more column; `values` (num_packs, ...), one a pack, those left over too."""
        index = self.index.add_column(name, values.tolist())  # pyright: ignore[reportCallIssue]
        whole = index.select(range(len(self.dataset))).with_transform(self.reader)
        return replace(self, index=index, dataset=whole)


class Found(NamedTuple):
    """A data set that was prepared before: its ledger, packs (or pairs), tokens of the longest of them.

    document_tokens: the length of the document that a token stands in, a mean over tokens (sum of l^2 / sum
    of l), by which attention is paid for.
    """

    ledger: dict[str, Any]
    num_packs: int
    longest: int
    document_tokens: float


@dataclass(frozen=True)
class Task:
    """The tokenising of one source; `origin`: what its rows come from, see `pin`; `key`: its address."""

    source: Source
    encoder: Encoder
    folder: Path
    on_bad_rows: str
    origin: Any
    key: str

    def writer(self, **how: Any) -> Callable[[Path], None]:
        """What writes the documents into an empty folder; `how`: see `tokenise`."""
        given = {"folder": self.folder, "on_bad_rows": self.on_bad_rows}
        return lambda target: tokenise(self.source, self.encoder, target=target, **given, **how)


@dataclass(frozen=True)
class Tokens:
    """The tokens of several stores as one address space; opened when first read, pickled as paths."""

    paths: tuple[str, ...]

    @classmethod
    def of(cls, stores: Sequence[Store]) -> "Tokens":
        """The tokens of these stores laid end to end."""
        return cls(tuple(str(path) for store in stores for path in store.token_files))

    @cached_property
    def _every(self) -> np.ndarray | Chain:
        return laid_out([Path(path) for path in self.paths])

    def __getstate__(self) -> dict[str, Any]:
        """The paths alone: a transform is pickled to be fingerprinted, and sent to workers."""
        return {"paths": self.paths}

    def read(self, address: int, length: int) -> np.ndarray:
        """(length,) tokens from `address` on, those without loss as complements."""
        return self._every[address : address + length]

    def mask(self, address: int, length: int) -> np.ndarray:
        """(length,) whether each token from `address` on carries loss."""
        return self.read(address, length) >= 0


@dataclass(frozen=True)
class PackReader:
    """A transform of `datasets`: {"address", "length"} -> {"input_ids", "labels", "seq_lengths", "address"}.

    Pieces -6 6 7 and 8 9 (a complement has no loss):
        input_ids 5 6 7 8 9   labels -100 6 7 -100 9   seq_lengths 3 2   (isolate=False: seq_lengths 5, label
        of 8 trained)
    A preference pair is a pack of two: prompt + chosen, prompt + rejected. Other columns are passed on.
    """

    tokens: Tokens
    isolate: bool = True

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Gather a batch of packs."""
        made: dict[str, list[Any]] = {key: values for key, values in batch.items() if key != "length"}
        made |= {"input_ids": [], "labels": [], "seq_lengths": []}
        for addresses, lengths in zip(batch["address"], batch["length"], strict=True):
            stored = np.concatenate(
                [self.tokens.read(*piece) for piece in zip(addresses, lengths, strict=True)]
            )
            stored = stored.astype(np.int64)
            labels = np.where(stored >= 0, stored, IGNORED)
            labels[np.cumsum(lengths) - lengths if self.isolate else 0] = IGNORED
            made["input_ids"].append(stored ^ (stored >> 63))
            made["labels"].append(labels)
            made["seq_lengths"].append(list(lengths) if self.isolate else [sum(lengths)])
        return made


def prepare(
    recipe: Training, words: Vocabulary, *, folder: Path, cache_dir: Path, num_workers: int = 1
) -> Prepared:
    """The sources of a recipe as packs (or pairs), from the cache where nothing that made them has changed.

    packing: "bfd" (best-fit decreasing over the whole set; longer rows as overlong_rows says), "wrapped" (the
    stream cut every max_tokens, each piece isolated) or "wrapped_cross_document" (the same, attention and
    positions run across documents, as TRL's `wrapped`). Documents and then packs are shuffled with the seed.
    A pair whose longer side exceeds max_tokens is dropped and counted. Raises Refusal where a row is bad, no
    document is left, or there is not one whole batch.
    """
    started = time.monotonic()
    pairs = isinstance(recipe, ApoRecipe)
    tasks = [task_of(source, recipe, words, folder=folder) for source in recipe.sources]
    paths = [once(cache_dir / DOCUMENTS, task.key, task.writer(num_workers=num_workers)) for task in tasks]
    stores = [Store(path) for path in paths]
    names = [source.name for source in recipe.sources]
    key = _pack_key(recipe, [path.name for path in paths])
    tokens = Tokens.of(stores)

    def build(target: Path) -> None:
        table, counts = (_pair_index if pairs else _pack_index)(recipe, stores, tokens)
        ledger = {"fingerprint": key, **_ledger(counts, stores, names)}
        ledger["num_pairs" if pairs else "num_packs"] = number = len(table)
        if not ledger["num_documents"]:
            raise Refusal(_empty(names, ledger))
        if not pairs:
            ledger["utilisation"] = round(ledger["num_tokens"] / (number * recipe.max_tokens), 4)
        ledger["revisions"] = {task.source.name: task.origin for task in tasks if task.origin is not None}
        datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(target)
        ledger["seconds"] = round(time.monotonic() - started, 2)
        manifest.write_json(target / "ledger.json", ledger)

    path = once(cache_dir / "packs", key, build)
    index = datasets.load_from_disk(path)
    assert isinstance(index, datasets.Dataset)
    isolate = getattr(recipe, "packing", "bfd") != "wrapped_cross_document"
    reader = PackReader(tokens, isolate)
    updates, unused = divmod(len(index), recipe.global_batch_size)
    if not updates:
        raise Refusal(
            f"global_batch_size: found {recipe.global_batch_size}, wanted at most {len(index)}, the number "
            f"of {'pairs' if pairs else 'packs'}; lower it"
        )
    ledger = manifest.read_json(path / "ledger.json") | {"num_unused": unused, "updates_per_epoch": updates}
    whole = index.select(range(len(index) - unused)).with_transform(reader)
    return Prepared(whole, ledger, path, stores, index, reader)


def find(recipe: Training, words: Vocabulary, *, folder: Path, cache_dir: Path) -> Found | None:
    """What `prepare` would find made already; None where it would have to make anything."""
    tasks = [task_of(source, recipe, words, folder=folder) for source in recipe.sources]
    names = [folder_of(Path(), task.key).name for task in tasks]
    path = folder_of(cache_dir / "packs", _pack_key(recipe, names))
    if not manifest.is_sealed(path):
        return None
    index = datasets.load_from_disk(path)
    assert isinstance(index, datasets.Dataset)
    longest, total, squares = 0, 0, 0
    for batch in index.with_format("numpy").iter(2**16):
        assert isinstance(batch, dict)
        packs = np.array([sum(one) for one in batch["length"]])
        documents = np.concatenate(list(batch["length"]))
        if getattr(recipe, "packing", "bfd") == "wrapped_cross_document":
            documents = packs
        longest = max(longest, int(packs.max()))
        total, squares = total + int(packs.sum()), squares + int((documents.astype(np.int64) ** 2).sum())
    return Found(manifest.read_json(path / "ledger.json"), len(index), longest, squares / max(total, 1))


def _pack_key(recipe: Training, documents: list[str]) -> str:
    """What the packs of a recipe are addressed by; `documents`: the names of the stores of its sources."""
    return manifest.digest_tree(
        {
            "documents": documents,
            "sources": [[one.name, one.repeat, one.token_share] for one in recipe.sources],
            "max_tokens": recipe.max_tokens,
            "packing": "pairs" if isinstance(recipe, ApoRecipe) else getattr(recipe, "packing", "bfd"),
            "overlong_rows": getattr(recipe, "overlong_rows", "drop"),
            "think_to_no_think": recipe.think_to_no_think,
            "seed": recipe.seed,
            "code": _code(_PACK_CODE),
        }
    )


def task_of(source: Source, recipe: Training, words: Vocabulary, *, folder: Path) -> Task:
    """What is to be tokenised of one source of a recipe; Refusal where it is not there."""
    loss_on = getattr(recipe, "loss_on", "completion")
    encoder = Encoder(
        tokenizer=words.tokenizer,
        template=words.template,
        date_string=recipe.date_string,
        text_end=words.text_end,
        loss_on="completion" if loss_on != "all" else source.loss_on or loss_on,
        mode=source.mode,
        columns=source.columns,
        max_row_characters=recipe.max_row_characters,
        pairs=isinstance(recipe, ApoRecipe),
    )
    pinned, origin = pin(source, folder)
    reading = pinned.model_dump(
        exclude={"name", "path", "repeat", "token_share", "loss_on", "mode", "columns", "size"}
    )
    if source.path and source.keep_fraction == 1:
        del reading["seed"]  # nothing is drawn
    named = source.path if isinstance(origin, str) else Path(source.path or "").suffix  # files: by content
    key = manifest.digest_tree(
        {
            "source": {**reading, "path": named},
            "origin": origin,
            "encoder": encoder.identity(),
            "on_bad_rows": recipe.on_bad_rows,
            "read": COLUMNS,
            "code": _code(_TOKEN_CODE),
        }
    )
    return Task(pinned, encoder, folder, recipe.on_bad_rows, origin, key)


def _code(names: Sequence[str]) -> list[str]:
    return [resources.files("smol_post").joinpath(name).read_text() for name in names]


def _repeated(recipe: Training, pool: Pool) -> Pool:
    return mixture.repeated(pool, [source.repeat for source in recipe.sources])


def _balanced(recipe: Training, pool: Pool) -> tuple[Pool, dict[str, Pool]]:
    """What the recipe's shares or ratio keep, in random order, and what they leave out."""
    shares = [source.token_share for source in recipe.sources if source.token_share is not None]
    asked: list[tuple[str, np.ndarray]] = []  # what must have tokens, and which pieces are of it
    if shares:
        asked = [
            (f"token_share: source '{one.name}'", pool.source == at) for at, one in enumerate(recipe.sources)
        ]
    elif recipe.think_to_no_think is not None:
        asked = [
            (f"think_to_no_think: mode {name}", pool.mode == MODES.index(name))
            for name in ("think", "no_think")
        ]
    for what, which in asked:
        if not which.any():
            raise Refusal(
                f"{what} has no tokens that fit, so its part would be all or nothing; mend the sources"
            )
    keep, name = np.ones(len(pool), bool), "left out by token_share or think_to_no_think"
    if shares:
        keep = mixture.by_shares(pool, shares, seed=recipe.seed)
    if recipe.think_to_no_think is not None:
        keep = mixture.by_ratio(pool, recipe.think_to_no_think, seed=recipe.seed)
    kept = np.random.default_rng(recipe.seed).permutation(np.flatnonzero(keep))
    return pool.take(kept), {name: pool.take(~keep)}


# Numbers of the pieces of a pool, by what they count: {"num_tokens": (pool, (num_pieces,) array), ...}
Counts = dict[str, tuple[Pool, np.ndarray]]


def _pack_index(recipe: Training, stores: Sequence[Store], tokens: Tokens) -> tuple[pa.Table, Counts]:
    """Addresses and lengths of the pieces of every pack, and what there is to count."""
    strategy, max_tokens = getattr(recipe, "packing", "bfd"), recipe.max_tokens
    overlong = getattr(recipe, "overlong_rows", "drop") if strategy == "bfd" else "wrap"
    every = Pool.of(stores)
    pool = _repeated(recipe, every)
    pool, lost = mixture.fitted(pool, max_tokens=max_tokens, overlong_rows=overlong, mask_of=tokens.mask)
    pool, left_out = _balanced(recipe, pool)
    pack = packing.best_fit_decreasing if strategy == "bfd" else packing.wrapped
    packs = pack(pool.length, max_tokens)
    trained = _trained(pool, packs, tokens, isolate=strategy != "wrapped_cross_document")
    idle = np.add.reduceat(trained, packs.bounds[:-1]) == 0 if len(packs) else np.zeros(0, bool)
    if idle.any():  # pieces of long untrained stretches; a step on them alone would have no loss to take
        which = np.repeat(idle, np.diff(packs.bounds)) & (packs.start == 0)
        lost["in packs with nothing trained"] = pool.take(packs.document[which])
    packs, kept = packs.take(np.random.default_rng(recipe.seed).permutation(np.flatnonzero(~idle)))
    pieces = pool.take(packs.document)
    address = pieces.address + packs.start
    opens = np.isin(address, every.address)  # a document; other pieces go on with one
    table = {"address": address, "length": packs.lengths}
    counts: Counts = {
        "num_documents": (pieces, opens),
        "num_tokens": (pieces, packs.lengths),
        "num_trained_tokens": (pieces, trained[kept]),
        **{kind: (one, np.ones(len(one))) for kind, one in (lost | left_out).items()},
    }
    return pa.table({key: _lists(values, packs.bounds) for key, values in table.items()}), counts


def _trained(pool: Pool, packs: packing.Packs, tokens: Tokens, *, isolate: bool) -> np.ndarray:
    """Trained tokens of each piece; the first of a piece has no context, nor, if not isolated, of a pack."""
    trained, first = mixture.trained_tokens(pool.take(packs.document), packs.start, packs.stop, tokens.mask)
    if isolate:
        return trained
    inside = np.ones(len(first), bool)
    inside[packs.bounds[:-1]] = False
    return trained + (first & inside)


def _pair_index(recipe: Training, stores: Sequence[Store], tokens: Tokens) -> tuple[pa.Table, Counts]:
    """Addresses and lengths of both sides of every pair, and what to count (the prompt of a pair twice)."""
    every = Pool.of(stores)
    chosen, rejected = every.take(np.arange(0, len(every), 2)), every.take(np.arange(1, len(every), 2))
    pairs = replace(
        chosen, length=chosen.length + rejected.length, num_trained=chosen.num_trained + rejected.num_trained
    )
    long = np.maximum(chosen.length, rejected.length) > recipe.max_tokens
    lost = {"longer than max_tokens": _repeated(recipe, pairs.take(long))}
    pool, left_out = _balanced(recipe, _repeated(recipe, pairs.take(~long)))
    number = np.searchsorted(chosen.address, pool.address)
    sides = {
        "address": np.stack([pool.address, rejected.address[number]], axis=1),
        "length": np.stack([chosen.length[number], rejected.length[number]], axis=1),
    }
    bounds = np.arange(len(pool) + 1) * 2
    counts: Counts = {
        "num_documents": (pool, np.ones(len(pool))),
        "num_tokens": (pool, pool.length),
        "num_trained_tokens": (pool, pool.num_trained),
        **{kind: (one, np.ones(len(one))) for kind, one in (lost | left_out).items()},
    }
    return pa.table({key: _lists(values.ravel(), bounds) for key, values in sides.items()}), counts


_NUMBERS = ("num_documents", "num_tokens", "num_trained_tokens", "num_truncated_rows", "num_turns_cut",
            "num_split_rows", "num_dropped_rows", "num_skipped_rows")  # fmt: skip
# What the ledger calls the documents of which something is lost; every other kind is a reason to drop one.
_LOST = {"truncated": "num_truncated_rows", "turn cut": "num_turns_cut", "split": "num_split_rows"}


def _ledger(counts: Counts, stores: Sequence[Store], names: Sequence[str]) -> dict[str, Any]:
    """Totals, reasons, and the same numbers by source and by mode; every number is always there."""
    by_source, by_mode = ({name: _nothing() for name in group} for group in (names, MODES))
    for kind, (pool, numbers) in counts.items():
        key = kind if kind in _NUMBERS else _LOST.get(kind, "num_dropped_rows")
        for group, column in ((by_source, pool.source), (by_mode, pool.mode)):
            sums = np.bincount(column, weights=numbers, minlength=len(group))
            for one, number in zip(group.values(), map(int, sums.tolist()), strict=True):
                one[key] += number
                if key == "num_dropped_rows" and number:
                    one["dropped"][kind] = number
    skipped = {}
    for name, store in zip(names, stores, strict=True):
        found = store.ledger["skipped"]
        by_source[name] |= {
            "num_rows": store.ledger["num_rows"],
            "num_skipped_rows": sum(found.values()),
            "seconds": store.ledger["seconds"],
        }
        for kind, number in found.items():
            example = store.ledger["skipped_examples"][kind]
            skipped[f"{name}: {kind}"] = {"num_rows": number, "example": example}
    reasons = sorted({kind for one in by_source.values() for kind in one["dropped"]})
    return {
        **{key: sum(one[key] for one in by_source.values()) for key in ("num_rows", *_NUMBERS)},
        "dropped": {kind: sum(one["dropped"].get(kind, 0) for one in by_source.values()) for kind in reasons},
        "skipped": skipped,
        "by_source": by_source,
        "by_mode": {name: one for name, one in by_mode.items() if any(one.values())},
    }


def _nothing() -> dict[str, Any]:
    return {**dict.fromkeys(_NUMBERS, 0), "dropped": {}}


def _lists(values: np.ndarray, bounds: np.ndarray) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), pa.array(values, pa.int64()))


def _empty(names: Sequence[str], ledger: Mapping[str, Any]) -> str:
    why = [f"{number} rows dropped: {reason}" for reason, number in ledger["dropped"].items()]
    why += [f"{one['num_rows']} rows skipped: {kind}" for kind, one in ledger["skipped"].items()]
    sources = ", ".join(f"'{name}'" for name in names)
    found = "; ".join(why) or "empty"
    return f"sources {sources}: no rows left to train on ({found}); check sources and max_tokens"
