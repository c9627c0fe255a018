"""Rows of one source -> its tokenised documents on disk, written once, read by address.

    tokens.bin      int32, all documents end to end; a token without loss is stored as its complement ~id
                    (of a source that was made in shards: tokens-00000.bin, tokens-00001.bin, ...)
    documents.bin   one record (RECORD) a document, in the order of the rows
    ledger.json     what was read, skipped and counted; written last

Document 5 6 7 with loss on 6 7:  tokens.bin -6 6 7,  address 0, length 3, num_trained 2, trains_first 0
A preference pair is two documents in a row: prompt + chosen, prompt + rejected, loss on the answers.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

from smol_post import chat, disk, manifest
from smol_post.config import Source
from smol_post.encoding import encode
from smol_post.launch import exit_with_parent
from smol_post.refusal import Refusal
from smol_post.sources import Raw, Span, parse_row, read_rows

MODES = ("text", "think", "no_think")
RECORD = np.dtype(
    [
        ("address", np.int64),  # of the first token in tokens.bin, in tokens
        ("row", np.int64),
        ("length", np.int32),
        ("num_trained", np.int32),  # without the first token, which has no context
        ("trains_first", np.bool_),
        ("mode", np.uint8),  # in MODES
    ]
)
_BATCH_ROWS, _BATCH_CHARACTERS = 512, 4_000_000
_SAMPLE_ROWS = 32  # a batch in _SAMPLE_BATCHES has so many masks derived a second way
_SAMPLE_BATCHES = 16


class Encoded(NamedTuple):
    """Documents end to end, loss by complement, and records whose addresses count from the first of them."""

    tokens: np.ndarray
    records: np.ndarray
    bad_rows: list[tuple[int, str]]


@dataclass(frozen=True)
class Encoder:
    """How the rows of one source become documents. `loss_on`: "assistant", "completion" or "all"."""

    tokenizer: Any
    template: str | None
    date_string: str
    text_end: str
    loss_on: str
    mode: chat.Mode | None
    columns: Mapping[str, str]
    max_row_characters: int
    pairs: bool

    def identity(self) -> dict[str, Any]:
        """Everything that decides what a row becomes, as a tree to digest."""
        tokenizer = self.tokenizer.backend_tokenizer
        tokenizer.no_padding()  # nothing is padded or cut here, whatever the last caller asked for
        tokenizer.no_truncation()
        return {
            **{key: value for key, value in vars(self).items() if key != "tokenizer"},
            "tokenizer": manifest.digest_text(tokenizer.to_str()),
            "special_tokens": {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()},
        }

    def encode(self, rows: Sequence[Raw], *, check: bool = False) -> Encoded:
        """The documents of these rows in order; rows that cannot be encoded are named, not raised.

        `check` derives the masks of the first chats a second way, too. Raises ValueError where the two
        differ: then the template is wrong, not a row.
        """
        parsed, bad = [], []
        for raw in rows:
            try:
                parsed.append((raw.number, self._parse(raw.content)))
            except (ValueError, RecursionError) as error:
                bad.append((raw.number, _reason(error)))
        try:
            made = self._documents([row for _, row in parsed])
        except (ValueError, RecursionError):
            made, good = [], []
            for number, row in parsed:
                try:
                    made += self._documents([row])
                    good.append((number, row))
                except (ValueError, RecursionError) as error:
                    bad.append((number, _reason(error)))
            parsed = good
        if check and self.template and self.loss_on != "all" and not self.pairs:
            for number, row in [one for one in parsed if one[1].get("messages")][:_SAMPLE_ROWS]:
                try:
                    chat.check_masks([row], self.tokenizer, **self._how)
                except ValueError as error:
                    raise ValueError(f"row {number}: {error}") from None
        numbers = [number for number, _ in parsed for _ in range(2 if self.pairs else 1)]
        return _end_to_end(made, numbers, sorted(bad))

    @property
    def _how(self) -> dict[str, Any]:
        return {"date_string": self.date_string, "template": self.template, "mode": self.mode}

    def _parse(self, content: bytes | Mapping[str, Any]) -> dict[str, Any]:
        size = len(content) if isinstance(content, bytes) else _characters(content)
        if size > self.max_row_characters:
            raise ValueError(
                f"found a row of {size:,} characters, wanted at most {self.max_row_characters:,} "
                "(max_row_characters)"
            )
        return parse_row(content, columns=self.columns)

    def _documents(
        self, rows: Sequence[dict[str, Any]]
    ) -> list[tuple[list[int], list[tuple[int, int]], str]]:
        """(ids, intervals with loss, mode) of each document; ValueError where a row cannot be encoded."""
        if self.pairs:
            pairs = chat.encode_pairs(rows, self.tokenizer, **self._how)
            return [
                (
                    [*one.prompt_ids, *answer],
                    [(len(one.prompt_ids), len(one.prompt_ids) + len(answer))],
                    one.mode,
                )
                for one in pairs
                for answer in (one.chosen_ids, one.rejected_ids)
            ]
        chats = [row for row in rows if row.get("messages")]
        loss_on = "all" if self.loss_on == "all" else "assistant"
        encoded = iter(
            chat.encode_chats(chats, self.tokenizer, loss_on=loss_on, **self._how) if chats else []
        )
        plain = iter(self._texts([row for row in rows if not row.get("messages")]))
        made = []
        for row in rows:
            if row.get("messages"):
                one = next(encoded)
                made.append((one.input_ids, one.trained, one.mode))
            else:
                made.append(next(plain))
        return made

    def _texts(
        self, rows: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[list[int], list[tuple[int, int]], str]]:
        """A text is trained whole, of prompt + completion the latter; both end with the token `text_end`."""
        if not rows:
            return
        ends = self.tokenizer.convert_tokens_to_ids(self.text_end)
        parts = [part for row in rows for part in _parts(row)]
        if self.text_end == chat.END_OF_TURN:
            raise Refusal("text_end: a text would end with <|im_end|>; name the token that ends a text")
        ids = [ids for ids, _ in encode([(part, []) for part in parts], self.tokenizer)]
        for before, after in zip(ids[::2], ids[1::2], strict=True):
            length = len(before) + len(after) + 1
            yield [*before, *after, ends], [(0 if self.loss_on == "all" else len(before), length)], "text"


def _parts(row: Mapping[str, Any]) -> tuple[str, str]:
    """("", text) or (prompt, completion) of a row without messages."""
    text, prompt, completion = row.get("text"), row.get("prompt"), row.get("completion")
    for one in (text, prompt, completion):
        str(one).encode()  # half a surrogate pair, which no tokenizer takes, is a ValueError here
    if isinstance(text, str):
        return "", text
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if "messages" in row:
        raise ValueError(f"messages: found {row['messages']!r}, wanted a list of messages")
    for key, value in (("text", text), ("prompt", prompt), ("completion", completion)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key}: found {type(value).__name__}, wanted text")
    raise ValueError(
        f"found columns {', '.join(map(str, row)) or 'none'}, wanted text, prompt + completion, or messages"
    )


def _reason(error: Exception) -> str:
    """What is wrong with a row, as one line that can be written, whatever the row holds."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).encode(errors="backslashreplace").decode().split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _characters(value: Any) -> int:
    """Characters of all texts in a nested value, however deep."""
    number, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str):
            number += len(one)
        elif isinstance(one, Mapping | list | tuple):
            rest.extend(one.values() if isinstance(one, Mapping) else one)
    return number


