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
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from smol_post import config, disk, inputs, launch, locks, manifest
from smol_post.inputs import fingerprint
from smol_post.launch import num_processes, rank, say
from smol_post.locks import LOCK
from smol_post.plan import Job, Parent, await_parents, make_plan, order, resolve_parent
from smol_post.refusal import Failure, Refusal, Stopped, redacted
from smol_post.trust import check_checkpoint

EXIT_OK, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130


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
    locks.check(job.run_dir, what="a run")
    _check_unfinished(job, parents, print_id)  # before anything is written, and once more when locked
    try:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        lock = locks.take(job.run_dir, what="a run")
    except OSError as error:
        raise Refusal(f"{job.run_dir}: cannot be made ({error.strerror}); choose another --run-dir") from None
    if manifest.is_whole(job.run_dir):
        raise Refusal(f"{job.run_dir}: another process has just made this run; type the command again")
    if _check_unfinished(job, parents, print_id):
        _clear(job.run_dir)
    record(job, parents, print_id, "running")
    return lock


def _clear(run_dir: Path) -> None:
    """Remove what another recipe's attempt left, which would be taken for this one's.

    Its state stays until the new one replaces it: without, a kill would leave a folder that is nobody's.
    """
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (LOCK, manifest.STATE):
            path.unlink()


def _check_unfinished(job: Job, parents: list[Parent], print_id: str) -> bool:
    """Whether another recipe's attempt is to be removed; Refusal where it has checkpoints or is damaged."""
    path = job.run_dir / manifest.STATE
    if path.is_file():
        old = manifest.read_json(path, wanted=manifest.RUN)
        # a run without checkpoints holds nothing that could be lost
        begun = bool(manifest.checkpoints(job.run_dir))
        if old["fingerprint"] != print_id:
            if begun:
                raise _other_recipe(job, old, parents, "an unfinished")
            return True
    return False


def _other_recipe(job: Job, old: dict[str, Any], parents: list[Parent], state: str) -> Refusal:
    changed = inputs.changes(old, job, inputs.collect(job, {one.path: one.digest for one in parents}))
    return Refusal(
        f"{job.run_dir}: holds {state} run of something else ({'; '.join(changed[:3]) or inputs.UNNAMED}); "
        "remove it, or choose another --run-dir"
    )


def record(job: Job, parents: list[Parent], print_id: str, status: str, message: str = "") -> None:
    """Write `state.json`: what this directory is being used for, of what it is made, and how it went."""
    path = job.run_dir / manifest.STATE
    known = manifest.read_json(path) if status != "running" and path.is_file() else {}
    made_of = known.get("inputs") or inputs.collect(job, {one.path: one.digest for one in parents})
    manifest.write_json(
        path,
        {
            "run": job.name,
            "stage": job.recipe.stage,
            "status": status,
            "message": message,
            "fingerprint": print_id,
            "origin": inputs.origin(job),
            "recipe": job.recipe.model_dump(),
            "parents": [{"path": one.path, "digest": one.digest} for one in parents],
            "inputs": made_of,
            "time": manifest.now(),
        },
    )


