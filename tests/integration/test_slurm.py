"""The Slurm script, with a stub of `srun` that starts the same processes on this machine."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
# Every node is this machine; the step ends as its worst task does, and a signal goes to all of them.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
trap 'for task in "${tasks[@]}"; do kill -USR1 "$task" $(pgrep -P "$task"); done' USR1
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
    wait "$task" || code=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task" || code=$?; done
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue) echo "$2" >> "$(dirname "$0")/requeued" ;;
esac
"""


def submit(
    repo: Path, folder: Path, environment: dict[str, str], *words: str | Path
) -> subprocess.Popen[str]:
    """The script as a batch job of two nodes, one process each."""
    bin_dir = folder / "bin"
    bin_dir.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "here[1-2]",
        "PROCESSES_PER_NODE": "1",
        "LAUNCH": "recipes/accelerate/cpu.yaml",
    }
    return subprocess.Popen(
        ["bash", str(repo / "recipes/slurm/stage.sbatch"), *map(str, words)],
        cwd=repo,
        env={**environment, **job, "PATH": f"{bin_dir}:{environment['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists() and job.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def test_a_job_at_its_time_limit_goes_back_into_the_queue_and_resumes_on_both_nodes(
    chain: tuple[Path, Path], repo: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(chain[1] / "mid", tmp_path / "mid")
    rest = ["num_steps=300", "micro_batch_size=1"]  # no checkpoints but the one for the time limit
    words: list[Any] = ["sft", "--config", chain[0] / "sft.yaml", "--run-dir", tmp_path, *rest]
    job = submit(repo, tmp_path, environment, *words)
    wait_for(tmp_path / "sft" / "train_log.jsonl", job)
    job.send_signal(signal.SIGUSR1)
    text = job.communicate(timeout=60)[0]
    assert job.returncode == 0, text
    assert (tmp_path / "bin" / "requeued").read_text().split() == [str(os.getpid())]
    assert not (tmp_path / "sft" / "manifest.json").exists(), text
    (saved,) = (tmp_path / "sft" / "checkpoints").glob("checkpoint-*")
    assert f"stopped after step {saved.name.removeprefix('checkpoint-')}, which is saved" in text

    job = submit(repo, tmp_path, environment, *words)
    text = job.communicate(timeout=120)[0]
    assert job.returncode == 0, text
    made = json.loads((tmp_path / "sft" / "manifest.json").read_text())
    assert made["num_processes"] == 2
    assert made["metrics"]["num_steps"] == 300
    assert made["metrics"]["resumed_from_step"] == int(saved.name.removeprefix("checkpoint-"))
    steps = [
        json.loads(one)["step"] for one in (tmp_path / "sft" / "train_log.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 301))


def test_a_time_limit_without_a_checkpoint_ends_the_job(
    chain: tuple[Path, Path], repo: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(chain[1] / "mid", tmp_path / "mid")
    rest = ["num_steps=3000", "micro_batch_size=1", "--run-dir", tmp_path]
    short = environment | {"GRACE_SECONDS": "0"}
    job = submit(repo, tmp_path, short, "sft", "--config", chain[0] / "sft.yaml", *rest)
    wait_for(tmp_path / "sft" / "state.json", job)  # the model is being loaded, the data prepared
    job.send_signal(signal.SIGUSR1)
    text = job.communicate(timeout=60)[0]
    assert job.returncode == 1, text
    assert "no checkpoint since the job began" in text
    assert not (tmp_path / "bin" / "requeued").exists()


def test_an_error_ends_the_job_and_is_not_queued_again(
    chain: tuple[Path, Path], repo: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(chain[1] / "mid", tmp_path / "mid")
    job = submit(
        repo, tmp_path, environment, "sft", "--config", chain[0] / "sft.yaml", "--run-dir", tmp_path,
        "trainer.learning_rate=wrong",
    )  # fmt: skip
    text = job.communicate(timeout=60)[0]
    assert job.returncode != 0
    assert "refused: " in text
    assert "learning_rate" in text
    assert not (tmp_path / "bin" / "requeued").exists()


def test_shellcheck_finds_nothing(repo: Path, command: Any) -> None:
    for script in sorted((repo / "recipes" / "slurm").iterdir()):
        done = command("shellcheck", script)
        assert done.returncode == 0, done.stdout
