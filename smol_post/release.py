"""`smol-post release`: a whole run as people publish a model, in a folder and, if asked, on the Hub.

    smol-post release runs/tiny/merge releases/tiny --context 1024 --quantize int8
    smol-post release runs/tiny/merge releases/tiny --push-to-hub me/tiny --private --revisions

    OUT/  config.json, *.safetensors, tokenizer, chat_template.jinja, generation_config.json
          README.md      the model card, from lineage and evals
          yarn/          config.json for --context tokens; the weights are those above
          int8/          the same model in 8 bits, of its own
          recipe/        what it was made by; report/ what came of every run
          release.json   what this was made from and a digest of every file; written last

Tensors are the run's, bit for bit. What is read of a folder by transformers 4.53 and by 5 differs, so
config.json and tokenizer_config.json say everything in both forms.
"""

import argparse
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from smol_post import __version__, evals, export, hub, inputs, lineage, manifest, model_card, status
from smol_post.export import CONFIG, GENERATION, INDEX, TOKENIZER
from smol_post.plan import Job, make_plan, say
from smol_post.points import Point, read_points
from smol_post.refusal import SECRET, Refusal, did_you_mean
from smol_post.runner import EXIT_OK, Parser, interrupt_on_sigterm, refuse
from smol_post.trust import check_checkpoint

RELEASE, YARN, INT8 = "release.json", "yarn", "int8"
_OPTIONS = ("context", "dtype", "quantize", "shard_size", "license", "despite_gates")
_OURS = ("backend", "is_local", "local_files_only")  # what transformers 5 notes of how it read a tokenizer
_SIZE = re.compile(r"(\d+)(KB|MB|GB)")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_REPORTS = ("report.md", "report.html", "metrics.json")
_TEXTS = (".json", ".yaml", ".md", ".html", ".jinja")
_PROMPT = "Give me a brief explanation of gravity in simple terms. 12*(3+4) = ?"


@dataclass(frozen=True)
class Source:
    """The run to be released: its job in the pipeline, its ancestors' jobs and itself, and what they did."""

    run: Path
    job: Job
    jobs: list[Job]
    tree: dict[str, lineage.Node]
    points: list[Point]
    short: str  # by how much it falls short of its gates; "" if it does not


def release(argv: list[str]) -> int:
    """Write a whole run as a model to publish: weights, card, recipe, report; push it where asked."""
    parser = Parser(prog="smol-post release", description=release.__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a whole run, such as runs/tiny/merge")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--context", type=int, help="add a YaRN configuration for so many tokens")
    parser.add_argument("--dtype", choices=["bfloat16"], help="round the weights to it; without, as they are")
    parser.add_argument("--quantize", choices=[INT8], help="add 8-bit weights, by torchao")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file of weights, at most")
    parser.add_argument("--license", metavar="ID", help="as the Hub spells it, such as apache-2.0")
    parser.add_argument(
        "--despite-gates", action="store_true", help="though it falls short; the card says so"
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="org/name, made where it is not there")
    parser.add_argument("--private", action="store_true", help="of the repository")
    parser.add_argument("--revisions", action="store_true", help="push every run of its chain as a branch")
    arguments = parser.parse_args(argv)
    interrupt_on_sigterm()
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    try:
        check_options(arguments)
        if arguments.push_to_hub:
            hub.check_repository(arguments.push_to_hub)
        source = find(arguments.run, despite_gates=arguments.despite_gates)
        if arguments.push_to_hub and is_made(arguments.out, source, options):
            finish(arguments.out, source, manifest.read_json(arguments.out / RELEASE), arguments.push_to_hub)
            say(f"{arguments.out}: kept, this very release; its card is that of {arguments.push_to_hub}")
        else:
            about = write(source, arguments.out, options, name=arguments.push_to_hub)
            size = sum((arguments.out / name).stat().st_size for name in about["files"])
            say(f"{arguments.out}: {len(about['files'])} files, {size / 1e6:,.1f} MB")
        if arguments.push_to_hub:
            push(source, arguments.out, arguments)
    except Refusal as refusal:
        return refuse(refusal)
    except manifest.EDITED as error:
        return refuse(
            Refusal(f"{arguments.run}: a manifest of its tree was edited ({error!r}); make it again")
        )
    return EXIT_OK


