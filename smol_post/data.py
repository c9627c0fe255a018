"""Sources -> rows -> documents -> packs (or preference pairs) on disk, addressed by what made them.

    rows  {"text"} | {"prompt", "completion"} | {"messages", ...} | {"prompt", "chosen", "rejected", ...}
      |  encode: ids and train mask of one document
      |  pack: pieces of documents, at most max_tokens a pack
      v
    packs {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]}

Labels are unshifted (Hugging Face convention); the first token of every piece has no context and is never
trained.
"""

import fcntl
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
import datasets.table
import numpy as np
import pyarrow as pa

from smol_post import chat, manifest, packing
from smol_post.config import Source
from smol_post.refusal import Refusal
from smol_post.sources import load_rows, pin

IGNORED = -100
_TOKEN_CODE = ("sources.py", "chat.py", "packing.py", "data.py", "synthetic.py")
_BATCH_ROWS = 512


@dataclass(frozen=True)
class Document:
    """One row as tokens: ids and train mask of shape (num_tokens,), and where it came from."""

    ids: np.ndarray
    mask: np.ndarray
    mode: str
    source: str


@dataclass(frozen=True)
class Prepared:
    """A data set ready for the trainer, and the ledger of what is in it."""

    dataset: datasets.Dataset
    ledger: dict[str, Any]


def encode_rows(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    tokenizer: Any,
    *,
    source: str,
    loss_on: str,
    template: str | None,
    date_string: str,
    text_end: str,
) -> Iterator[Document]:
    """Rows of one source as documents, in order; Refusal with the row's number where one cannot be encoded.

    A `text` row is trained whole and ends with the token `text_end`; a `prompt`/`completion` row has loss on
    the completion (on everything with loss_on="all"); a `messages` row on its assistant turns (or
    everything).

    >>> # {"prompt": "ab", "completion": "c"}, ids a=1 b=2 c=3 end=0  ->  ids [1, 2, 3, 0], mask [0, 0, 1, 1]
    """
    end_id = tokenizer.convert_tokens_to_ids(text_end)
    rows = iter(rows)
    while batch := list(islice(rows, _BATCH_ROWS)):
        plain = [row for _, row in batch]
        try:
            yield from _encode_batch(plain, tokenizer, source, loss_on, template, date_string, end_id)
        except ValueError:
            for number, row in batch:
                try:
                    list(_encode_batch([row], tokenizer, source, loss_on, template, date_string, end_id))
                except ValueError as error:
                    raise Refusal(
                        f"source '{source}': row {number}: {error}; mend or remove the row"
                    ) from None
            raise


def _encode_batch(
    rows: list[Mapping[str, Any]],
    tokenizer: Any,
    source: str,
    loss_on: str,
    template: str | None,
    date_string: str,
    end_id: int,
) -> Iterator[Document]:
    chats = [row for row in rows if row.get("messages")]
    encoded = iter(
        list(
            chat.encode_chats(
                chats,
                tokenizer,
                date_string=date_string,
                template=template,
                loss_on="all" if loss_on == "all" else "assistant",
            )
        )
        if chats
        else []
    )
    ends_turn = tokenizer.convert_ids_to_tokens(end_id) == chat.END_OF_TURN
    for row in rows:
        if row.get("messages"):
            one = next(encoded)
            ids, mask, mode = one.input_ids, one.train_mask, one.mode
        else:
            before, after = _plain(row)
            if ends_turn:
                raise ValueError("a text ends with <|im_end|> here; set text_end: the token that ends a text")
            prompt_ids = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
            ids = [*prompt_ids, *tokenizer(after, add_special_tokens=False)["input_ids"], end_id]
            untrained = 0 if loss_on == "all" else len(prompt_ids)
            mask, mode = [0] * untrained + [1] * (len(ids) - untrained), "text"
        yield Document(np.asarray(ids, np.int32), np.asarray(mask, np.int8), mode, source)


def _plain(row: Mapping[str, Any]) -> tuple[str, str]:
    """("", text) or (prompt, completion) of a row without messages."""
    text, prompt, completion = row.get("text"), row.get("prompt"), row.get("completion")
    for one in (text, prompt, completion):
        str(one).encode()  # half a surrogate pair, which no tokenizer takes, is a ValueError here
    if isinstance(text, str):
        return "", text
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    raise ValueError(
        f"found columns {', '.join(map(str, row)) or 'none'}, wanted text, prompt + completion, or messages"
    )


