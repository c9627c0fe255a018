"""The `trainer:` block of a recipe, held against the fields of the pinned TRL configuration without torch.

`trl_fields.json` lists them with types and choices; `python -m smol_post.trl_fields` writes it from
the installed TRL, and a test holds the two against each other.
"""

import json
from importlib import resources
from typing import Any

from smol_post.refusal import Refusal, describe, did_you_mean, text_number

# Fields of the TRL configuration that a recipe sets elsewhere, and where.
OWNED = {
    "output_dir": "--run-dir",
    "seed": "seed",
    "data_seed": "seed",
    "max_length": "max_tokens",
    "max_steps": "num_steps",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "packing": "packing",
    "packing_strategy": "packing",
    "padding_free": "packing",
    "assistant_only_loss": "loss_on",
    "completion_only_loss": "loss_on",
    "chat_template_path": "chat_template",
    "eos_token": "chat_template",
    "model_init_kwargs": "attention",
    "dataset_kwargs": "sources",
    "dataset_text_field": "sources",
    "remove_unused_columns": "sources",
    "shuffle_dataset": "seed",
    "truncation_mode": "overlong_rows",
    "resume_from_checkpoint": "nothing: an unfinished run resumes by itself",
}
# The preference losses of TRL that this stage is for: APO, and what it is compared with.
LOSSES = ("apo_zero", "apo_down", "sigmoid", "hinge", "ipo", "sft")
# Fields that the pinned versions accept and ignore, or that compute something else behind the recipe's back.
INERT = {
    "gradient_checkpointing": "its name is activation_checkpointing now",
    "gradient_checkpointing_kwargs": "its name is activation_checkpointing_kwargs now",
    "eval_packing": "there is no evaluation set in training",
    "eval_strategy": "there is no evaluation set in training",
    "eval_steps": "there is no evaluation set in training",
    "eval_on_start": "there is no evaluation set in training",
    "use_liger_kernel": "TRL 1.16 forbids its fused loss",
    "liger_kernel_config": "TRL 1.16 forbids its fused loss",
    "auto_find_batch_size": "it changes the batch silently",
    "do_train": "it has no effect outside the example scripts",
    "do_eval": "it has no effect outside the example scripts",
    "do_predict": "it has no effect outside the example scripts",
    "local_rank": "the launcher sets it",
    "pad_to_multiple_of": "in packs every padding token would be a document",
    "load_best_model_at_end": "there is no evaluation set in training",
    "push_to_hub": "a finished run directory is published by hand",
    "dataset_num_proc": "rows reach the trainer tokenised",
}
_TYPES = {"bool": bool, "int": int, "float": (int, float), "str": str, "dict": dict, "list": list}


def trl_fields(stage: str) -> dict[str, dict[str, Any]]:
    """Fields of the pinned SFTConfig or DPOConfig: name -> {"types": [...], "choices": [...] or absent}."""
    known = json.loads(resources.files("smol_post").joinpath("trl_fields.json").read_text())
    return known["DPOConfig" if stage == "apo" else "SFTConfig"]


def check_trainer_block(stage: str, block: dict[str, Any], *, where: str) -> None:
    """Refuse trainer keys that TRL does not know, the recipe owns elsewhere, or would be ignored."""
    fields = trl_fields(stage)
    for key, value in block.items():
        at = f"{where}: trainer.{key}"
        if key not in fields:
            raise Refusal(f"{at}: TRL has no such field{did_you_mean(key, list(fields))}")
        if key in OWNED:
            raise Refusal(f"{at}: the recipe owns this; set {OWNED[key]} instead")
        if key in INERT:
            raise Refusal(f"{at}: not accepted, {INERT[key]}; remove it")
        types, choices = fields[key]["types"], fields[key].get("choices")
        matches = any(
            (kind == "null" and value is None)
            or (
                kind != "null"
                and isinstance(value, _TYPES[kind])
                and (kind == "bool") == isinstance(value, bool)
            )
            for kind in types
        )
        if not matches:
            raise Refusal(f"{at}: found {describe(value)}, wanted {' or '.join(types)}{text_number(value)}")
        if choices and value is not None and value not in choices:
            raise Refusal(f"{at}: found {describe(value)}{did_you_mean(str(value), choices)}")
    unknown = [one for one in block.get("loss_type", []) if one not in LOSSES] if stage == "apo" else []
    if unknown:
        raise Refusal(
            f"{where}: trainer.loss_type: found {describe(unknown[0])}, wanted one of {', '.join(LOSSES)}"
        )
    if block.get("lr_scheduler_type") == "warmup_stable_decay" and "num_decay_steps" not in (
        block.get("lr_scheduler_kwargs") or {}
    ):
        raise Refusal(
            f"{where}: trainer.lr_scheduler_kwargs: warmup_stable_decay wants num_decay_steps; add it"
        )
