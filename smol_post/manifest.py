"""What a run is made of: digests of files, the manifest, and the state of a run that is not whole yet.

`manifest.json` is written last, so its presence means that the run is whole. A checkpoint's digest covers the
files that make it what it is (weights, configuration, tokenizer, template), not its logs:

    digest = sha256 over the sorted lines "<sha256 of file>  <name>" of those files
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from smol_post.refusal import Refusal, describe

SCHEMA = 1
MANIFEST = "manifest.json"
STATE = "state.json"
CHECKPOINTS = "checkpoints"  # of a run under way, and those its recipe keeps
SEAL = "whole.json"  # of a checkpoint under way, or a folder of the data cache
SOUP = "soup"  # inside a merge: the average before the last merge
GATES = "gates"  # beside the evals: gates_<run>.json, what a run's recipe demands of it
VERIFY = "verify.json"  # what was proved before step 1
# What is read again of state.json and of manifest.json.
RUN = {"fingerprint": str, "recipe": dict[str, Any], "parents": list[dict[str, Any]]}
WHOLE = {**RUN, "stage": str, "files": dict[str, str], "digest": str}
EDITED = (LookupError, TypeError, AttributeError)  # over the rest of what they say, if that was by hand
_AGAIN = "remove the run and make it again"
_SHOULD = "Input should be "
_NOT_CONTENT = {MANIFEST, STATE, VERIFY, SEAL, "bad_batch.json", "instruments.json", "trainer_state.json"}
_CONTENT_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "mergekit",
    "peft",
    "smol-post",
)


def digest_text(text: str) -> str:
    """`sha256:...` of a text."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def digest_tree(tree: Any) -> str:
    """`sha256:...` of a JSON-like value, independent of the order of keys."""
    return digest_text(
        json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    )


