"""The recipe keys as JSON Schema, for editors and for docs/keys.md: `smol-post schema > recipe.schema.json`.

One schema serves every file of a recipe folder: `stage` chooses, and a file without one is the pipeline.
"""

import json
from typing import Any

from pydantic.json_schema import models_json_schema

from smol_post.config import Pipeline
from smol_post.loading import RECIPES
from smol_post.plan import say
from smol_post.runner import EXIT_OK, Parser
from smol_post.strict import Strict
from smol_post.trainer_block import INERT, INERT_IN_APO, OWNED, trl_fields

_JSON = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "dict": "object",
         "list": "array", "null": "null"}  # fmt: skip
_TRAINERS = ("SFTConfig", "DPOConfig")  # TRL's configurations: of every stage but APO, of APO


def command(argv: list[str]) -> int:
    """Print the JSON Schema of recipes and pipelines."""
    Parser(prog="smol-post schema", description=command.__doc__, allow_abbrev=False).parse_args(argv)
    say(json.dumps(tree(), indent=1))
    return EXIT_OK


def tree() -> dict[str, Any]:
    """The schema: `$defs` has every recipe class, Pipeline, and the trainer blocks of SFT and APO."""
    classes: list[type[Strict]] = [*RECIPES.values(), Pipeline]
    _, made = models_json_schema([(one, "validation") for one in classes], by_alias=True)
    definitions = made["$defs"]
    for stage, kind in RECIPES.items():
        properties = definitions[kind.__name__]["properties"]
        if "trainer" in properties:
            properties["trainer"]["$ref"] = f"#/$defs/{_TRAINERS[stage == 'apo']}"
    definitions |= {name: trainer(stage) for name, stage in zip(_TRAINERS, ("sft", "apo"), strict=True)}
    chosen = [
        {"if": {"properties": {"stage": {"const": stage}}, "required": ["stage"]}, "then": _at(kind)}
        for stage, kind in RECIPES.items()
    ]
    known = {"properties": {"stage": {"enum": list(RECIPES)}}}
    pipeline = {"if": {"required": ["stage"]}, "then": known, "else": _at(Pipeline)}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "a smol_post recipe"}
    return head | {"type": "object", "allOf": [*chosen, pipeline], "$defs": definitions}


def trainer(stage: str) -> dict[str, Any]:
    """What the `trainer:` block of a stage may hold: fields of the pinned TRL that are not refused."""
    refused = OWNED.keys() | INERT.keys() | (INERT_IN_APO.keys() if stage == "apo" else set())
    fields = {
        name: {"type": [_JSON[kind] for kind in field["types"]]}
        | (
            {"enum": [*field["choices"], *([None] * ("null" in field["types"]))]}
            if "choices" in field
            else {}
        )
        for name, field in trl_fields(stage).items()
        if name not in refused
    }
    return {"properties": fields, "additionalProperties": False}


def _at(kind: type[Strict]) -> dict[str, str]:
    return {"$ref": f"#/$defs/{kind.__name__}"}
