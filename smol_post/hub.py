"""What we ask of the Hugging Face Hub, and give it: checkpoints, revisions. The only caller of its client."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smol_post.refusal import Refusal

_GET = "not to be had from the Hub ({}); check name and network, or give a local path"
_PUT = "not to be put on the Hub ({}); check name, network and `hf auth whoami`; what was made is kept"
_OURS = ["*.safetensors", "*.safetensors.index.json", "yarn/*", "int8/*", "recipe/*", "report/*"]
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@contextmanager
def refusing(what: str, text: str = _GET) -> Iterator[None]:
    """Turn whatever the client or the network raises into a Refusal: `what`, and `text` with the reason."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{what}: {text.format(reason)}") from None


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


def check_repository(name: str) -> None:
    """Refusal where `name` is no name of a repository, or nobody is logged in who may write to one."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1:
        raise Refusal(f"--push-to-hub {name}: wanted org/name, or your own name/name")
    with refusing(f"--push-to-hub {name}", _PUT):
        validate_repo_id(name)
        token = HfApi().whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise Refusal(f"--push-to-hub {name}: the token here may only read; log in with one that may write")


def validate_card(text: str) -> None:
    """Hold a model card against the Hub's own rules, which it alone knows; Refusal where it breaks one."""
    from huggingface_hub import ModelCard

    try:
        with refusing("README.md", _PUT):
            ModelCard(text).validate()
    except ValueError as error:
        raise Refusal(f"README.md: the Hub refuses it ({str(error).strip()}); mend --license") from None


def make_repository(name: str, *, private: bool) -> None:
    """A repository for a model, if there is none; Refusal where one that is to be private is public."""
    from huggingface_hub import HfApi

    with refusing(name, _PUT):
        HfApi().create_repo(name, private=private, exist_ok=True)
        is_public = private and not HfApi().model_info(name).private
    if is_public:
        raise Refusal(f"{name}: --private, but it is there and public; make it private, or name another")


def push(folder: Path, name: str, *, revision: str | None = None) -> str:
    """Upload a folder in one commit, to a branch where one is named; the address of the commit.

    Weights, variants and records that the folder does not have are removed there: what is left over would be
    loaded instead, or describe another model.
    A branch, which begins as a copy of main, has the folder's files and no others.
    """
    from huggingface_hub import HfApi

    with refusing(name, _PUT):
        if revision:
            HfApi().create_branch(name, branch=revision, exist_ok=True)
        gone = ["*"] if revision else _OURS
        done = HfApi().upload_folder(
            repo_id=name, folder_path=folder, revision=revision, delete_patterns=gone
        )
    return str(done.commit_url)
