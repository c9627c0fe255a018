"""`smol-post plan`: what every run of a pipeline will cost, before any spending.

    pipeline.yaml, recipes   updates, tokens, operations, bytes        `costs`
    the prepared ledger      or the sizes that recipes state
    a launch file            how many devices, and what each holds     `launch_files`

Torch is imported only where prepared data lies beside the runs.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smol_post import config, costs, hub, launch_files, manifest, runner, strict
from smol_post.costs import GIB, Shape, Work
from smol_post.launch_files import Launch
from smol_post.plan import CACHE, Job, make_plan, say
from smol_post.refusal import Refusal

# Fewer updates an epoch, where the recipe counts in epochs, draw a warning. Our choice: the published SFT has
# 225, and packing at an unchanged batch, by which it came to so few, cost 12 points of IFEval (playbook).
FEW_UPDATES = 250
LONG_HOURS = 2.0  # on all devices; a run so long without checkpoints draws a warning. Our choice
CONTEXTS = (4096, 32768, 65536, 131072)
DTYPES = ("float32", "bfloat16", "int8", "int4")
_LIBRARIES = 0.5 * GIB  # resident with torch, transformers and MergeKit imported (measured: 0.46 to 0.5 GiB)


@dataclass(frozen=True)
class Data:
    """How much a run reads an epoch, and who says so ("ledger", "stated" or "unknown").

    tokens: of all packs or pairs; packs: or pairs; longest: tokens of the longest of them, or its limit;
    document_tokens: length of the document that a token stands in, a mean over tokens.
    """

    origin: str
    tokens: float | None
    packs: int | None
    longest: int
    document_tokens: float
    why: str = ""  # nothing better is known


@dataclass(frozen=True)
class Hardware:
    """What is paid for: the launch, memory of a device in bytes, operations a second that it reaches."""

    launch: Launch
    room: float
    flops: float


def plan(argv: list[str]) -> int:
    """Print what every run of a pipeline will cost: updates, hours, memory, disk."""
    parser = runner.Parser(prog="smol-post plan", description=plan.__doc__, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, help="recipe folder")
    parser.add_argument("--run-dir", type=Path, help="where the runs are (default: runs/<recipe folder>)")
    parser.add_argument("--launch", type=Path, metavar="FILE", help="a launch file of accelerate")
    parser.add_argument("--devices", type=int, metavar="N", help="processes; without a launch file DDP")
    parser.add_argument("--device-memory-gib", type=float, metavar="G", help="of one device (default: 80)")
    parser.add_argument("--tflops", type=float, help=f"peak of a device (default: {costs.PEAK_TFLOPS:g})")
    parser.add_argument("--mfu", type=float, help=f"share of it reached (default: {costs.MFU})")
    parser.add_argument("--json", action="store_true", help="JSON for programs instead of a table")
    arguments = parser.parse_args(argv)
    try:
        found = budget(arguments)
    except Refusal as refusal:
        return runner.refuse(refusal)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for line in table(found):
            say(line)
    return runner.EXIT_OK


def budget(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that the command prints, as one tree; Refusal where something given makes no sense."""
    for name in ("devices", "device_memory_gib", "tflops", "mfu"):
        value = getattr(arguments, name)
        if value is not None and not (0 < value < math.inf and (name != "mfu" or value <= 1)):
            wanted = "a share above 0, at most 1" if name == "mfu" else "a number above 0"
            raise Refusal(f"--{name.replace('_', '-')}: found {value}, wanted {wanted}")
    if not arguments.recipe.is_dir():
        raise Refusal(f"{arguments.recipe}: no such folder; give a recipe folder such as recipes/tiny")
    jobs = make_plan(arguments.recipe, run_root=arguments.run_dir, arguments=[])
    file = arguments.launch
    launch = launch_files.read_launch(file, num_processes=arguments.devices) if file else None
    mfu, peak = arguments.mfu or costs.MFU, arguments.tflops or costs.PEAK_TFLOPS
    room = (arguments.device_memory_gib or 80.0) * GIB
    shapes: dict[str, Shape] = {}
    known: dict[str, Any] = {}
    paid: set[str] = set()
    stores: dict[str, float] = {}
    runs = []
    for job in jobs.pipeline:
        shapes[job.name] = shape = _shape(job, shapes, arguments.recipe)
        if isinstance(job.recipe, config.MergeRecipe):
            runs.append(_merge(job, job.recipe, shape))
        elif isinstance(job.recipe, config.Training):
            cpu = not job.recipe.trainer.get("bf16")
            hardware = Hardware(
                launch or launch_files.plain(arguments.devices or 1, cpu=cpu), room, peak * 1e12 * mfu
            )
            if hardware.launch.cpu and arguments.device_memory_gib is None:
                hardware = replace(hardware, room=math.inf)
            data = _data(job, jobs.pipeline, known)
            pairs = isinstance(job.recipe, config.ApoRecipe) and job.recipe.reference == "cached"
            scored = json.dumps([job.parent_paths, str(job.recipe_file)]) if pairs else ""
            runs.append(
                _run(job, job.recipe, shape, data, hardware, scores=bool(scored) and scored not in paid)
            )
            paid.add(scored)
            number = data.tokens or 0.0
            stores[f"{job.recipe_file}"] = max(stores.get(f"{job.recipe_file}", 0.0), number)
    last = shapes[jobs.pipeline[-1].name]
    cache = 4.0 * sum(stores.values())
    return {
        "recipe": str(arguments.recipe),
        "num_parameters": last.num_parameters,
        "runs": runs,
        "totals": {
            "device_hours": _sum(runs, "device_hours"),
            "hours": _sum(runs, "hours"),
            "disk_gib": round(sum(one["disk_gib"] for one in runs) + cache / GIB, 2),
            "tokens_cache_gib": round(cache / GIB, 2),
            "complete": all(one["device_hours"] is not None for one in runs),
        },
        "inference": list(_inference(last)),
        "assumptions": list(_assumptions(peak, mfu, runs)),
    }


