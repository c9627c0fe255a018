"""Linear merge with MergeKit: a uniform soup of APO checkpoints, then 0.9 x soup + 0.1 x long context.

Parents in order: the checkpoints of the soup, and last the long-context checkpoint. The soup stays in
`soup/`, a checkpoint of its own that evaluation reads. MergeKit takes configuration and tokenizer of a merge
from an arbitrary model unless `base_model` names one, so the soup is named; every tensor and the
configuration are checked afterwards.

    make merge
    smol-post merge recipes/tiny/merge.yaml
"""

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smol_post import disk, loading, manifest, runner
from smol_post.config import EvalsRecipe, MergeGate, MergeRecipe
from smol_post.points import lower_is_better
from smol_post.refusal import Refusal, did_you_mean

if TYPE_CHECKING:
    import torch

_SAME = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "layer_types",
    "no_rope_layers",
    "rope_parameters",
)


def run(recipe: MergeRecipe, parents: list[runner.Parent], job: runner.Job) -> dict[str, Any]:
    """Merge and check; returns the largest deviation from the fp32 weighted sum as a metric.

    Raises Refusal where parents differ in architecture, vocabulary or RoPE, or stand in another order.
    """
    from smol_post import model

    *soup, long_context = parents
    for one in soup:
        if one.stage == "long_context":
            raise Refusal(
                f"{one.path} is a long-context checkpoint; it wants the last place among merge's parents"
            )
    if long_context.stage not in (None, "long_context"):
        raise Refusal(
            f"{long_context.path} is of stage {long_context.stage}; the last parent is long_context"
        )
    check_alike([one.folder for one in parents], [one.path for one in parents])
    empty = model.without_weights(model.load_config(long_context.folder))
    written = 3 if recipe.weights and recipe.gate else 2  # soup, merge, a candidate: at most float32 each
    disk.require(job.run_dir, written * 4 * sum(one.numel() for one in empty.parameters()), what="the merge")
    soup_dir, final = job.run_dir / manifest.SOUP, job.run_dir / "merged.part"
    for folder in (soup_dir, final):
        shutil.rmtree(folder, ignore_errors=True)
    equal = [1 / len(soup)] * len(soup)
    folders = [one.folder for one in soup]
    out_dtype = _out_dtype(folders[0], recipe.out_dtype)
    job.announce(f"soup of {len(soup)} checkpoints")
    soup_error = linear(folders, equal, soup_dir, recipe=recipe, out_dtype="float32")
    candidates: list[dict[str, Any]] = []
    long_weight = 1 - recipe.soup_weight
    if recipe.weights and recipe.gate:
        candidates = sweep(recipe, recipe.gate, [soup_dir, long_context.folder], out_dtype=out_dtype, job=job)
        long_weight = choose(candidates, recipe.gate)["weight"]
    weights = [1 - long_weight, long_weight]
    job.announce(f"{weights[0]:g} soup, {weights[1]:g} long context")
    error = linear([soup_dir, long_context.folder], weights, final, recipe=recipe, out_dtype=out_dtype)
    for path in final.iterdir():
        path.replace(job.run_dir / path.name)
    final.rmdir()
    model.load_model(job.run_dir, attn_implementation="sdpa")
    metrics: dict[str, Any] = {"max_error": error, "soup_max_error": soup_error, "weights": weights}
    return {"data": None, "metrics": metrics | ({"sweep": candidates} if candidates else {})}


