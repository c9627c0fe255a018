"""Stages as launch files start them, on CPUs: accelerate launch --config_file F launched.py sft .. -- apo ..

accelerate takes its sharding branches for GPU-like set-ups only, and on a CPU falls back to DDP or fails. A
few lines tell it that gloo processes are such a set-up (--stock: they do not); all after them is the real
thing. Several stages run one after another, each in a fork of this process: libraries are imported once.
"""

import ctypes
import os
import signal
import sys
import tempfile
import time
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

STOCK = sys.argv[1] == "--stock"


def _gloo(self: Any, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    from accelerate.utils import DistributedType

    return "gloo", DistributedType.MULTI_GPU


def _pretend() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    import transformers.training_args
    from accelerate import PartialState

    setattr(PartialState, "_prepare_backend", _gloo)  # noqa: B010
    setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)  # noqa: B010
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops  # pyright: ignore[reportMissingImports]

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; else it is compiled first


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    from smol_post import runner

    if not STOCK:
        _pretend()
    for module in ("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"):
        import_module(module)
    words = sys.argv[1 + STOCK :]
    stages = [list(these) for bar, these in groupby(words, lambda word: word == "--") if not bar]
    for number, (stage, *rest) in enumerate(stages):
        child = os.fork() if len(stages) > 1 else 0
        if child == 0:
            if len(stages) > 1:  # each ends with this process, and meets at a place of its own
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1 + number)
                os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            sys.argv[1:] = rest
            runner.main(stage)
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(code)
        done = Path(tempfile.gettempdir(), f"launched-{os.environ['MASTER_PORT']}-{number}")
        if os.environ["RANK"] == "0":
            done.touch()
        while not done.exists():  # a parent is whole when the first process has written its manifest
            time.sleep(0.05)
