"""`make reproduce`: recipes/tiny-ablations for several seeds, fresh questions -> docs/reproduction.md.

    pipeline.yaml, seed n   every training run with seed n and rows of seed n (runs/reproduction/seed<n>)
      | smol-post run       chains two at a time; whole runs are kept, so a broken run goes on where it was
      | smol-post eval      every checkpoint, documents with and without overwrites, both modes
      v docs/reproduction.json, .md, pictures; the table between the marks of README.md

`python -m benchmarks.reproduction --seeds 2 3 4`; ARGS of make go there.
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
from benchmarks.run import commit
from smol_post import evals, loading, manifest

TOP = Path(__file__).parents[1]
RECIPE = TOP / "recipes" / "tiny-ablations"
SUITE = RECIPE / "evals.yaml"
NO_CHATS = ("num_arithmetic_questions=0", "num_preference_pairs=0", "tool_calls=[]")
CLEAN = ("needle_options={max_overwrites: 0}", *NO_CHATS)
BEYOND = (
    "num_needle_questions=0",
    "yarn_context=1024",
    "yarn_needle_tokens=[992]",
    "num_yarn_questions=200",
    *NO_CHATS,
)
ABLATIONS = set(findings.ABLATIONS | findings.SOUPS) - set(findings.CHAIN)  # asked with overwrites only
ROWS_OF_A_SEED = 1000  # seeds of generators lie closer than this
QUESTIONS_OF_A_SEED = 10_000


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
        found |= {entry.name: runs / entry.name, f"{entry.name}_soup": runs / entry.name / manifest.SOUP}
    wanted = {*findings.CHAIN, *ABLATIONS, *findings.WEIGHTS.values()}
    found = {name: place for name, place in found.items() if name in wanted}
    return found


def measure(name: str, checkpoint: Path, place: Path, *, seed: int) -> dict[str, Any]:
    """{"metrics", "seconds"} of one checkpoint, those without overwrites named `_clean`; kept in `place`.

    What is kept holds as long as the weights, the questions and the code that asks them are the same.
    """
    asked = [("", ()), *([] if name in ABLATIONS else [("_clean", CLEAN)])]
    asked += [("", BEYOND)] if name == "merge" else []
    asked_seed = f"seed={loading.read_yaml(SUITE)['seed'] + QUESTIONS_OF_A_SEED * seed}"
    files = [*sorted(checkpoint.glob("*.safetensors")), checkpoint / "config.json", SUITE]
    files += [Path(evals.__file__).parent / file for file in evals.CODE]
    held = manifest.digest_tree([asked_seed, asked, *map(manifest.digest_file, files)])
    path = place / f"{name}.json"
    if path.is_file() and (kept := manifest.read_json(path))["of"] == held:
        return kept
    started, metrics = time.monotonic(), {}
    for suffix, keys in asked:
        said = smol_post("eval", str(checkpoint), "--suite", str(SUITE), "--json", asked_seed, *keys)
        metrics |= {f"{key}{suffix}": value for key, value in json.loads(said)["metrics"].items()}
    found = {"of": held, "seconds": time.monotonic() - started, "metrics": metrics}
    place.mkdir(parents=True, exist_ok=True)
    manifest.write_json(path, found)
    return found


def digest_of_recipes() -> str:
    """Of what all runs and questions say, defaults left out."""
    entries = loading.load_pipeline(RECIPE).runs
    said = [loading.load_entry(RECIPE, entry).model_dump(exclude_defaults=True) for entry in entries]
    return manifest.digest_tree([*said, loading.read_yaml(SUITE)])


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="one thread each")
    parser.add_argument("--root", type=Path, default=TOP / "runs" / "reproduction")
    arguments = parser.parse_args()
    started, seeds = time.monotonic(), dict.fromkeys(arguments.seeds)
    if not 3 <= len(seeds) <= 8:
        parser.error("--seeds: wanted three to eight different ones, as the verdicts are over seeds")
    results: dict[int, dict[str, Future[dict[str, Any]]]] = {seed: {} for seed in seeds}

    def tell(text: str) -> None:
        print(f"{(time.monotonic() - started) / 60:5.1f} min  {text}", flush=True)

    def chain(seed: int) -> None:
        for name, checkpoint in train(seed, arguments.root).items():
            place = arguments.root / f"seed{seed}" / "measured"
            results[seed][name] = pool.submit(measure, name, checkpoint, place, seed=seed)
        tell(f"seed {seed}: all runs are whole")

    with ThreadPoolExecutor(arguments.workers) as pool:
        try:
            for done in [pool.submit(chain, seed) for seed in seeds]:
                done.result()
            found = {seed: {name: one.result() for name, one in its.items()} for seed, its in results.items()}
        except RuntimeError as error:
            print(error, file=sys.stderr)
            pool.shutdown(cancel_futures=True)
            return 1
    numbers = {seed: {name: one["metrics"] for name, one in its.items()} for seed, its in found.items()}
    spent = sum(trained_seconds(seed, arguments.root) for seed in seeds)
    spent += sum(one["seconds"] for its in found.values() for one in its.values())
    about = {
        "command": "make reproduce",
        "core_minutes": round(spent / 60),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no accelerator used",
        "commit": commit(),
        "versions": manifest.versions(),
        "recipes": digest_of_recipes(),
    }
    text = json.dumps({"about": about, "seeds": numbers}) + "\n"
    (findings.DOCS / "reproduction.json").write_text(text, encoding="utf-8")
    findings.write()
    tell(f"{findings.DOCS / 'reproduction.md'} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