def sweep(
    recipe: MergeRecipe, gate: MergeGate, folders: Sequence[Path], *, out_dtype: str, job: runner.Job
) -> list[dict[str, Any]]:
    """Merge and measure a candidate of each weight, the soup (0) first; {"weight", "metrics"} of each.

    One candidate is on disk at a time.
    """
    from smol_post import evals

    suite = loading.load_recipe(job.recipe_file.parent / gate.suite)
    assert isinstance(suite, EvalsRecipe)  # `plan.check_names`
    suite = suite.model_copy(update={"seed": gate.seed, "num_samples": 0, **evals.WITHOUT_YARN})
    candidates: list[dict[str, Any]] = []
    weights: set[float] = {0.0, *(recipe.weights or [])}
    for weight in sorted(weights):
        place = job.run_dir / "candidate.part"
        shutil.rmtree(place, ignore_errors=True)
        linear(folders, [1 - weight, weight], place, recipe=recipe, out_dtype=out_dtype)
        metrics, _ = evals.evaluate(place, suite)
        candidates.append({"weight": weight, "metrics": metrics})
        shutil.rmtree(place)
        for name in (gate.recover, *gate.keep):
            if name not in metrics:
                hint = did_you_mean(name, list(metrics))
                raise Refusal(f"{job.recipe_file}: gate: {gate.suite} measures no '{name}'{hint}")
        check_soup(candidates[0], gate)
        said = "  ".join(f"{name} {metrics[name]['value']:.3f}" for name in (gate.recover, *gate.keep))
        job.announce(f"weight {weight:g}: {said}")
    return candidates


def check_soup(soup: dict[str, Any], gate: MergeGate) -> None:
    """Refusal where a metric of the gate is not a finite number of the soup: nothing could be held to it."""
    for name in (gate.recover, *gate.keep):
        value = soup["metrics"][name]["value"]
        if not math.isfinite(value):
            raise Refusal(
                f"gate: {name} of the soup is {value}, wanted a finite number; choose by another metric"
            )


def choose(candidates: Sequence[dict[str, Any]], gate: MergeGate) -> dict[str, Any]:
    """The candidate that recovers most of those that keep enough; each is marked "keeps" and "chosen".

    The first one, the soup, keeps everything; one whose numbers are not finite does not. Of two that recover
    as much, the smaller weight.
    """
    check_soup(candidates[0], gate)
    signs = {name: -1 if lower_is_better(name) else 1 for name in (gate.recover, *gate.keep)}
    values = [{n: sign * each["metrics"][n]["value"] for n, sign in signs.items()} for each in candidates]
    floors = {name: values[0][name] - points / 100 for name, points in gate.keep.items()}
    for each, value in zip(candidates, values, strict=True):
        kept = all(value[name] >= floor - 1e-9 for name, floor in floors.items())
        each["keeps"] = kept and all(map(math.isfinite, value.values()))
        each["chosen"] = False
    kept = [at for at, each in enumerate(candidates) if each["keeps"]]
    best = candidates[max(kept, key=lambda at: (values[at][gate.recover], -candidates[at]["weight"]))]
    best["chosen"] = True
    return best


def check_alike(folders: Sequence[Path], names: Sequence[str]) -> None:
    """All parents have one architecture, vocabulary and RoPE; Refusal with key and both values otherwise."""
    from smol_post import model, vocabulary

    first, *others = [model.load_config(folder).to_dict() for folder in folders]
    tokens = [vocabulary.load_tokenizer(folder).get_vocab() for folder in folders]
    for name, other, vocab in zip(names[1:], others, tokens[1:], strict=True):
        for key in _SAME:
            if first.get(key) != other.get(key):
                raise Refusal(
                    f"{key}: {names[0]} has {first.get(key)}, {name} has {other.get(key)}; "
                    "a merge wants checkpoints of one model"
                )
        if vocab != tokens[0]:
            raise Refusal(
                f"{names[0]} and {name} have different tokenizers; add tokens in the chain's first run only"
            )


