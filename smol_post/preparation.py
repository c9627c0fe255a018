"""`smol-post prepare` and `smol-post inspect`: a run's data made, counted and shown, without weights or GPUs.

    smol-post prepare recipes/tiny --workers 2
    smol-post prepare recipes/tiny --shards 8 --workers 2
    smol-post inspect recipes/tiny/sft.yaml --rows 1 --mode think

Both end in `data.prepare`, as training does, and leave its cache beside the runs. A run whose parents are not
made yet has its tokenizer from their recipes.
"""

import argparse
import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smol_post import config, hub, manifest, runner, strict
from smol_post.plan import CACHE, Job, make_plan, say
from smol_post.refusal import Failure, Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from smol_post.data import Prepared
    from smol_post.vocabulary import Vocabulary


def parent_tokenizer(
    job: Job, pipeline: list[Job], known: dict[str, "PreTrainedTokenizerBase"]
) -> "PreTrainedTokenizerBase":
    """The tokenizer that a run starts from: its whole parent's, or what the recipes before it would make.

    `known` keeps those of runs by name from one call to the next.
    """
    from smol_post import vocabulary

    if isinstance(job.recipe, config.BaseRecipe):
        spec = job.recipe.tokenizer
        return vocabulary.tiny_tokenizer(
            vocab_size=spec.vocab_size, seed=spec.corpus_seed, date_string=job.recipe.date_string
        )
    path, trusted = job.parent_paths[0], getattr(job.recipe, "trust_remote_code", False)
    if not path.startswith("../"):
        own = path.startswith(("/", "~"))
        folder = strict.local_path(path, Path()) if own else hub.checkpoint(path, weights=False, code=trusted)
        return vocabulary.load_tokenizer(folder, trust_remote_code=trusted)
    parent = next(one for one in pipeline if one.name == path[3:].split("/")[0])
    if parent.name not in known:
        if manifest.is_whole(parent.run_dir):
            known[parent.name] = vocabulary.load_tokenizer(parent.run_dir, trust_remote_code=trusted)
        else:
            start = parent_tokenizer(parent, pipeline, known)
            if isinstance(parent.recipe, config.Training):
                start = vocabulary.of_run(parent.recipe, start, folder=parent.recipe_file.parent).tokenizer
            known[parent.name] = start
    return copy.deepcopy(known[parent.name])


Ready = list[tuple[Job, "Vocabulary"]]


def _ready(arguments: argparse.Namespace, pairs: list[str], *, one: bool = False) -> Ready:
    """Every run asked for that trains (or the only one), with its vocabulary."""
    where = Path(arguments.recipe)
    root = Path(arguments.run_dir) if arguments.run_dir else None
    plan = make_plan(where, run_root=root, run=arguments.run, arguments=pairs)
    jobs = [job for job in plan.jobs if isinstance(job.recipe, config.Training)]
    if not jobs:
        raise Refusal(f"{where}: no run of it has sources; give the recipe of a stage that trains")
    if one and len(jobs) > 1:
        names = ", ".join(job.name for job in jobs)
        raise Refusal(f"{where}: found the runs {names}; name one, --run {jobs[0].name}")
    from smol_post import vocabulary  # what is wrong with a recipe is said before libraries are loaded

    known: dict[str, PreTrainedTokenizerBase] = {}
    ready: Ready = []
    for job in jobs:
        assert isinstance(job.recipe, config.Training)
        start = parent_tokenizer(job, plan.pipeline, known)
        ready.append((job, vocabulary.of_run(job.recipe, start, folder=job.recipe_file.parent)))
    return ready


def _prepared(ready: Ready, *, num_workers: int = 1) -> Iterator[tuple[Job, "Vocabulary", "Prepared"]]:
    """Each run with its data, one by one."""
    from smol_post import data

    for job, words in ready:
        assert isinstance(job.recipe, config.Training)
        made = data.prepare(
            job.recipe,
            words,
            folder=job.recipe_file.parent,
            cache_dir=job.run_dir.parent / CACHE,
            num_workers=num_workers,
        )
        yield job, words, made


def _in_shards(arguments: argparse.Namespace, ready: Ready) -> bool:
    """Tokenise the sources of all runs in shards; False where that was left to Slurm."""
    try:
        from smol_post import data, shards
    except ModuleNotFoundError as error:
        missing = (error.name or "datatrove").split(".")[0]
        raise Refusal(f"--shards: {missing} is not installed; pip install 'smol_post[scale]'") from None
    executor = shards.local(arguments.workers or 1)
    if arguments.executor == "slurm":
        if not arguments.partition:
            raise Refusal("--executor slurm: no partition given; add --partition NAME, see sinfo")
        executor = shards.slurm(arguments.workers or -1, partition=arguments.partition, time=arguments.time,
                                memory_gb=arguments.memory)  # fmt: skip
    waiting, seen = False, set()
    for job, words in ready:
        assert isinstance(job.recipe, config.Training)
        for source in job.recipe.sources:
            task = data.task_of(source, job.recipe, words, folder=job.recipe_file.parent)
            where = job.run_dir.parent / CACHE
            if task.key in seen or shards.prepare(
                task, cache_dir=where, num_shards=arguments.shards, executor=executor
            ):
                continue
            seen.add(task.key)
            waiting = True
            say(f"{job.name}: source '{source.name}': its shards are with Slurm, logs in {where / 'shards'}")
    if waiting:
        say("when these jobs are done, give the same command again: what is whole is kept, the rest is made")
    return not waiting


