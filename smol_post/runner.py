"""The life of a run: plan, claim, execute, write the manifest. The only main() of the stages.

`accelerate launch smol_post/apo.py --config R` runs the stage in the launched processes; `smol-post apo
--config R` runs the same function in one child process a run, so that runs share nothing but files. Both
doors end in `execute`.

    recipe file + pipeline.yaml --plan--> [Job] --claim--> run directory --stage.run()--> checkpoint
    --manifest--> whole
"""

import argparse
import atexit
import contextlib
import fcntl
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from smol_post import config, launch, loading, manifest
from smol_post.launch import num_processes, rank, say
from smol_post.plan import Job, Parent, await_parents, make_plan, order, resolve_parent
from smol_post.refusal import Failure, Refusal

LOCK = ".lock"
EXIT_OK, EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


def fingerprint(job: Job, parents: list[Parent]) -> str:
    """What decides a run's outcome: recipe, parents' digests, local data files, the package's version."""
    recipe = _deciding(job.recipe.model_dump())
    files: dict[str, str] = {}
    for source in recipe.get("sources", []):
        if source["path"] and config.is_local(source["path"]):
            path = config.local_path(source["path"], job.recipe_file.parent)
            if not path.exists():
                raise Refusal(
                    f"{job.recipe_file}: sources: '{source['name']}': {path} does not exist; "
                    "paths count from the recipe's folder"
                )
            each = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
            files.update({str(one): manifest.digest_file(one) for one in each})
    template = recipe.get("chat_template")
    if template and template.endswith(".jinja"):
        files["template"] = manifest.digest_file(config.local_path(template, job.recipe_file.parent))
    if recipe.get("gate"):
        suite = job.recipe_file.parent / recipe["gate"]["suite"]
        inner: Any = loading.load_recipe(suite)
        files |= {str(one): manifest.digest_file(Path(one)) for one in [suite, *inner.files()]}
    content = {"stage": job.recipe.stage, "recipe": recipe, "parents": [one.digest for one in parents]}
    return manifest.digest_tree({**content, "files": sorted(files.values()), "smol_post": _version()})