def _sum(runs: list[dict[str, Any]], key: str) -> float:
    return round(sum(one[key] or 0 for one in runs), 4)


def _shape(job: Job, shapes: dict[str, Shape], folder: Path) -> Shape:
    """The sizes of a run's model: its own config.json, its recipe's, its parent's, or what is stated."""
    if (path := job.run_dir / "config.json").is_file():
        return _config(path)
    if isinstance(job.recipe, config.BaseRecipe):
        tree = {"vocab_size": job.recipe.tokenizer.vocab_size, **job.recipe.model}
        return Shape.of(tree, where=f"{job.recipe_file}: model")
    parent = job.parent_paths[0]
    if parent.startswith("../"):
        return shapes[parent[3:].split("/")[0]]
    if parent.startswith(("/", "~")):
        return _config(strict.local_path(parent, Path()) / "config.json")
    from smol_post import loading

    stated = loading.load_pipeline(folder).architecture
    where = f"{folder / 'pipeline.yaml'}: architecture"
    cached = hub.cached_config(parent)
    if stated:
        shape = Shape.of(stated, where=where)
        if cached and _config(cached) != shape:
            raise Refusal(f"{where}: is not that of {parent} ({cached}); mend or remove it")
        return shape
    try:
        return _config(cached or hub.checkpoint(parent, weights=False) / "config.json")
    except Refusal as refusal:
        raise Refusal(f"{refusal}; or state {where}") from None


def _config(path: Path) -> Shape:
    return Shape.of(manifest.read_json(path, remedy="mend the parent"), where=str(path))


