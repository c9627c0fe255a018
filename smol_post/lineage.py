"""`smol-post lineage RUN`: what a run was made from, down to the base, and whether all of it still holds.

    smol-post lineage runs/tiny/merge --verify

Reads manifests; with --verify every file that they have a digest of: weights and tokenizers, soups, the
manifests themselves, prepared data in the cache, local data files. Parents are relative to the run, so a
tree that was moved or copied holds as well.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from smol_post import inputs, manifest
from smol_post.plan import CACHE
from smol_post.refusal import Refusal
from smol_post.report import short
from smol_post.runner import EXIT_FAILED, EXIT_OK, Parser, refuse

CHANGED, NOTE = "changed", "note"  # note: what a tree can do without, and could not be checked


@dataclass
class Node:
    """A run of the tree, or a leaf: a folder that is no run of ours, or a checkpoint of the Hub.

    name: its folder, from the run that was asked about. parents: (as the manifest has them, node).
    """

    name: str
    folder: Path | None
    manifest: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    parents: list[tuple[dict[str, Any], "Node"]] = field(default_factory=list)


def read_tree(run_dir: Path) -> dict[str, Node]:
    """Name -> node, each run once, children before their parents; the first is the run itself, ".".

    What cannot be read is a leaf with its `problem`.
    """
    start, found = run_dir.absolute(), dict[str, Node]()

    def visit(name: str, folder: Path | None, *, ours: bool) -> Node:
        if name in found:
            return found[name]
        node = found[name] = Node(name, folder)
        if folder is None or not (ours or manifest.is_whole(folder)):
            node.problem = "" if folder is None or folder.is_dir() else f"{folder}: is not there any more"
            return node
        try:
            node.manifest = manifest.read_manifest(folder)
        except Refusal as refusal:
            node.problem = str(refusal) if (folder / manifest.MANIFEST).exists() else f"{folder}: is no run"
        if node.manifest and not node.manifest.keys() >= {"digest", "files", "recipe"}:
            node.problem, node.manifest = f"{folder / manifest.MANIFEST}: says too little, was edited", {}
        for one in node.manifest.get("parents", []):
            path = one["path"]
            if path.startswith("../"):  # of `../merge/soup` the run is ../merge
                place = folder.parent / path.split("/")[1]
                parent = visit(os.path.relpath(place, start), place, ours=True)
            elif path.startswith(("/", "~")):
                parent = visit(path, Path(path).expanduser(), ours=False)
            else:
                parent = visit(one["digest"].removeprefix("hub:"), None, ours=False)
            node.parents.append((one, parent))
        return node

    visit(".", start, ours=True)
    return found


def show(node: Node, path: str, child: Node | None, depth: int, seen: set[str]) -> Iterator[str]:
    """The lines of a run and of all it comes from; what was shown already is one line."""
    about, indent = node.manifest, "  " * depth
    if not about:
        yield f"{indent}{path}  {node.problem or 'no run of ours'}"
        return
    title = f"{indent}{path}  ({about.get('stage')})  {short(about.get('digest'))}"
    if node.name in seen:
        yield f"{title}  as above"
        return
    seen.add(node.name)
    yield f"{title}  {about.get('finished', '')}"
    number = about.get("num_processes", 1)
    yield (
        f"{indent}    {about.get('recipe_file')}  seed {about.get('seed')}  "
        f"{number} process{'es' if number != 1 else ''}"
    )
    if data := about.get("data"):
        revisions = [f"{name}@{one}" for name, one in data["revisions"].items() if isinstance(one, str)]
        yield f"{indent}    data {'  '.join([short(data['fingerprint']), *revisions])}"
    ours, theirs = about.get("versions", {}), child.manifest.get("versions", {}) if child else {}
    if other := [f"{name} {one}" for name, one in ours.items() if theirs.get(name) != one]:
        yield f"{indent}    {'  '.join(other)}"
    for one, parent in node.parents:
        if parent.folder is None:
            yield f"{indent}  {parent.name}  (hub)"
        else:
            yield from show(parent, one["path"], node, depth + 1, seen)


def check(node: Node, contents: Callable[[Path], dict[str, str]]) -> Iterator[tuple[str, str]]:
    """("changed" or "note", what) for all that is not as the manifest of a run says; every file is read.

    contents: name -> digest of the files of a checkpoint, which is asked for once by itself and each child.
    """
    if node.problem:
        yield CHANGED, node.problem
    if not node.manifest or node.folder is None:
        return
    folder, about = node.folder, node.manifest
    place = folder / manifest.MANIFEST
    if not (holds := manifest.record_holds(about)):
        yield (
            (NOTE, f"{place}: an older one, without a digest of itself; what it says of inputs is believed")
            if holds is None
            else (CHANGED, f"{place}: was edited since the run ended")
        )
    if about["digest"] != manifest.content_digest(about["files"]):
        yield CHANGED, f"{place}: its digest is not that of its files"
    for inside, wanted in ((folder, about["files"]), (folder / manifest.SOUP, about.get("soup", {}))):
        found = contents(inside) if wanted and inside.is_dir() else {}
        for name, what in manifest.changed_files(wanted, found).items():
            yield CHANGED, f"{inside / name}: {what}"
    for one, parent in node.parents:
        if parent.folder and not parent.problem:
            now = parent.folder / "/".join(one["path"].split("/")[2:] if one["path"][:3] == "../" else [])
            if one["digest"] != manifest.content_digest(contents(now) if now.is_dir() else {}):
                yield CHANGED, f"{folder}: parent {one['path']} has other contents than it was made from"
    yield from _check_data(folder, about)


def _check_data(folder: Path, about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Prepared data in the cache beside a run, and the local files that it was made from."""
    packs = [about["data"]["fingerprint"]] if about.get("data") else []
    cached = [("packs", key.removeprefix("sha256:")[:24]) for key in packs]
    for kind, name in cached + [("documents", one) for one in about.get("documents", [])]:
        place = folder.parent / CACHE / kind / name
        if not place.is_dir():
            yield NOTE, f"{place}: prepared data, not there any more and not checked"
        for what in manifest.broken(place) if place.is_dir() else []:
            yield CHANGED, f"{place}: prepared data: {what}; remove it, it is made anew"
    known = about.get("inputs", {}).get("files", {})
    try:
        now = inputs.files(about["recipe"], inputs.located(folder, about, "recipe").parent) if known else {}
    except Refusal as refusal:
        yield CHANGED, str(refusal)
        return
    found = {name: manifest.digest_file(path) for name, path in now.items() if path.is_file()}
    for name, what in manifest.changed_files(known, found).items():
        if what == "is missing":
            yield NOTE, f"{folder}: {inputs.named(name)}, not there any more and not checked"
        else:
            yield CHANGED, f"{folder}: {inputs.named(name)} {what}"


