"""Sources -> raw rows: a generator of the package, JSON(L), Parquet, a folder of `datasets`, a Hub data set.

    {"path": "rows.jsonl.gz", "keep_fraction": 0.5}  ->  Raw(3, b'{"messages": ...}', 0.4), Raw(17, ...), ...

Rows are read one after another, whatever the size of the set (only a .json list is read at once).
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import datasets.exceptions
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smol_post import hub, manifest, synthetic
from smol_post.config import COLUMNS, FILES, Source, is_local, local_path
from smol_post.refusal import Refusal

_BATCH_ROWS = 512
datasets.disable_progress_bars()


class Raw(NamedTuple):
    """A row as found: its number in the source, from 1; a line of JSON or a dict; the share read so far."""

    number: int
    content: bytes | Mapping[str, Any]
    done: float


def read_rows(source: Source, *, folder: Path) -> Iterator[Raw]:
    """The rows of a source in order; with `keep_fraction`, those among the first of a shuffle with its seed.

    Raises Refusal for a missing file or column, a damaged file, an unknown data set or split.
    """
    if source.generator is not None:
        assert source.num_rows is not None
        return _kept(_numbered(_generated(source), source.num_rows), source.num_rows, source)
    assert source.path is not None
    path = local_path(source.path, folder)
    if not is_local(source.path) or path.is_dir():
        table = _table(source, path)
        return _kept(_numbered(_plain(table, source), len(table)), len(table), source)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        number = sum(1 for _ in _lines(path)) if source.keep_fraction < 1 else 0
        return _kept(_lines(path), number, source)
    if path.name.endswith((".json", ".json.gz")):
        rows = _json_list(path)
        return _kept(_numbered(rows, len(rows)), len(rows), source)
    if path.suffix == ".parquet":
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(source, error) from None
        number = file.metadata.num_rows
        return _kept(_numbered(_parquet(file, source), number), number, source)
    raise Refusal(
        f"source '{source.name}': {source.path}: wanted {', '.join(FILES)} or a folder saved by datasets"
    )


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


def _kept(rows: Iterable[Raw], number: int, source: Source) -> Iterator[Raw]:
    """All rows, or those that `Dataset.shuffle(seed)` of this number of rows puts first, in their order."""
    if source.keep_fraction == 1:
        return iter(rows)
    kept = np.zeros(number, bool)
    order = np.random.default_rng(source.seed).permutation(number)
    kept[order[: int(round(number * source.keep_fraction, 6))]] = True
    return (row for row, keep in zip(rows, kept, strict=True) if keep)


def _numbered(rows: Iterable[Mapping[str, Any]], number: int) -> Iterator[Raw]:
    return (Raw(at, row, at / number) for at, row in enumerate(rows, 1))


def _generated(source: Source) -> Iterator[dict[str, Any]]:
    assert source.generator is not None
    assert source.num_rows is not None
    try:
        yield from synthetic.generate(
            source.generator, num_rows=source.num_rows, seed=source.seed, **source.options
        )
    except ValueError as error:
        raise Refusal(f"source '{source.name}': {error}") from None


def _lines(path: Path) -> Iterator[Raw]:
    """The lines of a JSONL file that are not blank, with their numbers in the file."""
    try:
        size = max(1, path.stat().st_size)
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as stream:
            for number, line in enumerate(stream, 1):
                if content := line.strip():
                    yield Raw(number, content, raw.tell() / size)
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(f"{path}: not readable ({error}); restore the file") from None


def _json_list(path: Path) -> list[Any]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            rows = json.load(stream)
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(f"{path}: not readable ({error}); restore the file") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: not JSON ({error}); mend the file") from None
    if not isinstance(rows, list):
        raise Refusal(f"{path}: found {type(rows).__name__}, wanted a list of rows; mend it, or write JSONL")
    return rows


def _parquet(file: pq.ParquetFile, source: Source) -> Iterator[dict[str, Any]]:
    columns = _readable(file.schema_arrow.names, source)
    try:
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(source, error) from None


def _plain(table: datasets.Dataset, source: Source) -> Iterator[dict[str, Any]]:
    selected = table.select_columns(_readable(table.column_names, source)).with_format(None)
    try:
        for batch in selected.iter(_BATCH_ROWS):
            assert isinstance(batch, dict)
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(source, error) from None


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
    try:
        if is_local(source.path):
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(source.path, source.config, split=split, revision=source.revision)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, error) from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            found = ", ".join(map(str, loaded))
            raise Refusal(f"source '{source.name}': split: found {found}, wanted '{split}'")
        loaded = loaded[split]
    elif source.split and is_local(source.path):
        raise Refusal(f"source '{source.name}': split: {source.path} has no splits; remove it")
    assert isinstance(loaded, datasets.Dataset)
    return loaded


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
        commit = hub.dataset_revision(source.path, revision=source.revision, source=source.name)
        return source.model_copy(update={"revision": commit}), commit
    if not path.exists():
        raise Refusal(f"source '{source.name}': {path} does not exist; paths count from the recipe's folder")
    return source, [
        manifest.digest_file(one)
        for one in sorted([path] if path.is_file() else path.rglob("*"))
        if one.is_file()
    ]
