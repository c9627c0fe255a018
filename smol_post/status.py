"""`smol-post status RUN` and `smol-post run RECIPE --explain`: where every run of a pipeline stands, and why.

    absent        nothing is there
    running       a process holds its lock
    interrupted   as failed, refused and verified: what came of a run that is not whole
    whole         its manifest is there
    short         whole, but it falls short of its gates
    stale         whole or with checkpoints, and now it would be made from other inputs
    unknown       what is there is no run, or cannot be read

Nothing is written and no weights are read: parents' manifests are believed (`smol-post lineage --verify` does
not do so), and what a run recorded of a parent on the Hub or in a plain folder.
"""

import json
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from smol_post import inputs, locks, manifest
from smol_post.config import RESERVED
from smol_post.journal import JOURNAL
from smol_post.plan import Job, default_run_root, make_plan
from smol_post.refusal import Refusal
from smol_post.report import duration
from smol_post.runner import EXIT_FAILED, EXIT_OK, EXIT_REFUSED, Parser, refuse

LOG = "train_log.jsonl"
_TAIL = 2**15  # bytes of a log that are read: some hundred steps


@dataclass(frozen=True)
class State:
    """Where a run stands. why: for a person. changes: the inputs that make it stale.

    checkpoint: the step it would go on from. absent: parents that are not whole. digest: of a whole one.
    outdated: it is stale, or it comes of one that is, whether or not it is there.
    """

    name: str
    run_dir: Path
    state: str = "absent"
    why: str = ""
    changes: list[str] = field(default_factory=list)
    checkpoint: int | None = None
    absent: list[str] = field(default_factory=list)
    digest: str | None = None
    outdated: bool = False
    time: str = ""
    progress: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The state in a line."""
        return f"{self.state:<12}{few(self.changes) or self.why}".rstrip()


def few(changes: Sequence[str]) -> str:
    """The first three of what has changed, and how many more."""
    more = [f"{len(changes) - 3} more"] if len(changes) > 3 else []
    return "; ".join([*changes[:3], *more])


def states(jobs: Sequence[Job]) -> dict[str, State]:
    """The state of every run of a pipeline by name, in order; each data file is read once."""
    digest, found = cache(manifest.digest_file), dict[str, State]()
    for job in jobs:
        one = state_of(job.run_dir, job=job, known=found, digest=digest)
        parents = [found[path.split("/")[1]] for path in job.parent_paths if path.startswith("../")]
        old = one.state == "stale" or any(parent.outdated for parent in parents)
        found[job.name] = replace(one, outdated=old)
    return found


def state_of(
    run_dir: Path,
    *,
    job: Job | None = None,
    known: dict[str, State] | None = None,
    digest: Callable[[Path], str] = manifest.digest_file,
) -> State:
    """The state of one run; nothing is known of staleness without its `job`. `known`: its parents' states."""
    found = State(run_dir.name, run_dir)
    try:
        record = _record(run_dir)
        if holder := locks.holder(run_dir):
            progress = holder | _progress(run_dir, record)
            return replace(found, state="running", why=_running(progress), progress=progress)
        if not record:
            ours = {locks.LOCK, manifest.STATE + ".tmp"}
            others = run_dir.is_dir() and {path.name for path in run_dir.iterdir()} - ours
            return replace(found, state="unknown", why="holds no run of ours") if others else found
        found = replace(found, time=record.get("finished") or record.get("time", ""))
        if manifest.is_whole(run_dir):
            why = f"{duration(record.get('seconds'))}, {found.time}"
            found = replace(found, state="whole", digest=record["digest"], why=why)
            if short := _short(run_dir, record, job):
                found = replace(found, state="short", why=short)
        else:
            found = _unfinished(found, record)
        if job:
            changes, absent = _changes(run_dir, record, job, known or {}, digest)
            found = replace(found, absent=absent)
            if changes and (found.digest or manifest.checkpoints(run_dir)):
                found = replace(found, state="stale", changes=changes)
    except Refusal as refusal:
        return State(run_dir.name, run_dir, "unknown", str(refusal))
    except manifest.EDITED as error:
        why = f"its record was edited ({error!r}); remove the run and make it again"
        return State(run_dir.name, run_dir, "unknown", why)
    return found


