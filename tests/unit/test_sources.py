"""Every form of a source gives the same rows, and a damaged one is refused by name, in one line."""

import doctest
import gzip
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smol_post import sources
from smol_post.config import Source
from smol_post.refusal import Refusal
from smol_post.sources import parse_row, pin, read_rows, spans

Row = dict[str, Any]
ROWS: list[Row] = [{"prompt": f"ä{number}\u2028\n", "completion": f"b{number}"} for number in range(1200)]
FORMS = ("rows.json", "rows.json.gz", "rows.jsonl", "rows.jsonl.gz", "rows.parquet", "./saved", "./splits")


def as_lines(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every form."""
    where = tmp_path_factory.mktemp("sources")
    (where / "rows.json").write_text(json.dumps(ROWS))
    (where / "rows.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (where / "rows.jsonl").write_bytes(as_lines(ROWS))
    (where / "rows.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS)))
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(where / "rows.parquet")
    table.save_to_disk(where / "saved")
    datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(where / "splits")
    return where


def read(folder: Path, path: str, **how: Any) -> list[tuple[int, Row]]:
    """Rows of a source with their numbers, parsed."""
    source = Source(name="s", path=path, **how)
    return [
        (raw.number, parse_row(raw.content, columns=source.columns))
        for raw in read_rows(source, folder=folder)
    ]


@pytest.mark.parametrize("path", FORMS)
def test_every_form_of_a_source_gives_the_same_rows_and_numbers(folder: Path, path: str) -> None:
    assert read(folder, path) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("number", [1, 3, 7, 1300])
def test_the_spans_of_a_source_are_its_rows_in_order_whatever_their_number(
    folder: Path, path: str, number: int
) -> None:
    for fraction in (1.0, 0.37):
        source = Source(name="s", path=path, keep_fraction=fraction, seed=3)
        cut = spans(source, folder=folder, num_shards=number)
        assert [one.start for one in cut] == [at * len(ROWS) // number for at in range(number)]
        read = [[(raw.number, raw.content) for raw in read_rows(source, folder=folder, span=one)]
                for one in (cut if number < 10 else cut[::100])]  # fmt: skip
        whole = [(raw.number, raw.content) for raw in read_rows(source, folder=folder)]
        if number < 10:
            assert [row for rows in read for row in rows] == whole
        for one, rows in zip(cut if number < 10 else cut[::100], read, strict=True):
            assert rows == [row for row in whole if one.start < row[0] <= one.stop]


def test_the_rows_of_a_generator_are_cut_too(folder: Path) -> None:
    source = Source(name="s", generator="needles", num_rows=10, seed=1)
    cut = spans(source, folder=folder, num_shards=3)
    read = [[raw[:2] for raw in read_rows(source, folder=folder, span=one)] for one in cut]
    assert [len(rows) for rows in read] == [3, 3, 4]
    assert [row for rows in read for row in rows] == [raw[:2] for raw in read_rows(source, folder=folder)]


@pytest.mark.parametrize("group", [1, 7, 512, 700, 5000])
def test_the_spans_of_a_parquet_file_need_not_end_where_its_row_groups_do(tmp_path: Path, group: int) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet", batch_size=group)
    assert pq.ParquetFile(tmp_path / "rows.parquet").num_row_groups == -(-len(ROWS) // group)
    source = Source(name="s", path="rows.parquet")
    for number in (1, 5, 11):
        cut = spans(source, folder=tmp_path, num_shards=number)
        read = [raw[:2] for one in cut for raw in read_rows(source, folder=tmp_path, span=one)]
        assert read == list(enumerate(ROWS, 1))


def test_the_lines_of_a_span_keep_their_numbers_among_blank_ones(tmp_path: Path) -> None:
    lines = [b"", b'{"text": "a"}\r', b"  ", b'{"text": "\xc3\xa4"}', b"", b'{"text": "b"}', b""]
    for name, text in (
        ("rows.jsonl", b"\n".join(lines)),
        ("rows.jsonl.gz", gzip.compress(b"\n".join(lines))),
    ):
        (tmp_path / name).write_bytes(text)
        source = Source(name="s", path=name)
        for number in (1, 2, 3, 5):
            cut = spans(source, folder=tmp_path, num_shards=number)
            read = [raw.number for one in cut for raw in read_rows(source, folder=tmp_path, span=one)]
            assert read == [2, 4, 6]


@pytest.fixture
def hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of three files that `datasets` finds under a Hub name, in the working directory."""
    home = tmp_path / "home"
    (home / "org" / "set" / "data").mkdir(parents=True)
    for at, (first, end) in enumerate([(0, 100), (100, 101), (101, 1200)]):
        part = datasets.Dataset.from_list(ROWS[first:end])
        part.to_parquet(home / "org" / "set" / "data" / f"train-{at:05d}-of-00003.parquet", batch_size=250)
    monkeypatch.chdir(home)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    return home / "org" / "set"


def test_the_spans_of_a_hub_set_are_read_from_its_files_without_an_arrow_copy(
    hub_set: Path, tmp_path: Path
) -> None:
    for changes in ({}, {"keep_fraction": 0.37, "seed": 3}, {"columns": {"text": "completion"}}):
        source = Source(name="s", path="org/set", **changes)
        read = [
            [raw[:2] for one in spans(source, folder=tmp_path, num_shards=number)
             for raw in read_rows(source, folder=tmp_path, span=one)]
            for number in (1, 4, 13)
        ]  # fmt: skip
        assert not list(tmp_path.glob("arrow/**/*.arrow"))
        whole = [raw[:2] for raw in read_rows(source, folder=tmp_path)]
        assert read == [whole] * 3
        assert len(whole) == round(1200 * changes.get("keep_fraction", 1))
        assert list(tmp_path.glob("arrow/**/*.arrow"))
        shutil.rmtree(tmp_path / "arrow")
    assert spans(source, folder=tmp_path, num_shards=1)[0].files == (100, 1, 1099)


def test_a_hub_set_that_is_no_parquet_or_a_slice_of_one_is_cut_as_well(hub_set: Path, tmp_path: Path) -> None:
    sliced = Source(name="s", path="org/set", split="train[10:20]")
    cut = spans(sliced, folder=tmp_path, num_shards=3)
    assert [raw.content for one in cut for raw in read_rows(sliced, folder=tmp_path, span=one)] == ROWS[10:20]
    shutil.rmtree(hub_set)
    hub_set.mkdir()
    (hub_set / "train.jsonl").write_bytes(as_lines(ROWS))
    source = Source(name="s", path="org/set")
    cut = spans(source, folder=tmp_path, num_shards=3)
    assert [raw.content for one in cut for raw in read_rows(source, folder=tmp_path, span=one)] == ROWS


def test_a_damaged_file_of_a_hub_set_is_refused_by_name(hub_set: Path, tmp_path: Path) -> None:
    (hub_set / "data" / "train-00001-of-00003.parquet").write_bytes(b"PAR1 no longer")
    with pytest.raises(Refusal, match=r"^source 's': org/set: could not be loaded \(.*network$"):
        spans(Source(name="s", path="org/set"), folder=tmp_path, num_shards=2)


def test_a_split_of_a_saved_set_is_read_alone(folder: Path) -> None:
    assert read(folder, "./splits", split="test") == [(1, ROWS[0])]


def test_a_path_may_be_absolute(folder: Path) -> None:
    assert read(Path("/nowhere"), str(folder / "rows.jsonl")) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow"])
def test_a_set_saved_in_the_form_of_another_library_is_read_as_rows(tmp_path: Path, form: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    datasets.Dataset.from_list(rows).with_format(form).save_to_disk(tmp_path / "saved")
    assert read(tmp_path, "./saved") == list(enumerate(rows, 1))


def test_a_folder_that_reads_like_a_hub_set_is_refused(folder: Path) -> None:
    """With a network, a stranger's set of that name would be trained on."""
    (folder / "data").mkdir()
    with pytest.raises(Refusal, match=r"data is a folder here and reads like a Hub data set; write \./data$"):
        pin(Source(name="s", path="data"), folder)


def test_a_hub_set_at_a_whole_commit_needs_no_network(folder: Path) -> None:
    source = Source(name="s", path="org/set", revision="a" * 40)
    assert pin(source, folder) == (source, "a" * 40)


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert read(tmp_path, "rows.jsonl") == [(2, {"text": "a"}), (4, {"text": "b"})]


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("fraction", [0.25, 0.37, 0.005])
def test_keep_fraction_keeps_what_a_shuffle_of_the_set_puts_first(
    folder: Path, path: str, fraction: float
) -> None:
    kept = read(folder, path, keep_fraction=fraction, seed=3)
    assert kept == read(folder, path, keep_fraction=fraction, seed=3)
    assert len(kept) == round(len(ROWS) * fraction)
    assert all(row == ROWS[number - 1] for number, row in kept)
    assert [number for number, _ in kept] == sorted({number for number, _ in kept})
    shuffled = datasets.Dataset.from_list(ROWS).shuffle(seed=3).select(range(len(kept)))
    assert sorted(row["completion"] for _, row in kept) == sorted(shuffled["completion"])


def test_keep_fraction_is_exact_where_the_product_in_floating_point_is_not(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(as_lines(ROWS[:100]))
    for percent in range(1, 101):
        assert len(read(tmp_path, "rows.jsonl", keep_fraction=percent / 100)) == percent


def test_keep_fraction_is_a_sample_that_the_seed_decides(folder: Path) -> None:
    one, other = (
        [number for number, _ in read(folder, "rows.jsonl", keep_fraction=0.5, seed=seed)] for seed in (0, 1)
    )
    assert one != other
    assert 250 < len(set(one) & set(other)) < 350  # half of a half
    assert 250 < sum(number <= 600 for number in one) < 350


def test_a_generator_is_a_source_like_any_other() -> None:
    source = Source(name="s", generator="needles", num_rows=20, seed=1)
    whole = list(read_rows(source, folder=Path()))
    part = list(read_rows(source.model_copy(update={"keep_fraction": 0.5}), folder=Path()))
    assert [raw.number for raw in whole] == list(range(1, 21))
    assert len(part) == 10
    assert all(raw in whole for raw in part)


@pytest.mark.parametrize("path", FORMS)
def test_columns_take_our_names_and_others_keep_theirs(folder: Path, path: str) -> None:
    found = read(folder, path, columns={"text": "completion"})
    wanted = [{"prompt": row["prompt"], "text": row["completion"]} for row in ROWS]
    assert found == list(enumerate(wanted, 1))


@pytest.mark.parametrize("path", ["rows.parquet", "./saved", "./splits"])
def test_a_table_without_a_named_column_is_refused_before_any_row(folder: Path, path: str) -> None:
    rows = read_rows(Source(name="s", path=path, columns={"text": "answer"}), folder=folder)
    with pytest.raises(Refusal, match="source 's': columns: found prompt, completion, wanted 'answer'"):
        next(rows)


@pytest.mark.parametrize("path", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
def test_a_row_of_json_without_a_named_column_is_an_error_of_that_row(folder: Path, path: str) -> None:
    raw = next(read_rows(Source(name="s", path=path), folder=folder))
    with pytest.raises(ValueError, match="columns: found prompt, completion, wanted 'answer'"):
        parse_row(raw.content, columns={"text": "answer"})


def test_of_a_table_only_columns_that_we_know_are_read(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"text": "a", "url": "b" * 999, "score": 0.5}])
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in ("rows.parquet", "./saved"):
        assert read(tmp_path, path) == [(1, {"text": "a"})]


def test_a_table_without_any_column_that_we_know_is_refused(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"title": "a"}])
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in ("rows.parquet", "./saved"):
        with pytest.raises(Refusal, match=r"'s': columns: found title, wanted text, prompt \+ completion"):
            read(tmp_path, path)


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_share_read_so_far_rises_to_about_one(folder: Path, path: str, fraction: float) -> None:
    source = Source(name="s", path=path, keep_fraction=fraction)
    done = [raw.done for raw in read_rows(source, folder=folder)]
    assert done == sorted(done)
    assert 0 < done[0] <= done[-1] <= 1
    assert done[-1] > 0.98
    if fraction == 1 and ".jsonl" not in path:
        assert done == [number / len(ROWS) for number in range(1, len(ROWS) + 1)]