def _data(job: Job, pipeline: list[Job], known: dict[str, Any]) -> Data:
    """From the prepared ledger where the cache beside the runs has it, else from the sizes stated."""
    recipe = job.recipe
    assert isinstance(recipe, config.Training)
    cache, why = job.run_dir.parent / CACHE, ""
    if any((cache / "packs").glob("*/ledger.json")):
        from smol_post import data, preparation, vocabulary

        try:
            folder = job.recipe_file.parent
            words = vocabulary.of_run(
                recipe, preparation.parent_tokenizer(job, pipeline, known), folder=folder
            )
            found = data.find(recipe, words, folder=folder, cache_dir=cache)
        except Refusal as refusal:
            found, why = None, f"the prepared data cannot be looked up ({refusal})"
        if found:
            tokens = float(found.ledger["num_tokens"])
            return Data("ledger", tokens, found.num_packs, found.longest, found.document_tokens)
    return stated(recipe, why=why)


def stated(recipe: config.Training, *, why: str = "") -> Data:
    """What the recipe says its sources hold: packs full, documents as long as a pack (the worst case)."""
    pairs = isinstance(recipe, config.ApoRecipe)
    shared = recipe.think_to_no_think is not None or any(one.token_share for one in recipe.sources)
    rows = [one.num_rows if one.generator else one.size and one.size.rows for one in recipe.sources]
    sizes = [one.size and one.size.tokens for one in recipe.sources]
    tokens = float(recipe.stated_tokens) if recipe.stated_tokens else None
    if tokens is None and not shared and all(sizes):
        kept = zip(recipe.sources, sizes, strict=True)
        tokens = sum((size or 0) * one.keep_fraction * one.repeat for one, size in kept)
    packs = math.ceil(tokens / recipe.max_tokens) if tokens and not pairs else None
    if pairs and not shared and all(rows):
        kept = zip(recipe.sources, rows, strict=True)  # as many as `sources` keeps
        packs = sum(int(round((row or 0) * one.keep_fraction, 6)) * one.repeat for one, row in kept)
    origin = "stated" if packs else "unknown"
    longest = (2 if pairs else 1) * recipe.max_tokens
    return Data(origin, tokens, packs, longest, float(recipe.max_tokens), why)


def _run(
    job: Job, recipe: config.Training, shape: Shape, data: Data, hardware: Hardware, *, scores: bool
) -> dict[str, Any]:
    """One training run; `scores`: the reference's log-probabilities are computed for it."""
    pairs, launch = isinstance(recipe, config.ApoRecipe), hardware.launch
    size = recipe.global_batch_size
    per_epoch = data.packs // size if data.packs else None
    if per_epoch == 0:
        raise Refusal(
            f"{job.recipe_file}: global_batch_size: found {size}, wanted at most {data.packs}, the number of "
            f"{'pairs' if pairs else 'packs'} ({data.origin}); lower it"
        )
    steps = recipe.num_steps
    if steps is None and per_epoch:
        steps = costs.num_steps(updates_per_epoch=per_epoch, num_steps=None, num_epochs=recipe.num_epochs)
    each = None  # tokens of a pack or pair
    if data.tokens and data.packs and (pairs or data.origin == "ledger"):
        each = data.tokens / data.packs
    elif not pairs:
        each = float(recipe.max_tokens)
    seen = steps * size * each if steps and each else None
    work = _work(recipe, shape, data, launch)
    flops = None
    if seen is not None:
        of_document = {"document_tokens": data.document_tokens}
        flops = seen * costs.flops_per_token(
            shape, **of_document, checkpointing=work.checkpointing, frozen=work.adapter is not None
        )
        forward = costs.forward_flops_per_token(shape, **of_document)
        flops += forward * (seen if work.live_reference else (data.tokens or seen) if scores else 0)
    device_hours = None if flops is None else flops / hardware.flops / 3600
    hours = None if device_hours is None else device_hours / launch.num_processes
    parts, host = costs.memory(shape, work, launch)
    total = sum(parts.values())
    saved = costs.checkpoint_bytes(shape, work, launch)
    kept = _num_kept(recipe, steps)
    found = {
        "name": job.name,
        "stage": job.recipe.stage,
        "launch": launch.describe(),
        "data": data.origin,
        "tokens": None if data.tokens is None else round(data.tokens),
        "packs": data.packs,
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "tokens_seen": None if seen is None else round(seen),
        "flops": flops,
        "device_hours": device_hours,
        "hours": hours,
        "memory_gib": {key: round(one / GIB, 3) for key, one in (parts | {"total": total}).items()},
        "host_memory_gib": {key: round(one / GIB, 3) for key, one in host.items() if one},
        "checkpoints": kept,
        "disk_gib": round(((kept or 0) * saved + 4.0 * shape.num_parameters) / GIB, 3),
    }
    found["warnings"] = list(_warnings(job, recipe, shape, data, work, hardware, found))
    return found


