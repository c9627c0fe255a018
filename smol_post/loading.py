"""Recipe files: YAML plus overrides -> one validated model a stage. Refuses here, before torch is imported.

A recipe folder holds a `pipeline.yaml` (the runs, their stages, recipes and parents) and one YAML file a
recipe.

    >>> parse_override("trainer.learning_rate=1.0e-3")
    (['trainer', 'learning_rate'], 0.001)
"""

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from smol_post.config import RECIPES, Entry, EvalsRecipe, Pipeline, Recipe, Strict, Training
from smol_post.refusal import SECRET, Refusal, describe, did_you_mean, text_number
from smol_post.trainer_block import check_trainer_block

T = TypeVar("T", bound=Strict)
_SECRET_KEY = re.compile(
    r"^((hub|hf|auth|access|bearer|secret)_?)?token$|api_?key|password|passwd|secret|credential",
    re.IGNORECASE,
)


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=value` -> (["a", "b"], value), the value read as YAML.

    Raises Refusal where there is no `=` or the value is not YAML.
    """
    key, found, value = text.partition("=")
    if not found or not key:
        raise Refusal(f"argument '{text}': wanted key=value, for example trainer.learning_rate=1.0e-3")
    try:
        return key.split("."), yaml.safe_load(value)
    except yaml.YAMLError:
        raise Refusal(f"argument '{text}': the value is not YAML; quote it") from None


def apply_override(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Set `tree[a][b] = value` in place; list items by number (`sources.0.num_rows`)."""
    node: Any = tree
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise Refusal(f"argument {'.'.join(path)}: '{key}' wanted a number under {len(node)}")
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            raise Refusal(f"argument {'.'.join(path)}: '{path[depth - 1]}' has no keys of its own")
        if last:
            node[index] = value
        else:
            node = node.setdefault(index, {}) if isinstance(node, dict) else node[index]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key given twice, which YAML would silently resolve to the last one."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if str(key.value) in seen:
            problem = f"the key '{key.value}' is given twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        seen.add(str(key.value))
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, or a Refusal with the line number."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # a SafeLoader
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file; give a recipe file such as recipes/tiny/sft.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise Refusal(f"{path}:{line} not readable as YAML ({problem}); mend the file") from None
    if not isinstance(tree, dict):
        raise Refusal(f"{path}: found {type(tree).__name__}, wanted a mapping of keys to values")
    return tree


def validate(model: type[T], tree: dict[str, Any], *, where: str) -> T:
    """`tree` as `model`; the first problem becomes a one-line Refusal that starts with `where`."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda problem: problem["type"] == "missing")  # a typo explains it
        problems = [_sentence(model, problem) for problem in found]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise Refusal(f"{where}: {problems[0]}{more}") from None


def _sentence(model: type[BaseModel], problem: Any) -> str:
    """One pydantic problem in words: key, what was found, what was wanted."""
    location = [str(part) for part in problem["loc"]]
    key, kind, found = ".".join(location), problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{key}: unknown key{did_you_mean(location[-1], _keys_at(model, location[:-1]))}"
    if kind == "missing":
        return f"{key}: this key is missing; add it"
    if kind == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    wanted = problem["msg"].removeprefix("Input should be ")
    return f"{key}: found {describe(found)}, wanted {wanted}{text_number(found)}"


def _keys_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """The keys a model knows at a place such as ["sources", "0"]."""
    for part in location:
        if part.isdigit():
            continue
        field = model.model_fields.get(part)
        nested = [
            kind
            for kind in [
                getattr(field, "annotation", None),
                *getattr(field and field.annotation, "__args__", ()),
            ]
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not nested:
            return []
        model = nested[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def load_recipe(
    path: Path, *, overrides: dict[str, Any] | None = None, arguments: list[str] | None = None
) -> Recipe:
    """Read one recipe file; then the pipeline entry's `overrides` (a tree), then `key=value` arguments.

    Raises Refusal with file and key on anything unknown, of the wrong type or out of range.
    """
    tree = read_yaml(path)
    for key, value in (overrides or {}).items():
        apply_override(tree, key.split("."), value)
    for argument in arguments or []:
        apply_override(tree, *parse_override(argument))
    stage = tree.get("stage")
    if not isinstance(stage, str) or stage not in RECIPES:
        hint = did_you_mean(str(stage), list(RECIPES))
        raise Refusal(f"{path}: stage: found {describe(stage)}, wanted the stage of this recipe{hint}")
    _check_secrets(tree, where=str(path))
    recipe = validate(RECIPES[stage], tree, where=str(path))
    if isinstance(recipe, Training):
        check_trainer_block(stage, recipe.trainer, where=str(path))
    return recipe.located(path) if isinstance(recipe, EvalsRecipe) else recipe  # type: ignore[return-value]


def load_pipeline(folder: Path) -> Pipeline:
    """`pipeline.yaml` of a recipe folder."""
    path = folder / "pipeline.yaml"
    if not path.is_file():
        raise Refusal(
            f"{path}: no such file; a recipe folder lists its runs there (see recipes/tiny/pipeline.yaml)"
        )
    tree = read_yaml(path)
    _check_secrets(tree, where=str(path))
    return validate(Pipeline, tree, where=str(path))


def _check_secrets(tree: Any, *, where: str) -> None:
    """Refusal where a key is for a secret, or a value looks like one: recipes are written into manifests."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        at = f"{where}: {key}" if where.endswith((".yaml", ".yml")) else f"{where}.{key}"
        if isinstance(value, dict | list):
            _check_secrets(value, where=at)
        if _SECRET_KEY.search(str(key)) or (isinstance(value, str) and SECRET.search(value)):
            raise Refusal(
                f"{at}: a recipe holds no secrets, as it is kept with its runs; take it out, and give it in "
                "the environment (HF_TOKEN, WANDB_API_KEY) or by `hf auth login`"
            )


def load_entry(folder: Path, entry: Entry, *, arguments: list[str] | None = None) -> Recipe:
    """The recipe of one pipeline entry, its stage held against the entry's."""
    path = folder / entry.recipe
    recipe = load_recipe(path, overrides=entry.overrides, arguments=arguments)
    if recipe.stage != entry.stage:
        raise Refusal(
            f"{path}: stage: found '{recipe.stage}', wanted '{entry.stage}' as run '{entry.name}' says"
        )
    ours = [parent for parent in entry.parents if parent.startswith("../")]
    if ours and getattr(recipe, "add_tokens", []):
        raise Refusal(
            f"{path}: add_tokens: run '{entry.name}' continues {ours[0]}; only the first run of a chain "
            "may add tokens, so that every checkpoint of a merge shares one vocabulary; move it there"
        )
    return recipe