def check_options(arguments: argparse.Namespace) -> None:
    """Refusal where options do not fit each other, or a value is none."""
    shard_bytes(arguments.shard_size)
    if (arguments.private or arguments.revisions) and not arguments.push_to_hub:
        raise Refusal("--private and --revisions: nothing is pushed; give --push-to-hub org/name too")
    if arguments.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", arguments.license):
        raise Refusal(
            f"--license {arguments.license}: wanted one as the Hub spells it, such as apache-2.0; mend it"
        )


def shard_bytes(size: str) -> int:
    """5GB -> 5000000000; Refusal otherwise."""
    found = _SIZE.fullmatch(size)
    if not found or int(found[1]) == 0:
        raise Refusal(f"--shard-size {size}: wanted a number and KB, MB or GB, such as 5GB; mend it")
    return int(found[1]) * _UNITS[found[2]]


def find(run: Path, *, despite_gates: bool) -> Source:
    """The run with its chain; Refusal where it is not whole, changed, stale, or short of its gates."""
    if not manifest.is_whole(run):
        raise Refusal(f"{run}: no whole run; give a run directory such as runs/tiny/merge")
    about = manifest.verify(run)
    recipes, name = inputs.located(run, about, "pipeline").parent, run.resolve().name
    if not recipes.is_dir():
        raise Refusal(f"{run}: its recipe is not at {recipes} any more; put it there, it is released too")
    jobs = make_plan(recipes, run_root=run.resolve().parent, arguments=[]).pipeline
    known = {job.name: job for job in jobs}
    if name not in known:
        raise Refusal(f"{run}: is no run of {recipes / 'pipeline.yaml'}{did_you_mean(name, list(known))}")
    state = status.states(jobs)[name]
    if state.outdated:
        raise Refusal(
            f"{run}: is stale ({status.few(state.changes)}); make it again, or restore what it was made from"
        )
    tree = lineage.read_tree(run)
    for node in tree.values():
        edited = node.manifest and manifest.record_holds(node.manifest) is False
        if edited or (node.problem and node.name.startswith(".")):
            raise Refusal(
                f"{run}: its lineage does not hold: {node.problem or f'{node.folder}: manifest was edited'}; "
                "restore that run"
            )
    points = read_points(run.resolve().parent, list(known))
    point = next(one for one in points if one.is_run and one.name == name)
    if getattr(known[name].recipe, "gates", {}) and not point.gated:
        raise Refusal(f"{run}: its gates were not measured; smol-post run {recipes} measures them")
    short = state.why if state.state == "short" else ""
    if short and not despite_gates:
        raise Refusal(
            f"{run}: falls short of its gates: {short}; mend its recipe, or give --despite-gates: the model "
            "card will say so"
        )
    chain = {node.folder.resolve().name for node in tree.values() if node.manifest and node.folder}
    chain_jobs = [job for job in jobs if job.name in chain]
    ours = [one for one in points if one.is_run and one.name in chain]
    return Source(run, known[name], chain_jobs, tree, ours, short)


