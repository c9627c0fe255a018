"""What the checkpoint of somebody else may bring: data. Held before any library opens the folder.

    *config*.json              auto_map names code: run only where the recipe says trust_remote_code: true;
                               attn_implementation with a / names a kernel of the Hub, code too
    adapter_config.json        transformers would load the model that it names in place of this one
    pytorch_model.bin          a pickle runs what it holds when it is read; weights are safetensors
    *.safetensors.index.json   names files of this folder and of no other
    other links                lead to files of this folder, or of its place in the Hub's cache

What is no JSON, or of another shape, is left to the library that reads it.
"""

import json
import re
from pathlib import Path
from typing import Any

from smol_post.refusal import Refusal

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_KERNEL = re.compile(r'attn_implementation": (\{[^}]*: )?"[^"]*/')
_COPIED = (".json", ".jinja", ".model", ".txt", ".py")  # by an export or a merge, into what may be published


def check_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refusal where `folder` would run code, read other files than its own, or stand for another model."""
    for path in sorted(folder.glob("*config*.json")):
        _check_code(path, trusted=trust_remote_code)
    if (folder / "adapter_config.json").is_file():
        raise Refusal(
            f"{folder / 'adapter_config.json'}: found an adapter, for which transformers loads the model "
            "that it names, not the one here; merge it into its model first, or remove the file"
        )
    if not any((folder / name).is_file() for name in _WEIGHTS):
        for name in sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
            raise Refusal(
                f"{folder / name}: found pickled weights, which run whatever code they hold when they are "
                "read, wanted model.safetensors; where you trust them, convert them: AutoModelForCausalLM"
                ".from_pretrained(folder).save_pretrained(other_folder)"
            )
    for path in sorted(folder.glob("*.safetensors.index.json")):
        for name in {str(one) for one in _inner(_mapping(path), "weight_map")}:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise Refusal(
                    f"{path}: weight_map names {name!r}, wanted .safetensors of this folder; mend it"
                )
    home = folder.resolve()
    if home.parent.name == "snapshots":  # whose files are links into blobs/, beside it
        home = home.parents[1]
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_symlink() and path.suffix in _COPIED and home not in path.resolve().parents:
            raise Refusal(f"{path}: a link that leads out of its folder; put a copy of the file in its place")


def _check_code(path: Path, *, trusted: bool) -> None:
    tree = _mapping(path)
    if _KERNEL.search(json.dumps(tree)):
        raise Refusal(
            f"{path}: attn_implementation names a kernel of the Hub, which is code; remove the key, the "
            "recipe says which attention is used"
        )
    for found in _inner(tree, "auto_map"):
        names = [one for one in (found if isinstance(found, list) else [found]) if one]
        if not trusted:
            raise Refusal(
                f"{path}: auto_map names code of the checkpoint ({', '.join(map(str, names))}), which is not "
                "run; read it, then set trust_remote_code: true in the recipe that trains from it; or, where "
                "transformers has the model itself, remove auto_map"
            )
        if away := [one for one in names if "--" in str(one)]:
            raise Refusal(f"{path}: auto_map names code of another repository ({away[0]}); copy it here")


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON object; {} for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _inner(tree: dict[str, Any], key: str) -> list[Any]:
    found = tree.get(key)
    return (
        list(found.values()) if isinstance(found, dict) else [found] * isinstance(found, list)
    )  # an old form