def _work(recipe: config.Training, shape: Shape, data: Data, launch: Launch) -> Work:
    """What a device has in memory at a time: packs of a micro-batch, or pairs of at most so many tokens."""
    trainer, mine = recipe.trainer, max(1, recipe.global_batch_size // max(1, launch.num_batches))
    if isinstance(recipe, config.ApoRecipe):
        limit = recipe.micro_batch_tokens or 2 * recipe.max_tokens
        tokens, accumulates = min(limit, mine * data.longest), mine > 1
    else:
        micro = recipe.rows_at_once(mine) if isinstance(recipe, config.Packed) else 1
        tokens, accumulates = micro * min(data.longest, recipe.max_tokens), mine > micro
    block: config.Peft | None = getattr(recipe, "peft", None)
    adapter = None if block is None else shape.adapter(block.r, block.target_modules)
    if block and any("embed_tokens" in name for name in block.modules_to_save):
        adapter = (adapter or 0) + shape.embedding
    return Work(
        tokens=tokens / launch.sequence_split,
        bf16=bool(trainer.get("bf16", False)),
        checkpointing=bool(trainer.get("activation_checkpointing", False)) or launch.checkpointing,
        accumulates=accumulates,
        optimizer=str(trainer.get("optim", costs.ADAMW)),
        live_reference=getattr(recipe, "reference", None) == "live",
        adapter=adapter,
        weight_bytes=0.52 if block and block.load_in_4bit else 4.0,  # QLoRA (arXiv:2305.14314), section 3
    )


def _num_kept(recipe: config.Training, steps: int | None) -> int | None:
    """Checkpoints on the way that are on disk at the end, the last step's among them; None: not known."""
    limit, made = recipe.trainer.get("save_total_limit"), recipe.num_checkpoints(steps)
    return limit if made is None else min(made, limit or made)


def _warnings(
    job: Job,
    recipe: config.Training,
    shape: Shape,
    data: Data,
    work: Work,
    hardware: Hardware,
    found: dict[str, Any],
) -> Iterator[str]:
    launch, size, pairs = hardware.launch, recipe.global_batch_size, isinstance(recipe, config.ApoRecipe)
    unit = "pairs" if pairs else "packs"
    if data.why:
        yield data.why
    if data.origin == "unknown":
        what = (
            "steps per epoch are" if found["steps"] else "how many steps it makes, and so what it costs, is"
        )
        yield (
            f"{what} not known: nothing is prepared and sizes are not stated; type smol-post prepare "
            f"{job.recipe_file.parent} --run-dir {job.run_dir.parent}, or state them (size: of each source, "
            "or stated_tokens:)"
        )
    elif found["device_hours"] is None:
        yield f"how many tokens its {unit} have is not stated, so hours are not known; add tokens to size:"
    steps = found["steps_per_epoch"]
    if recipe.num_epochs and steps and steps < FEW_UPDATES:
        fewer = 2 ** int(math.log2(max(1, size * steps // FEW_UPDATES)))
        tokens = f" ({size * recipe.max_tokens:,} tokens)" if not pairs else ""
        yield (
            f"{steps:,} updates an epoch, {found['steps']:,} in all: a batch of {size} {unit}{tokens} leaves "
            f"few; packing at an unchanged batch cost 12 points of IFEval (Smol Training Playbook); "
            f"global_batch_size={fewer} would make about {steps * size // fewer:,}"
        )
    group = launch.num_batches
    if size % group:
        low, high = size // group * group, -(-size // group) * group
        near = f"{low} or {high}" if low else f"{high}"
        some = [one for one in range(1, size + 1) if size % one == 0]
        fewer = max(one for one in some if one < group)
        more = "".join(f" or {one}" for one in [one for one in some if one > group][:1])
        yield (
            f"global_batch_size {size} does not divide by {group} processes, so training refuses; take "
            f"{near}, or {fewer}{more} processes"
        )
    total = found["memory_gib"]["total"] * GIB
    if total > hardware.room:
        known = costs.what_fits(shape, work, launch, room=hardware.room, splits=not pairs)
        ways = "; ".join(f"{text} ({need / GIB:.0f} GiB)" for text, need in known[:4])
        yield (
            f"does not fit: {total / GIB:.0f} GiB of {hardware.room / GIB:.0f} a device; would fit: "
            f"{ways or 'nothing that is counted here; shorten max_tokens'}"
        )
    if work.optimizer not in costs.OPTIMIZER_BYTES:
        yield f"trainer.optim {work.optimizer}: unknown here, counted as AdamW (8 bytes a parameter)"
    strategy, limit = recipe.trainer.get("save_strategy", "no"), recipe.trainer.get("save_total_limit")
    if strategy == "no" and (found["hours"] or 0) >= LONG_HOURS:
        yield (
            f"no checkpoint on the way: a kill loses up to {found['hours']:,.0f} hours; set "
            "trainer.save_strategy, save_steps and save_total_limit: 2"
        )
    elif strategy != "no" and limit is None and (found["checkpoints"] or 3) > 2:
        each = costs.checkpoint_bytes(shape, work, launch) / GIB
        number = found["checkpoints"] or "all"
        yield f"keeps {number} checkpoints of {each:,.1f} GiB on the way; set trainer.save_total_limit: 2"


def _merge(job: Job, recipe: config.MergeRecipe, shape: Shape) -> dict[str, Any]:
    """A merge: no device. Memory: the result read back in float32, its file in the page cache beside it."""
    width = 2.0 if recipe.out_dtype == "bfloat16" else 4.0  # parents are float32
    merged, soup = width * shape.num_parameters, 4.0 * shape.num_parameters
    host = 4.0 * shape.num_parameters + merged + _LIBRARIES
    largest = 4.0 * max(shape.embedding, *shape.matrices)
    host = max(host, len(job.parent_paths) * largest + recipe.out_shard_size + _LIBRARIES)
    candidate = merged if recipe.weights else 0.0  # one at a time
    return {
        "name": job.name,
        "stage": recipe.stage,
        "launch": "host",
        "data": "none",
        "tokens": None,
        "packs": None,
        "steps": None,
        "steps_per_epoch": None,
        "tokens_seen": None,
        "flops": 0.0,
        "device_hours": 0.0,
        "hours": 0.0,
        "memory_gib": {"total": 0.0},
        "host_memory_gib": {"merge": round(host / GIB, 3)},
        "checkpoints": 0,
        "disk_gib": round((merged + soup + candidate) / GIB, 3),
        "warnings": [],
    }


def _inference(shape: Shape) -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for context in CONTEXTS:
            weights, cache = costs.inference_bytes(shape, dtype=dtype, context=context)
            yield {
                "dtype": dtype,
                "context": context,
                "weights_gib": round(weights / GIB, 3),
                "cache_gib": round(cache / GIB, 3),
                "total_gib": round((weights + cache) / GIB, 3),
            }


def _assumptions(peak: float, mfu: float, runs: list[dict[str, Any]]) -> Iterator[str]:
    yield f"hours: {peak:g} TFLOP/s a device at {mfu:.0%} (--tflops, --mfu), recomputation counted as work"
    if any(one["data"] in ("stated", "unknown") for one in runs):
        yield (
            "not prepared: sizes as the recipes state them, packs full, attention as if every document "
            "filled its pack (the worst case)"
        )
    yield (
        "memory: a device at its worst moment, every token trained; not what the device's own allocator, "
        "kernels and communication need (leave a tenth free)"
    )
    yield ("runs without bf16, or a launch file with use_cpu: on a CPU, growth above start-up (0.5 GiB)")
    yield "inference: one sequence; scales of int8 and int4 not counted; their cache is bfloat16"


def table(found: dict[str, Any]) -> Iterator[str]:
    """A budget for a person: runs, totals, inference, then what to look at."""
    yield (f"{found['recipe']}: {found['num_parameters']:,} parameters; an epoch, then all")
    yield ""
    yield (
        f"{'run':<18}{'from':>8}{'tokens':>9}{'packs':>11}{'an epoch':>10}{'steps':>9}{'tokens':>9}"
        f"{'dev-hours':>11}{'hours':>9}{'GiB/dev':>9}{'disk GiB':>10}"
    )
    for one in found["runs"]:
        memory = one["memory_gib"]["total"]
        yield (
            f"{one['name']:<18}{one['data']:>8}{_short(one['tokens']):>9}{_count(one['packs']):>11}"
            f"{_count(one['steps_per_epoch']):>10}{_count(one['steps']):>9}{_short(one['tokens_seen']):>9}"
            f"{_hours(one['device_hours']):>11}{_hours(one['hours']):>9}"
            f"{f'{memory:,.1f}' if memory else '-':>9}{one['disk_gib']:>10,.1f}"
        )
    totals = found["totals"]
    least = "" if totals["complete"] else "at least "
    yield ""
    yield (
        f"in all {least}{_hours(totals['device_hours'])} device-hours, {_hours(totals['hours'])} hours; disk "
        f"{totals['disk_gib']:,.1f} GiB, {totals['tokens_cache_gib']:,.1f} of it tokens"
    )
    for one in found["runs"]:
        if one["stage"] == "merge":
            yield f"{one['name']}: {one['host_memory_gib']['merge']:.1f} GiB of main memory, no device"
        elif one["host_memory_gib"]:
            moved = sum(one["host_memory_gib"].values())
            yield f"{one['name']}: {moved:.1f} GiB of main memory a process, by offloading"
    widest = max((one for one in found["runs"] if one["tokens"] or one["steps"]), default=None,
                 key=lambda one: one["memory_gib"]["total"])  # fmt: skip
    if widest:
        parts = {key: one for key, one in widest["memory_gib"].items() if key != "total" and one >= 0.0005}
        text = ", ".join(f"{key} {one:,.2f}" for key, one in parts.items())
        yield f"memory of {widest['name']} ({widest['launch']}), GiB a device: {text}"
    yield ""
    yield "inference, GiB: " + "".join(f"{f'{context // 1024}k':>9}" for context in CONTEXTS)
    for dtype in DTYPES:
        cells = [one["total_gib"] for one in found["inference"] if one["dtype"] == dtype]
        yield f"  {dtype:<14}" + "".join(f"{cell:>9,.2f}" for cell in cells)
    yield ""
    said: dict[str, list[str]] = {}
    for one in found["runs"]:
        for text in one["warnings"]:
            said.setdefault(text, []).append(one["name"])
    for text, names in said.items():
        yield f"warning: {', '.join(names)}: {text}"
    for text in found["assumptions"]:
        yield f"assumed: {text}"


def _short(number: float | None) -> str:
    """1.2k, 35.2B; a dash for what is not known."""
    if number is None:
        return "-"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _hours(number: float | None) -> str:
    if number is None:
        return "-"
    return (
        f"{number:,.0f}"
        if number >= 100
        else f"{number:.1f}"
        if number >= 0.1 or not number
        else f"{number:.1g}"
    )
