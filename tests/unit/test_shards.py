"""A source made in shards is the source made at once, and what goes wrong in one shard is told as it is."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smol_post
from smol_post import data, documents, manifest, preparation, shards
from smol_post.config import ApoRecipe, MidRecipe, Source, Training
from smol_post.data import Prepared
from smol_post.documents import Store
from smol_post.refusal import Refusal
from smol_post.vocabulary import Vocabulary

Row = dict[str, Any]
Make = Callable[..., Prepared]
SAY = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
GOOD: list[Row] = [{"text": f"row {number}"} for number in range(60)]
BAD: list[Row] = [{"text": 5}, {"title": "x"}, {"messages": []}]
SOURCES = [
    Source(name="rows", path="rows.jsonl", keep_fraction=0.6, seed=1),
    Source(name="chats", generator="dual_mode_chats", num_rows=40, seed=1, keep_fraction=0.9),
    Source(name="needles", generator="needles", num_rows=10, seed=1, repeat=2),
]
PAIRS = [Source(name="pairs", generator="preference_pairs", num_rows=30, seed=1, keep_fraction=0.7)]


def write_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))


def in_process(order: Callable[[list[int]], Sequence[int]] = list) -> shards.MakeExecutor:
    """datatrove's executor, with the shards left to make in an order, one after another, in this process."""

    class InProcess(shards.LocalExecutor):
        def run(self) -> None:
            for rank in order(self.get_incomplete_ranks()):
                self._run_for_rank(rank, local_rank=1)

    return lambda pipeline, number, folder: InProcess(pipeline, number, 1, str(folder))


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Make:
    """Prepare a recipe, in a cache of its own, in `number` shards (0: as a whole)."""
    write_lines(tmp_path / "rows.jsonl", GOOD[:20] + BAD + GOOD[20:40] + BAD[:2] + GOOD[40:])

    def made(
        number: int, *, executor: shards.MakeExecutor | None = None, cache: str = "", **changes: Any
    ) -> Prepared:
        words = Vocabulary(tokenizer, tokenizer.chat_template, "<|endoftext|>", [])
        given: Row = {"max_tokens": 512, "global_batch_size": 1, "num_steps": 1, "on_bad_rows": "skip"}
        kind = ApoRecipe if changes.get("sources") == PAIRS else MidRecipe
        stage = "apo" if kind is ApoRecipe else "mid"
        recipe: Training = kind(stage=stage, **{**given, "sources": SOURCES, **changes})
        cache_dir = tmp_path / (cache or f"cache{len(list(tmp_path.iterdir()))}")
        for source in recipe.sources if number else []:
            task = data.task_of(source, recipe, words, folder=tmp_path)
            assert shards.prepare(
                task, cache_dir=cache_dir, num_shards=number, executor=executor or in_process()
            )
        return data.prepare(recipe, words, folder=tmp_path, cache_dir=cache_dir)

    return made


def without_seconds(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_seconds(value) for key, value in tree.items() if key != "seconds"}
    return tree


def tokens_of(store: Store) -> list[int]:
    return [token for path in store.token_files for token in np.fromfile(path, np.int32).tolist()]


def assert_same(one: Prepared, other: Prepared) -> None:
    """Address by address, token by token, number by number."""
    assert one.ledger["fingerprint"] == other.ledger["fingerprint"]
    assert without_seconds(one.ledger) == without_seconds(other.ledger)
    assert one.index.to_dict() == other.index.to_dict()
    for mine, yours in zip(one.stores, other.stores, strict=True):
        assert mine.folder.name == yours.folder.name
        assert tokens_of(mine) == tokens_of(yours)
        assert np.array_equal(mine.records, yours.records)
        assert without_seconds(mine.ledger) == without_seconds(yours.ledger)
        assert list(mine.ledger["skipped"]) == list(yours.ledger["skipped"])
    for mine, yours in zip(one.dataset, other.dataset, strict=True):
        assert {key: np.asarray(value).tolist() for key, value in mine.items()} == {
            key: np.asarray(value).tolist() for key, value in yours.items()
        }


@pytest.mark.parametrize("number", [1, 2, 7, 13])
@pytest.mark.parametrize(
    "how", [{}, {"packing": "wrapped", "max_tokens": 64}, {"sources": PAIRS}], ids=["bfd", "wrapped", "pairs"]
)
def test_packs_ledgers_and_tokens_are_the_same_whatever_the_number_of_shards(
    make: Make, number: int, how: Row
) -> None:
    whole, made = make(0, **how), make(number, **how)
    assert_same(whole, made)
    assert {len(store.token_files) for store in made.stores} == {number}
    assert bool(whole.ledger["num_skipped_rows"]) == ("sources" not in how)


def test_shards_may_be_made_in_any_order(make: Make) -> None:
    assert_same(make(0), make(5, executor=in_process(lambda left: left[::-1])))


