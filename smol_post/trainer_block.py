"""The `trainer:` block of a recipe, held against the fields of the pinned TRL configuration without torch.

`trl_fields.json` lists them with types and choices; `python -m smol_post.trl_fields` writes it from
the installed TRL, and a test holds the two against each other.
"""

import importlib.util
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
    "per_device_train_batch_size": "micro_batch_size (of pairs: micro_batch_tokens)",
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
    "precompute_ref_log_probs": "reference",
    "precompute_ref_batch_size": "micro_batch_tokens",
    "trust_remote_code": "trust_remote_code",
    "resume_from_checkpoint": "nothing: an unfinished run resumes by itself",
}
# The preference losses of TRL that this stage is for: APO, and what it is compared with.
LOSSES = ("apo_zero", "apo_down", "sigmoid", "hinge", "ipo", "sft")
_NO_EVALUATION = "there is no evaluation set in training"
_BY_HAND = "a finished run directory is published by hand"
# Why fields are not accepted that the pinned versions ignore, or by which they compute something else behind
# the recipe's back.
_INERT = {
    "its name is activation_checkpointing now": ("gradient_checkpointing",),
    "its name is activation_checkpointing_kwargs now": ("gradient_checkpointing_kwargs",),
    _NO_EVALUATION: (
        "eval_packing", "eval_strategy", "eval_steps", "eval_on_start", "eval_delay", "bf16_full_eval",
        "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics",
        "per_device_eval_batch_size", "prediction_loss_only", "metric_for_best_model", "greater_is_better",
        "include_for_metrics", "load_best_model_at_end",
    ),
    "TRL 1.16 forbids its fused loss": ("use_liger_kernel", "liger_kernel_config"),
    "it changes the batch silently": ("auto_find_batch_size",),
    "it has no effect outside the example scripts": ("do_train", "do_eval", "do_predict"),
    "the launcher sets it": ("local_rank",),
    "nothing is padded": ("pad_to_multiple_of",),
    _BY_HAND: (
        "push_to_hub", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy",
        "hub_token",
    ),
    "rows reach the trainer tokenised": ("dataset_num_proc",),
    "the loss is always the mean over the global batch": ("average_tokens_across_devices",),
    "a resumed run would not be the same run": ("save_only_model", "ignore_data_skip"),
    "its loss scaler leaves steps out; use bf16": ("fp16", "fp16_full_eval"),
    "it changes the order of rows": ("train_sampling_strategy", "length_column_name", "accelerator_config"),
    "the loss has no such part here": ("router_aux_loss_coef",),
}  # fmt: skip
_INERT_IN_APO = {
    "the reference is the parent": ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "no loss of this stage uses it": (
        "label_smoothing", "label_smoothing_factor", "discopop_tau", "f_alpha_divergence_coef",
    ),
    "log-probabilities are summed over the whole answer, unweighted": (
        "ld_alpha", "use_weighting", "f_divergence_type",
    ),
}  # fmt: skip
INERT = {name: why for why, names in _INERT.items() for name in names}
INERT_IN_APO = {name: why for why, names in _INERT_IN_APO.items() for name in names}
# What `report_to` may name; the module of a tracker has its name, or one of these.
TRACKERS = ("tensorboard", "trackio", "wandb", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub",
            "dvclive", "flyte", "kubeflow", "mlflow", "neptune", "swanlab")  # fmt: skip
_MODULES = {"tensorboard": ("tensorboardX", "tensorboard"), "azure_ml": ("azureml",), "flyte": ("flytekit",)}
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
        inert = INERT | INERT_IN_APO if stage == "apo" else INERT
        if key in inert:
            raise Refusal(f"{at}: not accepted, {inert[key]}; remove it")
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
        if not isinstance(value, bool) and isinstance(value, int | float) and value < 0:
            raise Refusal(f"{at}: found {describe(value)}, wanted no negative number")
        if choices and value is not None and value not in choices:
            raise Refusal(f"{at}: found {describe(value)}{did_you_mean(str(value), choices)}")
    check_trackers(block.get("report_to"), where=f"{where}: trainer.report_to")
    _check_loss(stage, block, where=f"{where}: trainer")
    if block.get("save_strategy") == "best":
        raise Refusal(f"{where}: trainer.save_strategy: not accepted as best, {_NO_EVALUATION}; take steps")
    if block.get("save_total_limit") == 1:
        raise Refusal(
            f"{where}: trainer.save_total_limit: found 1, wanted 2 or more; the last one may be torn"
        )
    if block.get("lr_scheduler_type") == "warmup_stable_decay" and "num_decay_steps" not in (
        block.get("lr_scheduler_kwargs") or {}
    ):
        raise Refusal(
            f"{where}: trainer.lr_scheduler_kwargs: warmup_stable_decay wants num_decay_steps; add it"
        )


def check_trackers(names: str | list[str] | None, *, where: str) -> None:
    """Refuse trackers that TRL does not know or that are not installed, before anything is loaded."""
    for name in [names] if isinstance(names, str) else names or []:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            raise Refusal(f"{where}: found {describe(name)}{did_you_mean(str(name), [*TRACKERS, 'none'])}")
        modules = _MODULES.get(name, (name,))
        specs = [importlib.util.find_spec(module) for module in modules]
        if not any(spec and spec.origin for spec in specs):  # half a package has no origin
            raise Refusal(f"{where}: '{name}' is not installed; pip install {modules[0]}, or remove it")


def _check_loss(stage: str, block: dict[str, Any], *, where: str) -> None:
    """The loss is one that the stage's trainer computes, with all that it takes."""
    given = block.get("loss_type")
    if stage != "apo":
        if given not in (None, "nll", "dft"):
            raise Refusal(f"{where}.loss_type: found {describe(given)}, wanted nll or dft")
        if given == "dft" and block.get("label_smoothing_factor"):
            raise Refusal(
                f"{where}.label_smoothing_factor: loss_type dft does not use it; remove one of the two"
            )
        return
    kinds = ["apo_zero"] if given is None else given if isinstance(given, list) else [given]
    unknown = [one for one in kinds if one not in LOSSES]
    if unknown or not kinds:
        found = describe(unknown[0]) if unknown else "none"
        raise Refusal(f"{where}.loss_type: found {found}, wanted one of {', '.join(LOSSES)}")
    if len(block.get("loss_weights") or kinds) != len(kinds):
        raise Refusal(
            f"{where}.loss_weights: found {len(block['loss_weights'])} for {len(kinds)} losses; give each one"
        )
    if block.get("beta", 0.1) <= 0:
        raise Refusal(f"{where}.beta: found {block['beta']}, wanted more than 0, such as 0.1")
