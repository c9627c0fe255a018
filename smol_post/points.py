"""What is on disk of a run root, a Point for each checkpoint: manifest, training log, evals."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smol_post.manifest import SOUP, content_digest, content_files, read_json
from smol_post.refusal import Refusal, describe

GROUPS = {  # prefixes of metric names, in the order of the columns
    "needle retrieval": ("needle",),
    "two modes": ("think_greedy", "no_think_greedy", "think", "no_think", "mode_think", "mode"),
    "tool calls": ("tool_calls_",),
    "long-context probes": ("single_", "multi_key_", "multi_value_"),
    "other": ("",),
}

# What is read of a manifest; the report of a chain with others is refused, not half of it shown.
_MANIFEST = {"stage": str, "digest": str, "recipe": dict[str, Any], "data": dict[str, Any] | None,
             "parents": list[dict[str, str | None]], "metrics": dict[str, Any], "versions": dict[str, Any],
             "seconds": float}  # fmt: skip
_LOWER = re.compile(r"(?:^|_)(?:perplexity|loss|nll|bits_per_byte|brier)(?:_|$)")


def lower_is_better(name: str) -> bool:
    """Whether a metric is a loss of some kind, by the whole words of its name.

    >>> lower_is_better("perplexity_books"), lower_is_better("openllm_acc")
    (True, False)
    """
    return _LOWER.search(name) is not None


@dataclass(frozen=True)
class Point:
    """A checkpoint: a run of the chain, or (`is_run` false) the soup inside a merge, which only has evals."""

    name: str
    is_run: bool
    manifest: dict[str, Any]
    evals: dict[str, Any]
    log: list[dict[str, Any]]
    stage: str
    parents: dict[str, str]  # name -> digest as recorded
    gated: dict[str, Any] = field(default_factory=dict)  # what became of the gates, if they were measured
    verified: dict[str, Any] = field(default_factory=dict)  # verify.json, of a run that is not whole too
    digest: str | None = None  # of the checkpoint as it is now; None where there is none
    asked_others: bool = False  # than those it stands beside

    @property
    def note(self) -> str:
        """Why its numbers are missing or must not be trusted; "" if all is well."""
        if self.is_run and not self.manifest:
            return "not run"
        stale = self.evals.get("checkpoint_digest") != self.digest
        if not self.evals or stale:
            return "evals of another checkpoint" if self.evals else "no evals"
        return "asked other questions" if self.asked_others else ""

    def metric(self, name: str, key: str = "value") -> float | None:
        """The value (or stderr) of a metric; None where it was not measured or the run is not there."""
        metrics = {} if self.note == "not run" else self.evals.get("metrics") or {}
        return (metrics.get(name) or {}).get(key)

    def counts(self) -> dict[str, Any]:
        """What the manifest says of the data; empty for a merge."""
        return self.manifest.get("data") or {}


def read_points(run_root: Path, runs: Sequence[str]) -> list[Point]:
    """All checkpoints in the order of the chain; the soup of a whole merge, if measured, stands before it."""
    points: list[Point] = []
    for name in runs:
        manifest = _read_json(run_root / name / "manifest.json", wanted=_MANIFEST)
        soup = f"{name}_soup"
        if manifest.get("stage") == "merge" and soup not in runs:
            evals, folder = read_evals(run_root / "evals" / f"{soup}.json"), run_root / name / SOUP
            if evals:
                digest = content_digest(content_files(folder)) if folder.is_dir() else None
                points.append(Point(soup, False, {}, evals, [], "merge", {}, digest=digest))
        evals = read_evals(run_root / "evals" / f"{name}.json")
        log = _read_log(run_root / name / "train_log.jsonl") if manifest else []
        parents = {
            Path(p.get("path") or "").name: p.get("digest") or "" for p in manifest.get("parents") or []
        }
        stage = manifest.get("stage") or evals.get("stage") or ""
        gated = _read_json(
            run_root / "evals" / f"gates_{name}.json", wanted={"gates": dict[str, dict[str, Any]] | None}
        )
        gated = gated if gated.get("digest") == manifest.get("digest") else {}
        verified = _read_json(run_root / name / "verify.json", wanted={"proofs": list[dict[str, Any]]})
        digest = manifest.get("digest")
        points.append(Point(name, True, manifest, evals, log, stage, parents, gated, verified, digest))
    return mark_others(points)


def mark_others(points: list[Point]) -> list[Point]:
    """Points that were asked other questions than most of the measured ones are marked; of two, both are.

    Evals that do not say what was asked are not marked.
    """
    points = [replace(p, asked_others=False) for p in points]
    asked = [p.evals.get("asked_digest") if not p.note else None for p in points]
    counts = Counter(digest for digest in asked if digest)
    most = max(counts, key=counts.__getitem__, default=None)
    most = None if len(points) == len(counts) == 2 else most
    others = [digest is not None and digest != most for digest in asked]
    return [replace(p, asked_others=other) for p, other in zip(points, others, strict=True)]


def _read_json(
    path: Path, remedy: str = "remove the file and run its stage again", **wanted: Any
) -> dict[str, Any]:
    return read_json(path, remedy=remedy, **wanted) if path.is_file() else {}


def read_evals(path: Path) -> dict[str, Any]:
    """What was measured on a checkpoint; Refusal where the file is not of the shape that evals have."""
    remedy = "remove the file and measure again with smol-post evals"
    evals = _read_json(path, remedy)
    metrics, samples = evals.get("metrics") or {}, evals.get("samples") or []
    if not isinstance(metrics, dict):
        raise Refusal(f"{path}: metrics: found {describe(metrics)}, wanted an object; {remedy}")
    for name, metric in metrics.items():
        numbers = [metric.get("value"), metric.get("stderr")] if isinstance(metric, dict) else [""]
        if not all(isinstance(one, int | float | None) for one in numbers):
            raise Refusal(
                f"{path}: metrics.{name}: found {describe(metric)}, wanted a value and its stderr; {remedy}"
            )
    if not isinstance(samples, list) or not all(isinstance(one, dict) for one in samples):
        raise Refusal(f"{path}: samples: found {describe(samples)}, wanted a list of objects; {remedy}")
    return evals


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log, each loss with its step; Refusal with the line that is not so."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        where, remedy = f"{path}, line {number}", "remove the file and run its stage again"
        if not line.strip():
            continue
        try:
            found.append(json.loads(line.decode("utf-8")))
        except ValueError as error:
            raise Refusal(f"{where}: not JSON ({error}); {remedy}") from None
        if not isinstance(found[-1], dict):
            raise Refusal(f"{where}: found {describe(found[-1])}, wanted a JSON object; {remedy}")
        loss, step = found[-1].get("loss"), found[-1].get("step")
        if loss is not None and not (isinstance(loss, int | float) and isinstance(step, int | float)):
            raise Refusal(f"{where}: found {describe(found[-1])}, wanted a loss and its step; {remedy}")
    return found


def metric_names(points: list[Point]) -> list[str]:
    """Every metric that any checkpoint has; the order depends on the names alone, needles by length."""
    names = {name for p in points for name in p.evals.get("metrics") or {} if p.metric(name) is not None}
    return sorted(names, key=rank_metric)


def rank_metric(name: str) -> tuple[int, int, float, str]:
    """Where a metric stands: (group, prefix in the group, length, name)."""
    group, prefixes = next((n, g) for n, g in enumerate(GROUPS.values()) if name.startswith(g))
    prefix = next(n for n, prefix in enumerate(prefixes) if name.startswith(prefix))
    return group, prefix, float((re.findall(r"\d+(?:\.\d+)?", name) or [0])[-1]), name
