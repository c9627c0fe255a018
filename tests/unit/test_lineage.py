"""A run's lineage is told from manifests alone, and held against every byte when asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smol_post import manifest
from smol_post.__main__ import dispatch
from smol_post.plan import Job
from tests.unit import trees

Ran = tuple[int, list[str]]


@pytest.fixture
def tree(recipe_folder: Path, tmp_path: Path) -> dict[str, Job]:
    trees.with_local_inputs(recipe_folder)
    return trees.make_tree(recipe_folder, tmp_path / "place" / "runs")


@pytest.fixture
def lineage(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*words: object) -> Ran:
        capsys.readouterr()
        code = dispatch("lineage", [str(word) for word in words])
        said = capsys.readouterr()
        return code, (said.out + said.err).splitlines()

    return call


def changes(lines: list[str]) -> list[str]:
    return [line.removeprefix("changed  ") for line in lines if line.startswith("changed")]


def test_the_tree_reaches_the_base_and_shows_a_parent_of_two_once_in_full(
    tree: dict[str, Job], lineage: Callable[..., Ran]
) -> None:
    code, lines = lineage(tree["merge"].run_dir)
    text = "\n".join(lines)
    assert code == 0
    for name, job in tree.items():
        told = [line for line in lines if f" seed {job.recipe.model_dump().get('seed', 0)}" in line]
        digest = manifest.read_manifest(job.run_dir)["digest"].removeprefix("sha256:")[:8]
        full = [line for line in lines if f"{name}  ({job.recipe.stage})  {digest}  20" in line]
        assert len(full) == 1, text
        assert any(str(job.recipe_file) in line for line in told)
    above = [line.strip().split()[0] for line in lines if line.endswith("as above")]
    assert above == ["../sft", "../long_context_1"]
    assert text.count("tulu@0123abc") == 6
    assert text.count("torch ") == 1, "versions are shown where they differ from the child's"


def test_versions_are_shown_again_where_they_differ(
    tree: dict[str, Job], lineage: Callable[..., Ran]
) -> None:
    path = tree["mid"].run_dir / "manifest.json"
    versions = json.loads(path.read_text())["versions"] | {"torch": "2.12.1"}
    trees.rewrite(path, versions=versions)
    lines = lineage(tree["sft"].run_dir)[1]
    (at,) = [number for number, line in enumerate(lines) if "../mid" in line]
    mid, parent = lines[at : at + 4], lines[at + 4 : at + 8]
    assert [line.strip() for line in mid if "torch" in line] == ["torch 2.12.1"]
    assert any(f"torch {json.loads((tree['sft'].run_dir / 'manifest.json').read_text())['versions']['torch']}"
               in line for line in parent)  # fmt: skip


def test_an_untouched_tree_holds(tree: dict[str, Job], lineage: Callable[..., Ran]) -> None:
    code, lines = lineage(tree["merge"].run_dir, "--verify")
    assert (code, changes(lines)) == (0, [])
    assert {line.split("/")[-1] for line in lines if line.startswith("ok")} == set(trees.RUNS)


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_a_tree_holds_wherever_it_was_moved_and_wherever_the_command_is_typed(
    tree: dict[str, Job],
    lineage: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    move: Any,
) -> None:
    shutil.copytree(tmp_path / "recipe", tmp_path / "far" / "recipe")
    (tmp_path / "far" / "away").mkdir()
    move(tmp_path / "place" / "runs", tmp_path / "far" / "away" / "runs")
    monkeypatch.chdir(tmp_path / "far" / "away" / "runs" / "sft")
    for run in ("../merge", tmp_path / "far" / "away" / "runs" / "merge"):
        code, lines = lineage(run, "--verify")
        assert (code, changes(lines)) == (0, [])
        assert not [line for line in lines if line.startswith("note")], (
            "data files are found beside the recipe"
        )
    (tmp_path / "far" / "recipe" / "chats.jsonl").write_text("other")
    assert changes(lineage(".", "--verify")[1]) == [f"{Path.cwd()}: data file sources.chats has changed"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


TAMPERED: dict[str, tuple[Callable[[dict[str, Job]], None], list[str]]] = {
    "a flipped byte": (
        lambda tree: flip(tree["sft"].run_dir / "model.safetensors"),
        [
            "apo_seed0: parent ../sft has other contents than it was made from",
            "apo_seed1: parent ../sft has other contents than it was made from",
            "sft/model.safetensors: has changed",
        ],
    ),
    "a file that was added": (
        lambda tree: (tree["apo_seed1"].run_dir / "tokenizer.json").touch(),
        [
            "apo_seed1/tokenizer.json: was added",
            "merge: parent ../apo_seed1 has other contents than it was made from",
        ],
    ),
    "a file that is missing": (
        lambda tree: (tree["merge"].run_dir / "config.json").unlink(),
        ["merge/config.json: is missing"],
    ),
    "an edited seed": (
        lambda tree: trees.rewrite(tree["base"].run_dir / "manifest.json", seed=7),
        ["base/manifest.json: was edited since the run ended"],
    ),
    "the soup": (
        lambda tree: flip(tree["merge"].run_dir / "soup" / "model.safetensors"),
        ["merge/soup/model.safetensors: has changed"],
    ),
    "a parent that was made again": (
        lambda tree: trees.remake(tree["apo_seed0"], weights="other"),
        ["merge: parent ../apo_seed0 has other contents than it was made from"],
    ),
    "a parent that is gone": (
        lambda tree: shutil.rmtree(tree["base"].run_dir),
        ["base: is no run"],
    ),
    "packs": (
        lambda tree: flip(tree["sft"].run_dir.parent / "cache" / "documents" / "of_sft" / "tokens.bin"),
        ["documents/of_sft: prepared data: tokens.bin has changed; remove it, it is made anew"],
    ),
    "a data file": (
        lambda tree: flip(tree["sft"].recipe_file.parent / "chats.jsonl"),
        ["sft: data file sources.chats has changed"],
    ),
    "a file in a folder of data": (
        lambda tree: (tree["mid"].recipe_file.parent / "rows" / "b.jsonl").touch(),
        ["mid: data file sources.traces/b.jsonl was added"],
    ),
    "a template": (
        lambda tree: flip(tree["sft"].recipe_file.parent / "mine.jinja"),
        ["sft: template has changed"],
    ),
    "a text of the gate's suite": (
        lambda tree: flip(tree["sft"].recipe_file.parent / "texts.jsonl"),
        ["merge: gate.suite/texts.jsonl has changed"],
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_changed_is_named_and_nothing_else(
    tree: dict[str, Job], lineage: Callable[..., Ran], what: str
) -> None:
    tamper, wanted = TAMPERED[what]
    tamper(tree)
    code, lines = lineage(tree["merge"].run_dir, "--verify")
    found = sorted(changes(lines))
    assert code == 1
    assert len(found) == len(wanted), found
    for line, end in zip(found, wanted, strict=True):
        assert line.endswith(f"/{end}")
    assert lineage(tree["merge"].run_dir)[0] == 0, "without --verify nothing is read again"


def test_all_that_changed_is_told_at_once(tree: dict[str, Job], lineage: Callable[..., Ran]) -> None:
    for what in ("an edited seed", "the soup", "a data file", "a file that is missing"):
        TAMPERED[what][0](tree)
    assert len(changes(lineage(tree["merge"].run_dir, "--verify")[1])) == 4


def test_what_is_not_there_any_more_is_noted_and_no_change(
    tree: dict[str, Job], lineage: Callable[..., Ran], recipe_folder: Path
) -> None:
    shutil.rmtree(recipe_folder)
    shutil.rmtree(tree["merge"].run_dir.parent / "cache")
    code, lines = lineage(tree["merge"].run_dir, "--verify")
    notes = [line for line in lines if line.startswith("note")]
    assert (code, changes(lines)) == (0, [])
    assert sum("prepared data" in line for line in notes) == 12
    assert sum("data file sources.chats" in line for line in notes) == 1


def test_a_manifest_of_before_is_believed_and_said_to_be_so(
    tree: dict[str, Job], lineage: Callable[..., Ran]
) -> None:
    for job in tree.values():
        path = job.run_dir / "manifest.json"
        trees.rewrite(path, record=None, inputs=None, origin=None, documents=None, soup=None)
    code, lines = lineage(tree["merge"].run_dir, "--verify")
    assert (code, changes(lines)) == (0, [])
    assert sum("an older one, without a digest of itself" in line for line in lines) == 7


def test_a_parent_on_the_hub_is_named_by_its_commit_and_a_plain_folder_is_read_again(
    recipe_folder: Path, tmp_path: Path, lineage: Callable[..., Ran]
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    entry = {"name": "merge", "stage": "merge", "recipe": "merge.yaml", "parents": [str(plain), "/nowhere"]}
    trees.edit(recipe_folder / "pipeline.yaml", runs=[entry], evals=None)
    (job,) = trees.jobs_of(recipe_folder, tmp_path / "runs").values()
    commit = "a" * 40
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "model.safetensors").write_text("merged")
    files = manifest.content_files(job.run_dir)
    parents = [
        {"path": str(plain), "digest": manifest.content_digest(manifest.content_files(plain))},
        {"path": "org/name@main", "digest": f"hub:org/name@{commit}"},
    ]
    about = {
        "schema": 1,
        "fingerprint": "",
        "stage": "merge",
        "recipe": {},
        "files": files,
        "parents": parents,
    }
    manifest.write_manifest(job.run_dir, about | {"digest": manifest.content_digest(files)})
    code, lines = lineage(job.run_dir, "--verify")
    assert code == 0
    assert f"org/name@{commit}  (hub)" in "\n".join(lines)
    (plain / "config.json").write_text("{ }")
    assert changes(lineage(job.run_dir, "--verify")[1]) == [
        f"{job.run_dir}: parent {plain} has other contents than it was made from"
    ]


def test_programs_get_every_run_once_with_what_changed(
    tree: dict[str, Job], capsys: pytest.CaptureFixture[str]
) -> None:
    flip(tree["merge"].run_dir / "config.json")
    assert dispatch("lineage", [str(tree["merge"].run_dir), "--verify", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["runs"][0]["run"] == "."
    assert {one["run"] for one in said["runs"][1:]} == {f"../{name}" for name in trees.RUNS[:-1]}
    assert [one["run"] for one in said["runs"][0]["parents"]] == [
        "../apo_seed0", "../apo_seed1", "../long_context_1",
    ]  # fmt: skip
    assert (said["holds"], len(said["runs"][0]["changed"])) == (False, 1)
    sft = next(one for one in said["runs"] if one["run"] == "../sft")
    assert sft["inputs"]["files"].keys() == {"sources.chats", "chat_template"}
    assert sft["inputs"]["parents"].keys() == {"../mid"}


@pytest.mark.parametrize("where", ["", "nowhere"])
def test_what_is_no_run_is_refused(tree: dict[str, Job], lineage: Callable[..., Ran], where: str) -> None:
    code, lines = lineage(tree["merge"].run_dir.parent / where)
    assert code == 2
    assert len(lines) == 1
    assert "no whole run; give a run directory" in lines[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": 1, "files": {}}'])
def test_a_manifest_that_says_nothing_is_a_change_and_no_traceback(
    tree: dict[str, Job], lineage: Callable[..., Ran], text: str
) -> None:
    (tree["mid"].run_dir / "manifest.json").write_text(text)
    code, lines = lineage(tree["merge"].run_dir, "--verify")
    assert code == 1
    assert len([line for line in changes(lines) if "mid/manifest.json" in line]) == 1
    (tree["merge"].run_dir / "manifest.json").write_text(text)
    assert lineage(tree["merge"].run_dir)[0] == 2
