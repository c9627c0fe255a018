"""`make reproduce`: recipes/tiny-ablations for several seeds, fresh questions -> docs/reproduction.md.

pipeline.yaml, seed n   every training run with seed n and rows of seed n (runs/reproduction/seed<n>)
  | smol-post run       chains two at a time; whole runs are kept, so a broken run goes on where it was
  | smol-post eval      every checkpoint, documents with and without overwrites, both modes
  v docs/reproduction.json, .md, pictures; the table between the marks of README.md

python -m benchmarks.reproduction --seeds 1 2 3
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks import findings
from smol_post import loading, manifest

TOP = Path(__file__).parents[1]
RECIPE = TOP / "recipes" / "tiny-ablations"
SUITES = {"overwritten": RECIPE / "evals.yaml", "clean": RECIPE / "evals_clean.yaml"}
BEYOND = {"beyond": RECIPE / "evals_beyond.yaml"}  # of the merged model alone
ROWS_OF_A_SEED = 1000  # seeds of generators lie closer than this
MORE = {"long_context_2", "merge_soup", "merge", "merge_weight_0.2"}  # the differences of these are small
NEVER = ("dpo_seed", "nll_seed", "apo_")  # they are measured as soups


def folder_of(seed: int, root: Path) -> Path:
    """Write the recipe folder of one seed: seeds of training and of rows set, paths absolute."""
    folder = root / f"seed{seed}" / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    tree = loading.read_yaml(RECIPE / "pipeline.yaml")
    for run in tree["runs"]:
        path = (RECIPE / run["recipe"]).resolve()
        run["recipe"] = str(path)
        recipe, overrides = loading.read_yaml(path), run.setdefault("overrides", {})
        if run["stage"] == "merge":
            continue
        if run["stage"] != "apo":
            overrides["seed"] = seed
        else:
            overrides["seed"] = overrides.get("seed", 0) + 10 * (seed - 1)
        for number, source in enumerate(overrides.get("sources") or recipe["sources"]):
            overrides[f"sources.{number}.seed"] = source["seed"] + ROWS_OF_A_SEED * (seed - 1)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return folder


def smol_post(*arguments: str, log: Path | None = None) -> str:
    """A command of the product, one thread; its output. RuntimeError with its last lines where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "smol_post", *arguments], env=environment, capture_output=True, text=True
    )
    if log is not None:
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"smol-post {' '.join(arguments)}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def train(seed: int, root: Path) -> dict[str, Path]:
    """Make every run of one seed; the checkpoints to measure, soups beside their merges."""
    folder, runs = folder_of(seed, root), root / f"seed{seed}" / "runs"
    smol_post("run", str(folder), "--run-dir", str(runs), log=root / f"seed{seed}" / "run.log")
    found: dict[str, Path] = {}
    for entry in loading.load_pipeline(folder).runs:
        if entry.stage == "merge" and not entry.name.startswith("merge_weight"):
            found[f"{entry.name}_soup"] = runs / entry.name / manifest.SOUP
        if not entry.name.startswith(NEVER):
            found[entry.name] = runs / entry.name
    return found


def measure(name: str, checkpoint: Path, place: Path) -> dict[str, Any]:
    """{"metrics", "seconds"} of one checkpoint, those without overwrites named `_clean`; kept in `place`."""
    path, suites = place / f"{name}.json", SUITES | (BEYOND if name == "merge" else {})
    files = sorted([*checkpoint.glob("*.safetensors"), *suites.values()])
    held = {one.name: manifest.digest_file(one) for one in files}
    if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["of"] == held:
        return kept
    started, metrics = time.monotonic(), {}
    for suite, file in suites.items():
        more = ["num_needle_questions=1200"] if name in MORE and suite in SUITES else []
        said = json.loads(smol_post("eval", str(checkpoint), "--suite", str(file), "--json", *more))[
            "metrics"
        ]
        metrics |= {f"{key}_clean" if suite == "clean" else key: value for key, value in said.items()}
    found = {"of": held, "seconds": time.monotonic() - started, "metrics": metrics}
    place.mkdir(parents=True, exist_ok=True)
    manifest.write_json(path, found)
    return found


def trained_seconds(seed: int, root: Path) -> float:
    """What the runs of one seed took, as their manifests say."""
    return sum(
        manifest.read_manifest(path.parent)["seconds"]
        for path in (root / f"seed{seed}" / "runs").glob("*/manifest.json")
    )


def main() -> int:
    """Train, measure, write; exit status 1 where a command of the product fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="one thread each")
    parser.add_argument("--root", type=Path, default=TOP / "runs" / "reproduction")
    arguments = parser.parse_args()
    started, seeds = time.monotonic(), dict.fromkeys(arguments.seeds)
    results: dict[int, dict[str, Future[dict[str, Any]]]] = {seed: {} for seed in seeds}

    def tell(text: str) -> None:
        print(f"{(time.monotonic() - started) / 60:5.1f} min  {text}", flush=True)

    def chain(seed: int) -> None:
        for name, checkpoint in train(seed, arguments.root).items():
            place = arguments.root / f"seed{seed}" / "measured"
            results[seed][name] = pool.submit(measure, name, checkpoint, place)
        tell(f"seed {seed}: all runs are whole")

    with ThreadPoolExecutor(arguments.workers) as pool:
        try:
            for done in [pool.submit(chain, seed) for seed in seeds]:
                done.result()
            found = {seed: {name: one.result() for name, one in its.items()} for seed, its in results.items()}
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            print(error, file=sys.stderr)
            return 1
    numbers = {seed: {name: one["metrics"] for name, one in its.items()} for seed, its in found.items()}
    spent = sum(trained_seconds(seed, arguments.root) for seed in seeds)
    spent += sum(one["seconds"] for its in found.values() for one in its.values())
    about = {
        "command": "make reproduce",
        "core_minutes": round(spent / 60),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no accelerator used",
        "versions": manifest.versions(),
        "questions": {name: loading.read_yaml(file)["seed"] for name, file in SUITES.items()},
    }
    text = json.dumps({"about": about, "seeds": numbers}) + "\n"
    (findings.DOCS / "reproduction.json").write_text(text, encoding="utf-8")
    findings.write()
    tell(f"{findings.DOCS / 'reproduction.md'} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
