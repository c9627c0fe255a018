"""The fields of the installed TRL configurations, so that recipes can be checked against them without torch.

python -m smol_post.trl_fields > smol_post/trl_fields.json
"""

import dataclasses
import enum
import json
import types
import typing
from typing import Any

from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig


def trl_field_table() -> dict[str, Any]:
    """Name -> types (and choices) of every field of the installed SFTConfig and DPOConfig."""
    table: dict[str, Any] = {}
    for kind in (SFTConfig, DPOConfig):
        hints = typing.get_type_hints(kind)
        table[kind.__name__] = {field.name: _field(hints[field.name]) for field in dataclasses.fields(kind)}
    return table


def _field(hint: Any) -> dict[str, Any]:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names: set[str] = set()
    choices: list[str] = []
    for option in options:
        base = typing.get_origin(option) or option
        if isinstance(base, type) and issubclass(base, enum.Enum):
            choices += [str(member.value) for member in base]
            names.add("str")
        elif base is types.NoneType:
            names.add("null")
        elif base is typing.Literal:
            names |= {type(value).__name__ for value in typing.get_args(option)}
        elif base in (bool, int, float, str, dict, list):
            names.add(base.__name__)
    return {"types": sorted(names), **({"choices": choices} if choices else {})}


if __name__ == "__main__":
    print(json.dumps(trl_field_table(), indent=1, sort_keys=True))
