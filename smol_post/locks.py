"""A folder belongs to one process at a time; its lock says to which, and since when.

    runs/tiny/sft/.lock    {"pid": 4711, "host": "node3", "started": "2026-11-22T22:30:00+00:00"}

The lock is the kernel's, on the open file, so it ends with the process however that dies: a file that a dead
process left behind holds nobody up.
"""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

from smol_post.manifest import now
from smol_post.refusal import Refusal

LOCK = ".lock"
_TRIES = 3  # a tenth of a second apart: `holder` has it for a moment when it looks


def take(folder: Path, *, what: str) -> TextIO:
    """The held lock of `folder`; close it, or use it as a context, to give it back.

    Raises Refusal with the process that holds it and its start; `what` is under way there.
    """
    path = folder / LOCK
    for tries in range(_TRIES):
        stream = path.open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            time.sleep(0.1 * (tries < _TRIES - 1))
            continue
        except OSError as error:
            stream.close()
            raise Refusal(
                f"{path}: this file system has no locks ({error.strerror}); choose another --run-dir"
            ) from None
        if path.is_file() and path.stat().st_ino == os.fstat(stream.fileno()).st_ino:
            stream.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": now()}, stream)
            stream.flush()
            os.register_at_fork(after_in_child=stream.close)  # a worker that outlives us would hold it on
            return stream
        stream.close()  # the former owner removed the file when it was done
    raise _refusal(folder, what, _read(path))


def check(folder: Path, *, what: str) -> None:
    """Refusal, as of `take`, where a process holds the lock of `folder`; nothing is written."""
    if found := holder(folder):
        raise _refusal(folder, what, found if found["pid"] else None)


def _refusal(folder: Path, what: str, found: dict[str, Any] | None) -> Refusal:
    who = "{pid} on {host}, since {started}".format(**found) if found else "that has just begun"
    return Refusal(f"{folder}: {what} is under way, by process {who}; wait for it or stop it")


def holder(folder: Path) -> dict[str, Any] | None:
    """The process that holds the lock of `folder` now: pid, host, started; None where none does."""
    try:
        stream = (folder / LOCK).open("r")
    except OSError:
        return None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(folder / LOCK) or {"pid": 0, "host": "", "started": now()}
        except OSError:
            return None
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says; None while its owner is about to write it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= {"pid", "host", "started"} else None
