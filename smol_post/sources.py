"""Sources -> raw rows: a generator of the package, JSON(L), Parquet, a folder of `datasets`, a Hub data set.

    {"path": "rows.jsonl.gz", "keep_fraction": 0.5}  ->  Raw(3, b'{"messages": ...}', 0.4), Raw(17, ...), ...

Rows are read one after another, whatever the size of the set (only a .json list is read at once). A `Span` is
a shard of a source, read alone:

    spans(source, num_shards=2)  ->  Span(0, 600, num_rows=1200, ...), Span(600, 1200, num_rows=1200, ...)
"""

import gzip
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import datasets
import datasets.exceptions
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smol_post import hub, manifest, synthetic
from smol_post.config import COLUMNS, Source
from smol_post.refusal import Refusal
from smol_post.strict import FILES, is_local, local_path

_BATCH_ROWS = 512
datasets.disable_progress_bars()


class Raw(NamedTuple):
    """A row as found: its number in the source, from 1; a line of JSON or a dict; the share read so far."""

    number: int
    content: bytes | Mapping[str, Any]
    done: float


class Span(NamedTuple):
    """Rows `start` to `stop`, from 0, of the `num_rows` of a source, and the way to the first of them.

    Of a JSONL file: where its line begins, and the number of that line less one. Of a Hub data set that is
    stored as Parquet: how many rows each of its files has; they are read from there, no copy is made.
    """

    start: int
    stop: int
    num_rows: int
    offset: int = 0
    line: int = 0
    files: tuple[int, ...] = ()


