"""What is to be made: recipe file or folder + pipeline.yaml -> jobs in order, with their parents found.

recipes/tiny/apo.yaml  ->  [Job apo_seed0, Job apo_seed1]   each with parents ["../sft"]
"""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smol_post import chat, config, hub, loading, manifest, strict, synthetic
from smol_post.launch import num_parts, num_processes, say
from smol_post.refusal import Refusal, did_you_mean

CACHE = "cache"  # of prepared data, beside the runs that use it


@dataclass(frozen=True)
class Parent:
    """A checkpoint that a run consumes: as written in the pipeline, where it is, what it is."""

    path: str
    folder: Path
    digest: str
    stage: str | None


@dataclass(frozen=True)
class Job:
    """One run to make."""

    name: str
    recipe: config.Recipe
    recipe_file: Path
    run_dir: Path
    parent_paths: list[str]
    pinned: frozenset[str] = frozenset()  # its checkpoints that other runs start from: "checkpoint-300"
    scratch: Path | None = None  # where it is only verified, writing here what a run writes to run_dir
    folder: Path | None = None  # of the pipeline.yaml it stands in; None: its recipe's

    def announce(self, text: str) -> None:
        """Show a line of this run to the person who waits."""
        say(f"{self.name}: {text}")

    def place(self) -> dict[str, Any]:
        """Where and among how many processes the run is made, as `training` takes it."""
        return {
            "folder": self.recipe_file.parent,
            "run_dir": self.scratch or self.run_dir,
            "cache_dir": self.run_dir.parent / CACHE,
            "num_processes": num_processes(),
            "num_parts": num_parts(),
            "only_verify": self.scratch is not None,
            "pinned": self.pinned,
            "announce": self.announce,
        }


@dataclass(frozen=True)
class Plan:
    """The jobs asked for, and the whole pipeline they stand in (for missing parents)."""

    jobs: list[Job]
    pipeline: list[Job]
    build_parents: bool


def default_run_root(folder: Path) -> Path:
    """`runs/<name of the recipe folder>` under the working directory."""
    return Path("runs") / folder.resolve().name


def make_plan(
    where: Path,
    *,
    run_root: Path | None,
    stage: str | None = None,
    run: str | None = None,
    arguments: list[str],
) -> Plan:
    """The jobs of `where`: a recipe folder (all runs, or those of `stage`) or a file (the runs that use it).

    `arguments` are key=value overrides for the jobs asked for, not for their parents. Raises Refusal on a
    file that no pipeline entry uses, a stage that does not fit, or an unknown `run`.
    """
    folder = where if where.is_dir() else where.parent
    if not where.exists():
        raise Refusal(f"{where}: no such file or folder; give a recipe such as recipes/tiny/sft.yaml")
    pipeline = loading.load_pipeline(folder)
    entries = pipeline.runs
    if where.is_file():
        entries = [
            entry
            for entry in entries
            if strict.local_path(entry.recipe, folder) == strict.local_path(str(where), Path())
        ]
        if not entries:
            raise Refusal(
                f"{where}: no run of {folder / 'pipeline.yaml'} uses this recipe; add an entry for it there"
            )
    if stage is not None:
        fitting = [entry for entry in entries if entry.stage == stage]
        if not fitting:
            raise Refusal(f"{where}: found no run of stage {stage}; stages here: {_stages(entries)}")
        entries = fitting
    if run is not None:
        names = [entry.name for entry in entries]
        if run not in names:
            raise Refusal(f"--run {run}: no such run in {where}{did_you_mean(run, names)}")
        entries = [entry for entry in entries if entry.name == run]
    root = run_root or default_run_root(folder)
    taken = [path for entry in pipeline.runs for path in entry.parents]
    every = [_job(folder, entry, root, [], taken) for entry in pipeline.runs]
    jobs = [_job(folder, entry, root, arguments, taken) for entry in entries] if arguments else None
    wanted = {entry.name for entry in entries}
    return Plan(jobs or [job for job in every if job.name in wanted], every, pipeline.build_parents)


def _stages(entries: list[config.Entry]) -> str:
    return ", ".join(sorted({entry.stage for entry in entries}))


