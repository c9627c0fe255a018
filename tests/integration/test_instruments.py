"""The log of a run is whole whatever happens to its processes, and a run gone wrong ends by itself."""

import fcntl
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
Chain = tuple[Path, Path]
TIMES = {"seconds", "tokens_per_second", "memory_bytes"}
# The door of `accelerate launch smol_post/<stage>.py`, in processes forked from one that has imported the
# libraries, as `smol-post run` forks its runs. A line with arguments starts one, its number waits for it.
DOOR = """
import json, os, sys
import datasets, smol_post.long_context, smol_post.training, trl.trainer.dpo_trainer
from smol_post import runner
for line in sys.stdin:
    job = json.loads(line)
    if isinstance(job, int):
        print(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.setsid()
    for number, name in enumerate(["/dev/null", job["stdout"], job["stderr"]]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(job["environment"])
    sys.argv = ["smol_post", *job["words"]]
    runner.main(job["stage"])
"""


class Door:
    """Starts stages and waits for them."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DOOR],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.folder = folder

    def ask(self, what: Any) -> int:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, stage: str, *words: object, name: str, stderr: str = "", **environment: str) -> int:
        """The number of the process; what it says goes to name.out and name.err."""
        files = {
            "stdout": str(self.folder / f"{name}.out"),
            "stderr": stderr or str(self.folder / f"{name}.err"),
        }
        return self.ask({"stage": stage, "words": [*map(str, words)], "environment": environment, **files})

    def finish(self, number: int) -> int:
        return self.ask(number)

    def said(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()

    def both(self, stage: str, *words: object, name: str) -> list[int]:
        """The exit codes of two processes that train together, as torchrun starts them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        numbers = [
            self.start(stage, *words, name=f"{name}{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **world)
            for rank in range(2)
        ]
        return [self.finish(number) for number in numbers]


@pytest.fixture(scope="module")
def door(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    made = Door(environment, tmp_path_factory.mktemp("door"))
    yield made
    made.process.communicate()


def log_of(root: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / run / "train_log.jsonl").read_text().splitlines()]


def lasting(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in log]


def manifest_of(root: Path, run: str) -> dict[str, Any]:
    return json.loads((root / run / "manifest.json").read_text())


STEPS = 24
RUN = "long_context_1"


@pytest.fixture(scope="module")
def straight(chain: Chain, door: Door, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """(words of the command, where its run is): long context, a checkpoint every third step."""
    where = tmp_path_factory.mktemp("straight")
    shutil.copytree(chain[1] / "base", where / "base")
    words: list[object] = [chain[0] / f"{RUN}.yaml", f"num_steps={STEPS}", "global_batch_size=2"]
    words += ["micro_batch_size=1", "verify=off", "trainer.save_strategy=steps", "trainer.save_steps=3"]
    words += ["trainer.lr_scheduler_type=constant_with_warmup", "trainer.warmup_steps=4"]
    assert door.finish(door.start("long_context", *words, "--run-dir", where, name="straight")) == 0
    return words, where


def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_log_and_weights_of_one_that_was_not(
    straight: tuple[list[object], Path], door: Door, tmp_path: Path
) -> None:
    """SIGKILL; the second process has a terminal, where a bar goes on from the step resumed from."""
    words, where = straight
    shutil.copytree(where / "base", tmp_path / "base")
    path = tmp_path / RUN / "train_log.jsonl"
    victim = door.start("long_context", *words, "--run-dir", tmp_path, name="victim")
    wanted = random.randrange(4, STEPS - 4)  # behind the first checkpoint
    while not path.is_file() or path.read_bytes().count(b"\n") < wanted:
        time.sleep(0.001)
    time.sleep(random.random() / 20)
    os.kill(victim, signal.SIGKILL)
    assert door.finish(victim) == -signal.SIGKILL, "the run ended before it could be killed"
    killed = len(path.read_bytes().splitlines())
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    name = os.ttyname(follower)
    done = door.start("long_context", *words, "--run-dir", tmp_path, name="resumed", stderr=name)
    assert door.finish(done) == 0
    shown = b""
    while select.select([leader], [], [], 0)[0]:
        shown += os.read(leader, 65536)
    os.close(leader)
    os.close(follower)
    again, before = manifest_of(tmp_path, RUN), manifest_of(where, RUN)
    resumed = again["metrics"]["resumed_from_step"]
    assert killed - 4 <= resumed <= killed
    assert lasting(log_of(tmp_path, RUN)) == lasting(log_of(where, RUN))
    assert [line["step"] for line in log_of(where, RUN)] == list(range(1, STEPS + 1))
    assert again["files"] == before["files"]
    for key in before["metrics"].keys() - {"training_seconds", "resumed_from_step"}:
        assert again["metrics"][key] == before["metrics"][key], key
    frames = [frame for frame in shown.decode().replace("\n", "\r").split("\r") if frame.startswith(RUN)]
    assert frames[-1].startswith(f"{RUN}: step {STEPS}/{STEPS}  loss {log_of(where, RUN)[-1]['loss']:.4f}")
    assert re.search(r" tokens/s  0 s left  \|\u2588+\|$", frames[-1])
    assert f"step {resumed}/" not in shown.decode()
    assert not [line for line in door.said("resumed.out") if "step" in line]
    lines = [line for line in door.said("straight.out") if line.startswith(f"{RUN}: step ")]
    assert [line.split()[2] for line in lines] == [f"{step}/{STEPS}" for step in range(2, STEPS + 1, 2)]
    assert "step" not in " ".join(door.said("straight.err"))


def test_two_processes_write_the_totals_of_one_once(
    straight: tuple[list[object], Path], door: Door, tmp_path: Path
) -> None:
    words, where = straight
    shutil.copytree(where / "base", tmp_path / "base")
    assert door.both("long_context", *words, "num_steps=6", "--run-dir", tmp_path, name="rank") == [0, 0]
    one, two = log_of(where, RUN)[:6], log_of(tmp_path, RUN)
    assert [line.keys() for line in two] == [line.keys() for line in one]
    for key in ("step", "num_tokens", "num_trained_tokens", "utilisation", "learning_rate", "epoch"):
        assert [line[key] for line in two] == [line[key] for line in one], key
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-4), key
    assert manifest_of(tmp_path, RUN)["metrics"]["num_tokens_seen"] == one[-1]["num_tokens"]
    assert not [line for line in door.said("rank1.out") if "step" in line]


def test_numbers_gone_to_nan_end_all_processes_in_one_line_with_the_rows_of_all_of_them(
    straight: tuple[list[object], Path], door: Door, tmp_path: Path
) -> None:
    words, where = straight
    shutil.copytree(where / "base", tmp_path / "base")
    more = ["trainer.learning_rate=1.0e+30", "trainer.warmup_steps=0", "trainer.save_steps=1"]
    assert door.both("long_context", *words, *more, "--run-dir", tmp_path, name="bad") == [1, 1]
    (line,) = [line for line in door.said("bad0.err") if not line.startswith("[")]  # a library's
    path = tmp_path / RUN / "bad_batch.json"
    said = (
        r"failed: step 2: the (loss|norm of the gradient) is (nan|inf); the rows of its batch are in (\S+); "
    )
    found = re.match(said, line)
    assert found
    assert found[3] == str(path)
    assert "Traceback" not in " ".join(door.said("bad0.err") + door.said("bad1.err"))
    state = json.loads((tmp_path / RUN / "state.json").read_text())
    assert (state["status"], state["message"] in line) == ("failed", True)
    (batch,) = json.loads(path.read_text())["batches"]
    assert batch["step"] == 2
    first, second = log_of(where, RUN)[:2]
    total = sum(document["length"] for document in batch["documents"])
    assert total == second["num_tokens"] - first["num_tokens"]  # packs of both processes, whole documents
    assert {document["source"] for document in batch["documents"]} == {"needles"}
    assert len({document["row"] for document in batch["documents"]}) == len(batch["documents"])
    assert [line["step"] for line in log_of(tmp_path, RUN)] == [1]
    assert not list((tmp_path / RUN / "checkpoints").glob("checkpoint-*/whole.json"))  # 1 has those weights


RUNS = ["base", "long_context_1", "mid", "sft", "apo_seed0", "apo_seed1"]


@pytest.mark.parametrize("run", RUNS)
def test_every_stage_logs_every_step_and_its_manifest_adds_up(chain: Chain, run: str) -> None:
    log, made = log_of(chain[1], run), manifest_of(chain[1], run)
    recipe, metrics = made["recipe"], made["metrics"]
    assert [line["step"] for line in log] == list(range(1, recipe["num_steps"] + 1))
    last, losses = log[-1], [line["loss"] for line in log]
    for key in ("num_tokens", "num_trained_tokens"):
        assert metrics[f"{key}_seen"] == last[key]
        assert sorted({line[key] for line in log}) == [line[key] for line in log]
    assert metrics["train_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert metrics["first_loss"] == losses[0]
    assert metrics["last_loss"] == pytest.approx(sum(losses[-10:]) / len(losses[-10:]))
    assert last["epoch"] == pytest.approx(metrics["num_epochs"], abs=1e-3)
    rates = [recipe["trainer"]["learning_rate"] * (1 - step / len(log)) for step in range(len(log))]
    assert [line["learning_rate"] for line in log] == pytest.approx(rates)
    assert ("utilisation" in last) == (recipe["stage"] != "apo")
    assert ("rewards/margins" in last) == (recipe["stage"] == "apo")


def test_two_epochs_are_every_pack_twice(chain: Chain) -> None:
    """The base: 12 steps of 16 packs; of 100, each a document of 48 tokens, 4 are left over."""
    log, ledger = log_of(chain[1], "base"), manifest_of(chain[1], "base")["data"]
    assert (ledger["num_packs"], ledger["num_unused"], ledger["num_tokens"]) == (100, 4, 100 * 48)
    assert (log[-1]["epoch"], log[-1]["num_tokens"]) == (2.0, 2 * 96 * 48)
    assert {line["utilisation"] for line in log} == {0.75} == {ledger["utilisation"]}


def test_both_seeds_of_preference_training_start_at_no_reward_and_gain_some(chain: Chain) -> None:
    for run in ("apo_seed0", "apo_seed1"):
        log = log_of(chain[1], run)
        assert log[0]["loss"] == pytest.approx(1.0, abs=1e-5)
        for line in log:
            margin = line["rewards/chosen"] - line["rewards/rejected"]
            assert line["rewards/margins"] == pytest.approx(margin, abs=1e-4)
        assert abs(log[0]["rewards/margins"]) < 1e-4 < abs(log[-1]["rewards/margins"])
        assert log[-1]["rewards/accuracies"] in (0, 0.25, 0.5, 0.75, 1)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(
    command: Callable[..., subprocess.CompletedProcess[str]], recipe_folder: Path, tmp_path: Path
) -> None:
    words = ["base", recipe_folder / "base.yaml", "--run-dir", tmp_path / "runs"]
    done = command("smol-post", *words, "trainer.report_to=[tensorboard, neptune]")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("trainer.report_to: 'neptune' is not installed; pip install neptune, or remove it")
    assert not (tmp_path / "runs").exists()
