"""`smol-post export`: a checkpoint for inference at more tokens than it was trained at, by YaRN.

    smol-post export runs/tiny/merge exports/merge-1k --context 1024

Weights, tokenizer and template are copied byte by byte; config.json gets YaRN (Peng et al., 2023) as the
SmolLM3 model card sets it, generation_config.json the card's sampling, and export.json says what the variant
was made of. Train from the checkpoint, never from its variant.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smol_post import __version__, manifest
from smol_post.plan import say
from smol_post.refusal import Refusal
from smol_post.runner import EXIT_OK, Parser, interrupt_on_sigterm, refuse
from smol_post.strict import local_path
from smol_post.trust import check_checkpoint

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
EXPORT = "export.json"
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}  # SmolLM3 model card
INDEX = "model.safetensors.index.json"
_UNLIMITED = 10**20  # a tokenizer's model_max_length from here on states no limit (transformers)


def export(argv: list[str]) -> int:
    """Write a variant of a checkpoint for inference at a longer context, by YaRN; weights are untouched."""
    parser = Parser(prog="smol-post export", description=export.__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a whole run, or any checkpoint folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--context", type=int, required=True, help="tokens that the variant is for")
    arguments = parser.parse_args(argv)
    interrupt_on_sigterm()
    try:
        made = write(arguments.run, arguments.out, context=arguments.context)
    except Refusal as refusal:
        return refuse(refusal)
    say(
        f"{arguments.out}: {made['context']:,} tokens, YaRN factor {made['factor']:g} of {made['original']:,}"
    )
    return EXIT_OK


def yarn(tree: dict[str, Any], *, context: int, where: Path) -> dict[str, Any]:
    """The keys of a config.json that stretch the length it was trained at to `context` tokens.

    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "max_position_embeddings": 65536}, 131072
    -> {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e6, "factor": 2.0,
        "original_max_position_embeddings": 65536}, "max_position_embeddings": 131072}

    Raises Refusal where there is no plain RoPE, or nothing to extend. The original length is written down, as
    transformers would else take the new one for it.
    """
    old_form, scaling = {"rope_theta": tree.get("rope_theta")}, tree.get("rope_scaling")  # transformers 4
    old_form |= scaling if isinstance(scaling, dict) else {}
    rope, original = tree.get("rope_parameters") or old_form, tree.get("max_position_embeddings")
    rope = rope if isinstance(rope, dict) else {}
    if not isinstance(rope.get("rope_theta"), int | float) or not isinstance(original, int):
        raise Refusal(
            f"{where}: found no rope_parameters.rope_theta with max_position_embeddings, wanted one RoPE for "
            "all layers, which is all that YaRN extends; use the model as it is"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
        raise Refusal(
            f"{where}: found RoPE that is scaled or partial already ({rope}), wanted rope_type default; "
            "export the checkpoint that it was made from"
        )
    if context <= original:
        raise Refusal(
            f"{where}: found max_position_embeddings {original}, asked for a context of {context}: "
            "nothing to extend; ask for more tokens, or use the checkpoint as it is"
        )
    scaled = {"rope_type": "yarn", "rope_theta": rope["rope_theta"], "factor": context / original}
    scaled["original_max_position_embeddings"] = original
    return {"rope_parameters": scaled, "max_position_embeddings": context}


def write(folder: Path, out: Path, *, context: int) -> dict[str, Any]:
    """Make `out` from the checkpoint in `folder`; returns what export.json says.

    Written beside `out` and renamed at the end, so that `out` is whole or not there. Raises Refusal,
    before torch is imported, where checkpoint or place will not do; RuntimeError where a copy is not equal or
    the live RoPE is not YaRN.
    """
    check_place(folder, out)
    check_checkpoint(folder)
    tree = manifest.read_json(folder / CONFIG)
    changes = yarn(tree, context=context, where=folder / CONFIG)
    source, files = read_source(folder)
    new = {CONFIG: {key: tree[key] for key in tree if key not in ("rope_theta", "rope_scaling")} | changes}
    new[GENERATION] = generation_config(folder, tree)
    tokenizer = manifest.read_json(folder / TOKENIZER) if TOKENIZER in files else {}
    if tokenizer.get("model_max_length", _UNLIMITED) < _UNLIMITED:
        new[TOKENIZER] = tokenizer | {"model_max_length": context}
    with made_whole(out) as part:
        for name in files.keys() - new.keys():
            shutil.copyfile(folder / name, part / name)
        for name, content in new.items():
            manifest.write_json(part / name, content)
        check_copies(folder, part, {name: files[name] for name in files.keys() - new.keys()})
        check_yarn(folder, part)
        scaled = changes["rope_parameters"]
        about = {
            "source": source,
            "original": scaled["original_max_position_embeddings"],
            "context": context,
            "factor": scaled["factor"],
            "versions": {**manifest.versions(), "smol-post": __version__},
            "files": manifest.content_files(part),
        }
        manifest.write_json(part / EXPORT, about)
    return about


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, renamed to it at the end; nothing is left where that is not reached.

    Raises Refusal where it cannot be written.
    """
    place = local_path(str(out), Path())
    part = place.with_name(f".{place.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of one that was killed
        part.mkdir(parents=True)
        yield part
        part.replace(place)
    except OSError as error:
        reason = error.strerror or error
        raise Refusal(f"{out}: cannot be written ({reason}); name a folder elsewhere") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def generation_config(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's generation_config.json, or the end tokens of its config.json `tree`, and sampling."""
    ends = {key: tree[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in tree}
    found = manifest.read_json(folder / GENERATION) if (folder / GENERATION).is_file() else ends
    return found | SAMPLING


def check_place(folder: Path, out: Path) -> None:
    """Refusal where there is no checkpoint to export, or `out` is no place for the variant."""
    if (folder / manifest.STATE).is_file() and not manifest.is_whole(folder):
        raise Refusal(f"{folder}: found an unfinished run, wanted a whole one; finish it first")
    if not (folder / CONFIG).is_file():
        raise Refusal(f"{folder}: found no {CONFIG}, so no checkpoint; name a run such as runs/tiny/merge")
    if local_path(str(folder), Path()) in local_path(str(out), Path()).parents:
        raise Refusal(f"{out}: lies inside {folder}, which stays as it is; name a folder elsewhere")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Refusal(f"{out}: exists and is no empty folder; name another, or remove it")


def read_source(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What is exported, and its files by digest; Refusal where it changed, or where weights are lacking."""
    from safetensors import SafetensorError, safe_open

    run = manifest.verify(folder) if manifest.is_whole(folder) else {"files": manifest.content_files(folder)}
    files: dict[str, str] = run["files"]
    weights = {name for name in files if name.endswith(".safetensors")}
    if INDEX in files:
        index = manifest.read_json(folder / INDEX, remedy="mend it", wanted={"weight_map": dict[str, str]})
        weights |= set(index["weight_map"].values())
    for name in sorted(weights):
        try:
            safe_open(folder / name, framework="np").__exit__(None, None, None)  # its header fits its size
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise Refusal(f"{folder / name}: no loadable weights ({reason}); mend the checkpoint") from None
    if not weights:
        raise Refusal(f"{folder}: found no .safetensors, wanted the weights; mend the checkpoint")
    source = {"path": str(folder), "run": run.get("run"), "stage": run.get("stage")}
    source["digest"] = manifest.content_digest(files)
    return source, files


def check_copies(folder: Path, part: Path, copied: dict[str, str]) -> None:
    """Copies in `part`, name -> digest, equal their originals; RuntimeError where one does not."""
    for name, digest in copied.items():
        if manifest.digest_file(part / name) != digest:
            raise RuntimeError(f"{part / name}: is not the {name} of {folder}; export again")


def check_yarn(folder: Path, variant: Path) -> None:
    """RoPE as transformers builds it for `variant` is YaRN of that of `folder`; RuntimeError where not."""
    from smol_post import model

    model.use_yarn(model.without_weights(model.load_config(folder)), model.load_config(variant))