def test_the_share_read_of_a_long_file_follows_the_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(300_000).hex()
    rows = [{"text": noise[at : at + 600]} for at in range(0, len(noise), 600)]
    (tmp_path / "rows.jsonl").write_bytes(as_lines(rows))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(as_lines(rows)))
    for path in ("rows.jsonl", "rows.jsonl.gz"):
        done = [raw.done for raw in read_rows(Source(name="s", path=path), folder=tmp_path)]
        assert done[len(done) // 2] == pytest.approx(0.5, abs=0.15)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def corrupt(content: bytes) -> bytes:
    """A sound header, then a deflate block of a type that does not exist."""
    return content[:10] + b"\x07" + content[11:]


def test_the_corrupt_stream_of_these_tests_is_what_zlib_refuses() -> None:
    with pytest.raises(zlib.error):
        gzip.decompress(corrupt(gzip.compress(as_lines(ROWS))))


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("r.jsonl.gz", truncated(gzip.compress(as_lines(ROWS))), r"r\.jsonl\.gz: not readable \(Compressed"),
        ("r.jsonl.gz", corrupt(gzip.compress(as_lines(ROWS))), r"r\.jsonl\.gz: not readable \(Error -3"),
        ("r.jsonl.gz", b"no gzip", r"r\.jsonl\.gz: not readable \(Not a gzipped"),
        ("r.json", b'{"text": "a"}', r"r\.json: found dict, wanted a list of rows"),
        ("r.json", b'[{"text": "a"', r"r\.json: not JSON"),
        ("r.json", b'[{"text": "\xff"}]', r"r\.json: not JSON"),
        ("r.json", b"[" * 100_000, r"r\.json: not JSON"),
        ("r.parquet", b"no parquet", r"source 's': r\.parquet: could not be loaded"),
        ("r.parquet", b"", r"source 's': r\.parquet: could not be loaded"),
        (
            "./r.csv",
            b"text\na\n",
            r"source 's': \./r\.csv: wanted \.json, \.json\.gz, \.jsonl, \.jsonl\.gz, \.parquet",
        ),
        ("r.jsonl", None, r"r\.jsonl: not readable \(.*No such file"),
        ("r.jsonl.gz", None, r"r\.jsonl\.gz: not readable \(.*No such file"),
        ("r.json", None, r"r\.json: not readable \(.*No such file"),
        ("r.parquet", None, r"source 's': r\.parquet: could not be loaded"),
        ("./r", None, r"source 's': \./r: wanted \.json"),
    ],
)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_source_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, path: str, content: bytes | None, message: str, fraction: float
) -> None:
    if content is not None:
        (tmp_path / path).write_bytes(content)
    with pytest.raises(Refusal, match=message) as caught:
        read(tmp_path, path, keep_fraction=fraction)
    assert "\n" not in str(caught.value)