def _record(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run, or its state; {} where it has neither; Refusal where it says too little."""
    whole, path = manifest.is_whole(run_dir), run_dir / manifest.STATE
    if not whole and not path.is_file():
        return {}
    record = manifest.read_manifest(run_dir) if whole else manifest.read_json(path)
    if missing := {"fingerprint", "digest" if whole else "status"} - record.keys():
        raise Refusal(f"{run_dir}: its record has no {sorted(missing)[0]}; remove the run and make it again")
    return record


def _unfinished(found: State, record: dict[str, Any]) -> State:
    """What came of a run that nobody is at any more."""
    steps = reversed(manifest.checkpoints(found.run_dir))
    step = next((step for step, path in steps if manifest.is_sealed(path)), None)
    kept = "no checkpoint yet" if step is None else f"whole as far as step {step}"
    how = str(record.get("status"))
    message = "its process ended without a word" if how == "running" else record.get("message")
    state = "interrupted" if how == "running" else how
    return replace(found, state=state, checkpoint=step, why=f"{kept}; {message}" if message else kept)


def _changes(
    run_dir: Path,
    record: dict[str, Any],
    job: Job,
    known: dict[str, State],
    digest: Callable[[Path], str],
) -> tuple[list[str], list[str]]:
    """The inputs of a run that have changed since, and the parents that are not whole now."""
    recorded = {one["path"]: one["digest"] for one in record.get("parents", [])}
    parents = {path: _believed(run_dir, path) or recorded.get(path, "") for path in job.parent_paths}
    made_of, changes = inputs.collect(job, parents, digest=digest), list[str]()
    if None in made_of["files"].values() or record.get("fingerprint") != inputs.digest_of(job, made_of):
        changes = inputs.changes(record, job, made_of) or [inputs.UNNAMED]
    absent: list[str] = []
    for path in job.parent_paths:
        parent = known.get(path.split("/")[1]) if path.startswith("../") else None
        if parent and parent.outdated and f"parent {path} has other contents" not in changes:
            how = "is stale" if parent.state == "stale" else "comes of one that is stale"
            changes.append(f"parent {path} {how}")
        if parent and not parent.digest:
            absent.append(path)
    return changes, absent


def _believed(run_dir: Path, path: str) -> str | None:
    """The digest of a parent as its manifest has it; None where it has none that can be read."""
    if not path.startswith(("../", "/", "~")):
        return None
    _, name, *inside = path.split("/") if path.startswith("../") else ("", "")
    try:
        about = manifest.read_manifest(run_dir.parent / name if name else Path(path).expanduser())
    except Refusal:
        return None
    if inside:
        soup = about.get("soup") if inside == [manifest.SOUP] else None
        return manifest.content_digest(soup) if soup else None
    return about.get("digest")


def _short(run_dir: Path, record: dict[str, Any], job: Job | None) -> str:
    """The numbers of a run that was found to fall short of its gates, unless its recipe has none now."""
    path = run_dir.parent / "evals" / f"{manifest.GATES}_{run_dir.name}.json"
    found = manifest.read_json(path) if path.is_file() else {}
    gated = job is None or getattr(job.recipe, "gates", {})
    measured = gated and found.get("digest") == record["digest"] and not found["passed"]
    return "; ".join(found["short"]) if measured else ""


def _progress(run_dir: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The step of a run under way, of how many, and the seconds left; {} before training begins."""
    number, path, lines = record.get("num_steps"), run_dir / LOG, list[dict[str, Any]]()
    if number is None:
        return {}
    if path.is_file():
        with path.open("rb") as stream:
            cut = max(0, stream.seek(0, 2) - _TAIL)
            stream.seek(cut)
            whole = stream.read().split(b"\n")[1 if cut else 0 : -1]  # the last is not whole, or empty
        lines = [one for line in whole if (one := _line(line))]
    if not lines:
        return {"step": 0, "num_steps": number}
    first, last = lines[0], lines[-1]
    num_steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    left = {"seconds_left": seconds / num_steps * (number - last["step"])} if num_steps else {}
    return {"step": last["step"], "num_steps": number, **left}


def _line(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.keys() >= {"step", "seconds"} else {}


def _running(progress: dict[str, Any]) -> str:
    """process 4711 on node3, step 12/300, 1 min 4 s left."""
    host = "" if progress["host"] == socket.gethostname() else f" on {progress['host']}"
    step = f"step {progress['step']}/{progress['num_steps']}" if "step" in progress else "before step 1"
    left = f", {duration(progress['seconds_left'])} left" if "seconds_left" in progress else ""
    return f"process {progress['pid']}{host}, {step}{left}"


def explain(jobs: Sequence[Job], pipeline: Sequence[Job]) -> tuple[list[str], int]:
    """What `smol-post run` would do with each run and why, a line a run, and the exit code that it comes to.

    That is 2 where a run would be refused, 1 where one falls short of its gates, else 0.
    """
    found, lines, blocked, ends = states(pipeline), list[str](), set[str](), EXIT_OK
    for job in jobs:
        one, code = found[job.name], EXIT_OK
        waits = [path for path in job.parent_paths if path[:3] == "../" and path.split("/")[1] in blocked]
        later = f", if {' and '.join(one.absent)} comes out as it was" if one.absent else ""
        if refusal := _missing(job):
            code, text = EXIT_REFUSED, f"refused: {refusal}"
        elif one.state == "stale":
            code, text = EXIT_REFUSED, f"refused: stale ({few(one.changes)})"
            if any(not change.endswith("is stale") for change in one.changes):
                text += f"; remove {' '.join(str(path) for path in _with_dependents(job, pipeline, found))}"
        elif one.state in ("running", "unknown"):
            code, text = EXIT_REFUSED, f"refused: {one.why}"
        elif one.state == "short":
            code, text = EXIT_FAILED, f"kept, and the chain stops there: {one.why}"
        elif one.state == "whole":
            text = f"kept{later}" if later else "kept: whole, and its fingerprint holds"
        elif waits:
            blocked.add(job.name)
            text = f"waits for parent {' and '.join(waits)}"
        elif one.state == "absent":
            text = "would be made"
        elif one.checkpoint is None:
            text = f"would begin again ({one.why})"
        else:
            text = f"would go on from step {one.checkpoint}{later}"
        if code:
            blocked.add(job.name)
            text += "" if ends else "; the command ends here"
            ends = ends or code
        lines.append(f"{job.name:<{_width(found)}}  {text}")
    return lines, ends


def _missing(job: Job) -> str:
    try:
        inputs.check_files(job)
    except Refusal as refusal:
        return str(refusal)
    return ""


def _with_dependents(job: Job, pipeline: Sequence[Job], found: dict[str, State]) -> list[Path]:
    """The directories of a stale run and of those made from it, as far as they hold anything of it."""
    names = {job.name}
    for one in pipeline:
        if any(path[:3] == "../" and path.split("/")[1] in names for path in one.parent_paths):
            names.add(one.name)
    return [one.run_dir for one in pipeline if one.name in names and found[one.name].state == "stale"]


def _width(found: dict[str, State]) -> int:
    return max(map(len, found), default=0)


def status(argv: list[str]) -> int:
    """Print where every run of a run root, or of a recipe folder, stands; nothing is written."""
    parser = Parser(prog="smol-post status", description=status.__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run root (runs/tiny) or a recipe folder")
    parser.add_argument("--run-dir", type=Path, help="the run root of a recipe folder (default: runs/<it>)")
    parser.add_argument("--json", action="store_true", help="JSON for programs")
    arguments = parser.parse_args(argv)
    where: Path = arguments.run
    try:
        if is_recipe := (where / "pipeline.yaml").is_file():
            root, folder, problem = arguments.run_dir or default_run_root(where), where, ""
        else:
            root, (folder, problem) = where, _recipe_folder(where)
        try:
            found = states(make_plan(folder, run_root=root, arguments=[]).pipeline) if folder else {}
        except Refusal as refusal:
            if is_recipe:
                raise
            found, problem = {}, str(refusal)
    except Refusal as refusal:
        return refuse(refusal)
    others = [state_of(path) for path in _run_dirs(root) if path.name not in found]
    every = [*found.values(), *sorted(others, key=lambda one: one.time)]
    evals, report = _measured(root, every), root / "report.html"
    if arguments.json:
        runs = [asdict(one) | {"in_pipeline": one.name in found} for one in every]
        tree = {"root": root, "recipe": folder, "problem": problem, "runs": runs, "evals": evals}
        print(json.dumps(tree | {"report": report if report.is_file() else None}, indent=2, default=str))
        return EXIT_OK
    print(f"{root}: {problem}; shown without staleness" if problem else f"{root}, by {folder}")
    width = _width({one.name: one for one in every})
    for one in every:
        outside = "" if one.name in found or problem else "  (not in the pipeline)"
        print(f"{one.name:<{width}}  {one.text()}{outside}")
    num_whole = sum(one.digest is not None and not (one.run_dir / JOURNAL).is_file() for one in every)
    print(
        f"evals of {len(evals)} of {num_whole} whole runs; report: {report if report.is_file() else 'none'}"
    )
    return EXIT_OK


def _run_dirs(root: Path) -> list[Path]:
    marks = (manifest.MANIFEST, manifest.STATE, locks.LOCK)
    found = {path.parent for path in root.glob("*/*") if path.name in marks}
    return sorted(path for path in found if path.name not in RESERVED)  # the lock of evals is no run's


def _recipe_folder(root: Path) -> tuple[Path | None, str]:
    """The recipe folder that most of the runs of a root were made from, or why there is none."""
    places: Counter[Path] = Counter()
    for run_dir in _run_dirs(root):
        try:
            if record := _record(run_dir):
                places[inputs.located(run_dir, record, "pipeline")] += 1
        except (Refusal, *manifest.EDITED):
            continue
    if not places and not _run_dirs(root):
        raise Refusal(f"{root}: holds neither runs nor a pipeline.yaml; give runs/tiny or recipes/tiny")
    for place, _ in places.most_common():
        if place.is_file():
            return place.parent, ""
    return None, f"its recipes are gone ({next(iter(places)).parent})" if places else "says no recipe"


def _measured(root: Path, every: Sequence[State]) -> list[str]:
    """The whole runs of which there are evals of what they are now."""
    found: list[str] = []
    for one in every:
        path = root / "evals" / f"{one.name}.json"
        try:
            if one.digest and path.is_file():
                found += [one.name] * (manifest.read_json(path).get("checkpoint_digest") == one.digest)
        except Refusal:
            continue
    return found
