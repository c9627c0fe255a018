"""A folder belongs to one process at a time, whatever became of the one before."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from smol_post import locks
from smol_post.refusal import Refusal


def hold(folder: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with locks.take(folder, what="a run"):
        ready.set()
        signal.pause()


def test_the_refusal_names_the_process_and_its_start(tmp_path: Path) -> None:
    with locks.take(tmp_path, what="a run"):
        found = locks.holder(tmp_path)
        assert found is not None
        assert found["pid"] == os.getpid()
        with pytest.raises(Refusal, match=f"by process {os.getpid()} on .*, since {found['started'][:19]}"):
            locks.take(tmp_path, what="a run")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready))
    other.start()
    assert ready.wait(60)
    with pytest.raises(Refusal, match=f"by process {other.pid} on"):
        locks.take(tmp_path, what="a run")
    other.kill()
    other.join()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == other.pid
    assert locks.holder(tmp_path) is None
    with locks.take(tmp_path, what="a run"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path: Path) -> None:
    lock = locks.take(tmp_path, what="a run")
    worker = multiprocessing.get_context("fork").Process(target=signal.pause)
    worker.start()
    time.sleep(0.5)
    lock.close()  # as the kernel does for who is killed
    try:
        assert locks.holder(tmp_path) is None
    finally:
        worker.kill()
        worker.join()


def test_one_who_waited_while_the_file_was_removed_does_not_share_it(tmp_path: Path) -> None:
    with locks.take(tmp_path, what="a run"):
        (tmp_path / ".lock").unlink()
        with locks.take(tmp_path, what="a run"):  # another file, so another lock
            found = locks.holder(tmp_path)
    assert found is not None
    assert locks.holder(tmp_path) is None
