"""FSDP2 and ZeRO, two processes each, train the weights that one process trains: packs and pairs."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
Command = Callable[..., subprocess.CompletedProcess[str]]
DRIVER = Path(__file__).parent / "launched.py"
# Nothing is kept whole between uses: the shards part as soon as they may, as those of a large model do.
ZERO3 = {
    "stage": 3,
    "stage3_gather_16bit_weights_on_model_save": True,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",  # as `accelerate config` proposes
        },
    },
    "zero2": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 2, "zero3_init_flag": False},
    },
    "zero3": {"distributed_type": "DEEPSPEED", "zero_optimization": ZERO3},
}
# Plain SGD: Adam would blow a rounding difference in a gradient near zero up to the learning rate. Twelve
# pairs of unlike lengths: the two processes would cut their shares into different numbers of micro-batches.
RUNS = {
    "sft": ("mid", ["num_steps=3", "trainer.learning_rate=0.5"]),
    "apo": (
        "sft",
        ["--run", "apo_seed0", "num_steps=2", "global_batch_size=12", "trainer.learning_rate=0.05"],
    ),
}


@pytest.fixture(scope="session", params=RUNS)
def alone(
    request: pytest.FixtureRequest, chain: tuple[Path, Path], command: Command, tmp_path_factory: Any
) -> tuple[str, list[str | Path], Path]:
    """(stage, its arguments, the run directory that one process made)."""
    stage: str = request.param
    parent, rest = RUNS[stage]
    root = tmp_path_factory.mktemp("alone")
    shutil.copytree(chain[1] / parent, root / parent)
    words = ["--config", chain[0] / f"{stage}.yaml", *rest, "trainer.optim=sgd", "--run-dir"]
    done = command("smol-post", stage, *words, root)
    assert done.returncode == 0, done.stdout + done.stderr
    return stage, words, root / ("apo_seed0" if stage == "apo" else stage)


def door(engine: str, folder: Path, **settings: Any) -> list[str | Path]:
    """The command that launches two processes, its files in `folder`."""
    launch = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "use_cpu": False,
              **ENGINES[engine], **settings}  # fmt: skip
    if "zero_optimization" in launch:
        zero = {"zero_optimization": launch.pop("zero_optimization"), **dict.fromkeys(BATCH, "auto")}
        zero["bf16"] = {"enabled": launch.pop("mixed_precision", "no") == "bf16"}
        (folder / "ds.json").write_text(json.dumps(zero))
        launch["deepspeed_config"] = {
            "deepspeed_config_file": str(folder / "ds.json"),
            "zero3_init_flag": False,
        }
    (folder / "launch.yaml").write_text(yaml.safe_dump(launch))
    return ["accelerate", "launch", "--config_file", folder / "launch.yaml", DRIVER]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_preference_training_in_bf16_starts_at_its_reference(
    chain: tuple[Path, Path], command: Command, tmp_path: Path, engine: str, reference: str
) -> None:
    """Policy and reference are rounded alike, and what is computed from them is not rounded at all."""
    shutil.copytree(chain[1] / "sft", tmp_path / "sft")
    words = [
        "--config",
        chain[0] / "apo.yaml",
        *RUNS["apo"][1],
        f"reference={reference}",
        "--run-dir",
        tmp_path,
    ]
    bf16 = ["trainer.bf16=true", "trainer.use_cpu=false"]
    done = command(*door(engine, tmp_path, mixed_precision="bf16"), "apo", *words, *bf16)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "apo_seed0"
    proofs = {one["name"]: one for one in json.loads((run / "verify.json").read_text())["proofs"]}
    assert proofs["preference training starts at its reference"]["found"]["log-ratio"] < 1e-5
    weights = load_file(run / "model.safetensors").values()
    assert any((one != one.bfloat16()).any() for one in weights)  # what the optimiser updates, not its copy
    first = json.loads((run / "train_log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(1, abs=1e-6)


def test_weights_that_zero_updates_in_bf16_are_refused(
    chain: tuple[Path, Path], command: Command, tmp_path: Path
) -> None:
    shutil.copytree(chain[1] / "sft", tmp_path / "sft")
    launch = door("zero3", tmp_path, mixed_precision="bf16")
    settings = json.loads((tmp_path / "ds.json").read_text())
    settings["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    words = ["--config", chain[0] / "apo.yaml", *RUNS["apo"][1], "--run-dir", tmp_path]
    done = command(*launch, "apo", *words, "trainer.bf16=true", "trainer.use_cpu=false")
    assert (
        'refused: verify: it is not true that numbers are kept in full precision: found {"what' in done.stderr
    )
    assert not (tmp_path / "apo_seed0" / "model.safetensors").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_sharded_processes_train_the_weights_of_one(
    alone: tuple[str, list[str | Path], Path],
    chain: tuple[Path, Path],
    command: Command,
    tmp_path: Path,
    engine: str,
) -> None:
    stage, words, wanted = alone
    parent = RUNS[stage][0]
    shutil.copytree(chain[1] / parent, tmp_path / parent)
    done = command(*door(engine, tmp_path), stage, *words, tmp_path, "trainer.use_cpu=false")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / wanted.name
    assert json.loads((run / "manifest.json").read_text())["num_processes"] == 2
    found, one = load_file(run / "model.safetensors"), load_file(wanted / "model.safetensors")
    start = load_file(tmp_path / parent / "model.safetensors")
    assert max((one[name] - start[name]).abs().max().item() for name in one) > 5e-3
    assert found.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def _share_of_head_gradient(rank: int, folder: str) -> None:
    """One of two processes whose head is a shard of its own; the first saves the head's whole gradient."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from smol_post.trainers import add_scoring

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    lm, batches = _untied(), _two_batches()
    add_scoring(lm)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(lm.lm_head, mesh=mesh)
    fully_shard(lm, mesh=mesh)
    lm(input_ids=batches[rank], scored_labels=batches[rank], use_cache=False).backward()
    whole = lm.lm_head.weight.grad.full_tensor()
    if rank == 0:
        torch.save(whole, Path(folder) / "gradient.pt")
    dist.destroy_process_group()
    os._exit(0)  # or threads of gloo may abort it


def _untied() -> Any:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return SmolLM3ForCausalLM(SmolLM3Config(**sizes, **heads, pad_token_id=0, bos_token_id=0, eos_token_id=0))


def _two_batches() -> torch.Tensor:
    return torch.randint(1, 100, (2, 1, 12), generator=torch.Generator().manual_seed(0))


def test_a_head_that_is_a_shard_of_its_own_gets_the_gradient_of_all_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_share_of_head_gradient, (str(tmp_path),), nprocs=2)
    lm = _untied()
    for ids in _two_batches():
        log_probs = lm(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        (-log_probs.gather(1, ids[0, 1:, None]).sum() / 2).backward()
    found = torch.load(tmp_path / "gradient.pt", weights_only=True)
    torch.testing.assert_close(found, lm.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