def _end_to_end(
    made: Sequence[tuple[list[int], list[tuple[int, int]], str]], numbers: Sequence[int], bad: Any
) -> Encoded:
    """Documents as one array and their records.

    >>> one = _end_to_end([([5, 6, 7], [(1, 3)], "text"), ([8, 9], [(0, 2)], "think")], [1, 2], [])
    >>> one.tokens.tolist(), one.records[["address", "length", "num_trained", "trains_first"]].tolist()
    ([-6, 6, 7, 8, 9], [(0, 3, 2, False), (3, 2, 1, True)])
    """
    records = np.zeros(len(made), RECORD)
    records["row"] = numbers
    records["length"] = [len(ids) for ids, _, _ in made]
    records["address"] = np.cumsum(records["length"], dtype=np.int64) - records["length"]
    records["mode"] = [MODES.index(mode) for _, _, mode in made]
    records["trains_first"] = [bool(spans) and spans[0][0] == 0 for _, spans, _ in made]
    trained = [sum(stop - start for start, stop in spans) for _, spans, _ in made]
    records["num_trained"] = np.array(trained, np.int32) - records["trains_first"]
    total = int(records["length"].sum())
    flips = np.full(total, -1, np.int32)
    for address, (_, spans, _) in zip(records["address"].tolist(), made, strict=True):
        for start, stop in spans:
            flips[address + start : address + stop] = 0
    ids = np.fromiter((token for ids, _, _ in made for token in ids), np.int32, total)
    return Encoded(ids ^ flips, records, bad)