def prepare(argv: list[str]) -> int:
    """Prepare and cache the data of a recipe's runs, and print what is in it."""
    parser = runner.parser("smol-post prepare", stage="any")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    parser.add_argument(
        "--workers", type=int, help="processes that tokenise (default: 1; of Slurm, no limit)"
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="cut every source into N shards, by datatrove"
    )
    parser.add_argument("--executor", choices=["local", "slurm"], default="local", help="of shards")
    parser.add_argument("--partition", help="of Slurm, for shards")
    parser.add_argument("--time", default="24:00:00", help="limit of a shard under Slurm (default: 24:00:00)")
    parser.add_argument(
        "--memory", type=int, default=4, metavar="GB", help="of a shard under Slurm (default: 4)"
    )
    try:
        arguments, pairs = _parse(parser, argv)
        for option in ("workers", "shards", "memory"):
            number = getattr(arguments, option)
            if number is not None and not 1 <= number < 100_000:
                raise Refusal(f"--{option}: found {number}, wanted at least 1 and less than 100,000")
        if arguments.executor == "slurm" and not arguments.shards:
            raise Refusal("--executor slurm: found no --shards; add --shards N, so many jobs a source")
        ready = _ready(arguments, pairs)
        if arguments.shards and not _in_shards(arguments, ready):
            return runner.EXIT_OK
        for job, _, made in _prepared(ready, num_workers=arguments.workers or 1):
            whole = {"run": job.name, "stage": job.recipe.stage, **made.ledger, "path": str(made.path)}
            if arguments.json:
                say(json.dumps(whole, ensure_ascii=False))
            else:
                for line in _lines(whole):
                    say(line)
    except Failure as failure:
        return runner.fail(failure)
    except Refusal as refusal:
        return runner.refuse(refusal)
    return runner.EXIT_OK


def inspect(argv: list[str]) -> int:
    """Show rows of every source and mode as the trainer gets them, token by token."""
    parser = runner.parser("smol-post inspect", stage="any")
    parser.add_argument("--rows", type=int, default=2, help="rows of each source and mode (default: 2)")
    parser.add_argument("--source", help="of this source only")
    parser.add_argument("--mode", help="of this mode only: think, no_think or text")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a row")
    form.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    try:
        arguments, pairs = _parse(parser, argv)
        if arguments.rows < 1:
            raise Refusal(f"--rows: found {arguments.rows}, wanted at least 1")
        ((job, words, prepared),) = _prepared(_ready(arguments, pairs, one=True))
        from smol_post import inspection

        rows = list(
            inspection.sample(
                prepared,
                words.tokenizer,
                num_rows=arguments.rows,
                source=arguments.source,
                mode=arguments.mode,
            )
        )
        if arguments.json:
            for row in rows:
                say(json.dumps(inspection.to_json(row), ensure_ascii=False))
        elif arguments.html:
            page = inspection.to_html(rows, title=f"{job.name}: {arguments.recipe}", ledger=prepared.ledger)
            try:
                arguments.html.parent.mkdir(parents=True, exist_ok=True)
                arguments.html.write_text(page, encoding="utf-8")
            except OSError as error:
                raise Refusal(f"--html {arguments.html}: {error.strerror}; name another file") from None
            say(f"page: {arguments.html}")
        else:
            color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            for line in inspection.to_terminal(rows, color=color, width=shutil.get_terminal_size().columns):
                say(line)
    except Failure as failure:
        return runner.fail(failure)
    except Refusal as refusal:
        return runner.refuse(refusal)
    return runner.EXIT_OK


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    arguments, pairs = runner.parse(parser, argv)
    if arguments.recipe is None:
        raise Refusal(f"no recipe given; type: {parser.prog} recipes/tiny/sft.yaml")
    return arguments, pairs


def _lines(ledger: dict[str, Any]) -> Iterator[str]:
    """A ledger for a person: what there is, where it comes from, what was lost and why."""
    unit = "pairs" if "num_pairs" in ledger else "packs"
    full = f", {ledger['utilisation']:.2%} full" if "utilisation" in ledger else ""
    yield (
        f"{ledger['run']} ({ledger['stage']}): {ledger['num_documents']:,} documents in "
        f"{ledger[f'num_{unit}']:,} {unit}{full}; {ledger['num_tokens']:,} tokens, "
        f"{ledger['num_trained_tokens']:,} trained; {ledger['updates_per_epoch']:,} updates per epoch"
    )
    columns = {
        "rows": "num_rows", "documents": "num_documents", "tokens": "num_tokens",
        "trained": "num_trained_tokens", "truncated": "num_truncated_rows", "turns cut": "num_turns_cut",
        "split": "num_split_rows", "dropped": "num_dropped_rows", "skipped": "num_skipped_rows",
    }  # fmt: skip
    shown = [name for name, key in columns.items() if name in ("rows", "documents", "tokens", "trained")
             or ledger.get(key)]  # fmt: skip
    yield "  " + "source or mode".ljust(32) + "".join(name.rjust(14) for name in shown)
    for group in ("by_source", "by_mode"):
        for name, counts in ledger[group].items():
            cells = [f"{counts[columns[one]]:,}" if columns[one] in counts else "" for one in shown]
            yield "  " + name.ljust(32) + "".join(cell.rjust(14) for cell in cells)
    for reason, number in ledger["dropped"].items():
        yield f"  {number:,} dropped: {reason}"
    for reason, found in ledger["skipped"].items():
        yield f"  {found['num_rows']:,} skipped: {reason} (first: {found['example']})"
    yield f"  {ledger['num_unused']:,} {unit} left over by whole batches; {ledger['seconds']} s to make"
    yield f"  {ledger['fingerprint']}  {ledger['path']}"
