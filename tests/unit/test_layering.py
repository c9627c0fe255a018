"""Who may import whom: recipes are checked in a blink, stages know nothing of each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import smol_post

PACKAGE = Path(smol_post.__file__).parent
STAGES = {"base", "long_context", "mid", "sft", "apo", "merge", "evals"}
LAYERS = [
    {
        "__init__",
        "refusal",
        "trainer_block",
        "config",
        "loading",
        "manifest",
        "trust",
        "locks",
        "disk",
        "strict",
        "evals_config",
        "judging_config",
        "generate_config",
    },
    {
        "launch",
        "plan",
        "inputs",
        "runner",
        "lineage",
        "status",
        "chat",
        "messages",
        "encoding",
        "synthetic",
        "report",
        "points",
        "plots",
        "hub",
        "launch_files",
        "schema",
        "costs",
        "judging",
        "asking",
        "journal",
        "scripts",
        "servers",
        "sifting",
        "constraints",
        "turns",
        "data_card",
        "tool_calls",
        "toolbox",
        "model_card",
    },
    {
        "packing",
        "vocabulary",
        "sources",
        "documents",
        "mixture",
        "data",
        "shards",
        "inspection",
        "model",
        "attention",
        "sequence",
        "losses",
        "batches",
    },
    {
        "adapters",
        "trainers",
        "reference",
        "training",
        "instruments",
        "proofs",
        "rehearsal",
        "scoring",
        "probes",
        "tool_scores",
        "harness",
        "trl_fields",
        "overlap",
        "local_teacher",
    },
    STAGES | {"export", "release"},
    {"commands", "preparation", "verify", "budget", "talk", "generate", "answering"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
LIGHT = [name for name in MODULES if LEVEL.get(name) not in (2, 3)]
HEAVY = {"accelerate", "datasets", "datatrove", "lm_eval", "matplotlib", "mergekit", "numpy", "peft",
         "pyarrow", "safetensors", "tokenizers", "torch", "transformers", "trl"}  # fmt: skip


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """(dotted module, at the top of the file?) for every import that is not for type checkers only."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            inside = top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module == "smol_post":
                yield from ((f"smol_post.{alias.name}", top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module or "", top
            yield from walk(child, inside)

    yield from walk(ast.parse((PACKAGE / f"{name}.py").read_text()), True)


def siblings(name: str, *, top_only: bool = False) -> set[str]:
    found = [module.split(".")[1] for module, top in imports(name)
             if module.startswith("smol_post.") and (top or not top_only)]  # fmt: skip
    return {"__init__" if one == "__version__" else one for one in found} - {name}


def test_every_module_has_a_layer() -> None:
    assert [name for name in MODULES if name not in LEVEL] == []


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_its_own_layer_or_lower_ones(name: str) -> None:
    assert {other for other in siblings(name) if LEVEL[other] > LEVEL[name]} == set()


def test_no_two_modules_import_each_other() -> None:
    left = {name: siblings(name) for name in MODULES}
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_imports_no_other_stage(name: str) -> None:
    allowed = {"evals"} if name == "merge" else set()  # its sweep measures candidates
    assert siblings(name) & STAGES == allowed


@pytest.mark.parametrize("name", ["training", "trainers", "scoring", "data", "model", "attention"])
def test_what_trains_and_measures_knows_nothing_of_runs(name: str) -> None:
    assert siblings(name) & {"plan", "runner"} == set()


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_imports_heavy_ones_inside_functions_only(name: str) -> None:
    top = {module.split(".")[0] for module, top in imports(name) if top}
    assert top & HEAVY == set()
    assert {other for other in siblings(name, top_only=True) if LEVEL[other] in (2, 3)} == set()


def test_light_modules_import_without_torch() -> None:
    names = [f"smol_post.{name}" for name in LIGHT if name != "__init__"]
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("__")])
def test_no_module_is_named_like_an_installed_one(name: str) -> None:
    """A launcher puts smol_post/ first on sys.path: a sibling datasets.py would be imported instead."""
    assert name not in sys.stdlib_module_names
    assert name not in metadata.packages_distributions()