def examine(job: Job) -> tuple[list[Parent], str]:
    """The parents of a run, found and verified, and its fingerprint; Refusal where a parent is not whole."""
    parents = [resolve_parent(job, path) for path in job.parent_paths]
    for parent in parents:
        trusted = getattr(job.recipe, "trust_remote_code", False)
        check_checkpoint(parent.folder, trust_remote_code=trusted)
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
        except KeyboardInterrupt as stop:
            return interrupted(stop)
        return _guarded(job, [], "", None)
    try:
        parents, print_id = examined or examine(job)
        lock = claim(job, parents, print_id)
    except Refusal as refusal:
        return refuse(refusal)
    except OSError as error:
        return refuse(Refusal(f"{job.run_dir}: cannot be written ({error.strerror}); make room for it"))
    except KeyboardInterrupt as stop:  # parents and data are hashed, which takes a while
        say(f"{job.name}: interrupted before it began", error=True)
        return interrupted(stop)
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
        with disk.watched(job.run_dir):
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
        if isinstance(failure, disk.DiskFull) and started is not None and not job.scratch:
            disk.give_back(job.run_dir)
        if started is not None:
            fail(failure)
    except KeyboardInterrupt as stop:
        status, code = "interrupted", interrupted(stop)
        said = str(stop) or "interrupted"
        message = f"{job.name}: {said}; the same command resumes from the last whole checkpoint"
        if started is not None:
            say(message, error=True)
    except Exception as error:  # noqa: BLE001  the last door: written down, then shown in full
        message = redacted(f"{type(error).__name__}: {error}")
        sys.stderr.write(redacted(traceback.format_exc()))
    if started is not None:
        _keep_proofs(job)
        if not manifest.is_whole(job.run_dir):
            with contextlib.suppress(
                OSError, Refusal
            ):  # no room for that either: the state says "running", nobody is
                record(job, parents, print_id, status, message)
    return code


def interrupted(stop: KeyboardInterrupt) -> int:
    """The exit code: 130 of Ctrl-C, 75 of a signal after which the same command is to be given again."""
    return EXIT_STOPPED if isinstance(stop, Stopped) else EXIT_INTERRUPTED


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
    files, soup = manifest.content_files(job.run_dir), job.run_dir / manifest.SOUP
    for path in [*(job.run_dir / name for name in files), *soup.glob("*.safetensors")]:
        manifest.sync(path)
    manifest.write_manifest(
        job.run_dir,
        {
            "schema": manifest.SCHEMA,
            "run": job.name,
            "stage": job.recipe.stage,
            "recipe_file": str(job.recipe_file),
            "origin": inputs.origin(job),
            "recipe": job.recipe.model_dump(),
            "fingerprint": print_id,
            "parents": [{"path": one.path, "digest": one.digest, "stage": one.stage} for one in parents],
            "inputs": manifest.read_json(job.run_dir / manifest.STATE)["inputs"],
            "data": outcome.get("data"),
            "documents": outcome.get("documents", []),
            "metrics": outcome.get("metrics", {}),
            "verified": _summary(job.run_dir / manifest.VERIFY),
            "versions": manifest.versions(),
            "seed": job.recipe.seed,
            "num_processes": num_processes(),
            "seconds": round(seconds, 1),
            "finished": manifest.now(),
            "files": files,
            "digest": manifest.content_digest(files),
            "soup": manifest.content_files(soup) if soup.is_dir() else {},
        },
    )
    if isinstance(job.recipe, config.Training) and not job.recipe.num_checkpoints(1):
        shutil.rmtree(job.run_dir / manifest.CHECKPOINTS, ignore_errors=True)  # of a stop on the way
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


def fail(failure: Failure) -> int:
    """Print why something could not go on as one line; the exit code for it."""
    say(f"failed: {failure}", error=True)
    return EXIT_FAILED


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
    libraries = ["datasets", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"]
    context.set_forkserver_preload(["smol_post.runner", *libraries])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the server does, which must not end before its runs
    ensure_running()
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
        asked = 0
        while child.is_alive():
            try:
                child.join()
            except KeyboardInterrupt as stop:
                asked = interrupted(stop)
                child.terminate()
                interrupt_on_sigterm()  # to pass on the next one too
        if code := child.exitcode or 0:
            return 128 - code if code < 0 else asked or code
        if asked:  # it was about to end, and is whole
            return asked
        if code := after(job):
            return code
    return EXIT_OK


def _child(job: Job, examined: tuple[list[Parent], str]) -> None:
    """One run in a process of its own; Ctrl-C, SIGTERM and the end of the parent interrupt it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and passes it on as SIGTERM
    interrupt_on_sigterm()
    launch.exit_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    sys.exit(execute(job, examined))


def interrupt_on_sigterm() -> None:
    """SIGTERM ends this process as Ctrl-C does: what is under way is put in order first."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Stopped


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