def torn_parquet(path: Path) -> None:
    """A Parquet file whose footer is sound and whose pages are not."""
    pq.write_table(
        pa.table({"text": [str(number) * 50 for number in range(999)]}), path, compression="snappy"
    )
    content = bytearray(path.read_bytes())
    content[200 : len(content) // 2] = bytes(len(content) // 2 - 200)
    path.write_bytes(content)


def parquet_of_no_text(path: Path) -> None:
    """A column that says it is text and holds bytes that are none."""
    _, offsets, content = pa.array([b"fine", b"\xff"]).buffers()
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(2, offsets, content)}), path)


@pytest.mark.parametrize("write", [torn_parquet, parquet_of_no_text])
def test_a_table_that_is_damaged_inside_is_refused_by_name(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    write(tmp_path / "r.parquet")
    with pytest.raises(Refusal, match=r"source 's': r\.parquet: could not be loaded") as caught:
        read(tmp_path, "r.parquet")
    assert "\n" not in str(caught.value)


def test_a_saved_set_that_is_damaged_is_refused_by_name(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    whole = file.read_bytes()
    for content in (truncated(whole), b"no arrow", whole.replace("ä999".encode(), b"\xff\xff999")):
        assert content != whole
        file.write_bytes(content)
        with pytest.raises(Refusal, match=r"source 's': \./saved: could not be loaded"):
            read(tmp_path, "./saved")
    file.write_bytes(whole)
    about = tmp_path / "saved" / "dataset_info.json"
    about.write_text(about.read_text().replace('"completion"', '"answer"'))
    with pytest.raises(Refusal, match=r"source 's': \./saved: could not be loaded \(Keys mismatch") as caught:
        read(tmp_path, "./saved")
    assert "\n" not in str(caught.value)
    (tmp_path / "saved" / "state.json").unlink()
    with pytest.raises(Refusal, match=r"source 's': \./saved: could not be loaded"):
        read(tmp_path, "./saved")


def test_a_split_that_is_not_there_is_refused_with_those_that_are(folder: Path) -> None:
    with pytest.raises(Refusal, match="source 's': split: found test, train, wanted 'validation'"):
        read(folder, "./splits", split="validation")


def test_options_that_a_generator_refuses_are_refused_with_the_source() -> None:
    source = Source(name="s", generator="needles", num_rows=1, options={"num_needles": 1})
    with pytest.raises(Refusal, match=r"source 's': .*num_needles"):
        next(read_rows(source, folder=Path()))


def test_files_are_known_by_their_content_and_generators_by_their_recipe(
    folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder, tmp_path / "own")

    def pinned(path: str) -> Any:
        return sources.pin(Source(name="s", path=path), folder)[1]

    (folder / "copy.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    assert pinned("copy.jsonl") == pinned("rows.jsonl")
    assert pinned("rows.jsonl") != pinned("rows.json")
    before = pinned("./splits")
    (folder / "splits" / "note").write_text("more")
    assert pinned("./splits") != before
    assert sources.pin(Source(name="s", generator="needles", num_rows=1), folder)[1] is None
    with pytest.raises(
        Refusal, match=r"source 's': .*none\.jsonl does not exist; paths count from the recipe"
    ):
        pinned("none.jsonl")


def test_the_examples_in_the_text_are_true() -> None:
    assert doctest.testmod(sources).failed == 0
