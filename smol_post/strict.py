"""What every recipe class is made of: strict keys, and values that are paths, seeds or counts."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from smol_post.refusal import describe


class Strict(BaseModel):
    """Unknown keys and converted types are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=False, use_attribute_docstrings=True
    )


def _a_path(text: str) -> str:
    """ValueError for what no file system takes as a path."""
    if not text or any(len(one.encode()) > 255 for one in text.split("/")) or len(text.encode()) > 4000:
        raise ValueError(f"found {describe(text)}, wanted a path; no name in it may be over 255 bytes")
    return text


PathText = Annotated[str, AfterValidator(_a_path)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy's generators take
Threads = Annotated[int, Field(gt=0, le=4096)]


FILES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")


def is_local(path: str) -> bool:
    """Whether a source path names something on disk (else it is a Hub data set).

    >>> is_local("data/rows.jsonl.gz"), is_local("HuggingFaceTB/smoltalk2")
    (True, False)
    """
    return path.startswith(("/", "./", "../", "~")) or path.endswith(FILES)


def local_path(path: str, folder: Path) -> Path:
    """A source path as a file or folder: `~` expanded, relative to the recipe's folder."""
    return Path(os.path.realpath(folder / os.path.expanduser(path)))  # which takes links in a circle
