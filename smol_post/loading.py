"""Recipe files: YAML plus overrides -> one validated model a stage. Refuses here, before torch is imported.

A recipe folder holds a `pipeline.yaml` (the runs, their stages, recipes and parents) and one YAML file a
recipe.

    >>> parse_override("trainer.learning_rate=1.0e-3")
    (['trainer', 'learning_rate'], 0.001)
"""

import math
import re
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from smol_post.config import RECIPES as STAGES
from smol_post.config import Entry, EvalsRecipe, Pipeline, Recipe, Training
from smol_post.generate_config import GENERATIONS
from smol_post.refusal import SECRET, Refusal, describe, did_you_mean, text_number
from smol_post.strict import Strict
from smol_post.trainer_block import check_trainer_block

T = TypeVar("T", bound=Strict)
RECIPES = STAGES | GENERATIONS
_SECRET_KEY = re.compile(
    r"^((hub|hf|auth|access|bearer|secret)_?)?token$|((api|secret|access)_?key|password|passwd|secret|credentials?)$",
    re.IGNORECASE,
)
# Of a recipe file, and of what its aliases unfold to. Our choice: twenty-five times the longest of ours.
MAX_CHARACTERS = 150_000
MAX_DEPTH = 50


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=value` -> (["a", "b"], value), the value read as YAML.

    Raises Refusal where there is no `=` or the value is not YAML.
    """
    key, found, value = text.partition("=")
    if not found or not key:
        raise Refusal(f"argument '{text}': wanted key=value, for example trainer.learning_rate=1.0e-3")
    try:
        return key.split("."), _parse(value)
    except ValueError as error:
        raise Refusal(f"argument '{text[:80]}': the value is not YAML ({error}); quote it") from None


def apply_override(tree: dict[str, Any], path: list[str], value: Any, *, where: str = "argument") -> None:
    """Set `tree[a][b] = value` in place; list items by number (`sources.0.num_rows`)."""
    node: Any = tree
    where = f"{where} {'.'.join(path)}"
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not (key.isdecimal() and len(key) < 10 and int(key) < len(node)):
                raise Refusal(f"{where}: found '{key}', wanted a number under {len(node)}")
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            raise Refusal(f"{where}: '{path[depth - 1]}' has no keys of its own")
        if last:
            node[index] = value
        else:
            node = node.setdefault(index, {}) if isinstance(node, dict) else node[index]


class _Loader(yaml.SafeLoader):
    """Refuses what YAML would take without a word: a key given twice or that is no text, text that cannot be
    written, numbers that nothing counts, aliases that unfold to very much. Plain aliases and merges work.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node and all within it; called by yaml, whose scanner takes long over deep nesting."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> Any:
        """The document, if its aliases are harmless; called by yaml."""
        node = super().get_single_node()
        size, depth = _unfolded(node, {})
        if size > MAX_CHARACTERS or depth > MAX_DEPTH:
            what = f"over {MAX_CHARACTERS:,} characters" if size > MAX_CHARACTERS else "very deep nesting"
            raise yaml.MarkedYAMLError(problem=f"its aliases unfold to {what}")
        return node


def _unfolded(node: Any, known: dict[int, tuple[float, int]]) -> tuple[float, int]:
    """Characters and nodes of a tree whose aliases are written out, and its depth.

    Infinitely many where one is within itself.
    """
    if id(node) not in known:
        known[id(node)] = (math.inf, 0)
        inner: Any = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = chain.from_iterable(inner) if isinstance(node, yaml.MappingNode) else inner
        sizes = [_unfolded(one, known) for one in inner]
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 1
        known[id(node)] = (own + sum(one for one, _ in sizes), 1 + max((one for _, one in sizes), default=0))
    return known[id(node)]


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if str(key.value) in seen:
            raise _problem(key, f"the key '{key.value}' is given twice")
        seen.add(str(key.value))
    made = yaml.SafeLoader.construct_mapping(loader, node, deep=True)
    for key in made:
        if not isinstance(key, str):
            raise _problem(node, f"the key {key!r} is no text; quote it")
    return made


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    if "\0" in node.value or any("\ud800" <= one <= "\udfff" for one in node.value):
        raise _problem(node, f"the text {node.value[:40]!r} holds NUL or half a character; take it out")
    return node.value


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    number = loader.construct_yaml_int(node)
    if abs(number) >= 2**63:
        raise _problem(node, f"the number {node.value[:40]} has more than 63 bits; take a smaller one")
    return number


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    number = loader.construct_yaml_float(node)
    if not math.isfinite(number):
        raise _problem(node, f"the number {node.value[:40]} is not finite; take one that is")
    return number


def _problem(node: yaml.Node, text: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG, _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def _parse(text: str) -> Any:
    """One YAML document; ValueError in a line, with the number of the line it is about."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"found {len(text):,} characters, wanted at most {MAX_CHARACTERS:,}")
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(line + (getattr(error, "problem", None) or str(error).splitlines()[0])) from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # of a scalar, such as 2025-13-01
        raise ValueError(f"a value that is none: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, or a Refusal with the line number."""
    if not path.exists():
        raise Refusal(f"{path}: no such file; give a recipe file such as recipes/tiny/sft.yaml")
    if not path.is_file():
        raise Refusal(
            f"{path}: is no file that can be read whole (a folder, pipe or device); give a recipe file"
        )
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise Refusal(f"{path}: not readable as YAML ({error}); mend the file") from None
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
    if kind in ("string_type", "literal_error") and not isinstance(found, str | dict | list):
        wanted += "; YAML reads bare words such as on, no and 2025-07-01 as something else, quote it"
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
        apply_override(tree, key.split("."), value, where=f"{path}: overrides:")
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
