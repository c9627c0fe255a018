"""Evaluation of every whole checkpoint of the chain: `runs/R/evals/<run>.json`, keyed by its digest.

A result is kept while checkpoint, recipe and scoring code are the same. The soup before the last merge is
`merge_soup`. With `num_threads`, as many checkpoints as the cores allow are measured at once.

    make evals
    smol-post evals recipes/tiny
"""

import copy
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smol_post import export, manifest
from smol_post.config import EvalsRecipe
from smol_post.plan import Job, say
from smol_post.refusal import Refusal
from smol_post.runner import interrupt_on_sigterm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CODE = (
    "evals.py",
    "scoring.py",
    "synthetic.py",
    "chat.py",
    "messages.py",
    "encoding.py",
    "model.py",
    "export.py",
    "harness.py",
)
_WITHOUT_YARN = {"yarn_context": None, "yarn_needle_tokens": []}


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
    """Measure what has no valid result yet; one line and one file a checkpoint, as each is done."""
    code = [resources.files("smol_post").joinpath(name).read_text() for name in _CODE]
    todo: list[tuple[Path, EvalsRecipe, Path, dict[str, Any]]] = []
    for name, stage, folder, digest in checkpoints(jobs):
        ours = recipe if folder == jobs[-1].run_dir else recipe.model_copy(update=_WITHOUT_YARN)
        suite = manifest.digest_tree({"recipe": _what(ours), "code": code})
        about = {"run": name, "stage": stage, "checkpoint_digest": digest, "suite_digest": suite}
        path = jobs[0].run_dir.parent / "evals" / f"{name}.json"
        if path.is_file() and about.items() <= json.loads(path.read_text()).items():
            say(f"evals: {name}: kept, same checkpoint and suite")
        else:
            todo.append((folder, ours, path, about))
    if todo and recipe.harness:
        from smol_post import harness

        for asked in recipe.harness:
            harness.find(asked)  # an unknown task is refused now, not after hours
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(num_cores // (recipe.num_threads or num_cores), len(todo))
    # the last first: they have most to do
    if num_workers < 2 or not at_once(measure, todo[::-1], num_workers=num_workers):
        for one in todo:
            say(measure(*one))


def _what(recipe: EvalsRecipe) -> dict[str, Any]:
    """What a recipe measures; local task files by what is in them, not by where they are."""
    tree = recipe.model_dump()
    for entry in tree["harness"]:
        entry["version"] = metadata.version("lm_eval")
        if entry["include_path"]:
            files = [path for path in Path(entry["include_path"]).rglob("*") if path.is_file()]
            entry["include_path"] = {
                str(path.relative_to(entry["include_path"])): manifest.digest_file(path)
                for path in files
                if path.parent.name != "__pycache__"
            }
    return tree


def at_once(call: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], *, num_workers: int) -> bool:
    """Say what `call` returns of each task, in order of completion; each is done by one of the workers.

    They are forked from a server that has imported the libraries once; the first exception ends them all.
    False, with nothing done, where there is an accelerator to share. Refusal where a worker is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.modeling_utils"])
    interrupt_on_sigterm()
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_as_worker) as pool:
        try:
            if pool.submit(_has_accelerator).result():
                return False
            left = {pool.submit(call, *task) for task in tasks}
            while left:  # woken each second, as a signal that another thread took is handled by this one
                done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
                for one in done:
                    say(one.result())
        except BaseException as error:
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise Refusal(
                    f"evals: one of {num_workers} workers was killed, as happens where memory is short; "
                    "a higher num_threads=... has fewer of them at once"
                ) from None
            raise
    return True


def _as_worker() -> None:
    """Ctrl-C is the parent's to act on; its end is ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def measure(folder: Path, recipe: EvalsRecipe, path: Path, about: dict[str, Any]) -> str:
    """Evaluate one checkpoint and write its file, `about` first; the line to show."""
    started = time.monotonic()
    metrics, samples = evaluate(folder, recipe)
    seconds = round(time.monotonic() - started, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(path, about | {"seconds": seconds, "metrics": metrics, "samples": samples})
    numbers = "  ".join(f"{key} {metric['value']:.3f}" for key, metric in metrics.items())
    return f"evals: {about['run']}: {numbers}  ({seconds:.0f} s)"


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
    shortest = min(recipe.needle_tokens, default=1)

    def needles(lengths: list[int], num_questions: int, suffix: str = "") -> None:
        for num_tokens in lengths if num_questions else []:
            metrics[f"needle_{num_tokens / shortest:g}x{suffix}"] = scoring.needles(
                lm,
                tokenizer,
                num_tokens=num_tokens,
                num_questions=num_questions,
                seed=recipe.seed,
                batch_size=max(1, recipe.batch_size * shortest // num_tokens),
                options=recipe.needle_options,
            )

    needles(recipe.needle_tokens, recipe.num_needle_questions)
    chats, samples = evaluate_chats(lm, tokenizer, recipe)
    metrics |= chats
    for asked in recipe.harness:
        from smol_post import harness

        metrics |= harness.evaluate(lm, tokenizer, asked, date_string=recipe.date_string)
    rope = getattr(lm.config, "rope_parameters", None) or {}
    if recipe.yarn_context and rope.get("rope_type") == "default":
        longer = [length for length in recipe.yarn_needle_tokens if length not in recipe.needle_tokens]
        needles(longer, recipe.num_yarn_questions)
        scaled = copy.deepcopy(lm.config)
        scaled.update(export.yarn(lm.config.to_dict(), context=recipe.yarn_context, where=folder))
        model.use_yarn(lm, scaled)
        needles(recipe.yarn_needle_tokens, recipe.num_yarn_questions, "_yarn")
    return metrics, samples


def evaluate_chats(
    lm: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", recipe: EvalsRecipe
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What takes a chat template: arithmetic and obedience in each mode that it has, preferences."""
    from smol_post import scoring

    metrics: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
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
