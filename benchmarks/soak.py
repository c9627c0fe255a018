"""`make soak`: a chain that is killed over and over, in every stage and phase, ends as one that never was.

    python -m benchmarks.soak --recipe recipes/tiny --run-dir runs/soak --reference runs/tiny

The same `smol-post run` is given again after each kill. A watcher looks where the chain is, waits a random
while, stops all its processes (SIGSTOP), notes where they were, and kills them (SIGKILL); some are asked to
stop (SIGTERM) instead. After each kill whatever looks whole is hashed. In the end digests, logs and evals are
those of a chain that nobody killed and that made no checkpoints. Prints a table, writes docs/soak.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from benchmarks.run import commit, hardware
from smol_post import loading, manifest
from smol_post.refusal import Refusal

# How often each phase of a run is hit (our choice: 50 kills of the tiny chain, a few to spare), and the
# longest wait in seconds from its first sign to the kill.
TRAINING = {"start": 1, "preparation": 1, "proofs": 1, "training": 3, "checkpoint": 2, "final save": 1}
MERGE = {"start": 1, "soup": 1, "merge": 1, "final save": 1}
AFTERWARDS = {"evals": 3, "report": 1}
WAIT = {"start": 3.0, "proofs": 1.5, "training": 6.0, "evals": 8.0}
SHORT_WAIT = 0.03  # of other phases, of the merge, and of all where runs are short
LIMIT_SECONDS = 1800  # of one attempt
VARIES = {"seconds", "tokens_per_second", "memory_bytes"}  # from one run to the next


class Chain:
    """The runs of a recipe below `root`, watched from outside."""

    def __init__(self, recipe: Path, root: Path) -> None:
        """`recipe`: its folder."""
        self.recipe, self.root = recipe, root
        entries = loading.load_pipeline(recipe).runs
        self.runs = [entry.name for entry in entries]
        self.merges = {entry.name for entry in entries if entry.stage == "merge"}

    def command(self) -> list[str]:
        """What a person types."""
        words = ["run", str(self.recipe), "--run-dir", str(self.root)]
        return [sys.executable, "-m", "smol_post", *words]

    def phase(self, since: float) -> tuple[str, str]:
        """(run, phase) that the attempt begun at `since` is in, by what it has written."""

        def new(path: Path) -> bool:
            try:
                return path.stat().st_mtime >= since
            except FileNotFoundError:
                return False

        run = next((one for one in self.runs if not manifest.is_whole(self.root / one)), None)
        if run is None:
            done = len(list((self.root / "evals").glob("[!gv]*.json"))) > len(self.runs)
            return "afterwards", "report" if done else "evals"
        folder = self.root / run
        if not new(folder / manifest.STATE):
            return run, "start"
        if any(map(new, folder.glob("*.safetensors"))):
            return run, "final save"
        if run in self.merges:
            return run, "merge" if new(folder / "merged.part") else "soup" if new(
                folder / "soup"
            ) else "start"
        if any(not (one / manifest.SEAL).exists() for one in folder.glob("checkpoints/checkpoint-*")):
            return run, "checkpoint"
        if new(folder / "train_log.jsonl"):
            return run, "training"
        return run, "preparation" if any(self.root.glob("cache/*/*.half")) else "proofs"

    def check_whole(self) -> int:
        """Hash whatever looks whole, runs and folders of the cache; how many. Refusal where one is not."""
        whole = [self.root / run for run in self.runs if manifest.is_whole(self.root / run)]
        for folder in whole:
            manifest.verify(folder)
        sealed = [path.parent for path in self.root.glob(f"cache/*/*/{manifest.SEAL}")]
        for folder in sealed:
            if lost := manifest.broken(folder):
                raise Refusal(f"{folder}: looks whole and is not: {lost}")
        return len(whole) + len(sealed)

    def outcome(self) -> dict[str, Any]:
        """Everything that must not depend on what happened on the way."""
        found: dict[str, Any] = {}
        for run in self.runs:
            made, log = manifest.read_manifest(self.root / run), self.root / run / "train_log.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
            kept = [{key: one for key, one in line.items() if key not in VARIES} for line in lines]
            steps = [line["step"] for line in lines]
            if steps != list(range(1, len(steps) + 1)):
                raise Refusal(f"{log}: steps are missing or repeated")
            found[run] = {"digest": made["digest"], "files": made["files"], "log": manifest.digest_tree(kept)}
        for path in sorted((self.root / "evals").glob("[!gv]*.json")):
            found[f"evals of {path.stem}"] = manifest.read_json(path)["metrics"]
        return found


def saving(recipe: Path, to: Path) -> Path:
    """A copy of a recipe folder whose training runs make checkpoints on the way, five and the last."""
    shutil.copytree(recipe, to, dirs_exist_ok=True)
    tree = yaml.safe_load((to / "pipeline.yaml").read_text())
    how = {"save_strategy": "steps", "save_steps": 0.2, "save_total_limit": 2}
    for entry in tree["runs"]:
        if entry["stage"] != "merge":
            entry["overrides"] = entry.get("overrides", {}) | {f"trainer.{k}": v for k, v in how.items()}
    (to / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    return to


def attempt(
    chain: Chain, targets: Counter[tuple[str, str]], wait: dict[str, float], draw: random.Random, log: Path
) -> tuple[str, str, str] | None:
    """Start the chain and kill it at a target: (run, phase, signal) where it was; None: it ended, whole."""
    since = time.time()
    with log.open("a") as stream:
        started = subprocess.Popen(
            chain.command(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    while started.poll() is None:
        if time.time() - since > LIMIT_SECONDS:
            os.killpg(started.pid, signal.SIGKILL)
            raise Refusal(f"an attempt took more than {LIMIT_SECONDS} s; see {log}")
        place = chain.phase(since)
        if not targets[place]:
            time.sleep(0.002)
            continue
        longest = SHORT_WAIT if place[0] in chain.merges else wait.get(place[1], SHORT_WAIT)
        time.sleep(draw.uniform(0, longest))
        if asked := place[1] == "training" and targets[place] == 1:
            # to the command, which passes it on, or to all its processes at once, as a scheduler does
            (os.kill if draw.random() < 0.5 else os.killpg)(started.pid, signal.SIGTERM)
        else:
            os.killpg(started.pid, signal.SIGSTOP)
        where = chain.phase(since)
        targets[place] -= 1
        if not asked:
            os.killpg(started.pid, signal.SIGKILL)
        code = started.wait(LIMIT_SECONDS)
        wanted = (75,) if asked else (-signal.SIGKILL,)
        if code not in wanted:
            raise Refusal(f"{where}: ended with {code}, wanted {wanted}; see {log}")
        return *where, "SIGTERM" if asked else "SIGKILL"
    if started.returncode:
        raise Refusal(f"an attempt ended with {started.returncode}; see {log}")
    return None


def soak(
    recipe: Path, root: Path, *, reference: Path | None, seed: int, short: bool = False, few: bool = False
) -> dict[str, Any]:
    """Make the chain under kills and hold it against `reference`, which is made if it is not given.

    `short`: the runs of the recipe are, so kills come at the first sign of a phase. `few`: each phase of one
    training run and of the merge once, instead of all phases of all runs.
    """
    if root.exists():
        raise Refusal(f"{root}: exists; choose another --run-dir or remove it")
    root.mkdir(parents=True)
    if reference is None:
        reference = root / "reference"
        straight = Chain(recipe, reference)
        subprocess.run(straight.command(), check=True, stdout=subprocess.DEVNULL)
    wanted = Chain(recipe, reference).outcome()
    chain = Chain(saving(recipe, root / "recipe"), root / "runs")
    targets: Counter[tuple[str, str]] = Counter({("afterwards", phase): n for phase, n in AFTERWARDS.items()})
    for run in chain.runs[2:3] + chain.runs[-1:] if few else chain.runs:
        phases = MERGE if run in chain.merges else TRAINING
        targets |= Counter({(run, phase): 1 if few else n for phase, n in phases.items()})
    draw, began, hits, checked = random.Random(seed), time.monotonic(), Counter[tuple[str, ...]](), 0
    while hit := attempt(chain, targets, {} if short else WAIT, draw, root / "soak.log"):
        hits[hit] += 1
        checked += chain.check_whole()
        print(f"{sum(hits.values()):3} {hit[2]} {hit[0]}: {hit[1]}", flush=True)
    found = chain.outcome()
    torn = (root / "soak.log").read_text().count(" is torn (")
    return {
        "recipe": recipe.name,
        "runs": [*chain.runs, "afterwards"],
        "hits": [[*hit, number] for hit, number in sorted(hits.items())],
        "checkpoints_set_aside": torn,
        "whole_things_hashed": checked,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "digests": {name: one["digest"] for name, one in found.items() if "digest" in one},
        "different": [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)],
    }


def table(report: dict[str, Any]) -> str:
    """Kills by run and phase in Markdown, and requests to stop beside them: 2+1."""
    runs, hits = report["runs"], {(run, phase, how): n for run, phase, how, n in report["hits"]}
    phases = [one for one in [*TRAINING, *MERGE, *AFTERWARDS] if any(hit[1] == one for hit in hits)]
    lines = ["| phase | " + " | ".join(runs) + " | in all |", "|---|" + "--:|" * (len(runs) + 1)]
    for phase in dict.fromkeys(phases):
        both = [[hits.get((run, phase, how), 0) for run in runs] for how in ("SIGKILL", "SIGTERM")]
        cells = zip(*([*one, sum(one)] for one in both), strict=True)
        said = [f"{kills}+{stops}" if stops else f"{kills or ''}" for kills, stops in cells]
        lines.append(f"| {phase} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def main() -> int:
    """Soak; the exit code is 1 where anything differs or too few were killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/soak"), help="new; removed if all is well")
    parser.add_argument("--reference", type=Path, help="runs of this recipe that nobody killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="the runs of the recipe are seconds")
    parser.add_argument("--few", action="store_true", help="one training run and the merge only")
    parser.add_argument("--out", type=Path, default=Path("docs/soak.json"))
    given = parser.parse_args()
    about = {"commit": commit(), "hardware": hardware()}
    try:
        how = {"seed": given.seed, "short": given.short, "few": given.few}
        found = soak(given.recipe, given.run_dir, reference=given.reference, **how)
    except Refusal as refusal:
        print(f"failed: {refusal}", file=sys.stderr)
        return 1
    kills = sum(number for *_, how, number in found["hits"] if how == "SIGKILL")
    given.out.write_text(json.dumps(about | {"kills": kills} | found, indent=1) + "\n")
    print(table(found))
    print(
        f"{kills} kills, {found['minutes']} minutes; different: {', '.join(found['different']) or 'nothing'}"
    )
    if found["different"] or kills < (10 if given.few else 50):
        return 1
    shutil.rmtree(given.run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
