"""A source cut into shards, each tokenised alone by datatrove, then joined: the very store of one process.

    cache/shards/<key>-of-8/00003         documents of rows 3n/8 to 4n/8, sealed when whole
    cache/shards/<key>-of-8/00003.refused why they cannot be made, if so
    cache/shards/<key>-of-8/{logs,completions,stats}   datatrove's own
      | join, no token is copied
    cache/documents/<key>                 as if it had been made at once

A shard is a task of datatrove, whose executors run tasks here or as an array of Slurm jobs, keep logs and
pass over what is done. What is done is said by the seals of the shards.
"""

import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from tqdm import tqdm

from smol_post import manifest
from smol_post.data import DOCUMENTS, Task
from smol_post.documents import folder_of, join, once
from smol_post.launch import exit_with_parent
from smol_post.refusal import Failure, Refusal
from smol_post.sources import Span, spans

# Makes the executor of a pipeline: (pipeline, number of tasks, folder of logs)
MakeExecutor = Callable[..., LocalPipelineExecutor | SlurmPipelineExecutor]


class TokeniseShard(PipelineStep):
    """Writes the documents of the shard `rank`, or why they cannot be made."""

    type, name = "smol_post", "tokenise"

    def __init__(self, task: Task, cut: list[Span], folder: Path) -> None:
        """`cut`: the rows of each shard; `folder`: where shards lie."""
        super().__init__()
        self.task, self.cut, self.folder = task, cut, folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:  # pyright: ignore
        """Do it, unless it is there, or an earlier shard is refused: then this one would be for nothing."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        part = self.folder / f"{rank:05d}"
        if any(one.stem < part.name for one in self.folder.glob("*.refused")):
            return
        try:
            once(self.folder, part.name, self.task.writer(span=self.cut[rank]))
        except Refusal as refusal:
            _refusal(part).write_text(str(refusal))


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's, but a process that is killed is noticed: its own pool would wait for it for ever."""

    def run(self) -> None:
        """Run what is not done; Failure where a process died."""
        context = get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, initializer=exit_with_parent) as pool:
            try:
                left = self.get_incomplete_ranks()
                tasks = [pool.submit(self._run_for_rank, rank, local_rank=1) for rank in left]
                done = as_completed(tasks)
                for task in tqdm(done, "shards", len(left), disable=None, file=sys.stderr):
                    task.result()
            except BaseException as error:
                for process in active_children():
                    process.terminate()
                if isinstance(error, BrokenProcessPool):
                    raise Failure(
                        "a process that tokenised a shard died (out of memory?); what is whole is kept: give "
                        "the same command again, with fewer --workers or more --shards"
                    ) from None
                raise


def local(num_workers: int) -> MakeExecutor:
    """Shards in processes of this machine; returns when they are done."""

    def made(pipeline: list[PipelineStep], num_shards: int, folder: Path) -> LocalExecutor:
        return LocalExecutor(pipeline, num_shards, num_workers, str(folder))  # pyright: ignore

    return made


def slurm(num_workers: int, *, partition: str, time: str, memory_gb: int) -> MakeExecutor:
    """Shards as jobs of one core each, `num_workers` at once (-1: no limit); returns when they are queued."""
    if not shutil.which("sbatch"):
        raise Refusal("--executor slurm: no sbatch on PATH; give the command where jobs are submitted from")

    def made(pipeline: list[PipelineStep], num_shards: int, folder: Path) -> SlurmPipelineExecutor:
        return SlurmPipelineExecutor(
            pipeline,  # pyright: ignore
            tasks=num_shards,
            workers=num_workers,
            partition=partition,
            time=time,
            mem_per_cpu_gb=memory_gb,
            qos="",  # the partition's own
            job_name=f"smol-post-{folder.name}",
            logging_dir=str(folder),
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
        )

    return made


def prepare(task: Task, *, cache_dir: Path, num_shards: int, executor: MakeExecutor) -> bool:
    """Make the documents of a source in shards, if they are not there; False while its jobs are with Slurm.

    Raises the Refusal of the earliest bad row, and Failure where a process died; whole shards are kept.
    """
    name = f"{folder_of(cache_dir, task.key).name}-of-{num_shards}"
    folder = (cache_dir / "shards" / name).resolve()
    parts = [folder / f"{rank:05d}" for rank in range(num_shards)]

    def build(target: Path) -> None:
        if not _whole(parts):
            cut = spans(task.source, folder=task.folder, num_shards=num_shards)
            for part in parts:  # datatrove believes what it has written, the truth is in the seals
                if not (manifest.is_sealed(part) or _refusal(part).exists()):
                    (folder / "completions" / part.name).unlink(missing_ok=True)
            executor([TokeniseShard(task, cut, folder)], num_shards, folder).run()
            if not _whole(parts):
                raise _Waiting
        join(task.source, parts, target)

    try:
        once(cache_dir / DOCUMENTS, task.key, build)
    except _Waiting:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _whole(parts: list[Path]) -> bool:
    """Whether all shards are; Refusal of the first that is refused, if all before it are whole."""
    for part in parts:
        if manifest.is_sealed(part):
            continue
        if not _refusal(part).exists():
            return False
        reason = _refusal(part).read_text()
        for each in parts:  # told once: the next time they are tried again
            _refusal(each).unlink(missing_ok=True)
        raise Refusal(reason)
    return True


def _refusal(part: Path) -> Path:
    return part.with_suffix(".refused")


class _Waiting(Exception):
    """The shards are made by jobs that may not have begun."""
