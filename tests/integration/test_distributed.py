"""The launch files, with real processes: the losses and weights of one process, or a refusal."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
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
BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
# Nothing is kept whole between uses: the shards part as soon as they may, as those of a large model do.
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
    **dict.fromkeys(BATCH, "auto"),
}
# A chain of four stages. Adam with a large epsilon, and plain SGD: the common one would blow a rounding
# difference in a gradient near zero up to the learning rate. Twelve pairs of unlike lengths: two processes
# would cut their shares into different numbers of micro-batches.
ADAM = {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "logging_steps": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "long_context_1": {"trainer": ADAM},
    "mid": {"trainer": {**ADAM, "activation_checkpointing": True}},
    "sft": {"num_steps": 3, "trainer": {"optim": "sgd", "learning_rate": 0.5}},
    "apo": {
        "num_steps": 2,
        "global_batch_size": 12,
        "trainer": {"optim": "sgd", "learning_rate": 0.05, "beta": 1.0},
    },
}
APO = ["--run", "apo_seed0", "trainer.bf16=true", "trainer.use_cpu=false"]
STAGES = {"long_context_1": "long_context", "mid": "mid", "sft": "sft", "apo_seed0": "apo"}


@pytest.fixture(scope="session")
def alone(chain: tuple[Path, Path], command: Command, tmp_path_factory: Any) -> tuple[Path, Path]:
    """(recipe folder, runs of long context to APO that one process made)."""
    where = tmp_path_factory.mktemp("alone")
    folder = Path(shutil.copytree(chain[0], where / "recipe"))
    for name, changes in CHANGES.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    shutil.copytree(chain[1] / "base", where / "runs" / "base")
    done = command("smol-post", "run", folder, "--run-dir", where / "runs", "--until", "apo_seed0")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, where / "runs"


def door(repo: Path, name: str, folder: Path, *, processes: int = 2, **settings: Any) -> list[str | Path]:
    """The command that launches processes on CPUs by one of our launch files."""
    launch = yaml.safe_load((repo / "recipes" / "accelerate" / f"{name}.yaml").read_text()) | settings
    if "ds.json" in (deepspeed := launch.get("deepspeed_config", {})):
        (folder / "ds.json").write_text(json.dumps(deepspeed.pop("ds.json")))
        launch.pop("mixed_precision")  # which belongs into that file then
        launch["deepspeed_config"] = {
            "deepspeed_config_file": str(folder / "ds.json"),
            "zero3_init_flag": False,
        }
    (folder / "launch.yaml").write_text(yaml.safe_dump(launch))
    with socket.create_server(("127.0.0.1", 0)) as free:  # others may launch at the same time
        port = free.getsockname()[1]
    rest = ["--num_processes", str(processes), "--main_process_port", str(port), DRIVER]
    return ["accelerate", "launch", "--config_file", folder / "launch.yaml", *rest]


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]


def differences(found: Path, wanted: Path) -> tuple[float, float]:
    """The largest difference of two runs' losses, and of their weights."""
    losses = [[line["loss"] for line in log(run)] for run in (found, wanted)]
    assert len(losses[0]) == len(losses[1])
    weights = [load_file(run / "model.safetensors") for run in (found, wanted)]
    assert weights[0].keys() == weights[1].keys()
    return (
        max(abs(one - two) for one, two in zip(*losses, strict=True)),
        max((one - weights[1][name]).abs().max().item() for name, one in weights[0].items()),
    )


