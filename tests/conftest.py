"""Shared by all tests: a tokenizer, tiny models, the command line, one chain made by the real commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import smol_post

REPO = Path(smol_post.__file__).parents[1]
BIN = Path(sys.executable).parent
RECIPE = Path(__file__).parent / "integration" / "recipe"
# One thread, so that sums are taken in the same order everywhere; no network; no launcher of our own caller;
# secrets that are nobody's, which must turn up nowhere.
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_TOKEN": "hf_plantedAaBbCcDdEeFfGgHhIiJjKkLlMmNn",
    "HUGGING_FACE_HUB_TOKEN": "hf_plantedOoPpQqRrSsTtUuVvWwXxYyZz0011",
    "WANDB_API_KEY": "planted0123456789abcdef0123456789abcdef0",
    "OPENAI_API_KEY": "sk-proj-plantedAaBbCcDdEeFfGgHhIiJj",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
ENVIRONMENT["PATH"] = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout that the tests run against."""
    return REPO


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of every process that a test starts."""
    return ENVIRONMENT


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of the environment, such as `smol-post`, and wait for it."""

    def call(*words: str | Path, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / str(words[0])), *map(str, words[1:])],
            cwd=cwd,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )

    return call


@pytest.fixture
def recipe_folder(tmp_path: Path) -> Path:
    """A copy of the test recipe, to be edited freely."""
    return Path(shutil.copytree(RECIPE, tmp_path / "recipe"))


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> tuple[Path, Path]:
    """(recipe folder, run root): the whole pipeline, base to merge, evaluated, by `smol-post run`, once."""
    where = tmp_path_factory.mktemp("chain")
    recipe = Path(shutil.copytree(RECIPE, where / "recipe"))
    made = command("smol-post", "run", recipe, "--run-dir", where / "runs")
    assert made.returncode == 0, made.stdout + made.stderr
    (where / "output.txt").write_text(made.stdout + made.stderr)
    return recipe, where / "runs"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny recipe's kind of tokenizer, with our chat template."""
    from smol_post import chat, synthetic, vocabulary

    chats = synthetic.generate("dual_mode_chats", num_rows=100, seed=0)
    texts = [turn["content"] for row in chats for turn in row["messages"]]
    texts += [row["prompt"] for row in synthetic.generate("needles", num_rows=50, seed=0)]
    made = vocabulary.train_tokenizer(iter(texts), vocab_size=400)
    made.chat_template = chat.load_template("smol_post")
    return made


@pytest.fixture(scope="session")
def build(tokenizer: Any) -> Callable[..., Any]:
    """A tiny SmolLM3 with large random weights, so that every path through it shows in the logits."""
    import torch

    from smol_post import model

    def made(*, attention: str = "varlen", seed: int = 0, tied: bool = True, **changes: Any) -> Any:
        torch.manual_seed(seed)
        end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        parameters = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        }
        return model.build_model(
            {**parameters, **changes},
            vocab_size=len(tokenizer),
            token_ids={"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
            attn_implementation=attention,
        ).eval()

    return made


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order for the length of a test."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