class Store:
    """The documents of one source, memory-mapped: `tokens` (num_tokens,), `records` (num_documents,)."""

    def __init__(self, folder: Path) -> None:
        """Open what `tokenise` or `join` wrote into `folder`."""
        self.folder = folder
        self.token_files = sorted(folder.glob("tokens*.bin"))
        self.tokens = laid_out(self.token_files)
        self.records = mapped(folder / "documents.bin", RECORD)
        self.ledger = json.loads((folder / "ledger.json").read_text())


def mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """A file as a read-only array; an empty one cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


class Chain:
    """Arrays end to end as one, without a copy; a slice lies within one of them, as a document does.

    >>> Chain([np.array([5, 6]), np.array([], int), np.array([7, 8, 9])])[3:5].tolist()
    [8, 9]
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        """In this order; empty ones are allowed."""
        self._arrays, self._bases = arrays, np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        """The number of values."""
        return int(self._bases[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        """The values from `place.start` to `place.stop`."""
        at = int(np.searchsorted(self._bases, place.start, side="right")) - 1
        return self._arrays[at][place.start - self._bases[at] : place.stop - self._bases[at]]


def laid_out(paths: Sequence[Path]) -> np.ndarray | Chain:
    """The tokens of these files end to end."""
    arrays = [mapped(path, np.dtype(np.int32)) for path in paths]
    return arrays[0] if len(arrays) == 1 else Chain(arrays)


def tokenise(
    source: Source,
    encoder: Encoder,
    *,
    folder: Path,
    target: Path,
    on_bad_rows: str,
    num_workers: int = 1,
    span: Span | None = None,
) -> None:
    """Write the documents of `source` into the empty folder `target`; rows are read from `folder`.

    One process, or `num_workers` with the same result; at most a few batches of rows are in memory. The rows
    of a span make a part, for `join`; some masks of each part are derived a second way, too. Raises Refusal
    with the row's number where a row is bad (on_bad_rows="refuse"; "skip" counts it instead), or the
    template's masks disagree.
    """
    started, num_rows, address = time.monotonic(), 0, 0
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    where = source.path or source.generator
    batches = _batches(read_rows(source, folder=folder, span=span))
    bar = tqdm(
        total=100,
        desc=f"tokenise {source.name}",
        disable=True if span else None,  # None: where no person watches
        file=sys.stderr,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}",
    )
    with (
        bar,
        (target / "tokens.bin").open("wb") as tokens_file,
        (target / "documents.bin").open("wb") as records_file,
    ):
        try:
            for rows, encoded in _in_order(encoder, batches, num_workers):
                if encoded.bad_rows and on_bad_rows == "refuse":
                    number, reason = encoded.bad_rows[0]
                    raise Refusal(
                        f"source '{source.name}': {where}: row {number}: {reason}; mend or remove the row, "
                        "or set on_bad_rows: skip"
                    )
                for number, reason in encoded.bad_rows:
                    kind = re.sub(r"\d+|'.*'", "..", reason)  # one kind, whatever the row's own numbers
                    skipped[kind] += 1
                    examples.setdefault(kind, f"row {number}: {reason}")
                records = encoded.records
                records["address"] += address
                address += len(encoded.tokens)
                num_rows += len(rows)
                encoded.tokens.tofile(tokens_file)
                records.tofile(records_file)
                bar.set_postfix_str(f"{address / (time.monotonic() - started):,.0f} tokens/s", refresh=False)
                bar.update(100 * rows[-1].done - bar.n)
        except ValueError as error:
            raise Refusal(f"source '{source.name}': {where}: {error}; mend the chat template") from None
    ledger = {"num_rows": num_rows, "skipped": dict(skipped), "skipped_examples": examples}
    ledger["seconds"] = round(time.monotonic() - started, 2)
    if not (address or span):
        raise _nothing(source, ledger)
    manifest.write_json(target / "ledger.json", ledger)


def join(source: Source, parts: Sequence[Path], target: Path) -> None:
    """Make the parts of a source one store in the empty folder `target`, tokens as they lie.

    Records, numbers and examples are what `tokenise` would have written of the whole source. Raises Refusal
    where there are no documents.
    """
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    address, num_rows, seconds = 0, 0, 0.0
    with (target / "documents.bin").open("wb") as records_file:
        for at, store in enumerate(map(Store, parts)):
            records = np.array(store.records)
            records["address"] += address
            records.tofile(records_file)
            address += len(store.tokens)
            num_rows += store.ledger["num_rows"]
            seconds += store.ledger["seconds"]
            skipped.update(store.ledger["skipped"])
            examples = store.ledger["skipped_examples"] | examples
            (tokens,) = store.token_files
            try:
                (target / f"tokens-{at:05d}.bin").hardlink_to(tokens)
            except OSError:  # a file system without them
                tokens.rename(target / f"tokens-{at:05d}.bin")
    ledger = {"num_rows": num_rows, "skipped": dict(skipped), "skipped_examples": examples}
    if not address:
        raise _nothing(source, ledger)
    manifest.write_json(target / "ledger.json", ledger | {"seconds": round(seconds, 2)})


def _nothing(source: Source, ledger: Mapping[str, Any]) -> Refusal:
    where = source.path or source.generator
    why = "; ".join(f"{number} skipped: {kind}" for kind, number in ledger["skipped"].items())
    return Refusal(
        f"source '{source.name}': {where}: no rows to train on ({why or 'it is empty'}); mend or remove it"
    )


def _batches(rows: Iterable[Raw]) -> Iterator[list[Raw]]:
    """Rows in batches of bounded number and size."""
    batch: list[Raw] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.content) if isinstance(row.content, bytes) else _characters(row.content)
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(
    encoder: Encoder, batches: Iterator[list[Raw]], num_workers: int
) -> Iterator[tuple[list[Raw], Encoded]]:
    """Each batch and what became of it, in order; with workers, a few batches ahead of the reader."""
    if num_workers == 1:
        for at, rows in enumerate(batches):
            yield rows, encoder.encode(rows, check=at % _SAMPLE_BATCHES == 0)
        return
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(encoder,)
    ) as pool:
        ahead: deque[tuple[list[Raw], Future[Encoded]]] = deque()
        try:
            for at, rows in enumerate(batches):
                ahead.append((rows, pool.submit(_work, rows, at % _SAMPLE_BATCHES == 0)))
                if len(ahead) > 2 * num_workers:
                    rows_done, future = ahead.popleft()
                    yield rows_done, future.result()
            while ahead:
                rows_done, future = ahead.popleft()
                yield rows_done, future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker of the preparation died (out of memory?); use fewer workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder
    exit_with_parent()


