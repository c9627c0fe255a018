"""A whole run is recognised, and any later change to it is seen."""

import json
from pathlib import Path

import pytest

from smol_post import manifest
from smol_post.refusal import Refusal

FILES = {"model.safetensors": "weights", "config.json": "{}", "chat_template.jinja": "{{ x }}"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    files = manifest.content_files(tmp_path)
    manifest.write_json(
        tmp_path / "manifest.json",
        {
            **{"schema": manifest.SCHEMA, "files": files, "digest": manifest.content_digest(files)},
            **{"stage": "sft", "fingerprint": "print", "recipe": {}, "parents": []},
        },
    )
    return tmp_path


def digest(folder: Path) -> str:
    return manifest.content_digest(manifest.content_files(folder))


def test_a_checkpoint_keeps_its_digest_when_logs_and_manifest_change(run_dir: Path) -> None:
    before = digest(run_dir)
    (run_dir / "train_log.jsonl").write_text("{}")
    (run_dir / "state.json").write_text("{}")
    (run_dir / "manifest.json").write_text("{}")
    (run_dir / "soup").mkdir()
    assert digest(run_dir) == before


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_checkpoint_changes_its_digest_with_any_file_that_makes_it(run_dir: Path, name: str) -> None:
    before = digest(run_dir)
    (run_dir / name).write_text("other")
    assert digest(run_dir) != before


def test_a_digest_sees_names_as_well_as_contents() -> None:
    assert manifest.content_digest({"a": "1", "b": "2"}) != manifest.content_digest({"a": "2", "b": "1"})
    assert manifest.content_digest({"a": "1", "b": "2"}) == manifest.content_digest({"b": "2", "a": "1"})


def test_verify_passes_what_is_untouched(run_dir: Path) -> None:
    assert manifest.is_whole(run_dir)
    assert manifest.verify(run_dir)["digest"] == digest(run_dir)


def test_verify_names_the_file_that_changed_is_missing_or_was_added(run_dir: Path) -> None:
    (run_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(Refusal, match=r"tokenizer\.json: was added"):
        manifest.verify(run_dir)
    (run_dir / "tokenizer.json").unlink()
    (run_dir / "model.safetensors").write_text("bit rot")
    with pytest.raises(Refusal, match=r"model\.safetensors: has changed"):
        manifest.verify(run_dir)
    (run_dir / "model.safetensors").unlink()
    with pytest.raises(Refusal, match=r"model\.safetensors: is missing"):
        manifest.verify(run_dir)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file, so this run is not whole"),
        ("{", "not readable as JSON"),
        ('{"schema": 99}', "found schema 99"),
        ("[]", "found list, wanted an object"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(Refusal, match=message):
        manifest.read_manifest(tmp_path)


class Unwritable:
    """Fails in the middle of being written."""

    def __str__(self) -> str:
        raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    manifest.write_json(path, {"old": 1})
    with pytest.raises(OSError, match="disk full"):
        manifest.write_json(path, {"new": [1] * 10_000, "then": Unwritable()})
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    manifest.write_json(path, {"old": 1})
    with path.open() as reader:
        manifest.write_json(path, {"new": 1})
        assert json.load(reader) == {"old": 1}
    assert json.loads(path.read_text()) == {"new": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_of_a_tree_is_independent_of_the_order_of_keys() -> None:
    assert manifest.digest_tree({"a": 1, "b": 2}) == manifest.digest_tree({"b": 2, "a": 1})
    assert manifest.digest_tree({"a": 1}) != manifest.digest_tree({"a": 1.5})


def test_versions_name_what_decides_a_run() -> None:
    assert {"python", "torch", "transformers", "trl", "tokenizers", "smol-post"} <= manifest.versions().keys()