def write(source: Source, out: Path, options: dict[str, Any], *, name: str | None) -> dict[str, Any]:
    """Make `out`; returns what release.json says. `name` on the Hub, for the card's snippets.

    Raises Refusal, before anything is written, where the place will not do; RuntimeError where what was
    written is not equal to the run.
    """
    run, context = source.run, options["context"]
    export.check_place(run, out)
    check_checkpoint(run)
    tree = manifest.read_json(run / CONFIG)
    stretched = export.yarn(tree, context=context, where=run / CONFIG) if context is not None else {}
    if options["quantize"]:
        check_torchao()
    with export.made_whole(out) as part:
        made, num_parameters = write_checkpoint(
            run, part, shard_size=options["shard_size"], dtype=options["dtype"]
        )
        if stretched:
            (part / YARN).mkdir()
            manifest.write_json(
                part / YARN / CONFIG, for_old_readers(manifest.read_json(part / CONFIG) | stretched)
            )
            export.check_yarn(run, part / YARN)
        error = quantize(part, shard_size=options["shard_size"]) if options["quantize"] else None
        copy_records(source, part)
        about = {
            "source": made,
            "options": options,
            "num_parameters": num_parameters,
            "yarn": stretched.get("rope_parameters"),
            "int8": error,
            "short_of_gates": source.short,
            "report": (part / "report").is_dir(),
            "recipe_is_whole": {job.recipe_file.resolve().parent for job in source.jobs} == {_folder(source)},
            "chain": [
                {"run": one.name, **{key: one.manifest.get(key) for key in ("stage", "digest", "parents",
                 "recipe", "data", "metrics", "versions", "seed", "inputs")}} for one in source.points
            ],
            "versions": {**manifest.versions(), "smol-post": __version__},
        }  # fmt: skip
        finish(part, source, about, name or out.name)
    return manifest.read_json(out / RELEASE)


def finish(folder: Path, source: Source, about: dict[str, Any], name: str) -> None:
    """Write the card, whose code to copy loads `name`, and release.json with a digest of every file, last."""
    config = manifest.read_json(folder / CONFIG)
    card = model_card.render(source.points, source.tree, config, about, name=name)
    manifest.write_text(folder / "README.md", card)
    check_secrets(folder)
    manifest.write_json(folder / RELEASE, about | {"files": digests(folder)})