def _work(rows: list[Raw], check: bool) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(rows, check=check)


def folder_of(folder: Path, key: str) -> Path:
    """Where `once` keeps what has this key, a digest."""
    return folder / key.removeprefix("sha256:")[:24]


def once(folder: Path, key: str, build: Callable[[Path], None]) -> Path:
    """`folder/<key>`, made by `build(an empty folder)` unless it is there whole; other processes wait for it.

    Whatever interrupts `build`, and whatever is lost afterwards, a folder without its seal or a file is made
    anew. Raises Refusal where nothing can be written, DiskFull where that ends. Where `build` refuses, no
    trace is left.
    """
    target = folder_of(folder, key)
    if manifest.is_sealed(target):
        return target
    path, new = folder / f"{target.name}.lock", [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    except OSError as error:
        raise Refusal(f"{folder}: cannot be written ({error.strerror}); choose another --run-dir") from None
    with lock:
        if not manifest.is_sealed(target):
            half = target.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            half.mkdir()
            try:
                with disk.watched(folder):
                    build(half)
                    manifest.seal(half)
                    half.rename(target)
            except Refusal:
                shutil.rmtree(half, ignore_errors=True)
                path.unlink()
                with contextlib.suppress(OSError):  # not empty: others work there
                    for one in new:
                        one.rmdir()
                raise
            finally:
                shutil.rmtree(half, ignore_errors=True)
    return target


def _locked(path: Path) -> TextIO:
    """A lock file, held; the file that stands there now, not one that its last holder took away."""
    while True:
        lock = path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(path, lock.fileno()):
                return lock
        lock.close()
