"""Evaluation of every whole checkpoint of the chain: `runs/R/evals/<run>.json`, keyed by its digest.

A result is kept while checkpoint, recipe and scoring code are the same. The soup before the last merge is
`merge_soup`.

    make evals
    smol-post evals recipes/tiny
"""

import json
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from smol_post import manifest
from smol_post.config import EvalsRecipe
from smol_post.plan import Job, say

_CODE = ("evals.py", "scoring.py", "synthetic.py", "chat.py", "messages.py", "encoding.py")


def checkpoints(jobs: Sequence[Job]) -> Iterator[tuple[str, str, Path, str]]:
    """(name, stage, folder, digest) of every whole run in order; a merge's soup before the merge itself."""
    for job in jobs:
        if not manifest.is_whole(job.run_dir):
            continue
        soup = job.run_dir / manifest.SOUP
        if job.recipe.stage == "merge" and soup.is_dir():
            yield f"{job.name}_soup", "merge", soup, manifest.content_digest(manifest.content_files(soup))
        yield job.name, job.recipe.stage, job.run_dir, manifest.read_manifest(job.run_dir)["digest"]


def evaluate_all(recipe: EvalsRecipe, jobs: Sequence[Job]) -> None:
    """Measure what has no valid result yet; one line and one file a checkpoint."""
    code = [resources.files("smol_post").joinpath(name).read_text() for name in _CODE]
    suite = manifest.digest_tree({"recipe": recipe.model_dump(), "code": code})
    for name, stage, folder, digest in checkpoints(jobs):
        path = jobs[0].run_dir.parent / "evals" / f"{name}.json"
        if path.is_file():
            old = json.loads(path.read_text())
            if old["checkpoint_digest"] == digest and old["suite_digest"] == suite:
                say(f"evals: {name}: kept, same checkpoint and suite")
                continue
        started = time.monotonic()
        metrics, samples = evaluate(folder, recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        seconds = round(time.monotonic() - started, 1)
        manifest.write_json(
            path,
            {
                "run": name,
                "stage": stage,
                "checkpoint_digest": digest,
                "suite_digest": suite,
                "seconds": seconds,
                "metrics": metrics,
                "samples": samples,
            },
        )
        numbers = "  ".join(f"{key} {metric['value']:.3f}" for key, metric in metrics.items())
        say(f"evals: {name}: {numbers}  ({seconds:.0f} s)")


def evaluate(folder: Path, recipe: EvalsRecipe) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All metrics of one checkpoint, and transcripts; what it cannot do (no modes) is absent, not zero."""
    import torch

    from smol_post import model, scoring, vocabulary

    model.use_threads(recipe.num_threads)
    tokenizer = vocabulary.load_tokenizer(folder)
    lm = model.load_model(folder, attn_implementation="sdpa").eval()
    if torch.accelerator.is_available():
        lm.to(torch.accelerator.current_accelerator())  # pyright: ignore[reportArgumentType]
    metrics: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    shortest = min(recipe.needle_tokens, default=1)
    for num_tokens in recipe.needle_tokens if recipe.num_needle_questions else []:
        metrics[f"needle_{num_tokens / shortest:g}x"] = scoring.needles(
            lm,
            tokenizer,
            num_tokens=num_tokens,
            num_questions=recipe.num_needle_questions,
            seed=recipe.seed,
            batch_size=max(1, recipe.batch_size * shortest // num_tokens),
            options=recipe.needle_options,
        )
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return metrics, samples
    modes = ["think", "no_think"] if "enable_thinking" in template else ["think"]
    common = {
        "seed": recipe.seed,
        "date_string": recipe.date_string,
        "options": recipe.arithmetic_options,
        "num_questions": recipe.num_arithmetic_questions,
        "max_new_tokens": recipe.max_new_tokens,
        "batch_size": recipe.batch_size,
    }
    for mode in modes if recipe.num_arithmetic_questions else []:
        right, obeyed, shown = scoring.arithmetic(
            lm, tokenizer, mode=mode, num_samples=recipe.num_samples, **common
        )
        metrics |= {f"{mode}_greedy": right, f"mode_{mode}": obeyed}
        samples += shown
        metrics[f"{mode}_sampled"], metrics[f"mode_{mode}_sampled"], _ = scoring.arithmetic(
            lm,
            tokenizer,
            mode=mode,
            num_samples=0,
            temperature=recipe.temperature,
            top_p=recipe.top_p,
            **common,
        )
    if len(modes) == 2 and recipe.num_preference_pairs:
        metrics["preference_accuracy"] = scoring.preferences(
            lm,
            tokenizer,
            num_pairs=recipe.num_preference_pairs,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            date_string=recipe.date_string,
            options=recipe.preference_options,
        )
    return metrics, samples
