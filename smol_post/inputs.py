"""What a run is made of, by name, and as one digest: its fingerprint.

    recipe            without what does not change the run
    files             local data, template and suite of a gate: {"sources.chats/a.jsonl": digest, ...}
    parents           {"../mid": digest}
    smol_post         the package's version

A fingerprint that no longer holds makes a run stale, and `changes` says which of these has changed.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smol_post import loading, manifest, strict
from smol_post.refusal import Refusal

if TYPE_CHECKING:
    from smol_post.plan import Job, Parent

UNNAMED = "what was not recorded of it: data files, template, version, or keys that recipes have gained"


def files(recipe: dict[str, Any], folder: Path) -> dict[str, Path]:
    """The local files that decide a run by what is in them, present or not; `folder`: of its recipe."""
    found: dict[str, Path] = {}
    for source in recipe.get("sources", []):
        if source["path"] and strict.is_local(source["path"]):
            name, path = f"sources.{source['name']}", strict.local_path(source["path"], folder)
            inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else []
            found |= {f"{name}/{one.relative_to(path)}": one for one in inside}
            found |= {} if path.is_dir() else {name: path}
    template = recipe.get("chat_template")
    if template and template.endswith(".jinja"):
        found["chat_template"] = strict.local_path(template, folder)
    if recipe.get("gate"):
        suite = found["gate.suite"] = folder / recipe["gate"]["suite"]
        inner: Any = loading.load_recipe(suite) if suite.is_file() else None
        for one in inner.files() if inner else []:
            found[f"gate.suite/{os.path.relpath(one, suite.parent.resolve())}"] = Path(one)
    return found


def collect(
    job: "Job", parents: dict[str, str], *, digest: Callable[[Path], str] = manifest.digest_file
) -> dict[str, Any]:
    """The inputs of a run with these parents (path -> digest); a file that is missing is None."""
    from smol_post import __version__

    recipe = job.recipe.model_dump()
    named = files(recipe, job.recipe_file.parent)
    return {
        "recipe": manifest.digest_tree(deciding(recipe)),
        "files": {name: digest(path) if path.is_file() else None for name, path in named.items()},
        "parents": parents,
        "smol_post": __version__,
    }


def check_files(job: "Job") -> dict[str, Path]:
    """Name -> path of the local files that decide a run; Refusal where one is missing."""
    named = files(job.recipe.model_dump(), job.recipe_file.parent)
    for name, path in named.items():
        if not path.is_file():
            where = f"sources: '{name[8:]}'" if name.startswith("sources.") else name
            found = " does not exist; paths count from the recipe's folder"
            if path.exists():
                found = ": is no file that can be read whole (a pipe or device); give a file"
            raise Refusal(f"{job.recipe_file}: {where}: {path}{found}")
    return named


def digest_of(job: "Job", inputs: dict[str, Any]) -> str:
    """The fingerprint of a run with these inputs; Refusal where a file is missing.

    Files go by what they are to the run, not by where they lie: two that change places are another run.
    """
    each = [[name, inputs["files"][name]] for name in check_files(job)]
    content = {"stage": job.recipe.stage, "recipe": deciding(job.recipe.model_dump())}
    content |= {"parents": list(inputs["parents"].values()), "files": sorted(each)}
    return manifest.digest_tree({**content, "smol_post": inputs["smol_post"]})


def fingerprint(job: "Job", parents: list["Parent"]) -> str:
    """What decides a run's outcome, as one digest."""
    return digest_of(job, collect(job, {one.path: one.digest for one in parents}))


def deciding(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what does not change its run: what is proved, demanded and stated of it."""
    kept = {key: one for key, one in recipe.items() if key not in ("verify", "gates", "stated_tokens")}
    if not kept.get("trust_remote_code"):  # as it was before recipes had the key
        kept.pop("trust_remote_code", None)
    if isinstance(kept.get("sources"), list):
        kept["sources"] = [
            {key: one for key, one in source.items() if key != "size"}
            for source in kept["sources"]
            if isinstance(source, dict)
        ]
    return kept


def changes(old: dict[str, Any], job: "Job", inputs: dict[str, Any]) -> list[str]:
    """Which inputs differ from those that a manifest or state says; [] where none that it names does."""
    known: dict[str, Any] = old.get("inputs") or {}
    found = differences(deciding(old.get("recipe", {})), deciding(job.recipe.model_dump()), "recipe ")
    found += file_changes(known.get("files", inputs["files"]), inputs["files"])
    before, after = {one["path"]: one["digest"] for one in old.get("parents", [])}, inputs["parents"]
    if list(before) != list(after):
        found.append(f"parents {', '.join(before) or 'none'} -> {', '.join(after) or 'none'}")
    else:
        found += [f"parent {path} has other contents" for path in after if before[path] != after[path]]
    version = known.get("smol_post") or old.get("versions", {}).get("smol-post", inputs["smol_post"])
    if version != inputs["smol_post"]:
        found.append(f"smol_post {version} -> {inputs['smol_post']}")
    return found


def file_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """`data file sources.chats has changed` for every file in which two sets of named digests differ."""
    found: list[str] = []
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            how = "is gone" if after.get(name) is None else "has changed" if name in before else "was added"
            found.append(f"{named(name)} {how}")
    return found


def named(name: str) -> str:
    """The name of a file among the inputs for a person: `data file sources.chats`, `template`."""
    return f"data file {name}" if name.startswith("sources.") else name.replace("chat_template", "template")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two recipes differ; what has a name goes by it.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    ['a.b: 1 -> 2']
    >>> differences({"sources": [{"name": "x", "seed": 1}]}, {"sources": [{"name": "x", "seed": 2}]})
    ['sources.x.seed: 1 -> 2']
    """
    found: list[str] = []
    for key in sorted({*old, *new}):
        left, right = old.get(key), new.get(key)
        a, b = _by_name(left), _by_name(right)
        inner = differences(a, b, f"{prefix}{key}.") if isinstance(a, dict) and isinstance(b, dict) else []
        if left != right and not inner:
            inner = [f"{prefix}{key}: {left} -> {right}" if len(f"{left}{right}") < 80 else f"{prefix}{key}"]
        found += inner
    return found


def _by_name(value: Any) -> Any:
    """[{"name": "chats", ...}] -> {"chats": {...}}; anything else as it is."""
    if isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value):
        return {one["name"]: one for one in value}
    return value


def origin(job: "Job") -> dict[str, str]:
    """Where recipe and pipeline lie, from the run directory, so that trees may be moved together."""
    places = {"recipe": job.recipe_file, "pipeline": (job.folder or job.recipe_file.parent) / "pipeline.yaml"}
    return {name: os.path.relpath(path.resolve(), job.run_dir.resolve()) for name, path in places.items()}


def located(run_dir: Path, record: dict[str, Any], name: str) -> Path:
    """The `recipe` or `pipeline` that a manifest or state was made from, which may be gone.

    Older ones say the recipe only, from the folder in which the command was typed.
    """
    if found := record.get("origin"):
        return (run_dir.resolve() / found[name]).resolve()
    path = Path(record.get("recipe_file", "")).resolve()
    return path if name == "recipe" else path.parent / "pipeline.yaml"
