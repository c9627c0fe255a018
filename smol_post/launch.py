"""What a launcher says of this process: which of how many it is, over how many each sequence is split.

    accelerate launch --config_file recipes/accelerate/fsdp2_cp.yaml smol_post/long_context.py --config R
      RANK 3, WORLD_SIZE 8, PARALLELISM_CONFIG_SP_SIZE 4   ->   part 3 of 4 of the first of 2 batches

The launch file holds the hardware, the recipe the science: nothing here changes what is trained.
"""

import os
import sys
from collections.abc import Callable
from multiprocessing import parent_process
from threading import Thread

from smol_post.refusal import Refusal

_SWITCH, _SIZE = "ACCELERATE_USE_PARALLELISM_CONFIG", "PARALLELISM_CONFIG_{}_SIZE"


def rank() -> int:
    """This process's number among the launched ones; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def num_processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_parts() -> int:
    """Over how many processes each sequence is split (`parallelism_config_sp_size`); 1: it is not."""
    return int(os.environ.get("SMOL_POST_NUM_PARTS", "1"))


def engine() -> str | None:
    """The engine that a launch file asks for, by accelerate's name, "FSDP" or "DEEPSPEED"; None: no such."""
    asked = (one for one in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{one}") == "true")
    return next(asked, None)


def exit_with_parent(how: Callable[[], object] = lambda: os._exit(1)) -> None:
    """End this process when the one that started it is gone, killed or not."""
    parent = parent_process()
    assert parent is not None
    Thread(target=lambda: (parent.join(), how()), daemon=True).start()


def say(text: str, *, error: bool = False) -> None:
    """One line for a person, from the first process only."""
    if rank() == 0:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def take_over() -> None:
    """Check what the launcher set up, and keep the split of sequences for ourselves.

    accelerate's own context and sequence parallelism lose the borders of documents (its ring drops masks) or
    fail on packs (its Ulysses loader), so it is told of a mesh without them. Raises Refusal where one of
    those is asked for, the sizes do not come to the number of processes, or accelerate started one process
    of several.
    """
    environ = os.environ
    on_cpu = environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_ADDR" in environ and "WORLD_SIZE" not in environ:
        raise Refusal(
            "the launch asks for several processes, and accelerate starts one (use_cpu, --cpu); launch with "
            "--config_file recipes/accelerate/cpu.yaml --num_processes N"
        )
    if environ.get(_SWITCH, "").lower() != "true":
        return
    size = {key: int(environ.get(_SIZE.format(key), "1")) for key in _AXES}
    for key, why in _AXES.items():
        if why and size[key] > 1:
            raise Refusal(f"launch file: parallelism_config_{key.lower()}_size: found {size[key]}, {why}")
    parts, replicas, shards = size["SP"], size["DP_REPLICATE"], size["DP_SHARD"]
    sharded = replicas * shards * parts
    if num_processes() % parts or (replicas * shards > 1 and sharded != num_processes()):
        raise Refusal(
            f"launch file: parallelism_config: dp_replicate_size {replicas} x dp_shard_size {shards} x "
            f"sp_size {parts} do not come to the {num_processes()} processes; change one of them"
        )
    environ["SMOL_POST_NUM_PARTS"] = str(parts)
    environ[_SIZE.format("SP")], environ[_SIZE.format("DP_SHARD")] = "1", str(shards * parts)
    if replicas == 1:
        environ[_SWITCH] = "false"  # nothing is left of it that accelerate does not do by itself


_AXES = {
    "DP_REPLICATE": "",
    "DP_SHARD": "",
    "SP": "",
    "CP": "but its ring drops the borders of documents; set parallelism_config_sp_size instead",
    "TP": "which no stage can do; shard with FSDP2 or ZeRO, and split sequences with sp_size",
}
