"""Evaluation of every whole checkpoint of the chain: `runs/R/evals/<run>.json`, keyed by its digest.

A result is kept while checkpoint, recipe and scoring code are the same. The soup before the last merge is
`merge_soup`. With `num_threads`, as many checkpoints as the cores allow are measured at once.

    make evals
    smol-post evals recipes/tiny
"""

import copy
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smol_post import disk, export, locks, manifest
from smol_post.config import EvalsRecipe, Made
from smol_post.launch import exit_with_parent
from smol_post.plan import Job, say
from smol_post.points import read_evals
from smol_post.refusal import Failure, Refusal, did_you_mean
from smol_post.runner import interrupt_on_sigterm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CODE = (
    "evals.py",
    "scoring.py",
    "probes.py",
    "tool_scores.py",
    "tool_calls.py",
    "synthetic.py",
    "sources.py",
    "chat.py",
    "messages.py",
    "encoding.py",
    "vocabulary.py",
    "model.py",
    "attention.py",
    "sequence.py",
    "export.py",
    "harness.py",
)
LIBRARIES = ("torch", "transformers")  # whose versions are part of the key
WITHOUT_YARN = {"yarn_context": None, "yarn_needle_tokens": []}


def checkpoints(jobs: Sequence[Job]) -> Iterator[tuple[str, str, Path, str]]:
    """(name, stage, folder, digest) of every whole run in order; a merge's soup before the merge itself."""
    for job in jobs:
        if not manifest.is_whole(job.run_dir):
            continue
        soup = job.run_dir / manifest.SOUP
        if job.recipe.stage == "merge" and soup.is_dir():
            yield f"{job.name}_soup", "merge", soup, manifest.content_digest(manifest.content_files(soup))
        yield job.name, job.recipe.stage, job.run_dir, manifest.read_manifest(job.run_dir)["digest"]


