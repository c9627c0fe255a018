"""Documents to packs: the assignment alone (`bin_assignment`), and from disk to disk (`packs`)."""

import ast
import inspect
import shutil
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import corpus
from benchmarks.corpus import chat_lengths
from benchmarks.measure import Call, Numbers, Result, cpu_seconds, in_turn, medians
from benchmarks.preparing import our_preparation

CAPACITY = 65_536


def bin_assignment(work: Path, *, call: Call, size: int = 1_000_000, repetitions: int = 3) -> Result:
    """Which document goes into which pack, for `size` documents; no token exists."""
    samples = in_turn(
        repetitions,
        peer=lambda: call(_peer_assignment, size=size),
        ours=lambda: call(_our_assignment, size=size),
    )
    peer, ours = medians(samples["peer"]), medians(samples["ours"])
    ratio, bar = peer["cpu_seconds"] / ours["cpu_seconds"], 50.0
    return Result(
        peer=peer,
        ours=ours,
        ratio=ratio,
        bar=bar,
        promises={
            "CPU time": ratio >= bar,
            "same utilisation": round(peer["utilisation"], 4) == round(ours["utilisation"], 4),
        },
        repetitions=repetitions,
        compared=(
            f"Best-fit decreasing of the same {size:,} lengths into packs of {CAPACITY:,}. Peer: the "
            "statements of trl.data_utils._pack_bfd from the numbering of the documents to the end of "
            "its loop over a segment tree, run once over the whole set (TRL's default is 1,000 "
            "documents at a time); its moving of tokens is left out. Ours: best_fit_decreasing, from "
            "lengths to the arrays of all pieces. Imports are left out of both."
        ),
        samples=samples,
    )


def _peer_loop() -> Callable[..., list[dict[str, Any]]]:
    """TRL's own statements that assign documents to bins, cut out of the function that also moves tokens."""
    from trl import data_utils

    (whole,) = ast.parse(textwrap.dedent(inspect.getsource(data_utils._pack_bfd))).body
    assert isinstance(whole, ast.FunctionDef)
    first = next(at for at, line in enumerate(whole.body) if ast.unparse(line).startswith("ids = "))
    last = next(at for at, line in enumerate(whole.body) if isinstance(line, ast.For))
    module = ast.parse("def assign(lengths, examples, seq_length): return bins")
    (assign,) = module.body
    assert isinstance(assign, ast.FunctionDef)
    assign.body = [*whole.body[first : last + 1], *assign.body]
    names = dict(vars(data_utils))
    exec(compile(module, "trl.data_utils._pack_bfd", "exec"), names)
    return names["assign"]


def _peer_assignment(size: int) -> Numbers:
    import pyarrow as pa

    assign = _peer_loop()
    lengths = chat_lengths(size, seed=0)
    column = pa.array(lengths, pa.int32())
    numbers: Numbers = {}
    with cpu_seconds(numbers):
        bins = assign(column, column, CAPACITY)
    return {**numbers, "num_packs": len(bins), "utilisation": int(lengths.sum()) / (len(bins) * CAPACITY)}


def _our_assignment(size: int) -> Numbers:
    from smol_post.packing import best_fit_decreasing

    lengths = chat_lengths(size, seed=0)
    numbers: Numbers = {}
    with cpu_seconds(numbers):
        packs = best_fit_decreasing(lengths, CAPACITY)
    return {**numbers, "num_packs": len(packs), "utilisation": packs.utilisation(CAPACITY)}


def packs(work: Path, *, call: Call, size: int = 100_000, repetitions: int = 3) -> Result:
    """From `size` tokenised documents on disk to packs that can be read, and reading each once."""
    call(_write_peer_documents, path=work / "documents.arrow", size=size)
    call(_write_our_documents, folder=work / "ours", size=size)
    samples = in_turn(
        repetitions,
        peer=partial(call, _peer_packs, path=work / "documents.arrow", scratch=work / "peer"),
        ours=partial(call, _our_packs, folder=work / "ours"),
    )
    if len(found := {one["num_tokens"] for each in samples.values() for one in each}) > 1:
        raise ValueError(f"not the same tokens were packed in every measurement: {sorted(found)}")
    peer, ours = medians(samples["peer"]), medians(samples["ours"])
    ratio, bar = peer["cpu_seconds"] / ours["cpu_seconds"], 20.0
    reading = peer["read_cpu_seconds"] / ours["read_cpu_seconds"]
    return Result(
        peer=peer,
        ours=ours,
        ratio=ratio,
        bar=bar,
        promises={"CPU time of making": ratio >= bar, "CPU time of reading": reading >= 1},
        repetitions=repetitions,
        compared=(
            f"The same {size:,} tokenised documents (random token ids, every other token trained) from "
            f"disk to packs of {CAPACITY:,}. Peer: trl.pack_dataset(strategy='bfd') as SFTTrainer calls "
            "it, 1,000 documents at a time, from an Arrow file of input_ids (int32) and labels (int64) "
            "to its Arrow file. Ours: prepare() with the documents in its cache, so packing the whole "
            "set, writing the index and opening it; tokens stay where they are. read_cpu_seconds: "
            "dataset[i] once for every pack, as a trainer reads. Imports and a first run are left out of "
            "both."
        ),
        samples=samples,
        extra={"reading_ratio": reading},
    )


