"""What was answered, a line a request, written as it is answered: `answers.jsonl`.

    {"id": "5f0c...", "source": "gsm8k", "row": 7, "mode": "think", ..., "text": "<think>...", "ended": true}

The journal only ever grows, by one writer, a whole line at a time. A last line without its end was being
written when the process died: it is cut off, and its request is asked again.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smol_post.refusal import Refusal

JOURNAL = "answers.jsonl"
SYNC_SECONDS = 5.0  # our choice: what a power cut may cost; a killed process loses nothing


class Journal:
    """The journal of a folder, open for reading and, after `open`, for adding; texts stay on the disk."""

    def __init__(self, folder: Path) -> None:
        """Read which requests have an answer; Refusal where a line in the middle is damaged."""
        self.path = folder / JOURNAL
        self._places: dict[str, tuple[int, int]] = {}
        self._number: int | None = None
        self._end, self._synced = 0, 0.0
        self.num_answered = 0  # and not failed
        if self.path.exists() and not self.path.is_file():
            raise Refusal(f"{self.path}: is no file; remove it, or choose another --run-dir")
        if self.path.is_file():
            with self.path.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    if not line.endswith(b"\n"):
                        break  # torn
                    self._enter(self._parsed(line, number), len(line))

    def _enter(self, answer: Mapping[str, Any], size: int) -> None:
        self._places[answer["id"]] = (self._end, size)
        self._end += size
        self.num_answered += "failed" not in answer

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
            if isinstance(found["id"], str) and ("failed" in found or isinstance(found["text"], str)):
                return found
            raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refusal(
                f"{self.path}: line {number}: not an answer as we write it; remove the line, and its request "
                "is asked again, or restore the file"
            ) from None

    def open(self) -> "Journal":
        """Make it ready for adding; the end of a torn line is cut off. One process at a time, by its lock."""
        self._number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._number, self._end)
        return self

    def close(self) -> None:
        """Have it all on the disk."""
        if self._number is not None:
            os.fsync(self._number)
            os.close(self._number)
            self._number = None

    def __contains__(self, key: str) -> bool:
        """Whether a request is done, answered or failed for good."""
        return key in self._places

    def __len__(self) -> int:
        """How many requests are done."""
        return len(self._places)

    def __getitem__(self, key: str) -> dict[str, Any]:
        """What is written of a request; KeyError where nothing is."""
        start, size = self._places[key]
        if self._number is not None:
            return json.loads(os.pread(self._number, size, start))
        with self.path.open("rb") as stream:
            stream.seek(start)
            return json.loads(stream.read(size))

    def add(self, answer: Mapping[str, Any]) -> None:
        """Write down one answer, by its `id`, at once and whole."""
        assert self._number is not None
        line = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        written = 0
        while written < len(line):
            written += os.pwrite(self._number, line[written:], self._end + written)
        self._enter(answer, len(line))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._number)
            self._synced = time.monotonic()