def fit_length(
    document: Document, *, max_tokens: int, overlong_rows: str
) -> tuple[Document | None, str | None]:
    """A document of at most `max_tokens`, or why it was dropped or cut."""
    if len(document.ids) > max_tokens:
        if overlong_rows == "drop":
            return None, "longer than max_tokens"
        document = Document(
            document.ids[:max_tokens], document.mask[:max_tokens], document.mode, document.source
        )
        return (
            (document, "truncated")
            if document.mask[1:].any()
            else (None, "nothing trained left after truncation")
        )
    return (document, None) if document.mask[1:].any() else (None, "nothing trained")


def gather(
    documents: Sequence[Document], packs: Sequence[packing.Pack], *, isolate: bool
) -> tuple[pa.Table, dict[str, Any]]:
    """Packs as a table of input_ids, labels, seq_lengths, and the counts of tokens by source and mode.

    Two documents 5 6 7 and 8 9 (masks 0 1 1 and 1 1) in one pack:
        input_ids 5 6 7 8 9   labels -100 6 7 -100 9   seq_lengths 3 2   (isolate=False: seq_lengths 5, label
        of 8 trained)
    """
    ids, labels, lengths = [], [], []
    counts: Counter[tuple[str, str, str]] = Counter()
    for pack in packs:
        pack_ids, pack_labels, pack_lengths = [], [], []
        for index, start, stop in pack:
            document = documents[index]
            piece = document.ids[start:stop]
            label = np.where(document.mask[start:stop] == 1, piece, IGNORED)
            if isolate or not pack_ids:
                label[0] = IGNORED
            pack_ids.append(piece)
            pack_labels.append(label)
            pack_lengths.append(stop - start)
            for kind, value in (("by_source", document.source), ("by_mode", document.mode)):
                counts[kind, value, "num_rows"] += start == 0
                counts[kind, value, "num_tokens"] += stop - start
                counts[kind, value, "num_trained_tokens"] += int((label != IGNORED).sum())
        ids.append(np.concatenate(pack_ids))
        labels.append(np.concatenate(pack_labels))
        lengths.append(np.asarray(pack_lengths if isolate else [sum(pack_lengths)], np.int32))
    ledger: dict[str, Any] = {"by_source": {}, "by_mode": {}}
    for (kind, value, what), number in counts.items():
        ledger[kind].setdefault(value, {})[what] = int(number)
    table = pa.table({"input_ids": _lists(ids), "labels": _lists(labels), "seq_lengths": _lists(lengths)})
    return table, ledger


def _lists(arrays: Sequence[np.ndarray]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    values = np.concatenate(arrays).astype(np.int32) if arrays else np.zeros(0, np.int32)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))


def prepare_packs(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    folder: Path,
    cache_dir: Path,
    max_tokens: int,
    packing_strategy: str,
    loss_on: str,
    overlong_rows: str,
    template: str | None,
    date_string: str,
    text_end: str,
    seed: int,
) -> Prepared:
    """Sources as packs of at most `max_tokens`, from the cache where nothing that made them has changed.

    `packing_strategy`: "bfd" (whole documents, best-fit decreasing over the whole set), "wrapped" (the stream
    cut every max_tokens, each piece isolated) or "wrapped_cross_document" (the same, attention and positions
    run across documents, as TRL's `wrapped`). Documents are shuffled with `seed` before packing. Raises
    Refusal where no document is left.
    """
    shape = {
        "max_tokens": max_tokens,
        "packing": packing_strategy,
        "loss_on": loss_on,
        "overlong_rows": overlong_rows,
        "text_end": text_end,
    }

    sources, origins = pin(sources, folder)

    def build() -> tuple[pa.Table, dict[str, Any]]:
        documents: list[Document] = []
        dropped: Counter[str] = Counter()
        for source in sources:
            rows = load_rows(source, folder=folder)
            for document in encode_rows(
                rows,
                tokenizer,
                source=source.name,
                loss_on="completion" if loss_on != "all" else source.loss_on or loss_on,
                template=template,
                date_string=date_string,
                text_end=text_end,
            ):
                fits, reason = document, None
                if packing_strategy == "bfd":
                    fits, reason = fit_length(document, max_tokens=max_tokens, overlong_rows=overlong_rows)
                if reason:
                    dropped[reason] += 1
                if fits is not None:
                    documents.append(fits)
        if not documents:
            raise Refusal(_empty(sources, dropped))
        random.Random(seed).shuffle(documents)
        lengths = [len(document.ids) for document in documents]
        pack = packing.best_fit_decreasing if packing_strategy == "bfd" else packing.wrapped
        packs = pack(lengths, max_tokens)
        random.Random(seed).shuffle(packs)  # whoever takes the first n packs takes a sample
        table, counts = gather(documents, packs, isolate=packing_strategy != "wrapped_cross_document")
        return table, {
            "num_documents": len(documents),
            "num_packs": len(packs),
            "num_tokens": sum(lengths),
            "num_trained_tokens": sum(one["num_trained_tokens"] for one in counts["by_mode"].values()),
            "utilisation": round(packing.utilisation(packs, max_tokens), 4),
            "num_truncated_rows": dropped.pop("truncated", 0),
            "num_dropped_rows": sum(dropped.values()),
            "dropped": dict(dropped),
            **counts,
        }

    return _cached(build, sources, origins, tokenizer, shape, folder, cache_dir, template, date_string, seed)


