"""What a run measures, shows and writes down while it trains, and when it stops by itself.

    trainer.tally        sums of this process over one optimiser step
      | on_step_end      one reduction over processes, one look at the device; a bad step ends the run
      v train_log.jsonl  {"step": 7, "loss": 1.25, "num_tokens": 7168, ...}, one line a step; a bar, or lines

Totals and the clock go into every checkpoint (`instruments.json`), and a resumed run cuts its log back to the
step it resumes from: the log ends up as that of an uninterrupted run, but for times and memory.
"""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from smol_post import manifest
from smol_post.data import Prepared
from smol_post.documents import MODES
from smol_post.mixture import Pool
from smol_post.refusal import Failure, Stopped
from smol_post.report import duration

Announce = Callable[[str], None]
TORN, GONE = "torn", "gone.part"  # among the checkpoints: set aside; about to be removed
LOG, BAD_BATCH, TOTALS = "train_log.jsonl", "bad_batch.json", "instruments.json"
# The loss explodes: half of the last RECENT_STEPS are above FACTOR x the median of the up to HISTORY_STEPS
# before them + MARGIN. Our choice: half of so many that odd batches, if one in 50 is, pass for it less than
# once in a million steps; a FACTOR that no shift of data makes; a MARGIN, since a loss near zero triples for
# nothing.
RECENT_STEPS, HISTORY_STEPS, FACTOR, MARGIN = 10, 100, 3.0, 0.5
SAME_SECONDS = 1.0  # of signals so close the second is the first, sent to a parent too, which passes it on
SPEED_STEPS = 100  # speed and time left are those of so many last steps, the first of the process left out
_TOTALS = {"losses": list[float], "launch": dict[str, Any], "num_tokens": int, "num_trained_tokens": int,
           "loss": float, "seconds": float}  # fmt: skip
_encode = json.JSONEncoder(allow_nan=False).encode
_LASTING = {"num_tokens", "num_trained_tokens", "seconds", "memory_bytes"}


