"""Room on the disk: asked for before a run starts, and missed in one line where it runs out all the same."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smol_post.manifest import is_sealed
from smol_post.refusal import Failure, Refusal

GIB = 2**30
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SAID = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
_NOTHING = 2**20  # bytes: less is no room for a file; some libraries say no more than that a write failed


class DiskFull(Failure):
    """The disk is full; what was whole is whole."""


def free(folder: Path) -> int:
    """Bytes that this user may still write below `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require(folder: Path, num_bytes: float, *, what: str) -> None:
    """Refusal, with both numbers, where less than `num_bytes` are free; `what` wants them."""
    found = free(folder)
    if found < num_bytes:
        raise Refusal(
            f"{folder}: {what} takes {num_bytes / GIB:,.3f} GiB of disk, found {found / GIB:,.3f} GiB free; "
            "make room or choose another --run-dir"
        )


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Turn whatever a library raises where the disk of `folder` is full into DiskFull."""
    try:
        yield
    except Exception as error:
        if not _is_full(error, folder):
            raise
        if name := getattr(error, "filename", None):
            folder = Path(str(name)).parent  # may be another disk
        raise DiskFull(
            f"{folder}: the disk is full, {free(folder) / GIB:,.3f} GiB free; make room and give the same "
            "command again: what is whole is kept"
        ) from error


def _is_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error, or one that it came of, is that of a full disk."""
    writing = isinstance(error, OSError | RuntimeError) and not isinstance(error, FileNotFoundError)
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(text in str(error) for text in _SAID):
            return True
        error = error.__cause__ or error.__context__
    return writing and free(folder) < _NOTHING


def give_back(run_dir: Path) -> None:
    """Remove what a run was writing when the disk was full, so that the next attempt has that room."""
    half = [path for path in run_dir.glob("checkpoints/checkpoint-*") if not is_sealed(path)]
    for path in [*half, *run_dir.glob("*.part"), *run_dir.glob("**/*.tmp")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