# Of each launch file what is set otherwise here.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},  # as `cpu` on a CPU
    "fsdp2": {},
    "zero2": {},
    "zero3": {"deepspeed_config": {"ds.json": ZERO3}},
    "zero3_offload": {},
    "fsdp2_cp": {"processes": 4, "parallelism_config": {"parallelism_config_sp_size": 2}},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_several_processes_train_the_chain_of_one(
    alone: tuple[Path, Path], command: Command, repo: Path, tmp_path: Path, engine: str
) -> None:
    shutil.copytree(alone[1] / "base", tmp_path / "base")
    words: list[str | Path] = []
    left_out = {"fsdp2_cp": ["apo_seed0"], "zero3_offload": ["sft", "apo_seed0"]}.get(engine, [])
    stages = {run: stage for run, stage in STAGES.items() if run not in left_out}
    for run, stage in stages.items():
        rest: list[str | Path] = ["--run", run, "--run-dir", tmp_path]
        words += ["--", stage, "--config", alone[0], *rest]
        words += [] if engine == "ddp" else ["trainer.use_cpu=false"]
    stock = ["--stock"] if engine == "ddp" else []
    done = command(*door(repo, engine, tmp_path, **ENGINES[engine]), *stock, *words[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    before = "base"
    for run in stages:
        made = json.loads((tmp_path / run / "manifest.json").read_text())
        verified = json.loads((tmp_path / run / "verify.json").read_text())
        assert made["num_processes"] == verified["num_processes"] == ENGINES[engine].get("processes", 2)
        kind = {"fsdp": "FSDP", "zero": "DEEPSPEED"}.get(engine[:4], "MULTI_")
        assert verified["distributed"].startswith(kind)
        one, start = (load_file(alone[1] / name / "model.safetensors") for name in (run, before))
        assert max((one[name] - start[name]).abs().max().item() for name in start) > 5e-3
        losses, weights = differences(tmp_path / run, alone[1] / run)
        print(engine, run, losses, weights)
        assert losses < 1e-5
        assert weights < 1e-5
        before = run


LONG = ["num_steps=60", "trainer.save_strategy=steps", "trainer.save_steps=5", "trainer.save_total_limit=3"]


@pytest.fixture(scope="session")
def uninterrupted(alone: tuple[Path, Path], command: Command, tmp_path_factory: Any) -> Path:
    """A longer run that one process made."""
    root = tmp_path_factory.mktemp("long")
    shutil.copytree(alone[1] / "mid", root / "mid")
    done = command("smol-post", "sft", alone[0], *LONG, "--run-dir", root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "sft"


def worker(launcher: int, rank: int) -> int:
    """The process id of a launched process."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in variables:
                return int(path.name)
    raise LookupError(f"{launcher} has no child of rank {rank}")


@pytest.mark.parametrize(
    ("engine", "others", "again"), [("ddp", None, 1), ("fsdp2", None, 4), ("zero2", 4, 2)]
)
def test_a_killed_process_ends_the_launch_which_resumes_on_as_many_processes_as_its_engine_can(
    alone: tuple[Path, Path],
    uninterrupted: Path,
    command: Command,
    environment: dict[str, str],
    repo: Path,
    tmp_path: Path,
    engine: str,
    others: int | None,
    again: int,
) -> None:
    shutil.copytree(alone[1] / "mid", tmp_path / "mid")
    stock = ["--stock"] if engine == "ddp" else []
    words = [*stock, "sft", "--config", alone[0], *LONG, "--run-dir", tmp_path]
    words += [] if stock else ["trainer.use_cpu=false"]

    def launch(processes: int) -> list[str]:
        made = [*door(repo, engine, tmp_path, **ENGINES[engine] | {"processes": processes}), *words]
        return [str(Path(sys.executable).parent / "accelerate"), *map(str, made[1:])]

    run = tmp_path / "sft"
    first = subprocess.Popen(
        launch(2), cwd=repo, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 120
    while not any((run / "checkpoints").glob("checkpoint-*/whole.json")) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(worker(first.pid, 1), signal.SIGKILL)
    text = first.communicate(timeout=60)[0]
    assert first.returncode != 0, text
    assert not (run / "manifest.json").exists(), text

    if others:
        refused = command(*launch(others))
        assert refused.returncode != 0
        assert f"was saved by 2 processes (DEEPSPEED), this launch has {others} (DEEPSPEED)" in refused.stderr
    done = command(*(["smol-post", *words[1:]] if again == 1 else launch(again)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "manifest.json").read_text())["metrics"]["resumed_from_step"] >= 5
    losses, weights = differences(run, uninterrupted)
    assert losses < 1e-4
    assert weights < 1e-4


@pytest.mark.parametrize(("engine", "reference"), [("fsdp2", "live"), ("zero3", "cached")])
def test_preference_training_in_bf16_starts_at_its_reference(
    alone: tuple[Path, Path], command: Command, repo: Path, tmp_path: Path, engine: str, reference: str
) -> None:
    """Policy and reference are rounded alike, and what is computed from them is not rounded at all."""
    shutil.copytree(alone[1] / "sft", tmp_path / "sft")
    words = [*APO, "--config", alone[0], "--run-dir", tmp_path, f"reference={reference}"]
    done = command(*door(repo, engine, tmp_path, **ENGINES[engine]), "apo", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "apo_seed0"
    proofs = {one["name"]: one for one in json.loads((run / "verify.json").read_text())["proofs"]}
    assert proofs["preference training starts at its reference"]["found"]["log-ratio"] < 1e-5
    weights = load_file(run / "model.safetensors").values()
    assert any((one != one.bfloat16()).any() for one in weights)  # what the optimiser updates, not its copy
    assert log(run)[0]["loss"] == pytest.approx(1, abs=1e-6)


def test_weights_that_zero_updates_in_bf16_are_refused(
    alone: tuple[Path, Path], command: Command, repo: Path, tmp_path: Path
) -> None:
    shutil.copytree(alone[1] / "sft", tmp_path / "sft")
    low = {"enabled": "auto", "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    launch = door(repo, "zero3", tmp_path, deepspeed_config={"ds.json": {**ZERO3, "bf16": low}})
    done = command(*launch, "apo", *APO, "--config", alone[0], "--run-dir", tmp_path)
    assert (
        'refused: verify: it is not true that numbers are kept in full precision: found {"what' in done.stderr
    )
    assert not (tmp_path / "apo_seed0" / "model.safetensors").exists()


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