class Instruments(TrainerCallback):
    """A line a step in `train_log.jsonl`, a bar or lines on the screen, and the seal on every checkpoint.

    Used as a context, so that bar and file are closed however training ends. The line of a step has:
        step, epoch, loss, learning_rate, grad_norm   of the global batch; the rate is the one applied
        num_tokens, num_trained_tokens                since step 1, over all processes
        utilisation                                   tokens of the step / room_tokens; of packs only
        tokens_per_second, seconds                    of the step; since step 1, without what a kill undid
        memory_bytes                                  peak of the first process: of its GPU, else resident
        rewards/..., logps/...                        means over the pairs of the global batch
    """

    def __init__(
        self,
        trainer: Any,
        *,
        prepared: Prepared,
        run_dir: Path,
        room_tokens: int | None,
        keep: tuple[int | None, Collection[str]] = (None, ()),
        announce: Announce,
    ) -> None:
        """`room_tokens`: what the packs of a global batch have room for; `announce` shows one line.

        `keep`: so many of the newest checkpoints stay (None: all), and those of these names.
        """
        self.trainer, self.prepared, self.run_dir = trainer, prepared, run_dir
        self.room_tokens, self.keep, self.announce = room_tokens, keep, announce
        self.asked: int | None = None  # the signal by which this process was asked to stop
        self.asked_at = 0.0
        self.stopping = False  # all processes are
        self.handlers: dict[int, Any] = {}
        self.totals: dict[str, Any] = {"num_tokens": 0, "num_trained_tokens": 0, "loss": 0.0, "seconds": 0.0}
        self.losses: deque[float] = deque(maxlen=RECENT_STEPS + HISTORY_STEPS)
        self.addresses: deque[list[int]] = deque(maxlen=RECENT_STEPS)  # of this process's documents
        self.speed: deque[tuple[float, int]] = deque(maxlen=SPEED_STEPS + 1)  # (seconds, num_tokens)
        self.line: dict[str, Any] = {}
        self.unlogged: deque[dict[str, Any]] = deque(maxlen=1000)  # lines since the trackers got some
        self.stream: TextIO | None = None
        self.bar: Any = None
        trainer.gauges = self._gauges
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):  # its own choice is among the checkpoints
                callback.logging_dir = callback.logging_dir or str(run_dir / "tensorboard")

    def __enter__(self) -> "Instruments":
        """Nothing is opened before training begins."""
        return self

    def __exit__(self, raised: type[BaseException] | None, *rest: object) -> None:
        """Close the bar, the log, and the trackers, which lose what they hold in a forked process else.

        From here on a signal ends the process at once.
        """
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for one in (self.bar, self.stream):
            if one is not None:
                one.close()
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback | TrackioCallback) and raised:
                callback.on_train_end(self.trainer.args, self.trainer.state, self.trainer.control)
            if isinstance(callback, WandbCallback):
                callback._wandb.finish(exit_code=int(raised is not None))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the totals of the checkpoint, if any; cut the log back to its step; start the clock.

        From here on a signal to stop waits for the end of the step.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # else not ours to take
                self.handlers[number] = signal.signal(number, self._ask)
        self.trainer.tally.clear()  # what was computed before step 1 is no part of it
        self.trainer.addresses.clear()
        if state.global_step:
            self.totals = manifest.read_json(_checkpoint(args, state) / TOTALS, wanted=_TOTALS)
            self.losses.extend(self.totals.pop("losses"))
            self.totals.pop("launch")
        self.lap = self.due = self.totals["seconds"]
        self.begun = time.monotonic() - self.lap
        if state.is_world_process_zero:
            cut(self.run_dir / LOG, state.global_step)
            manifest.note(self.run_dir, num_steps=state.max_steps)  # for `smol-post status`
            self.stream = (self.run_dir / LOG).open("a")
            if _columns():
                self.bar = tqdm(
                    desc=self.run_dir.name,
                    total=state.max_steps,
                    initial=state.global_step,
                    bar_format="{desc}  |{bar}|",
                    dynamic_ncols=True,
                )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the tally of the step: stop if the step is bad, else write its line."""
        sums, step, totals = self._take(), state.global_step, self.totals
        loss, grad_norm = sums.pop("loss"), sums.pop("grad_norm", None)
        self._check(step, loss, grad_norm)
        if sums.pop("asked") and step < state.max_steps:  # else all that is left is to save the end
            self.announce(f"asked to stop: saving after step {step}; ask again to stop without")
            self.stopping = control.should_save = True
        seconds = time.monotonic() - self.begun
        due = seconds >= self.due
        if due:  # once a second, since asking the system takes as long as all the rest
            self.due, self.memory = seconds + 1, peak_memory(self.trainer.accelerator.device)
        num_tokens, num_pairs = sums["num_tokens"], sums.pop("num_pairs", 0)
        for key in ("num_tokens", "num_trained_tokens"):
            totals[key] += int(sums.pop(key))
        totals["loss"], totals["seconds"] = totals["loss"] + loss, seconds
        totals.setdefault("first_loss", loss)
        line = {
            "step": step,
            "epoch": state.epoch,
            "loss": loss,
            "learning_rate": self.trainer.learning_rate,
            "grad_norm": grad_norm,
            "num_tokens": totals["num_tokens"],
            "num_trained_tokens": totals["num_trained_tokens"],
            "utilisation": round(num_tokens / self.room_tokens, 4) if self.room_tokens else None,
            "tokens_per_second": round(num_tokens / max(seconds - self.lap, 1e-9), 1),
            "seconds": round(seconds, 3),
            "memory_bytes": self.memory,
            **{key: total / num_pairs for key, total in sums.items()},
        }
        self.line = {key: value for key, value in line.items() if value is not None}
        self.lap = seconds
        self.speed.append((seconds, totals["num_tokens"]))
        self.unlogged.append(self.line)
        if self.stream is not None:
            self.stream.write(_encode(self.line) + "\n")
            if due:
                self.stream.flush()
        if self.bar is not None:
            text = self._text(loss, self.trainer.learning_rate, state)
            self.bar.set_description_str(f"{self.run_dir.name}: {text}", refresh=False)
            self.bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show a line where there is no bar."""
        if logs and "loss" in logs and self.bar is None:
            self.announce(self._text(logs["loss"], logs["learning_rate"], state))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the totals to a checkpoint and seal it, once all its files are there; remove older ones.

        Raises Stopped (KeyboardInterrupt after Ctrl-C) where this was the last thing to do.
        """
        PartialState().wait_for_everyone()  # every rank has written its part
        if state.is_world_process_zero:
            folder = _checkpoint(args, state)
            assert self.stream is not None
            self.stream.flush()
            os.fsync(self.stream.fileno())  # a checkpoint must not outlive the lines of its steps
            launched = launch_of(self.trainer.accelerator)
            totals = {**self.totals, "losses": list(self.losses), "launch": launched}
            manifest.write_json(folder / TOTALS, totals)
            manifest.seal(folder)
            limit, pinned = self.keep
            for _, old in manifest.checkpoints(self.run_dir)[: -limit if limit else 0]:
                if old.name not in pinned:
                    shutil.rmtree(gone := folder.parent / GONE, ignore_errors=True)  # of a kill right here
                    old.rename(gone)  # at once, so that none is torn
                    shutil.rmtree(gone)
        if self.stopping:
            PartialState().wait_for_everyone()  # the first that ends takes the others with it
            kind = KeyboardInterrupt if self.asked == signal.SIGINT else Stopped
            raise kind(f"stopped after step {state.global_step}, which is saved")
        self.lap = time.monotonic() - self.begun

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove what an earlier attempt wrote down; close bar and log, since what is left is to save."""
        for one in (self.bar, self.stream):
            if one is not None:
                one.close()
        if state.is_world_process_zero:
            (self.run_dir / BAD_BATCH).unlink(missing_ok=True)

    @property
    def last_loss(self) -> float | None:
        """The mean loss of the last RECENT_STEPS; None before step 1."""
        return statistics.fmean(list(self.losses)[-RECENT_STEPS:]) if self.losses else None

    def _take(self) -> dict[str, float]:
        """The tally of the step over all processes: sums, but of loss and gradient norm the mean."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        tally: dict[str, Any] = trainer.tally | {"asked": self.asked is not None}
        if trainer.grad_norm is not None:  # some of DeepSpeed's engines do not tell
            tally["grad_norm"] = trainer.grad_norm
        values = [float(one) for one in tally.values()]
        if accelerator.num_processes > 1:
            vector = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
            values = accelerator.reduce(vector, "sum").tolist()
        sums = dict(zip(tally, values, strict=True))
        self.addresses.append(trainer.addresses)
        trainer.addresses = []
        trainer.tally.clear()
        means = {key: sums[key] / accelerator.num_processes for key in ("loss", "grad_norm") if key in sums}
        return sums | means

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Stop when the step is done and saved; at once where that was asked before."""
        if self.asked is None:
            self.asked, self.asked_at = number, time.monotonic()
        elif time.monotonic() - self.asked_at > SAME_SECONDS:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped

    def _text(self, loss: float, learning_rate: float, state: TrainerState) -> str:
        """The run for a person: step 20/400  loss 1.2345  lr 1.0e-03  12,345 tokens/s  12 s left."""
        text = f"step {state.global_step}/{state.max_steps}  loss {loss:.4f}  lr {learning_rate:.1e}"
        if len(self.speed) < 2:
            return text
        seconds, tokens = (last - first for first, last in zip(self.speed[0], self.speed[-1], strict=True))
        left = seconds / (len(self.speed) - 1) * (state.max_steps - state.global_step)
        return f"{text}  {tokens / max(seconds, 1e-9):,.0f} tokens/s  {duration(left)} left"

    def _gauges(self) -> dict[str, float]:
        """For the trackers: totals as they are, else the means over the steps since they last asked."""
        lines = list(self.unlogged)
        self.unlogged.clear()
        return {
            key: last if key in _LASTING else statistics.fmean(line[key] for line in lines if key in line)
            for key, last in self.line.items()
            if key not in ("step", "epoch")
        }

    def _check(self, step: int, loss: float, grad_norm: float | None) -> None:
        """Stop the run, on all processes alike, where the step is bad."""
        self.losses.append(loss)
        for what, number in (("the loss", loss), ("the norm of the gradient", grad_norm)):
            if number is not None and not math.isfinite(number):
                self._stop(step, f"{what} is {number}", ago=0)
        ago = explosion(self.losses)
        if ago is not None:
            last = ", ".join(f"{one:.4g}" for one in list(self.losses)[-5:])
            self._stop(step, f"the loss explodes (since step {step - ago}; last: {last})", ago=ago)

    def _stop(self, step: int, why: str, *, ago: int) -> None:
        """Write down the batches of this step and of the one `ago` steps before; raise Failure."""
        parts = gather_object([list(self.addresses)])  # process, step, document
        path = self.run_dir / BAD_BATCH
        if PartialState().is_main_process:
            found = []
            for back in sorted({ago, 0}, reverse=True):
                pieces = [part[-1 - back] for part in parts if back < len(part)]
                if pieces:  # else a batch from before a resume
                    named = documents(self.prepared, list(itertools.chain(*pieces)))
                    found.append({"step": step - back, "documents": named})
            losses = [one if math.isfinite(one) else str(one) for one in self.losses]
            tree = {"step": step, "why": why, "learning_rate": self.trainer.learning_rate, "losses": losses}
            manifest.write_json(path, tree | {"batches": found})
            # A loss comes of the weights of the step before: no run goes on from those, nor from later ones.
            for saved, folder in manifest.checkpoints(self.run_dir):
                if saved >= step - ago - 1:
                    (folder / manifest.SEAL).unlink(missing_ok=True)
        PartialState().wait_for_everyone()
        raise Failure(
            f"step {step}: {why}; the rows of its batch are in {path}; mend them or lower "
            f"trainer.learning_rate, remove {self.run_dir} and type the command again"
        )


