"""A launch file of accelerate, as far as it decides memory: how many processes, and what each holds."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from smol_post import loading
from smol_post.refusal import Refusal, describe, did_you_mean

Kind = Literal["one process", "DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
_TYPES = {"NO": "one process", "MULTI_GPU": "DDP", "MULTI_CPU": "DDP", "FSDP": "FSDP2", "DEEPSPEED": "ZeRO"}


@dataclass(frozen=True)
class Launch:
    """How a run is spread. sequence_split: devices over which each sequence is split; cpu: no accelerator."""

    kind: Kind = "one process"
    num_processes: int = 1
    sequence_split: int = 1
    zero_stage: int = 0
    reshard: bool = True
    checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    cpu: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether an engine keeps parts of the model, and copies for the products."""
        return self.kind not in ("one process", "DDP")

    @property
    def num_batches(self) -> int:
        """How many processes, or groups that share a sequence, take different data."""
        return self.num_processes // self.sequence_split

    def describe(self) -> str:
        """`FSDP2, 8 processes, sequences over 4`."""
        parts: list[str] = [self.kind]
        if self.num_processes > 1:
            parts.append(f"{self.num_processes} processes")
        if self.sequence_split > 1:
            parts.append(f"sequences over {self.sequence_split}")
        if self.offload_optimizer or self.offload_parameters:
            parts.append("offload")
        return ", ".join(parts)


def plain(num_processes: int, *, cpu: bool = False) -> Launch:
    """One process, or DDP where there are several."""
    return Launch("DDP" if num_processes > 1 else "one process", num_processes, cpu=cpu)


def read_launch(path: Path, *, num_processes: int | None = None) -> Launch:
    """A launch file (YAML); `num_processes` replaces its own, as `accelerate launch --num_processes` does.

    Raises Refusal for what is not counted here: FSDP 1, other engines, tensor or context parallelism.
    """
    tree = loading.read_yaml(path)
    kind = str(tree.get("distributed_type", "NO")).removeprefix("DistributedType.")
    if kind not in _TYPES:
        raise Refusal(
            f"{path}: distributed_type: found {describe(kind)}{did_you_mean(str(kind), list(_TYPES))}"
        )
    number = num_processes or _number(path, tree, "num_processes", 1)
    if kind == "NO":
        if num_processes and num_processes > 1:
            raise Refusal(f"{path}: distributed_type: found NO, which is one process; remove --devices")
        number = 1
    parallel = tree.get("parallelism_config") or {}
    if not isinstance(parallel, dict):
        raise Refusal(f"{path}: parallelism_config: found {describe(parallel)}, wanted a mapping")
    for name in ("tp_size", "cp_size", "dp_replicate_size"):
        if _number(path, parallel, f"parallelism_config_{name}", 1) > 1:
            raise Refusal(
                f"{path}: parallelism_config_{name}: not counted; remove it, or split sequences (sp_size)"
            )
    split = _number(path, parallel, "parallelism_config_sp_size", 1)
    if number % split:
        raise Refusal(f"{path}: num_processes: {number} does not divide by sp_size {split}; change one")
    cpu = tree.get("use_cpu") is True or kind == "MULTI_CPU"
    if kind == "FSDP":
        fsdp = _mapping(path, tree, "fsdp_config")
        if _number(path, fsdp, "fsdp_version", 1) != 2:
            raise Refusal(f"{path}: fsdp_config.fsdp_version: wanted 2; FSDP 1 is not counted")
        offload = _yes(fsdp, "fsdp_offload_params")
        return Launch(
            "FSDP2",
            number,
            split,
            reshard=fsdp.get("fsdp_reshard_after_forward", True) not in (False, "false"),
            checkpointing=_yes(fsdp, "fsdp_activation_checkpointing"),
            offload_optimizer=offload,
            offload_parameters=offload,
            cpu=cpu,
        )
    if kind == "DEEPSPEED":
        given = _mapping(path, tree, "deepspeed_config")
        stage, optimizer, parameters = (
            _number(path, given, "zero_stage", 2, least=0),
            given.get("offload_optimizer_device"),
            given.get("offload_param_device"),
        )
        if given.get("deepspeed_config_file"):
            zero = _deepspeed_file(path, str(given["deepspeed_config_file"])).get("zero_optimization", {})
            stage = zero.get("stage", 0)
            optimizer, parameters = (
                (zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")
            )
        if stage not in (1, 2, 3):
            raise Refusal(f"{path}: zero_stage: found {describe(stage)}, wanted 1, 2 or 3")
        return Launch(
            f"ZeRO-{stage}",  # pyright: ignore[reportArgumentType]
            number,
            split,
            zero_stage=stage,
            offload_optimizer=optimizer in ("cpu", "nvme"),
            offload_parameters=parameters in ("cpu", "nvme") and stage == 3,
            cpu=cpu,
        )
    return replace(plain(number, cpu=cpu), sequence_split=split)


def _mapping(path: Path, tree: dict[str, Any], key: str) -> dict[str, Any]:
    found = tree.get(key)
    if not isinstance(found, dict):
        raise Refusal(f"{path}: {key}: found {describe(found)}, wanted a mapping; see accelerate config")
    return found


def _number(path: Path, tree: dict[str, Any], key: str, default: int, *, least: int = 1) -> int:
    value = tree.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise Refusal(f"{path}: {key}: found {describe(value)}, wanted a whole number from {least} on")
    return value


def _yes(tree: dict[str, Any], key: str) -> bool:
    return str(tree.get(key, False)).lower() in ("true", "yes", "1")


def _deepspeed_file(path: Path, name: str) -> dict[str, Any]:
    """DeepSpeed's own configuration, named from the working directory or beside the launch file."""
    places = [Path(os.path.expanduser(name)), path.parent / name]
    found = next((one for one in places if one.is_file()), None)
    if found is None:
        raise Refusal(f"{path}: deepspeed_config_file: {name}: no such file; mend the path")
    try:
        tree = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{found}: not readable as JSON ({error}); mend the file") from None
    if not isinstance(tree, dict):
        raise Refusal(f"{found}: found {describe(tree)}, wanted an object")
    return tree