def for_old_readers(tree: dict[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4.53 reads as transformers 5 does, which goes by rope_parameters.

    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "dtype": "bfloat16"}
    -> the same and {"rope_theta": 5e6, "rope_scaling": None, "torch_dtype": "bfloat16"}

    Without, 4.53 takes SmolLM3's default theta, 2e6, and says nothing. Refusal where RoPE has no such form.
    """
    rope = tree.get("rope_parameters") or {}
    if not isinstance(rope.get("rope_theta"), int | float):
        raise Refusal(
            f"{CONFIG}: found no rope_parameters.rope_theta, wanted one RoPE for all layers: transformers 4 "
            "would read another; release it by hand"
        )
    scaling = None
    if rope.get("rope_type", "default") != "default":
        scaling = {key: one for key, one in rope.items() if key != "rope_theta"}
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    if "dtype" in tree:
        old["torch_dtype"] = tree["dtype"]
    return tree | old


def tokenizer_for_old_readers(tree: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4.53 reads too: by tokenizer.json, which both know.

    model_input_names: the default of 4.53 has token_type_ids, which its own generate() refuses.
    """
    kept = {key: one for key, one in tree.items() if key not in _OURS}
    if kept.get("tokenizer_class") in (None, "TokenizersBackend"):
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(kept.get("extra_special_tokens"), list):  # 4.53 has names for them there
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    return {"model_input_names": ["input_ids", "attention_mask"]} | kept


def write_checkpoint(
    run: Path, part: Path, *, shard_size: str, dtype: str | None
) -> tuple[dict[str, Any], int]:
    """The model itself, for both readers; what it was made of, and its number of parameters.

    `dtype`: each tensor of floating point is rounded to it, once; None: all are as they are.
    """
    from smol_post import model, vocabulary

    made, files = export.read_source(run)
    tree = manifest.read_json(run / CONFIG) | ({"dtype": dtype} if dtype else {})
    new = {CONFIG: for_old_readers(tree), GENERATION: export.generation_config(run, tree)}
    if TOKENIZER in files:
        new[TOKENIZER] = tokenizer_for_old_readers(manifest.read_json(run / TOKENIZER))
    weights = model.safetensors_files(run)
    sharded = all(path.stat().st_size <= shard_bytes(shard_size) for path in weights)
    left = {INDEX, *(path.name for path in weights)} if dtype or not sharded else set[str]()
    copied = {name: digest for name, digest in files.items() if name not in left | new.keys()}
    for name in copied:
        shutil.copyfile(run / name, part / name)
    export.check_copies(run, part, copied)
    for name, content in new.items():
        manifest.write_json(part / name, content)
    if dtype or not sharded:
        reshard(weights, part, shard_bytes(shard_size), dtype=dtype)
    num_parameters = check_tensors(weights, model.safetensors_files(part), dtype=dtype)
    before, after = model.load_config(run).to_dict(), model.load_config(part).to_dict()
    ours = {"_name_or_path": None, "dtype": after["dtype"] if dtype else before["dtype"]}
    if before | ours != after | {"_name_or_path": None}:
        raise RuntimeError(f"{part / CONFIG}: is not read as that of {run}")
    if TOKENIZER in files:
        one, other = vocabulary.load_tokenizer(run), vocabulary.load_tokenizer(part)
        texts = [_PROMPT, *one.all_special_tokens, "\n\n  \t3.14 1234567 caf\u00e9 \u4f60\u597d I'll  "]
        alike = [one(text)["input_ids"] == other(text)["input_ids"] for text in texts]
        if not all(alike) or one.special_tokens_map != other.special_tokens_map:
            raise RuntimeError(f"{part / TOKENIZER}: is not read as that of {run}")
    return made, num_parameters


def rounded(tensor: Any, dtype: str | None) -> Any:
    """A tensor in another type, if it is of floating point."""
    import torch

    return tensor.to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor


def reshard(weights: list[Path], part: Path, num_bytes: int, *, dtype: str | None) -> None:
    """The tensors of `weights` in files of at most `num_bytes` where a tensor allows it, one in memory."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import safe_open
    from safetensors.torch import save_file

    where = {}
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                where[name] = path, rounded(file.get_tensor(name).to("meta"), dtype)
    empty = {name: tensor for name, (_, tensor) in sorted(where.items())}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=num_bytes)

    def load(name: str) -> Any:
        with safe_open(where[name][0], framework="pt") as file:
            return rounded(file.get_tensor(name), dtype)

    for file, names in split.filename_to_tensors.items():
        save_file({name: load(name) for name in names}, part / file, metadata={"format": "pt"})
    if split.is_sharded:
        manifest.write_json(
            part / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        )


def check_tensors(before: list[Path], after: list[Path], *, dtype: str | None) -> int:
    """The number of values in two sets of weight files; RuntimeError where a tensor is not the same bytes.

    With `dtype`: where it is not what the first one's rounds to.
    """
    import torch
    from safetensors import safe_open

    def each(paths: list[Path]) -> dict[str, Path]:
        found = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def bits(path: Path, name: str) -> tuple[Any, torch.Tensor]:
        with safe_open(path, framework="pt") as file:
            tensor = rounded(file.get_tensor(name), dtype)
        return (tensor.dtype, tensor.shape), tensor.flatten().view(torch.uint8)

    old, new, total = each(before), each(after), 0
    for name in old | new:
        if name not in old or name not in new:
            raise RuntimeError(f"{name}: is in the run or its release, not in both")
        (kind, ours), (other, theirs) = bits(old[name], name), bits(new[name], name)
        if kind != other or not torch.equal(ours, theirs):
            raise RuntimeError(f"{new[name]}: {name} is not that of the run")
        total += kind[1].numel()
    return total


def check_torchao() -> None:
    """Refusal where there is no torchao."""
    from importlib.util import find_spec

    if find_spec("torchao") is None:
        raise Refusal("--quantize int8: no torchao here; pip install 'smol_post[release]'")


def quantize(part: Path, *, shard_size: str) -> dict[str, float]:
    """int8/ beside the weights: linear layers in 8 bits with a scale a row; what that costs in logits.

    {"relative_error": RMS of the difference over the spread of the logits, "same_token": share of positions
    with the same most likely token}, on one prompt. Embeddings stay as they are, and a head tied to them.
    RuntimeError where what was saved does not give the same logits.
    """
    import torch
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, TorchAoConfig

    from smol_post import vocabulary

    tokenizer, folder = vocabulary.load_tokenizer(part), part / INT8
    ids = torch.tensor([tokenizer(_PROMPT)["input_ids"]])
    plain, how = AutoModelForCausalLM, {"dtype": "auto", "device_map": "cpu"}
    with torch.inference_mode():
        wanted = plain.from_pretrained(part, **how)(ids).logits.float()
        config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
        small = plain.from_pretrained(part, quantization_config=config, **how)
        found = small(ids).logits.float()
        small.save_pretrained(folder, max_shard_size=shard_size)
        again = plain.from_pretrained(folder, **how)(ids).logits.float()
    if not torch.equal(found, again):
        raise RuntimeError(f"{folder}: is not loaded as it was saved")
    for path in part.iterdir():
        if path.name in (GENERATION, TOKENIZER, "chat_template.jinja") or path.name.startswith("tokenizer"):
            shutil.copyfile(path, folder / path.name)
    manifest.write_json(folder / CONFIG, for_old_readers(manifest.read_json(folder / CONFIG)))
    error = (found - wanted).square().mean().sqrt() / wanted.std()
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return {"relative_error": round(float(error), 5), "same_token": round(float(same), 4)}


def _folder(source: Source) -> Path:
    """The recipe folder: that of its pipeline.yaml."""
    return (source.job.folder or source.job.recipe_file.parent).resolve()


def copy_records(source: Source, part: Path) -> None:
    """recipe/: the recipes and templates of the folder. report/: the report of all runs, if there is one."""
    (part / "recipe").mkdir()
    folder = _folder(source)
    texts = [path for path in sorted(folder.iterdir()) if path.suffix in (".yaml", ".jinja")]
    places: dict[str, Path] = {}
    for path in {one.resolve(): one for one in [*texts, *(job.recipe_file for job in source.jobs)]}.values():
        if (other := places.setdefault(path.name, path)) != path:
            raise Refusal(f"{path} and {other}: one name for two files of one release; rename one")
        shutil.copyfile(path, part / "recipe" / path.name)
    found = [path for name in _REPORTS if (path := source.run.resolve().parent / name).is_file()]
    if found:
        (part / "report").mkdir()
    for path in found:
        shutil.copyfile(path, part / "report" / path.name)


def check_secrets(part: Path) -> None:
    """Refusal where a text to be published holds what looks like a secret."""
    for path in sorted(part.rglob("*")):
        if (
            path.suffix in _TEXTS
            and path.name != "tokenizer.json"
            and SECRET.search(path.read_text("utf-8", "replace"))
        ):
            name = path.relative_to(part)
            raise Refusal(f"{name}: holds what looks like a token or a password; take it out of its source")


def digests(folder: Path) -> dict[str, str]:
    """Name -> digest of every file under a folder but its release.json."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / RELEASE]
    return {path.relative_to(folder).as_posix(): manifest.digest_file(path) for path in paths}


def is_made(out: Path, source: Source, options: dict[str, Any]) -> bool:
    """Whether `out` is this release of this run, whole and unchanged, so that it is only to be pushed."""
    if not (out / RELEASE).is_file():
        return False
    about = manifest.read_json(out / RELEASE, remedy="remove the folder", wanted={"files": dict[str, str]})
    wanted = manifest.read_manifest(source.run)["digest"]
    if about.get("options") != options or (about.get("source") or {}).get("digest") != wanted:
        return False
    if changed := manifest.changed_files(about["files"], digests(out)):
        name, what = next(iter(changed.items()))
        raise Refusal(f"{out / name}: {what} since it was released; remove the folder to make it anew")
    return True


def push(source: Source, out: Path, arguments: argparse.Namespace) -> None:
    """Upload a release, its card held against the Hub's own rules first; --revisions before main."""
    name = arguments.push_to_hub
    hub.validate_card((out / "README.md").read_text("utf-8"))
    hub.make_repository(name, private=arguments.private)
    chain = list(evals.checkpoints(source.jobs)) if arguments.revisions else []
    for revision, _, folder, _ in chain:
        if folder != source.job.run_dir:
            with TemporaryDirectory(prefix=f".{out.name}.", dir=out.resolve().parent) as part:
                write_checkpoint(folder, Path(part), shard_size=arguments.shard_size, dtype=arguments.dtype)
                say(f"{name}@{revision}: {hub.push(Path(part), name, revision=revision)}")
    say(f"{name}: {hub.push(out, name)}")