def evaluate_all(recipe: EvalsRecipe, jobs: Sequence[Job], *, only: str | None = None) -> None:
    """Measure what has no valid result yet (`only` this run); one line and one file a checkpoint."""
    code = [resources.files("smol_post").joinpath(name).read_text() for name in CODE]
    versions = {name: metadata.version(name) for name in LIBRARIES}
    what = _what(recipe)
    asked = manifest.digest_tree(_asked(what))
    todo: list[tuple[Path, EvalsRecipe, Path, dict[str, Any]]] = []
    for name, stage, folder, digest in checkpoints(jobs):
        if only not in (None, name):
            continue
        changes = {} if folder == jobs[-1].run_dir else WITHOUT_YARN
        ours = recipe.model_copy(update=changes)
        suite = manifest.digest_tree({"recipe": what | changes, "code": code, "versions": versions})
        about = {"run": name, "stage": stage, "checkpoint_digest": digest, "suite_digest": suite}
        about["asked_digest"] = asked
        path = jobs[0].run_dir.parent / "evals" / f"{name}.json"
        if _holds(path, about):
            say(f"evals: {name}: kept, same checkpoint and suite")
        else:
            todo.append((folder, ours, path, about))
    if not todo:
        return
    if recipe.harness:
        from smol_post import harness

        for entry in recipe.harness:
            harness.find(entry)  # an unknown task is refused now, not after hours
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(num_cores // (recipe.num_threads or num_cores), len(todo))
    folder = todo[0][2].parent
    folder.mkdir(exist_ok=True)
    with locks.take(folder, what="an evaluation"), disk.watched(folder):
        say(f"evals: measuring {', '.join(one[3]['run'] for one in todo)}")
        # the last first: they have most to do
        if num_workers < 2 or not at_once(measure, todo[::-1], num_workers=num_workers):
            for one in todo:
                say(measure(*one))


def hold(recipe: EvalsRecipe, jobs: Sequence[Job], job: Job) -> None:
    """Measure a run that has gates and write down how it does: `evals/gates_<run>.json`.

    Raises Failure with the numbers where it falls short, Refusal where nothing measures a gate.
    """
    gates = job.recipe.gates if isinstance(job.recipe, Made) else {}
    path = job.run_dir.parent / "evals" / f"{manifest.GATES}_{job.name}.json"
    if not gates:
        path.unlink(missing_ok=True)
        return
    where = f"{job.recipe_file}: gates"
    evaluate_all(recipe, jobs, only=job.name)
    result = read_evals(path.with_name(f"{job.name}.json"))
    short, found = list[str](), dict[str, Any]()
    for name, bound in gates.items():
        if name not in result["metrics"]:
            hint = did_you_mean(name, list(result["metrics"]))
            raise Refusal(f"{where}.{name}: was not measured on {job.name}{hint}")
        metric = result["metrics"][name]
        found[name] = bound.model_dump() | metric | {"passed": bound.holds(metric["value"])}
        wanted = " and ".join(
            f"{word} {limit:g}"
            for word, limit in (("at least", bound.min), ("at most", bound.max))
            if limit is not None
        )
        if not found[name]["passed"]:
            error = "" if metric["stderr"] is None else f" +- {metric['stderr']:g}"
            short.append(f"{name} is {metric['value']:g}{error}, wanted {wanted}")
    about = {"digest": result["checkpoint_digest"], "passed": not short, "gates": found}
    manifest.write_json(path, about | {"short": short})
    if short:
        raise Failure(f"{job.name} falls short: {'; '.join(short)}; the run is kept, the chain stops here")
    say(f"{job.name}: passed {len(found)} gates")


def _holds(path: Path, about: dict[str, Any]) -> bool:
    """Whether a result is there, readable, and of what `about` says."""
    try:
        return path.is_file() and about.items() <= manifest.read_json(path).items()
    except Refusal:
        return False


def _what(recipe: EvalsRecipe) -> dict[str, Any]:
    """What a recipe measures; a file stands in its place by what is in it, not by where it is."""

    def digest(path: str | None) -> str | None:
        return manifest.digest_file(Path(path)) if path else None

    tree: dict[str, Any] = recipe.model_dump() | {"turn_prompts": digest(recipe.turn_prompts)}
    for entry, probe in zip(tree["probes"], recipe.probes, strict=True):
        entry["haystack"] = digest(probe.haystack)
    for entry, texts in zip(tree["perplexity"], recipe.perplexity, strict=True):
        entry["path"] = digest(texts.path)
    for entry, calls in zip(tree["tool_calls"], recipe.tool_calls, strict=True):
        entry["path"] = digest(calls.path)
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


def _asked(what: dict[str, Any]) -> dict[str, Any]:
    """The questions of `_what`, without how they are gone through and what the last run alone is asked."""
    how = {"num_threads", "batch_size", "num_samples", "version", "num_yarn_questions", *WITHOUT_YARN}
    asked = {key: value for key, value in what.items() if key not in how}
    asked["probes"] = [one for one in what["probes"] if not one["yarn"]]
    asked["harness"] = [{k: v for k, v in one.items() if k not in how} for one in what["harness"]]
    return asked


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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent ends us; the server ignores it
    exit_with_parent()


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def measure(folder: Path, recipe: EvalsRecipe, path: Path, about: dict[str, Any]) -> str:
    """Evaluate one checkpoint and write its file, `about` first; the line to show."""
    started = time.monotonic()
    metrics, samples = evaluate(folder, recipe)
    seconds = round(time.monotonic() - started, 1)
    manifest.write_json(path, about | {"seconds": seconds, "metrics": metrics, "samples": samples})
    numbers = "  ".join(f"{key} {metric['value']:.3f}" for key, metric in metrics.items())
    return f"evals: {about['run']}: {numbers}  ({seconds:.0f} s)"


MODES = ("think", "no_think")


def check_lengths(folder: Path, recipe: EvalsRecipe) -> None:
    """Refusal where the suite asks for more tokens than the checkpoint's context; no weights are loaded."""
    from smol_post import model

    limit = _context(model.load_config(folder))
    asked = {one.metric(length): length for one in recipe.probes if not one.yarn for length in one.lengths}
    asked |= {f"perplexity_{one.name}": one.max_tokens for one in recipe.perplexity}
    for name, length in asked.items():
        if length > limit:
            raise Refusal(
                f"{folder}: max_position_embeddings: found {limit:.0f}, but {name} takes {length} tokens; "
                "ask for fewer, or with YaRN (yarn: true, yarn_context)"
            )


def _context(config: Any) -> float:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or float("inf")


def evaluate(
    folder: Path, recipe: EvalsRecipe, modes: Sequence[str] = MODES
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All metrics of one checkpoint, in `modes`, and transcripts.

    What it cannot do (no modes, a shorter context than a probe) is absent, not zero.
    """
    import torch
    from transformers import GenerationConfig

    from smol_post import model, probes, scoring, vocabulary

    model.use_threads(recipe.num_threads)
    tokenizer = vocabulary.load_tokenizer(folder)
    lm = model.load_model(folder, attn_implementation="sdpa").eval()
    if torch.accelerator.is_available():
        lm.to(torch.accelerator.current_accelerator())  # pyright: ignore[reportArgumentType]
    lm.generation_config = GenerationConfig()  # its own may have a penalty or a temperature
    metrics: dict[str, Any] = {}
    shortest = min(recipe.needle_tokens, default=1)

    def needles(lengths: list[int], num_questions: int, suffix: str = "") -> None:
        for num_tokens in lengths if num_questions else []:
            metrics[f"{recipe.needle(num_tokens)}{suffix}"] = scoring.needles(
                lm,
                tokenizer,
                num_tokens=num_tokens,
                num_questions=num_questions,
                seed=recipe.seed,
                batch_size=max(1, recipe.batch_size * shortest // num_tokens),
                options=recipe.needle_options,
            )

    def probe(*, yarn: bool) -> None:
        for one in recipe.probes:
            able = one.yarn == yarn and (one.form == "text" or tokenizer.chat_template)
            for length in [n for n in one.lengths if able and n <= _context(lm.config)]:
                metrics[one.metric(length)] = probes.ask(
                    lm,
                    tokenizer,
                    one,
                    num_tokens=length,
                    seed=recipe.seed,
                    batch_size=max(1, recipe.batch_size * shortest // length),
                    date_string=recipe.date_string,
                )

    needles(recipe.needle_tokens, recipe.num_needle_questions)
    chats, samples = evaluate_chats(lm, tokenizer, recipe, modes)
    metrics |= chats
    probe(yarn=False)
    for texts in recipe.perplexity:
        if texts.max_tokens <= _context(lm.config):
            rows = scoring.column(texts.path, "text")
            try:
                metrics[f"perplexity_{texts.name}"] = scoring.perplexity(
                    lm, tokenizer, rows, max_tokens=texts.max_tokens
                )
            except ValueError as error:
                raise Refusal(f"{texts.path}: {error}; give more text or a smaller max_tokens") from None
    for asked in recipe.harness:
        from smol_post import harness

        if also := [mode for mode in asked.modes if mode == "base" or mode in modes]:
            asked = asked.model_copy(update={"modes": also})
            metrics |= harness.evaluate(lm, tokenizer, asked, date_string=recipe.date_string)
    rope = getattr(lm.config, "rope_parameters", None) or {}
    if recipe.yarn_context and rope.get("rope_type") == "default":
        longer = [length for length in recipe.yarn_needle_tokens if length not in recipe.needle_tokens]
        needles(longer, recipe.num_yarn_questions)
        scaled = copy.deepcopy(lm.config)
        scaled.update(export.yarn(lm.config.to_dict(), context=recipe.yarn_context, where=folder))
        model.use_yarn(lm, scaled)
        needles(recipe.yarn_needle_tokens, recipe.num_yarn_questions, "_yarn")
        probe(yarn=True)
    return metrics, samples


def evaluate_chats(
    lm: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    recipe: EvalsRecipe,
    asked: Sequence[str] = MODES,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What takes a chat template: arithmetic, obedience and tool calls in each mode `asked`, preferences."""
    from smol_post import scoring

    metrics: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return metrics, samples
    known = MODES if "enable_thinking" in template else MODES[:1]
    modes = [mode for mode in known if mode in asked]
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
    for entry in recipe.tool_calls:
        from smol_post import tool_scores

        for mode in [mode for mode in entry.modes if mode in modes]:
            found, shown = tool_scores.evaluate(lm, tokenizer, entry, recipe, mode=mode)
            metrics |= found
            samples += shown
    if len(known) == 2 and recipe.num_turn_questions:
        said = scoring.questions(
            recipe.turn_prompts, recipe.num_turn_questions, recipe.seed, recipe.arithmetic_options
        )
        for mode in modes:
            first, *_, last = scoring.turns(
                lm,
                tokenizer,
                mode=mode,
                conversations=said,
                date_string=recipe.date_string,
                max_new_tokens=recipe.max_new_tokens,
                batch_size=recipe.batch_size,
            )
            metrics |= {f"mode_{mode}_flag": first, f"mode_{mode}_turn3": last}
    if len(known) == len(modes) == 2 and recipe.num_preference_pairs:
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
