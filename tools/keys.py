"""Write docs/keys.md and docs/recipe.schema.json from the recipe classes: `make docs`."""

import json
from pathlib import Path
from typing import Any

from smol_post import schema
from smol_post.config import Pipeline
from smol_post.loading import RECIPES

DOCS = Path(__file__).parent.parent / "docs"
HEAD = """# Every recipe key

Written from the schema by `make docs`. `smol-post check` holds recipes against the same classes; an unknown
key is refused with what was probably meant. For hints in an editor name the schema: in VS Code's
YAML extension `"yaml.schemas": {"docs/recipe.schema.json": "recipes/*/*.yaml"}`, or in a recipe's first line
`# yaml-language-server: $schema=../../docs/recipe.schema.json` (`smol-post schema` prints it).

On the command line every key can be set for once: `max_tokens=4096`, `trainer.learning_rate=1.0e-5`,
`sources.0.num_rows=100`.
"""


def kind(one: dict[str, Any]) -> str:
    """The type of a key in words: `whole number > 0`, `bfd or wrapped`, `list of [Source](#source)`, ..."""
    if "$ref" in one:
        name = one["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in one:
        return " or ".join(kind(part) for part in one["anyOf"] if part.get("type") != "null")
    if "const" in one or "enum" in one:
        return " or ".join(f"`{word}`" for word in one.get("enum", [one.get("const")]))
    if one.get("type") == "array":
        return f"list of {kind(one.get('items', {}))}"
    if one.get("type") == "object":
        inner = one.get("additionalProperties")
        return f"map to {kind(inner)}" if isinstance(inner, dict) else "map"
    limits = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {one[key]:,g}" for key, sign in limits.items() if key in one]
    if one.get("maximum", one.get("exclusiveMaximum", 0)) >= 2**20:
        bounds = bounds[:-1]  # what nobody meets
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    return " ".join([names.get(one.get("type", ""), "any"), ", ".join(bounds)]).strip()


def table(definition: dict[str, Any]) -> list[str]:
    """The keys of one class as a Markdown table."""
    required = definition.get("required", [])
    lines = ["", "| key | value | default | |", "|---|---|---|---|"]
    for name, one in definition["properties"].items():
        default = "required" if name in required else f"`{json.dumps(one.get('default'))}`"
        text = one.get("description", "What the file is." if name == "stage" else "")
        lines.append(f"| `{name}` | {kind(one)} | {default.replace('`null`', 'none')} | {text} |")
    return [line.replace("\n", " ") for line in lines]


def page(tree: dict[str, Any]) -> str:
    """docs/keys.md: the pipeline, the stages in order, then what they refer to."""
    definitions = tree["$defs"]
    own = {"pipeline.yaml": Pipeline.__name__} | {
        f"stage: {stage}": one.__name__ for stage, one in RECIPES.items()
    }
    lines = [HEAD]
    for title, name in own.items():
        about = definitions[name].get("description", "").split("\n\n")
        lines += [f"## {title}", "", *about[:1], *table(definitions[name]), ""]
    for name in sorted(definitions.keys() - set(own.values()) - {"SFTConfig", "DPOConfig"}):
        about = definitions[name].get("description", "").split("\n\n")
        lines += [f"## {name}", "", *about[:1], *table(definitions[name]), ""]
    for name, where in (("SFTConfig", "every stage but APO"), ("DPOConfig", "APO")):
        fields = ", ".join(f"`{field}`" for field in definitions[name]["properties"])
        lines += [
            f"## {name}",
            "",
            f"What `trainer` may hold in {where}; TRL's documentation says what each does.",
            "",
        ]
        lines += [fields + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write both files."""
    made = schema.tree()
    (DOCS / "keys.md").write_text(page(made))
    (DOCS / "recipe.schema.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
