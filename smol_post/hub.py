"""What we ask of the Hugging Face Hub: a checkpoint, a data set's revision. The only caller of its client."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smol_post.refusal import Refusal

CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever the client or the network raises into a Refusal that starts with `what`."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(
            f"{what}: not to be had from the Hub ({reason}); check name and network, or give a local path"
        ) from None


def checkpoint(path: str, *, weights: bool = True, code: bool = False, what: str = "parent") -> Path:
    """`org/name@revision` as a local folder, downloaded where it is not cached; its name is the commit.

    `code`: with its Python files.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = path.partition("@")
    files = CHECKPOINT_FILES[not weights :] + ["*.py"] * code
    with refusing(f"{what} {path}"):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))


def cached_config(path: str) -> Path | None:
    """The config.json of `org/name@revision` where it is cached; nothing is asked of the network."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = path.partition("@")
    with refusing(f"parent {path}"):
        found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    return Path(found) if isinstance(found, str) else None


def dataset_revision(path: str, *, revision: str | None, source: str) -> str:
    """The commit that a Hub data set stands at; the Hub is not asked about a whole commit hash."""
    from huggingface_hub import HfApi

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    with refusing(f"source '{source}': {path}"):
        return str(HfApi().dataset_info(path, revision=revision).sha)
