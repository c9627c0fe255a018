"""The final model is the weighted sum of its parents, and the soup's in everything else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
Chain = tuple[Path, Path]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_every_tensor_is_nine_parts_soup_and_one_part_long_context(chain: Chain) -> None:
    root = chain[1]
    first, second, long = (weights(root / run) for run in ("apo_seed0", "apo_seed1", "long_context_1"))
    merged = weights(root / "merge")
    assert merged.keys() == first.keys() == second.keys() == long.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        wanted = 0.9 * (first[name] + second[name]) / 2 + 0.1 * long[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)


def test_the_soup_is_kept_as_a_checkpoint_of_its_own(chain: Chain) -> None:
    root = chain[1]
    first, second, soup = (weights(root / run) for run in ("apo_seed0", "apo_seed1", "merge/soup"))
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer.json"])
def test_template_tokenizer_and_generation_settings_are_the_soup_s(chain: Chain, name: str) -> None:
    root = chain[1]
    assert (root / "merge" / name).read_bytes() == (root / "apo_seed0" / name).read_bytes()


def test_the_configuration_is_the_soup_s(chain: Chain) -> None:
    root = chain[1]
    merged, soup, long = (
        json.loads((root / run / "config.json").read_text())
        for run in ("merge", "apo_seed0", "long_context_1")
    )
    for key in ("eos_token_id", "pad_token_id", "rope_parameters", "max_position_embeddings", "vocab_size"):
        assert merged[key] == soup[key]
    assert merged["eos_token_id"] != long["eos_token_id"]