def linear(
    folders: Sequence[Path], weights: Sequence[float], out: Path, *, recipe: MergeRecipe, out_dtype: str
) -> float:
    """MergeKit's linear merge of `folders` into `out`, the first donates configuration and tokenizer.

    Returns the largest absolute deviation of any tensor from the fp32 weighted sum, after checking each is
    within rounding.
    """
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    merge_config = {
        "merge_method": "linear",
        "base_model": str(folders[0]),
        "dtype": recipe.dtype,
        "out_dtype": out_dtype,
        "models": [
            {"model": str(folder), "parameters": {"weight": weight}}
            for folder, weight in zip(folders, weights, strict=True)
        ],
    }
    out.mkdir(parents=True)
    options = MergeOptions(
        copy_tokenizer=True,
        lazy_unpickle=True,
        trust_remote_code=False,
        write_model_card=False,
        quiet=True,
        out_shard_size=recipe.out_shard_size,
    )
    logging.disable(logging.WARNING)  # MergeKit tells what it inferred; the outcome is checked below
    try:
        run_merge(MergeConfiguration.model_validate(merge_config), str(out), options=options)
    finally:
        logging.disable(logging.NOTSET)
    _check_donor(folders[0], out)
    return check_sum(folders, weights, out, dtype=getattr(torch, out_dtype))


def _out_dtype(folder: Path, wanted: str) -> str:
    from safetensors import safe_open

    from smol_post import model

    if wanted != "parent":
        return wanted
    with safe_open(model.safetensors_files(folder)[0], framework="pt") as file:
        name = next(iter(file.keys()))
        return str(file.get_tensor(name).dtype).removeprefix("torch.")


def _check_donor(donor: Path, out: Path) -> None:
    """Configuration, template and generation settings of `out` are the donor's; RuntimeError otherwise."""
    from smol_post import model

    wanted, found = model.load_config(donor).to_dict(), model.load_config(out).to_dict()
    for key in wanted.keys() - {"dtype", "transformers_version", "_name_or_path"}:
        if wanted[key] != found.get(key):
            raise RuntimeError(f"{out}: config {key} is {found.get(key)}, wanted the soup's {wanted[key]}")
    for name in ("chat_template.jinja", "generation_config.json"):
        source, copy = donor / name, out / name
        if source.is_file() and (not copy.is_file() or copy.read_bytes() != source.read_bytes()):
            raise RuntimeError(f"{copy}: is not the soup's {name}")


def check_sum(folders: Sequence[Path], weights: Sequence[float], out: Path, *, dtype: "torch.dtype") -> float:
    """The largest |merged - sum of weight x parent| over all tensors; RuntimeError beyond one rounding step.

    0.9 x 2.0 + 0.1 x 1.0 = 1.9: every tensor of `out` is held against that sum in fp32, one tensor of each
    checkpoint in memory at a time.
    """
    import torch
    from safetensors import safe_open

    from smol_post import model

    def locate(folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in model.safetensors_files(folder):
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    places = [locate(folder) for folder in [*folders, out]]
    if any(place.keys() != places[0].keys() for place in places):
        odd = sorted(set().union(*places) - set.intersection(*[set(place) for place in places]))
        raise RuntimeError(f"{out}: tensors differ between the parents and the merge: {odd[:3]}")

    def read(place: dict[str, Path], name: str) -> torch.Tensor:
        with safe_open(place[name], framework="pt") as file:
            return file.get_tensor(name)

    worst = 0.0
    half_step, noise = torch.finfo(dtype).eps / 2, 4 * torch.finfo(torch.float32).eps
    for name in places[0]:
        parts = [weight * read(place, name).float() for weight, place in zip(weights, places, strict=False)]
        wanted, scale = torch.stack(parts).sum(0), torch.stack(parts).abs().sum(0)
        found = read(places[-1], name)
        error = (found.float() - wanted).abs()
        if found.dtype != dtype or not (error <= half_step * wanted.abs() + noise * scale + 1e-30).all():
            raise RuntimeError(
                f"{out}: {name} ({found.dtype}) is off the weighted sum by {error.max():.3e}; merge again"
            )
        worst = max(worst, error.max().item())
    return worst


if __name__ == "__main__":
    runner.main("merge")