def digest_file(path: Path) -> str:
    """`sha256:...` of a file's bytes; Refusal for a pipe or device, which would never end."""
    if not path.is_file():
        raise Refusal(f"{path}: is no file that can be read whole (a pipe or device); give a file")
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def content_files(folder: Path) -> dict[str, str]:
    """Name -> digest of the files that make `folder` the checkpoint it is."""
    return {
        path.name: digest_file(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _CONTENT_SUFFIXES and path.name not in _NOT_CONTENT
    }


def content_digest(files: Mapping[str, str]) -> str:
    """The digest of a checkpoint from the digests of its files."""
    return digest_text("\n".join(f"{digest}  {name}" for name, digest in sorted(files.items())))


def is_whole(run_dir: Path) -> bool:
    """Whether the run ended well: its manifest is there."""
    return (run_dir / MANIFEST).is_file()


def read_json(
    path: Path,
    *,
    remedy: str = _AGAIN,
    wanted: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """A JSON object of ours; Refusal, with what to do, where the file is missing or damaged.

    `wanted`: keys that it must have, and the types of their values.
    """
    if not path.is_file():
        raise Refusal(f"{path}: no such file, so this run is not whole; finish the run first")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise Refusal(f"{path}: not readable as JSON; {remedy}") from None
    if not isinstance(found, dict):
        raise Refusal(f"{path}: found {type(found).__name__}, wanted an object; {remedy}")
    _check(path, found, wanted, remedy)
    return found


def _check(path: Path, found: dict[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Refusal where what was read from `path` lacks a key of `wanted`, or has another type there."""
    for key, kind in wanted.items():
        try:
            TypeAdapter(kind).validate_python(found.get(key), strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            where, wish = ".".join(map(str, (key, *problem["loc"]))), problem["msg"].removeprefix(_SHOULD)
            raise Refusal(
                f"{path}: {where}: found {describe(problem['input'])}, wanted {wish}; {remedy}"
            ) from None


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of a whole run; Refusal where there is none or it is not readable."""
    path = run_dir / MANIFEST
    found = read_json(path)
    if found.get("schema") != SCHEMA:
        raise Refusal(f"{path}: found schema {found.get('schema')!r}, wanted {SCHEMA}; make the run again")
    _check(path, found, WHOLE, _AGAIN)
    return found


def note(run_dir: Path, **facts: Any) -> None:
    """Add to the state of a run under way; nothing where there is no state, as of what is only verified."""
    path = run_dir / STATE
    if path.is_file():
        write_json(path, read_json(path) | facts)


def write_manifest(run_dir: Path, tree: dict[str, Any]) -> None:
    """Write the manifest, with a digest over all that it says (`record`)."""
    tree = json.loads(json.dumps(tree, default=str))  # as it will be read
    write_json(run_dir / MANIFEST, {**tree, "record": digest_tree(tree)})


def record_holds(manifest: Mapping[str, Any]) -> bool | None:
    """Whether a manifest says what was written; None where it is an older one, which cannot tell."""
    if "record" not in manifest:
        return None
    return manifest["record"] == digest_tree({key: one for key, one in manifest.items() if key != "record"})


def changed_files(wanted: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """Name -> "is missing", "was added" or "has changed", of files whose digests are not those wanted."""
    what = {name: "has changed" if name in wanted else "was added" for name in found}
    return {
        name: what.get(name, "is missing")
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name)
    }


def verify(run_dir: Path) -> dict[str, Any]:
    """The manifest, after every content file was hashed again and held against it."""
    manifest = read_manifest(run_dir)
    if record_holds(manifest) is False:
        raise Refusal(
            f"{run_dir / MANIFEST}: has changed since the run ended; restore it or make the run again"
        )
    for name, what in changed_files(manifest["files"], content_files(run_dir)).items():
        raise Refusal(f"{run_dir / name}: {what} since the run ended; restore it or make the run again")
    if manifest["digest"] != content_digest(manifest["files"]):
        raise Refusal(f"{run_dir / MANIFEST}: digest: is not that of its files; make the run again")
    return manifest


def write_json(path: Path, tree: Any) -> None:
    """`write_text` of a tree."""
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: what is written later is there later."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints of a run under way, oldest first, whole or not."""
    found = [(path.name[11:], path) for path in (run_dir / CHECKPOINTS).glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())  # no copy of one's own


def seal(folder: Path) -> None:
    """Write down sizes and digests of all files of a folder, last: what `broken` then holds it against."""
    files = _files(folder)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        for _ in pool.map(sync, files.values()):
            pass
        digests = list(pool.map(digest_file, files.values()))
    found = zip(files.items(), digests, strict=True)
    tree = {name: {"size": path.stat().st_size, "digest": digest} for (name, path), digest in found}
    write_json(folder / SEAL, {"files": tree})


def broken(folder: Path, *, rehash: bool = True) -> list[str]:
    """What is not as it was sealed, a phrase a file; [] where all is. `rehash`: digests too, not only sizes.

    A file that was added breaks nothing.
    """
    try:
        files = json.loads((folder / SEAL).read_text())["files"]
        wanted = {name: (one["size"], one["digest"]) for name, one in files.items()}
    except FileNotFoundError:
        return ["it was never finished"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{SEAL} is not readable"]
    found = _files(folder)
    lost = [f"{name} is missing" for name in wanted if name not in found]
    there = {name: path for name, path in found.items() if name in wanted}
    lost += [
        f"{name} has {path.stat().st_size:,} bytes, not {wanted[name][0]:,}"
        for name, path in there.items()
        if path.stat().st_size != wanted[name][0]
    ]
    if lost or not rehash:
        return lost
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(there, pool.map(digest_file, there.values()), strict=True))
    return [f"{name} has changed" for name, digest in digests.items() if digest != wanted[name][1]]


def is_sealed(folder: Path) -> bool:
    """Whether a folder is sealed and still has all its files, each of its size."""
    return not broken(folder, rehash=False)


def _files(folder: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