def launch_of(accelerator: Accelerator) -> dict[str, Any]:
    """Under which engine a checkpoint is written, by how many processes: whole replicas are one engine."""
    kind = accelerator.distributed_type
    engine = kind.value if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else "whole replicas"
    return {"engine": engine, "num_processes": accelerator.num_processes}


def explosion(losses: Sequence[float]) -> int | None:
    """How many steps before the last one the loss began to explode; None where it does not.

    >>> explosion([1.0] * 13 + [9.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0])
    6
    """
    if len(losses) < 2 * RECENT_STEPS:
        return None
    known = list(losses)[-HISTORY_STEPS - RECENT_STEPS :]
    before, recent = sorted(known[:-RECENT_STEPS]), known[-RECENT_STEPS:]
    limit = FACTOR * before[len(before) // 2] + MARGIN
    above = [at for at, loss in enumerate(recent) if loss > limit]
    return RECENT_STEPS - 1 - above[0] if 2 * len(above) >= RECENT_STEPS else None


def documents(prepared: Prepared, addresses: Sequence[int]) -> list[dict[str, Any]]:
    """Where the pieces at these addresses come from: source, row, mode and length of each one's document.

    `start` is where in its document a piece begins, if that is not the first token.
    """
    pool = Pool.of(prepared.stores)
    rows = np.concatenate([store.records["row"] for store in prepared.stores])
    names, found = list(prepared.ledger["by_source"]), []
    of = np.searchsorted(pool.address, addresses, side="right") - 1
    for at, start in zip(of.tolist(), (np.asarray(addresses) - pool.address[of]).tolist(), strict=True):
        one = {"source": names[pool.source[at]], "row": int(rows[at]), "mode": MODES[pool.mode[at]]}
        found.append(one | {"length": int(pool.length[at])} | ({"start": start} if start else {}))
    return found


def cut(path: Path, step: int) -> None:
    """Cut a log off behind the line of `step`; half a line goes too."""
    with path.open("ab+") as stream:
        end = stream.seek(0)
        for line in stream:
            if _step(line) > step:
                break
            end += len(line)
        stream.truncate(end)


def _step(line: bytes) -> float:
    """The step of a line of the log; what is no whole line is behind all of them."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: of a CUDA device, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _columns() -> int:
    """How wide the terminal on stderr is; 0 where there is none, or one that does not know."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