def test_nothing_is_left_beside_the_store_and_it_is_not_made_again(make: Make, tmp_path: Path) -> None:
    made = make(3, cache="cache")
    assert list((tmp_path / "cache" / "shards").iterdir()) == []
    before = {path: path.stat().st_mtime_ns for path in made.stores[0].folder.iterdir()}

    def never(left: list[int]) -> list[int]:
        raise AssertionError

    make(4, cache="cache", executor=in_process(never))
    assert {path: path.stat().st_mtime_ns for path in made.stores[0].folder.iterdir()} == before
    assert manifest.is_sealed(made.stores[0].folder)


def test_what_was_interrupted_is_made_again_alone(make: Make, tmp_path: Path) -> None:
    """Whatever datatrove believes: a shard whose file is lost counts as not made."""
    sources = SOURCES[1:2]

    def interrupted(left: list[int]) -> Any:
        yield from left[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(5, sources=sources, cache="cache", executor=in_process(interrupted))
    (folder,) = (tmp_path / "cache" / "shards").iterdir()
    assert sorted(path.name for path in folder.glob("completions/*")) == ["00000", "00001", "00002"]
    (folder / "00001" / "tokens.bin").unlink()
    written = {rank: (folder / f"0000{rank}" / "tokens.bin").stat() for rank in (0, 2)}
    asked: list[int] = []
    made = make(5, sources=sources, cache="cache",
                executor=in_process(lambda left: asked.extend(left) or left))  # fmt: skip
    assert asked == [1, 3, 4]
    assert_same(make(0, sources=sources), made)
    for rank, stat in written.items():
        now = made.stores[0].token_files[rank].stat()
        assert (now.st_mtime_ns, now.st_ino) == (stat.st_mtime_ns, stat.st_ino)


@pytest.mark.parametrize("order", [list, lambda left: left[::-1]], ids=["in order", "backwards"])
def test_the_earliest_bad_row_is_the_one_refused(make: Make, order: Any) -> None:
    with pytest.raises(Refusal) as whole:
        make(0, on_bad_rows="refuse", sources=SOURCES[:1])
    with pytest.raises(Refusal) as sharded:
        make(9, on_bad_rows="refuse", sources=SOURCES[:1], executor=in_process(order))
    assert str(sharded.value) == str(whole.value)
    assert "row 4" in str(whole.value)


def test_after_a_refusal_no_later_shard_is_begun_and_the_next_time_it_is_tried_again(
    make: Make, tmp_path: Path
) -> None:
    how: Row = {"on_bad_rows": "refuse", "sources": [Source(name="rows", path="rows.jsonl")], "cache": "c"}
    for _ in range(2):
        with pytest.raises(Refusal, match=r"row 41: text: found int, wanted text; mend"):
            make(9, **how)
        (folder,) = (tmp_path / "c" / "shards").iterdir()
        assert sorted(path.name for path in folder.iterdir() if manifest.is_sealed(path)) == [
            "00000",
            "00001",
        ]


def test_every_shard_has_masks_derived_a_second_way(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never fewer than without shards."""
    sound, checked = documents.chat.check_masks, []
    monkeypatch.setattr(documents, "_SAMPLE_ROWS", 4)
    monkeypatch.setattr(
        documents.chat, "check_masks", lambda *row, **how: checked.append(row) or sound(*row, **how)
    )
    numbers = []
    for number in (0, 1, 3):
        checked.clear()
        make(number, sources=SOURCES[1:2], loss_on="completion")
        numbers.append(len(checked))
    assert numbers == [4, 4, 12]


def test_a_source_without_documents_is_refused_as_a_whole_and_an_empty_shard_is_not(
    make: Make, tmp_path: Path
) -> None:
    sources = [Source(name="rows", path="rows.jsonl")]
    write_lines(tmp_path / "rows.jsonl", [*BAD * 3, *GOOD[:3]])
    assert_same(make(0, sources=sources), make(6, sources=sources))
    write_lines(tmp_path / "rows.jsonl", BAD * 3)
    said = []
    for number in (0, 4):
        with pytest.raises(Refusal, match=r"no rows to train on \(3 skipped: ") as caught:
            make(number, sources=sources)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_file_system_without_hard_links_is_enough(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", impossible)
    assert_same(make(0), make(3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shards", "0"], "--shards: found 0, wanted at least 1 and less"),
        (["--executor", "slurm"], "--executor slurm: found no --shards; add --shards N"),
        (["--executor", "slurm", "--shards", "2"], "--executor slurm: no partition given; add --partition"),
        (["--executor", "slurm", "--shards", "2", "--partition", "cpu"], "no sbatch on PATH"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(
    recipe_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", "/nowhere")
    assert preparation.prepare([str(recipe_folder / "base.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_without_datatrove_the_extra_to_install_is_named(
    recipe_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.delitem(sys.modules, "smol_post.shards")
    monkeypatch.delattr(smol_post, "shards")
    for name in [name for name in sys.modules if name.startswith("datatrove.")]:
        monkeypatch.delitem(sys.modules, name)
    assert preparation.prepare([str(recipe_folder / "base.yaml"), "--shards", "2"]) == 2
    error = capsys.readouterr().err
    assert error == "refused: --shards: datatrove is not installed; pip install 'smol_post[scale]'\n"
