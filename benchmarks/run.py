"""Run benchmarks, print one table and write benchmarks/results/<name>.json: python -m benchmarks.run [names]

Exit status 1 if a promise was not kept. Numbers are of this machine; ratios are within one run.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import smol_post
from benchmarks import attention, loss, memory, packing, preference, preparing, training
from benchmarks.measure import Result, apart

BENCHMARKS: dict[str, Callable[..., Result]] = {
    "bin_assignment": packing.bin_assignment,
    "prepare": preparing.prepare,
    "packs": packing.packs,
    "memory": preparing.memory,
    "loss": loss.loss,
    "attention": attention.attention,
    "sft_step": training.sft_step,
    "apo": preference.apo,
    "training_memory": memory.training_memory,
}
RESULTS = Path(__file__).parent / "results"
_SOURCES = {".py", ".jinja", ".json"}
_LIBRARIES = ("numpy", "pyarrow", "datasets", "tokenizers", "transformers", "trl", "torch")
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def run(name: str, *, results: Path, **arguments: Any) -> dict[str, Any]:
    """One benchmark in a folder of its own, removed afterwards; its report, as written to `results`.

    Raises ValueError if the code changed meanwhile: then nobody could say what was measured.
    """
    before = commit(), code()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        result = BENCHMARKS[name](Path(work), **arguments)
    if (commit(), code()) != before:
        raise ValueError(f"{name}: the commit or smol_post/ changed while it was measured; run it again")
    found = asdict(result)
    report = {
        "name": name,
        **{key: found[key] for key in ("peer", "ours", "ratio", "bar", "promises", "repetitions")},
        **found["extra"],
        "compared": result.compared,
        "commit": before[0],
        "hardware": hardware(),
        "versions": versions(),
        "samples": result.samples,
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether the tree (results aside) differed from it."""

    def git(*words: str) -> str | None:
        folder = Path(__file__).parents[1]
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"sha": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def code() -> str:
    """A digest of the source text that is measured."""
    files = sorted(path for path in Path(smol_post.__file__).parent.rglob("*") if path.suffix in _SOURCES)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def hardware() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def versions() -> dict[str, str]:
    """Python and the libraries that were compared or used."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def table(reports: list[dict[str, Any]]) -> str:
    """One line a number, and one a benchmark for its ratio.

    >>> print(table([{"name": "a", "peer": {"cpu_seconds": 3.0}, "ours": {"cpu_seconds": 1.5}, "ratio": 2.0,
    ...               "bar": 1.5, "promises": {"CPU time": True}}]))
    benchmark        number                         peer          ours
    a                cpu_seconds                       3           1.5
                     ratio 2.00, promised 1.5; CPU time: kept
    """
    lines = [f"{'benchmark':<16} {'number':<20} {'peer':>14}{'ours':>14}"]
    for report in reports:
        name = report["name"]
        for key, value in report["ours"].items():
            peer = report["peer"].get(key)
            lines.append(
                f"{name:<16} {key:<20} {'' if peer is None else _short(peer):>14}{_short(value):>14}"
            )
            name = ""
        kept = ", ".join(f"{what}: {'kept' if one else 'BROKEN'}" for what, one in report["promises"].items())
        lines.append(f"{'':<16} ratio {report['ratio']:.2f}, promised {report['bar']}; {kept}")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.5g}"


def main() -> int:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; none: all")
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    os.environ.update(_ENVIRONMENT)
    reports = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        reports.append(run(name, results=RESULTS, call=apart))
    print(table(reports))
    return 0 if all(all(report["promises"].values()) for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