def lineage(argv: list[str]) -> int:
    """Print the tree of a run; with --verify hold everything against its digests."""
    parser = Parser(prog="smol-post lineage", description=lineage.__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, such as runs/tiny/merge")
    parser.add_argument("--verify", action="store_true", help="read every file again")
    parser.add_argument("--json", action="store_true", help="JSON for programs")
    arguments = parser.parse_args(argv)
    if not manifest.is_whole(arguments.run):
        return refuse(Refusal(f"{arguments.run}: no whole run; give a run directory such as runs/tiny/merge"))
    try:
        return _tell(arguments)
    except manifest.EDITED as error:
        return refuse(
            Refusal(f"{arguments.run}: a manifest of its tree was edited ({error!r}); make that run again")
        )


def _tell(arguments: argparse.Namespace) -> int:
    tree = read_tree(arguments.run)
    if tree["."].problem:
        return refuse(Refusal(tree["."].problem))
    contents = cache(manifest.content_files)
    found = {node.name: list(check(node, contents)) for node in tree.values() if arguments.verify}
    failed = any(kind == CHANGED for each in found.values() for kind, _ in each)
    if arguments.json:
        said = [
            {
                "run": node.name,
                **{key: node.manifest.get(key) for key in _KEYS if node.manifest},
                "parents": [one | {"run": parent.name} for one, parent in node.parents],
                CHANGED: [what for kind, what in found.get(node.name, []) if kind == CHANGED],
                NOTE: [what for kind, what in found.get(node.name, []) if kind == NOTE],
            }
            for node in tree.values()
        ]
        print(json.dumps({"verified": arguments.verify, "holds": not failed, "runs": said}, indent=2))
        return EXIT_FAILED if failed else EXIT_OK
    print("\n".join(show(tree["."], arguments.run.resolve().name, None, 0, set())))
    for name, each in found.items():
        lines = [f"{kind}  {what}" for kind, what in each]
        if not any(kind == CHANGED for kind, _ in each):
            lines.append(f"ok       {tree[name].folder or f'{name}: on the Hub, named by its commit'}")
        print("\n".join(lines))
    return EXIT_FAILED if failed else EXIT_OK


_KEYS = ("stage", "digest", "recipe_file", "seed", "data", "versions", "finished", "num_processes", "inputs")