def _job(folder: Path, entry: config.Entry, root: Path, arguments: list[str], taken: list[str]) -> Job:
    recipe = loading.load_entry(folder, entry, arguments=arguments)
    check_names(recipe, folder / entry.recipe)
    own = f"../{entry.name}/{manifest.CHECKPOINTS}/"
    pinned = frozenset(path.removeprefix(own).rstrip("/") for path in taken if path.startswith(own))
    run_dir = root / entry.name
    return Job(
        entry.name, recipe, folder / entry.recipe, run_dir, entry.parents, pinned=pinned, folder=folder
    )


def check_names(recipe: config.Recipe, path: Path) -> None:
    """Templates and generators that a recipe names exist and take the options it gives; Refusal otherwise."""
    adapter = getattr(recipe, "peft", None)
    if adapter and adapter.load_in_4bit and find_spec("bitsandbytes") is None:
        raise Refusal(f"{path}: peft.load_in_4bit: no bitsandbytes here; pip install 'smol_post[qlora]'")
    template = getattr(recipe, "chat_template", None)
    if template is not None:
        try:
            chat.load_template(template, folder=path.parent)
        except Refusal as refusal:
            raise Refusal(f"{path}: chat_template: {refusal}") from None
    if isinstance(recipe, config.MergeRecipe) and recipe.gate:
        suite = path.parent / recipe.gate.suite
        if not isinstance(inner := loading.load_recipe(suite), config.EvalsRecipe):
            raise Refusal(f"{path}: gate.suite: {suite} is of stage {inner.stage}, wanted evals")
        check_names(inner, suite)
        if not inner.harness:
            check_metrics([recipe.gate.recover, *recipe.gate.keep], inner, where=f"{path}: gate", yarn=False)
    sources = [one for one in getattr(recipe, "sources", []) if one.generator]
    options = [(one.generator, one.options, ()) for one in sources]
    if isinstance(recipe, config.EvalsRecipe):
        options += [
            ("needle_questions", recipe.needle_options, ("num_tokens",)),
            ("arithmetic_questions", recipe.arithmetic_options, ("enable_thinking",)),
            ("preference_pairs", recipe.preference_options, ()),
            *((one.generator, one.options, ()) for one in recipe.tool_calls if one.generator),
        ]
        if recipe.harness and find_spec("lm_eval") is None:
            raise Refusal(f"{path}: harness: lm-eval is not installed; pip install 'smol_post[eval]'")
        for one in recipe.harness:
            if one.include_path and not Path(one.include_path).is_dir():
                raise Refusal(
                    f"{path}: harness: include_path: no such folder {one.include_path}; "
                    "give one with task files, counted from the recipe's folder"
                )
    for name, chosen, given in options:
        try:
            synthetic.check_options(name, chosen, given=given)
        except ValueError as error:
            raise Refusal(f"{path}: {error}") from None


def check_metrics(names: list[str], suite: config.EvalsRecipe, *, where: str, yarn: bool) -> None:
    """Refusal where a suite without harness measures no metric of one of `names`."""
    known = suite.metric_names(yarn=yarn)
    for name in names:
        if name not in known:
            raise Refusal(f"{where}: its suite measures no '{name}'{did_you_mean(name, known)}")


def missing_parents(job: Job, pipeline: list[Job]) -> list[Job]:
    """The runs of the pipeline that `job` needs and that are not whole, in order, their own parents first."""
    found: list[Job] = []
    for path in job.parent_paths:
        if path.startswith("../"):
            parent = next(one for one in pipeline if one.name == path[3:].split("/")[0])
            if not manifest.is_whole(parent.run_dir):
                found += [one for one in [*missing_parents(parent, pipeline), parent] if one not in found]
    return found