def prepare_pairs(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    folder: Path,
    cache_dir: Path,
    max_tokens: int,
    template: str | None,
    date_string: str,
    seed: int,
) -> Prepared:
    """Preference rows as prompt_ids, chosen_ids, rejected_ids (both end with `<|im_end|>`, neither is cut).

    A pair whose longer side exceeds `max_tokens` is dropped and counted. Raises Refusal with the row's number
    where a pair cannot be encoded, or where none is left.
    """

    sources, origins = pin(sources, folder)

    def build() -> tuple[pa.Table, dict[str, Any]]:
        pairs: list[tuple[chat.EncodedPair, str]] = []
        dropped: Counter[str] = Counter()
        for source in sources:
            for number, row in load_rows(source, folder=folder):
                try:
                    pair = chat.encode_pair(row, tokenizer, date_string=date_string, template=template)
                except ValueError as error:
                    raise Refusal(
                        f"source '{source.name}': row {number}: {error}; mend or remove the row"
                    ) from None
                if len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) > max_tokens:
                    dropped["longer than max_tokens"] += 1
                else:
                    pairs.append((pair, source.name))
        if not pairs:
            raise Refusal(_empty(sources, dropped))
        random.Random(seed).shuffle(pairs)
        counts: dict[str, Any] = {"by_source": {}, "by_mode": {}}
        for pair, name in pairs:
            trained = len(pair.chosen_ids) + len(pair.rejected_ids)
            for kind, value in (("by_source", name), ("by_mode", pair.mode)):
                one = counts[kind].setdefault(
                    value, {"num_rows": 0, "num_tokens": 0, "num_trained_tokens": 0}
                )
                one["num_rows"] += 1
                one["num_tokens"] += 2 * len(pair.prompt_ids) + trained
                one["num_trained_tokens"] += trained
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        table = pa.table(
            {
                column: _lists([np.asarray(getattr(pair, column), np.int32) for pair, _ in pairs])
                for column in columns
            }
        )
        totals = {
            key: sum(one[key] for one in counts["by_mode"].values())
            for key in ("num_tokens", "num_trained_tokens")
        }
        return table, {
            "num_documents": len(pairs),
            "num_pairs": len(pairs),
            **totals,
            "num_dropped_rows": sum(dropped.values()),
            "dropped": dict(dropped),
            **counts,
        }

    return _cached(
        build,
        sources,
        origins,
        tokenizer,
        {"max_tokens": max_tokens},
        folder,
        cache_dir,
        template,
        date_string,
        seed,
    )


def _empty(sources: Sequence[Source], dropped: Mapping[str, int]) -> str:
    names = ", ".join(f"'{source.name}'" for source in sources)
    why = "; ".join(
        f"{number} rows dropped: {reason}" for reason, number in dropped.items() if reason != "truncated"
    )
    return f"sources {names}: no rows left to train on ({why or 'empty sources'}); check them and max_tokens"


def _cached(
    build: Any,
    sources: Sequence[Source],
    origins: Sequence[Any],
    tokenizer: Any,
    shape: Mapping[str, Any],
    folder: Path,
    cache_dir: Path,
    template: str | None,
    date_string: str,
    seed: int,
) -> Prepared:
    """The prepared set from `cache_dir/<fingerprint>`, built once; other processes wait."""
    key = manifest.digest_tree(
        {
            "sources": [source.model_dump() for source in sources],
            "origins": origins,
            "tokenizer": manifest.digest_text(tokenizer.backend_tokenizer.to_str()),
            "template": template,
            "date_string": date_string,
            "seed": seed,
            "shape": dict(shape),
            "code": [resources.files("smol_post").joinpath(name).read_text() for name in _TOKEN_CODE],
        }
    )
    target = cache_dir / key.removeprefix("sha256:")[:24]
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            started = time.monotonic()
            table, ledger = build()
            half = target.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(half)
            seconds = round(time.monotonic() - started, 2)
            revisions = {one.name: origin for one, origin in zip(sources, origins, strict=True) if origin}
            ledger = {"fingerprint": key, **ledger, "revisions": revisions, "seconds": seconds}
            manifest.write_json(half / "ledger.json", ledger)
            half.rename(target)
    loaded = datasets.load_from_disk(target)
    assert isinstance(loaded, datasets.Dataset)
    return Prepared(loaded, json.loads((target / "ledger.json").read_text()))
