"""The schema that editors and docs/keys.md are made from says what `smol-post check` does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from smol_post import schema
from smol_post.loading import RECIPES
from tools import keys

ROOT = Path(__file__).parents[2]
FILES = [path for path in sorted(ROOT.glob("recipes/*/*.yaml")) if path.parent.name != "accelerate"]
VALIDATOR = Draft202012Validator(schema.tree())


def problems(tree: Any) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(tree)]


def test_what_is_printed_is_a_json_schema() -> None:
    done = subprocess.run([sys.executable, "-m", "smol_post", "schema"], capture_output=True, check=True)
    Draft202012Validator.check_schema(json.loads(done.stdout))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_of_ours_fits_the_schema(path: Path) -> None:
    assert problems(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"packnig": "bfd"}, "packnig"),
        ({"max_tokens": "512"}, "512"),
        ({"trainer": {"learning_rat": 1.0e-3}}, "learning_rat"),
        ({"trainer": {"packing": True}}, "packing"),  # which the recipe owns
        ({"trainer": {"lr_scheduler_type": "cosin"}}, "cosin"),
        ({"sources": [{"name": "a", "pth": "rows.jsonl"}]}, "pth"),
        ({"stage": "sfft"}, "sfft"),
    ],
)
def test_an_editor_marks_what_check_would_refuse(change: dict[str, Any], word: str) -> None:
    whole = yaml.safe_load((ROOT / "recipes/tiny/sft.yaml").read_text())
    assert any(word in problem for problem in problems(whole | change))


def test_every_key_is_explained() -> None:
    bare = [
        f"{name}.{key}"
        for name, one in schema.tree()["$defs"].items()
        if name not in ("SFTConfig", "DPOConfig")
        for key, value in one["properties"].items()
        if key != "stage" and "description" not in value
    ]
    assert bare == []


def test_the_key_reference_is_that_of_the_classes() -> None:
    tree = schema.tree()
    assert (ROOT / "docs/keys.md").read_text() == keys.page(tree), "make docs"
    assert json.loads((ROOT / "docs/recipe.schema.json").read_text()) == tree, "make docs"
    for stage in RECIPES:
        assert f"## stage: {stage}\n" in keys.page(tree)