def resolve_parent(job: Job, path: str, *, rehash: bool = True) -> Parent:
    """Find, verify and digest one parent: a run of this pipeline, a folder, or a Hub id with `@revision`.

    `rehash`: hash every file of a run again; else its manifest is believed.
    """
    known = manifest.verify if rehash else manifest.read_manifest
    if path.startswith("../"):
        folder = job.run_dir.parent / path[3:]
        root = job.run_dir.parent / path[3:].split("/")[0]
        if not manifest.is_whole(root):
            raise Refusal(f"{job.run_dir}: parent {path} is not whole; {_how_to_make(job, root.name)}")
        found = known(root)
        _check_gates(job, path, root, found["digest"])
        if folder.parent.name == manifest.CHECKPOINTS and (lost := manifest.broken(folder)):
            raise Refusal(f"{job.run_dir}: parent {path}: {lost[0]}; make {root} again, or name another")
        if (real := strict.local_path(str(folder), Path())) == strict.local_path(str(root), Path()):
            return Parent(path, real, found["digest"], found["stage"])
        return Parent(path, real, _folder_digest(path, folder), found["stage"])
    if path.startswith(("/", "~")):
        folder = strict.local_path(path, Path())
        if manifest.is_whole(folder):
            found = known(folder)
            _check_gates(job, path, folder, found["digest"])
            return Parent(path, folder, found["digest"], found["stage"])
        return Parent(path, folder, _folder_digest(path, folder), None)
    if Path(path).is_dir() or (job.recipe_file.parent / path).is_dir():
        raise Refusal(
            f"parent {path}: found a relative folder, wanted ../run, an absolute folder or a Hub id"
        )
    folder = hub.checkpoint(path, code=getattr(job.recipe, "trust_remote_code", False))
    return Parent(path, folder, f"hub:{path.partition('@')[0]}@{folder.name}", None)


def _check_gates(job: Job, parent: str, root: Path, digest: str) -> None:
    """Refuse a parent that was found to fall short of its gates."""
    path = root.parent / "evals" / f"{manifest.GATES}_{root.name}.json"
    wanted = {"digest": str, "passed": bool, "short": list[str]}
    remedy = "remove it; smol-post run with the recipe folder measures again"
    found = manifest.read_json(path, remedy=remedy, wanted=wanted) if path.is_file() else {}
    if found.get("digest") == digest and not found["passed"]:
        raise Refusal(
            f"{job.run_dir}: parent {parent} falls short: {'; '.join(found['short'])}; mend its "
            "recipe, or its gates and type smol-post run with its recipe folder"
        )


def _folder_digest(path: str, folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise Refusal(
            f"parent {path}: {folder} has no config.json, so it is no Hugging Face checkpoint; mend the path"
        )
    return manifest.content_digest(manifest.content_files(folder))


def await_parents(job: Job, *, seconds: float = 60) -> None:
    """Wait, on the other ranks, until the parents that rank 0 may still be writing are whole.

    Refusal where one is not seen in time, as on a machine that does not share rank 0's file system; where it
    is not there at all rank 0 refuses, and the launcher ends us.
    """
    end = time.monotonic() + seconds
    for path in job.parent_paths:
        root = job.run_dir.parent / path[3:].split("/")[0]
        while path.startswith("../") and not manifest.is_whole(root):
            if time.monotonic() > end:
                raise Refusal(
                    f"{root}: is not whole as seen from here; choose a --run-dir on a file system that "
                    "all machines of the launch share"
                )
            time.sleep(0.5)


def _how_to_make(job: Job, name: str) -> str:
    folder, root = job.recipe_file.parent, job.run_dir.parent
    return f"make it first: smol-post run {folder} --run-dir {root} --until {name}"


def order(plan: Plan) -> list[Job]:
    """The jobs of a plan, missing parents first where the recipe and the launch allow building them."""
    found: list[Job] = []
    asked = {job.name for job in plan.jobs}
    for job in plan.jobs:
        for parent in missing_parents(job, plan.pipeline):
            if parent.name in asked or parent in found:
                continue
            if not plan.build_parents or num_processes() > 1:
                why = (
                    "not inside a multi-process launch" if plan.build_parents else "build_parents is not set"
                )
                raise Refusal(
                    f"{job.run_dir}: parent ../{parent.name} is not whole and not built here ({why}); "
                    + _how_to_make(job, parent.name)
                )
            found.append(parent)
        found.append(job)
    return found
