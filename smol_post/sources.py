"""Sources -> rows: a generator of the package, JSON(L), Parquet, a folder of `datasets`, or a Hub data set.

{"path": "rows.jsonl.gz", "keep_fraction": 0.5}  ->  (17, {"messages": [...]}), (3, {...}), ...
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
import numpy as np

from smol_post import hub, manifest, synthetic
from smol_post.config import Source, is_local, local_path
from smol_post.refusal import Refusal

datasets.disable_progress_bars()


def load_rows(source: Source, *, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a source with their numbers, counted from 1 in the file.

    `keep_fraction` shuffles with the source's seed and keeps the first int(n * fraction) rows. Raises Refusal
    for a missing file, a line that is not JSON (with its number), an unknown data set or split.
    """
    if source.generator is not None:
        made = _generated(source)
        return ((index + 1, made[index]) for index in _kept(len(made), source))
    assert source.path is not None
    path = local_path(source.path, folder)
    if is_local(source.path) and path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        numbered = list(_json_rows(path))
        return (numbered[index] for index in _kept(len(numbered), source))
    table = _table(source, path)
    return ((index + 1, table[index]) for index in _kept(len(table), source))


def _kept(num_rows: int, source: Source) -> list[int]:
    """The rows that `keep_fraction` keeps: all, or the first int(n * fraction) of `Dataset.shuffle(seed)`."""
    if source.keep_fraction == 1:
        return list(range(num_rows))
    order = np.random.default_rng(source.seed).permutation(num_rows)
    return order[: int(round(num_rows * source.keep_fraction, 6))].tolist()


def _generated(source: Source) -> list[dict[str, Any]]:
    assert source.generator is not None
    assert source.num_rows is not None
    try:
        return list(
            synthetic.generate(source.generator, num_rows=source.num_rows, seed=source.seed, **source.options)
        )
    except ValueError as error:
        raise Refusal(f"source '{source.name}': {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        if path.suffix == ".json":
            try:
                rows = json.load(stream)
            except ValueError as error:
                raise Refusal(f"{path}: not JSON ({error}); mend the file") from None
            if not isinstance(rows, list):
                raise Refusal(f"{path}: found {type(rows).__name__}, wanted a list of rows")
            lines: Iterable[tuple[int, Any]] = enumerate(rows, 1)
        else:
            lines = _json_lines(path, stream)
        for number, row in lines:
            if not isinstance(row, dict):
                raise Refusal(f"{path}: row {number}: found {type(row).__name__}, wanted an object")
            yield number, row


def _json_lines(path: Path, stream: Iterable[str]) -> Iterator[tuple[int, Any]]:
    try:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise Refusal(
                        f"{path}: row {number}: not JSON ({error}); mend or remove the line"
                    ) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: not readable ({error}); restore the file") from None


def _table(source: Source, path: Path) -> datasets.Dataset:
    """Parquet, a folder saved by `datasets`, or a Hub data set."""
    assert source.path is not None
    where = f"source '{source.name}': {source.path}"
    try:
        if is_local(source.path):
            if path.is_dir():
                loaded = datasets.load_from_disk(path)
            elif path.suffix == ".parquet":
                loaded = datasets.load_dataset("parquet", data_files=str(path), split="train")
            else:
                raise Refusal(
                    f"{where}: wanted .json, .jsonl, .jsonl.gz, .parquet or a folder saved by datasets"
                )
        else:
            loaded = datasets.load_dataset(
                source.path, source.config, split=source.split, revision=source.revision
            )
        if isinstance(loaded, datasets.DatasetDict):
            loaded = loaded[source.split]
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refusal(
            f"{where}: could not be loaded ({reason}); check path, config, split and network"
        ) from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def pin(sources: Sequence[Source], folder: Path) -> tuple[list[Source], list[Any]]:
    """The sources, Hub sets at the very revision that is recorded, and what each comes from."""
    origins = [_origin(source, folder) for source in sources]
    pinned = [
        source.model_copy(update={"revision": origin}) if isinstance(origin, str) else source
        for source, origin in zip(sources, origins, strict=True)
    ]
    return pinned, origins


def _origin(source: Source, folder: Path) -> Any:
    """What a source's rows come from: digests of local files, or the Hub revision."""
    if source.path is None:
        return None
    path = local_path(source.path, folder)
    if not is_local(source.path):
        return hub.dataset_revision(source.path, revision=source.revision, source=source.name)
    if not path.exists():
        raise Refusal(f"source '{source.name}': {path} does not exist; paths count from the recipe's folder")
    return [
        manifest.digest_file(one)
        for one in sorted([path] if path.is_file() else path.rglob("*"))
        if one.is_file()
    ]