def spans(source: Source, *, folder: Path, num_shards: int) -> list[Span]:
    """The rows of a source, cut into `num_shards` spans as even as can be.

    Lines are counted in one pass; Parquet says how many rows it has. Raises Refusal as `read_rows` does.
    """
    files: tuple[int, ...] = ()
    starts: np.ndarray | None = None
    path = local_path(source.path or "", folder)
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        starts = _line_starts(path)
        number = len(starts) - 1
    else:
        if source.path and not is_local(source.path):
            files = _rows_of_files(source)
        number = sum(files) if files else _found(source, folder, None)[1]
    borders = [at * number // num_shards for at in range(num_shards + 1)]
    cut = [Span(start, stop, number, files=files) for start, stop in pairwise(borders)]
    if starts is None:
        return cut
    return [one._replace(offset=int(starts[one.start, 0]), line=int(starts[one.start, 1])) for one in cut]


def read_rows(source: Source, *, folder: Path, span: Span | None = None) -> Iterator[Raw]:
    """The rows of a source in order; with `keep_fraction`, those among the first of a shuffle with its seed.

    Of a span, those that lie in it. Raises Refusal for a missing file or column, a damaged file, an unknown
    data set or split.
    """
    rows, number = _found(source, folder, span)
    return _kept(rows, number, source, span)


def _found(source: Source, folder: Path, span: Span | None) -> tuple[Iterator[Raw], int]:
    """The rows of a source (of a span of it), unread, and how many it has (0: nobody asks, not counted)."""
    start, stop = (span.start, span.stop) if span else (0, None)
    if source.generator is not None:
        assert source.num_rows is not None
        number, rows = source.num_rows, islice(_generated(source), start, stop)
        return _numbered(rows, number, start), number
    assert source.path is not None
    path = local_path(source.path, folder)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise Refusal(
            f"source '{source.name}': {path}: is a pipe or device, wanted a file or folder; save it"
        )
    if span and span.files:
        return _numbered(_streamed(source, span), span.num_rows, start), span.num_rows
    if not is_local(source.path) or path.is_dir():
        table = _table(source, path)
        number = len(table)
        rows = _plain(table.select(range(start, number if stop is None else stop)), source)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        if span:
            return islice(_lines(path, span.offset, span.line), span.stop - span.start), span.num_rows
        return _lines(path), sum(1 for _ in _lines(path)) if source.keep_fraction < 1 else 0
    elif path.name.endswith((".json", ".json.gz")):
        every = _json_list(path)
        number, rows = len(every), every[start:stop]
    elif path.suffix == ".parquet":
        with _refusing(source):
            file = pq.ParquetFile(path)
        number = file.metadata.num_rows
        rows = _parquet(file, source, start, number if stop is None else stop)
    else:
        raise Refusal(
            f"source '{source.name}': {source.path}: wanted {', '.join(FILES)} or a folder saved by datasets"
        )
    return _numbered(rows, number, start), number


def parse_row(content: bytes | Mapping[str, Any], *, columns: Mapping[str, str]) -> dict[str, Any]:
    """A raw row under our column names; ValueError where it is no JSON object or lacks a named column.

    >>> parse_row(b'{"question": "2+3?", "answer": "5"}', columns={"prompt": "question"})
    {'prompt': '2+3?'}
    """
    try:
        row = json.loads(content.decode()) if isinstance(content, bytes) else content
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"found {type(row).__name__}, wanted an object")
    if not columns:
        return dict(row)
    for theirs in columns.values():
        if theirs not in row:
            raise ValueError(f"columns: found {', '.join(map(str, row)) or 'none'}, wanted '{theirs}'")
    kept = {name: row[name] for name in row if name in COLUMNS and name not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _kept(rows: Iterable[Raw], number: int, source: Source, span: Span | None) -> Iterator[Raw]:
    """All rows, or those that `Dataset.shuffle(seed)` of this number of rows puts first, in their order."""
    if source.keep_fraction == 1:
        return iter(rows)
    kept = np.zeros(number, bool)
    order = np.random.default_rng(source.seed).permutation(number)
    kept[order[: int(round(number * source.keep_fraction, 6))]] = True
    kept = kept[span.start : span.stop] if span else kept
    return (row for row, keep in zip(rows, kept, strict=True) if keep)


def _numbered(rows: Iterable[Mapping[str, Any]], number: int, start: int) -> Iterator[Raw]:
    return (Raw(at, row, at / number) for at, row in enumerate(rows, start + 1))


def _generated(source: Source) -> Iterator[dict[str, Any]]:
    assert source.generator is not None
    assert source.num_rows is not None
    try:
        yield from synthetic.generate(
            source.generator, num_rows=source.num_rows, seed=source.seed, **source.options
        )
    except ValueError as error:
        raise Refusal(f"source '{source.name}': {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(f"{path}: not readable ({error}); restore the file") from None


def _lines(path: Path, offset: int = 0, before: int = 0) -> Iterator[Raw]:
    """The lines of a JSONL file that are not blank, with their numbers in the file.

    From `offset` on in the text, where the line after `before` others begins.
    """
    with _opened(path) as stream:
        size, raw = max(1, path.stat().st_size), getattr(stream, "fileobj", stream)
        stream.seek(offset)
        for number, line in enumerate(stream, before + 1):
            if content := line.strip():
                yield Raw(number, content, raw.tell() / size)


def _line_starts(path: Path) -> np.ndarray:
    """(num_rows + 1, 2): where each line that is not blank begins, how many stand before it; then the end."""
    found, offset, number = array("q"), 0, 0
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                found.extend((offset, number - 1))
            offset += len(line)
    found.extend((offset, number))
    return np.frombuffer(found, np.int64).reshape(-1, 2)


def _json_list(path: Path) -> list[Any]:
    try:
        with _opened(path) as stream:
            rows = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: not JSON ({error}); mend the file") from None
    if not isinstance(rows, list):
        raise Refusal(f"{path}: found {type(rows).__name__}, wanted a list of rows; mend it, or write JSONL")
    return rows


def _parquet(file: pq.ParquetFile, source: Source, start: int, stop: int) -> Iterator[dict[str, Any]]:
    columns = _readable(file.schema_arrow.names, source)
    bounds = [0, *accumulate(file.metadata.row_group(at).num_rows for at in range(file.num_row_groups))]
    groups = [at for at, (first, end) in enumerate(pairwise(bounds)) if first < stop and start < end]
    row = bounds[groups[0]] if groups else 0
    with _refusing(source):
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns, row_groups=groups):
            first, end = max(start - row, 0), min(stop - row, len(batch))
            if first < end:
                yield from batch.slice(first, end - first).to_pylist()
            row += len(batch)


def _rows_of_files(source: Source) -> tuple[int, ...]:
    """Rows of each file of a Hub data set, by the files' last bytes; none unless all of them are Parquet."""
    assert source.path is not None
    with _refusing(source):
        about = datasets.load_dataset_builder(source.path, source.config, revision=source.revision)
        urls = (about.config.data_files or {}).get(source.split or "train", [])
        return tuple(_num_rows(url) for url in urls if all(one.endswith(".parquet") for one in urls))


def _num_rows(url: str) -> int:
    with fsspec.open(url) as stream:
        return pq.read_metadata(stream).num_rows


def _streamed(source: Source, span: Span) -> Iterator[dict[str, Any]]:
    """The rows of a span of a Hub data set, from the files that hold them."""
    stream = _from_hub(source, streaming=True)
    for at, (end, size) in enumerate(zip(accumulate(span.files), span.files, strict=True)):
        start, stop = max(span.start - end + size, 0), min(span.stop - end + size, size)
        if start < stop:
            one = stream.shard(len(span.files), at)
            yield from _plain(one.skip(start).take(stop - start), source)


def _plain(table: datasets.Dataset | datasets.IterableDataset, source: Source) -> Iterator[dict[str, Any]]:
    selected = table.select_columns(_readable(table.column_names or [], source)).with_format(None)
    with _refusing(source):
        for batch in selected.iter(_BATCH_ROWS):
            assert isinstance(batch, dict)
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _readable(found: Sequence[str], source: Source) -> list[str]:
    """The columns to read; Refusal where one that the recipe names is missing, or none is known."""
    wanted = list(dict.fromkeys([*source.columns.values(), *(name for name in found if name in COLUMNS)]))
    missing = [name for name in wanted if name not in found]
    if missing or not wanted:
        what = f"'{missing[0]}'" if missing else "text, prompt + completion, messages, or chosen + rejected"
        raise Refusal(f"source '{source.name}': columns: found {', '.join(found) or 'none'}, wanted {what}")
    return wanted


def _table(source: Source, path: Path) -> datasets.Dataset:
    """A folder saved by `datasets`, or a Hub data set."""
    assert source.path is not None
    split = source.split or "train"
    if not is_local(source.path):
        return _from_hub(source, streaming=False)
    with _refusing(source):
        loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            found = ", ".join(map(str, loaded))
            raise Refusal(f"source '{source.name}': split: found {found}, wanted '{split}'")
        loaded = loaded[split]
    elif source.split:
        raise Refusal(f"source '{source.name}': split: {source.path} has no splits; remove it")
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _from_hub(source: Source, *, streaming: bool) -> Any:
    assert source.path is not None
    split = source.split or "train"
    with _refusing(source):
        return datasets.load_dataset(
            source.path, source.config, split=split, revision=source.revision, streaming=streaming
        )


@contextmanager
def _refusing(source: Source) -> Iterator[None]:
    """Turn what the libraries raise where a source cannot be read into a Refusal."""
    try:
        yield
    except (
        *(OSError, ValueError, KeyError, pa.ArrowException, datasets.exceptions.DatasetsError),
        RuntimeError,  # a set that is a program
    ) as error:
        raise _unreadable(source, error) from None


def _unreadable(source: Source, error: Exception) -> Refusal:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Refusal(
        f"source '{source.name}': {source.path}: could not be loaded ({reason}); "
        "check path, config, split and network"
    )


def pin(source: Source, folder: Path) -> tuple[Source, Any]:
    """The source, a Hub set at the very revision that is recorded, and what it comes from.

    That is None for a generator, the digests of local files, or the commit of a Hub data set.
    """
    if source.path is None:
        return source, None
    path = local_path(source.path, folder)
    if not is_local(source.path):
        if path.exists():
            raise Refusal(
                f"source '{source.name}': {source.path} is a folder here and reads like a Hub data set; "
                f"write ./{source.path}"
            )
        if Path(source.path).exists():  # datasets would read it, and the commit would be recorded
            raise Refusal(
                f"source '{source.name}': {source.path} is in the working directory too and reads like a Hub "
                f"data set; start from another directory, or write {Path(source.path).absolute()}"
            )
        commit = hub.dataset_revision(source.path, revision=source.revision, source=source.name)
        return source.model_copy(update={"revision": commit}), commit
    if not path.exists():
        raise Refusal(f"source '{source.name}': {path} does not exist; paths count from the recipe's folder")
    return source, [
        manifest.digest_file(one)
        for one in sorted([path] if path.is_file() else path.rglob("*"))
        if one.is_file()
    ]