def _document_batches(size: int, batch: int = 1000) -> Any:
    """(lengths, token ids, train mask) of the same documents for both sides, a batch at a time."""
    lengths = chat_lengths(size, seed=0)
    rng = np.random.default_rng(1)
    for start in range(0, size, batch):
        some = lengths[start : start + batch]
        ids = rng.integers(0, 16_000, int(some.sum()), dtype=np.int32)
        yield some, ids, (np.arange(len(ids)) % 2).astype(np.int8)


def _write_peer_documents(path: Path, size: int) -> None:
    import datasets
    import pyarrow as pa

    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "labels": datasets.List(datasets.Value("int64")),
        }
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as stream:
        for lengths, ids, mask in _document_batches(size):
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
            labels = np.where(mask == 1, ids, -100).astype(np.int64)
            columns = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in (ids, labels)]
            stream.write_table(pa.Table.from_arrays(columns, schema=features.arrow_schema))


def _write_our_documents(folder: Path, size: int) -> None:
    """Our cache as if `size` rows had been prepared: that of one row, the files of its store replaced."""
    from smol_post import manifest
    from smol_post.documents import MODES, RECORD

    folder.mkdir()
    corpus.write_chats(folder, num_rows=1, seed=0, num_characters=200_000)
    made = our_preparation(folder / "chats.jsonl", folder / "tokenizer")(folder / "cache")
    store = made.stores[0].folder
    address = 0
    with (store / "tokens.bin").open("wb") as tokens, (store / "documents.bin").open("wb") as documents:
        for lengths, ids, mask in _document_batches(size):
            starts = np.cumsum(lengths) - lengths
            records = np.zeros(len(lengths), RECORD)
            records["address"] = starts + address
            records["length"] = lengths
            records["mode"] = MODES.index("think")
            records["trains_first"] = mask[starts] == 1
            records["num_trained"] = np.add.reduceat(mask, starts, dtype=np.int32) - records["trains_first"]
            np.where(mask == 1, ids, ~ids).tofile(tokens)
            records.tofile(documents)
            address += len(ids)
    manifest.seal(store)


def _our_packs(folder: Path) -> Numbers:
    prepare = our_preparation(folder / "chats.jsonl", folder / "tokenizer")
    prepare(folder / "cache")
    shutil.rmtree(folder / "cache" / "packs")
    numbers: Numbers = {}
    with cpu_seconds(numbers):
        packed = prepare(folder / "cache").dataset
    return _read(packed, numbers, folder / "cache" / "packs")


def _peer_packs(path: Path, scratch: Path) -> Numbers:
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    dataset = datasets.Dataset.from_file(str(path))
    pack_dataset(dataset.select(range(1)), CAPACITY, strategy="bfd", map_kwargs={"keep_in_memory": True})
    cache = {"cache_file_name": str(scratch / "packs.arrow"), "load_from_cache_file": False}
    numbers: Numbers = {}
    with cpu_seconds(numbers):
        packed = pack_dataset(dataset, CAPACITY, strategy="bfd", map_kwargs=cache)
    return _read(packed, numbers, scratch)


def _read(packed: Any, numbers: Numbers, written: Path) -> Numbers:
    """Read every pack once; the numbers of that, and of what lies in `written`."""
    num_tokens = 0
    with cpu_seconds(numbers, "read_cpu_seconds"):
        for number in range(len(packed)):
            num_tokens += len(packed[number]["input_ids"])
    return {
        **numbers,
        "written_bytes": sum(path.stat().st_size for path in written.rglob("*") if path.is_file()),
        "num_packs": len(packed),
        "num_tokens": num_tokens,
        "utilisation": num_tokens / (len(packed) * CAPACITY),
    }