def _deciding(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what does not change its run: what is proved, demanded and stated of it."""
    kept = {key: one for key, one in recipe.items() if key not in ("verify", "gates", "stated_tokens")}
    if isinstance(kept.get("sources"), list):
        kept["sources"] = [
            {key: one for key, one in source.items() if key != "size"}
            for source in kept["sources"]
            if isinstance(source, dict)
        ]
    return kept


def _version() -> str:
    from smol_post import __version__

    return __version__


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two recipes differ.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    ['a.b: 1 -> 2']
    """
    found: list[str] = []
    for key in sorted({*old, *new}):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(
                f"{prefix}{key}: {left} -> {right}" if len(f"{left}{right}") < 80 else f"{prefix}{key}"
            )
    return found


def claim(job: Job, parents: list[Parent], print_id: str) -> TextIO | None:
    """Take the run directory for this very recipe: new, or an unfinished run of its fingerprint.

    Returns the held lock, or None where the run is whole already and its fingerprint still holds. Raises
    Refusal where the directory holds another recipe's run or anything else: nothing is written over.
    """
    if manifest.is_whole(job.run_dir):
        old = manifest.read_manifest(job.run_dir)
        if old["fingerprint"] == print_id:
            return None
        raise _other_recipe(job, old, parents, "a whole")
    ours = {LOCK, manifest.STATE, manifest.STATE + ".tmp"}
    found = {path.name for path in job.run_dir.iterdir()} if job.run_dir.is_dir() else set()
    if found - ours and manifest.STATE not in found:
        raise Refusal(f"{job.run_dir}: exists and is no run of ours; choose another --run-dir or remove it")
    _check_unfinished(job, parents, print_id)  # before anything is written, and once more when locked
    try:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        lock = (job.run_dir / LOCK).open("w")
    except OSError as error:
        raise Refusal(f"{job.run_dir}: cannot be made ({error.strerror}); choose another --run-dir") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Refusal(f"{job.run_dir}: another process is making this run; wait for it or stop it") from None
    if manifest.is_whole(job.run_dir):
        raise Refusal(f"{job.run_dir}: another process has just made this run; type the command again")
    _check_unfinished(job, parents, print_id)
    record(job, parents, print_id, "running")
    return lock


def _check_unfinished(job: Job, parents: list[Parent], print_id: str) -> None:
    """Refusal where the directory holds checkpoints of another recipe's run, or a damaged state."""
    path = job.run_dir / manifest.STATE
    if path.is_file():
        old = manifest.read_json(path, wanted=manifest.RUN)
        # a run without checkpoints holds nothing that could be lost
        begun = any((job.run_dir / manifest.CHECKPOINTS).glob("checkpoint-*"))
        if old["fingerprint"] != print_id and begun:
            raise _other_recipe(job, old, parents, "an unfinished")


def _other_recipe(job: Job, old: dict[str, Any], parents: list[Parent], state: str) -> Refusal:
    changed = differences(_deciding(old["recipe"]), _deciding(job.recipe.model_dump()))
    if [one.get("digest") for one in old["parents"]] != [one.digest for one in parents]:
        changed.append("parents have other contents")
    what = "; ".join(changed[:3]) or "data files or the package's version"
    return Refusal(
        f"{job.run_dir}: holds {state} run of something else ({what}); remove it, or choose another --run-dir"
    )


def record(job: Job, parents: list[Parent], print_id: str, status: str, message: str = "") -> None:
    """Write `state.json`: what this directory is being used for, and how it went."""
    manifest.write_json(
        job.run_dir / manifest.STATE,
        {
            "run": job.name,
            "stage": job.recipe.stage,
            "status": status,
            "message": message,
            "fingerprint": print_id,
            "recipe": job.recipe.model_dump(),
            "parents": [{"path": one.path, "digest": one.digest} for one in parents],
            "time": manifest.now(),
        },
    )


def examine(job: Job) -> tuple[list[Parent], str]:
    """The parents of a run, found and verified, and its fingerprint; Refusal where a parent is not whole."""
    parents = [resolve_parent(job, path) for path in job.parent_paths]
    return parents, fingerprint(job, parents)


def execute(job: Job, examined: tuple[list[Parent], str] | None = None) -> int:
    """Make one run, or verify it, in this process (one of the launched ones, or alone); the exit code."""
    if rank() != 0:
        if job.recipe.stage == "merge" or (manifest.is_whole(job.run_dir) and not job.scratch):
            return EXIT_OK
        try:
            await_parents(job)
        except Refusal as refusal:
            return refuse(refusal)
        return _guarded(job, [], "", None)
    try:
        parents, print_id = examined or examine(job)
        lock = claim(job, parents, print_id)
    except Refusal as refusal:
        return refuse(refusal)
    if lock is None and not job.scratch:
        say(f"{job.name}: whole already, kept: {job.run_dir}")
        return EXIT_OK
    with lock or contextlib.nullcontext():
        return _guarded(job, parents, print_id, time.monotonic())


def _guarded(job: Job, parents: list[Parent], print_id: str, started: float | None) -> int:
    """Run the stage and write down how it went: whole, verified, refused, interrupted or failed."""
    status, message, code = "failed", "", EXIT_FAILED
    try:
        if started is None:
            parents = [resolve_parent(job, path, rehash=False) for path in job.parent_paths]
        stage = importlib.import_module(f"smol_post.{job.recipe.stage}")
        outcome = stage.run(job.recipe, parents, job)
        if not job.scratch:
            if started is not None:
                _finish(job, parents, print_id, outcome, time.monotonic() - started)
            return EXIT_OK
        status, code = "verified", EXIT_OK
    except Refusal as refusal:
        status, message, code = "refused", str(refusal), EXIT_REFUSED
        refuse(refusal)
    except Failure as failure:
        message = str(failure)
        if started is not None:
            say(f"failed: {message}", error=True)
    except KeyboardInterrupt:
        status, code = "interrupted", EXIT_INTERRUPTED
        message = f"{job.name}: interrupted; the same command resumes from the last whole checkpoint"
        if started is not None:
            say(message, error=True)
    except Exception as error:  # noqa: BLE001  the last door: written down, then shown in full
        message = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    if started is not None:
        _keep_proofs(job)
        if not manifest.is_whole(job.run_dir):
            record(job, parents, print_id, status, message)
    return code


def _keep_proofs(job: Job) -> None:
    """Keep what a verification found: in the run directory, or beside the evals where the run is whole."""
    if not job.scratch or not (job.scratch / manifest.VERIFY).is_file():
        return
    path = job.run_dir / manifest.VERIFY
    if manifest.is_whole(job.run_dir):
        path = job.run_dir.parent / "evals" / f"verify_{job.name}.json"
        path.parent.mkdir(exist_ok=True)
    manifest.write_json(path, manifest.read_json(job.scratch / manifest.VERIFY))
    say(f"{job.name}: {path}")


def _finish(job: Job, parents: list[Parent], print_id: str, outcome: dict[str, Any], seconds: float) -> None:
    """Digest what was written and write the manifest last."""
    files = manifest.content_files(job.run_dir)
    manifest.write_json(
        job.run_dir / manifest.MANIFEST,
        {
            "schema": manifest.SCHEMA,
            "run": job.name,
            "stage": job.recipe.stage,
            "recipe_file": str(job.recipe_file),
            "recipe": job.recipe.model_dump(),
            "fingerprint": print_id,
            "parents": [{"path": one.path, "digest": one.digest, "stage": one.stage} for one in parents],
            "data": outcome.get("data"),
            "metrics": outcome.get("metrics", {}),
            "verified": _summary(job.run_dir / manifest.VERIFY),
            "versions": manifest.versions(),
            "seed": job.recipe.seed,
            "num_processes": num_processes(),
            "seconds": round(seconds, 1),
            "finished": manifest.now(),
            "files": files,
            "digest": manifest.content_digest(files),
        },
    )
    (job.run_dir / manifest.STATE).unlink()
    (job.run_dir / LOCK).unlink()
    say(f"{job.name}: whole after {seconds:.0f} s: {job.run_dir}")


def _summary(path: Path) -> dict[str, Any] | None:
    """How many proofs passed and how many did not apply, at which step; None if nothing was proved."""
    if not path.is_file():
        return None
    found = manifest.read_json(path)
    number = Counter(one["status"] for one in found["proofs"])
    return {"level": found["level"], "step": found["step"], **number, "seconds": found["seconds"]}


def refuse(refusal: Refusal) -> int:
    """Print a refusal as its one line; the exit code for it.

    Of several processes the first speaks, and the launcher ends the others: what one of these still has to
    say after a while is its own.
    """
    if rank() != 0:
        time.sleep(5)
        print(f"refused: process {rank()}: {refusal}", file=sys.stderr, flush=True)
    say(f"refused: {refusal}", error=True)
    return EXIT_REFUSED


def execute_all(jobs: list[Job], *, separate: bool, after: Callable[[Job], int] = lambda job: EXIT_OK) -> int:
    """Make the runs one after another; stop at the first that does not succeed, or of which `after` says so.

    `separate`: each in a child process of its own, forked from a server that has imported the libraries once.
    """
    if not separate:
        for job in jobs:
            if code := execute(job) or after(job):
                return code
        return EXIT_OK
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"])
    interrupt_on_sigterm()
    for job in jobs:
        try:
            examined = examine(job)
            if manifest.is_whole(job.run_dir) and claim(job, *examined) is None and not job.scratch:
                say(f"{job.name}: whole already, kept: {job.run_dir}")
                if code := after(job):
                    return code
                continue
        except Refusal as refusal:
            return refuse(refusal)
        child = context.Process(target=_child, args=(job, examined))
        child.start()
        while child.is_alive():
            try:
                child.join()
            except KeyboardInterrupt:
                child.terminate()
        if code := child.exitcode or 0:
            return 128 - code if code < 0 else code
        if code := after(job):
            return code
    return EXIT_OK


def _child(job: Job, examined: tuple[list[Parent], str]) -> None:
    """One run in a process of its own; Ctrl-C, SIGTERM and the end of the parent interrupt it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and passes it on as SIGTERM
    interrupt_on_sigterm()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(
        target=lambda: (parent.join(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True
    ).start()
    sys.exit(execute(job, examined))


def interrupt_on_sigterm() -> None:
    """SIGTERM ends this process as Ctrl-C does: what is under way is put in order first."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are refusals: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse; called by argparse."""
        sys.exit(refuse(Refusal(f"{message}; see {self.prog} --help")))

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Refuse, besides, a word that no file system takes as a path; called by argparse."""
        for word in args or []:
            if "=" not in word and any(len(os.fsencode(part)) > 255 for part in word.split("/")):
                self.error(f"argument '{word[:40]}...': found a name of over 255 bytes, wanted a path")
        return super().parse_known_args(args, namespace)


def parser(program: str, *, stage: str | None) -> argparse.ArgumentParser:
    """The arguments every stage command takes."""
    made = Parser(prog=program, allow_abbrev=False)
    made.add_argument("recipe", nargs="?", help="recipe file or recipe folder")
    made.add_argument("--config", help="the same, as an option")
    made.add_argument("--run-dir", help="where the runs go (default: runs/<recipe folder>)")
    if stage:
        made.add_argument("--run", help="which run, where several use the recipe")
    made.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys to set, e.g. num_steps=10"
    )
    return made


def parse(made: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Arguments with key=value pairs in any place; the recipe plain or as --config."""
    arguments, rest = made.parse_known_args(argv)
    words = [word for word in [arguments.recipe, *arguments.overrides, *rest] if word is not None]
    unknown = [word for word in words if word.startswith("-")]
    if unknown:
        raise Refusal(f"argument {unknown[0]}: unknown option; see {made.prog} --help")
    pairs = [word for word in words if "=" in word and not os.path.exists(word)]
    plain = [word for word in words if word not in pairs]
    if arguments.config:
        plain = [arguments.config, *plain]
    if len(plain) > 1:
        raise Refusal(f"argument {plain[1]}: wanted key=value (one recipe is given already: {plain[0]})")
    arguments.recipe = plain[0] if plain else None
    return arguments, pairs


def stage_command(stage: str, argv: list[str], *, program: str, separate: bool) -> int:
    """One stage from the command line: `[--config] RECIPE [--run NAME] [--run-dir DIR] [key=value ...]`."""
    try:
        arguments, pairs = parse(parser(program, stage=stage), argv)
        if arguments.recipe is None:
            example = "long_context_1" if stage == "long_context" else stage
            return refuse(
                Refusal(
                    "no recipe given; type: accelerate launch --config_file recipes/accelerate/cpu.yaml "
                    f"smol_post/{stage}.py --config recipes/tiny/{example}.yaml"
                )
            )
        root = Path(arguments.run_dir) if arguments.run_dir else None
        plan = make_plan(
            Path(arguments.recipe), run_root=root, stage=stage, run=arguments.run, arguments=pairs
        )
        jobs = order(plan)
    except Refusal as refusal:
        return refuse(refusal)
    return execute_all(jobs, separate=separate)


def main(stage: str) -> None:
    """The door of `accelerate launch smol_post/<stage>.py`: runs in the launched process.

    A script run by path is `__main__`; `execute` imports the stage by its name, so both doors run the same
    code.
    """
    interrupt_on_sigterm()
    try:
        launch.take_over()
    except Refusal as refusal:
        sys.exit(refuse(refusal))
    leave(stage_command(stage, sys.argv[1:], program=f"smol_post/{stage}.py", separate=False))


def leave(code: int) -> NoReturn:
    """End a process; one of several at once and in order, before threads of gloo abort it on its way out."""
    distributed = torch.distributed if (torch := sys.modules.get("torch")) else None
    if not (distributed and distributed.is_available() and distributed.is_initialized()):
        sys.exit(code)
    if code:  # the others may be waiting for this one, which must not wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
