"""Run trees as the commands leave them, made by the runner's own functions around weights of a few bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from smol_post import manifest, runner
from smol_post.plan import Job, make_plan

RUNS = ["base", "long_context_1", "mid", "sft", "apo_seed0", "apo_seed1", "merge"]
DEPENDENTS = {
    "base": RUNS[1:],
    "long_context_1": RUNS[2:],
    "mid": RUNS[3:],
    "sft": RUNS[4:],
    "apo_seed0": ["merge"],
    "apo_seed1": ["merge"],
    "merge": [],
}


def edit(path: Path, **keys: Any) -> None:
    """Set keys of a recipe file."""
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def with_local_inputs(folder: Path) -> None:
    """Give the test recipe an input of every kind: data, a folder of it, a template, a gate's suite."""
    (folder / "rows").mkdir()
    for path in (folder / "rows" / "a.jsonl", folder / "chats.jsonl", folder / "texts.jsonl"):
        path.write_text('{"text": "one"}\n')
    (folder / "mine.jinja").write_text("{{ messages }}")
    edit(folder / "mid.yaml", sources=[{"name": "traces", "path": "./rows"}])
    chats = {"name": "chats", "path": "chats.jsonl"}
    edit(folder / "sft.yaml", sources=[chats], chat_template="mine.jinja")
    edit(folder / "evals.yaml", perplexity=[{"name": "texts", "path": "texts.jsonl", "max_tokens": 8}])
    gate = {"suite": "evals.yaml", "seed": 3, "recover": "needle_2x", "keep": {"think_greedy": 1.0}}
    edit(folder / "merge.yaml", weights=[0.0, 0.1], gate=gate)


def jobs_of(folder: Path, root: Path) -> dict[str, Job]:
    """The runs of a recipe folder by name."""
    return {job.name: job for job in make_plan(folder, run_root=root, arguments=[]).pipeline}


def begin(job: Job) -> None:
    """What a run that was killed before its first checkpoint leaves."""
    parents, print_id = runner.examine(job)
    lock = runner.claim(job, parents, print_id)
    assert lock is not None
    lock.close()


def save_checkpoint(job: Job, step: int) -> Path:
    """A sealed checkpoint of a run under way."""
    folder = job.run_dir / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_text("state")
    manifest.seal(folder)
    return folder


def finish(job: Job, *, weights: str = "") -> None:
    """Make a run whole; its data is in the cache beside it."""
    begin(job)
    (job.run_dir / "model.safetensors").write_text(weights or f"weights of {job.name}")
    (job.run_dir / "config.json").write_text("{}")
    outcome: dict[str, Any] = {"data": None}
    if job.recipe.stage == "merge":
        (job.run_dir / "soup").mkdir()
        (job.run_dir / "soup" / "model.safetensors").write_text("average")
    else:
        key = manifest.digest_text(job.name)
        outcome = {
            "data": {"fingerprint": key, "revisions": {"tulu": "0123abc"}},
            "documents": [f"of_{job.name}"],
        }
        for folder in (f"packs/{key[7:31]}", f"documents/of_{job.name}"):
            place = job.run_dir.parent / "cache" / folder
            place.mkdir(parents=True)
            (place / "tokens.bin").write_text("tokens")
            manifest.seal(place)
    runner._finish(job, runner.examine(job)[0], runner.examine(job)[1], outcome, 62.0)


def make_tree(folder: Path, root: Path) -> dict[str, Job]:
    """Every run of a recipe folder, whole."""
    jobs = jobs_of(folder, root)
    for job in jobs.values():
        finish(job)
    return jobs


def remake(job: Job, *, weights: str) -> None:
    """Remove a run and make it again with other weights, as other hardware might."""
    shutil.rmtree(job.run_dir)
    shutil.rmtree(job.run_dir.parent / "cache")
    finish(job, weights=weights)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file and what is in it."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file by hand; None takes one out."""
    tree = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: one for key, one in tree.items() if one is not None}))
