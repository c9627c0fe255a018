"""A stage as FSDP2 or ZeRO launch it, on CPUs: accelerate launch --config_file F launched.py STAGE ARGUMENTS.

accelerate takes its sharding branches for GPU-like set-ups only, and on a CPU falls back to DDP or fails. A
few lines tell it that gloo processes are such a set-up; everything after them is the real thing.
"""

import os
import sys
from typing import Any

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

import transformers.training_args
from accelerate import PartialState
from accelerate.utils import DistributedType

from smol_post import runner


def _gloo(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    setattr(PartialState, "_prepare_backend", _gloo)  # noqa: B010
    setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)  # noqa: B010
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops  # pyright: ignore[reportMissingImports]

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; else it is compiled first
    runner.main(sys.argv.pop(1))
