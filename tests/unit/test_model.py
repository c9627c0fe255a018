"""Weights and tokenizer, loaded and saved: what is saved is what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from smol_post import chat, config, model, vocabulary
from smol_post.refusal import Refusal

Build = Callable[..., Any]


def save(lm: Any, tokenizer: Any, folder: Path) -> None:
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shapes_of(lm: Any) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in lm.named_parameters()}


@pytest.fixture
def saved(build: Build, tokenizer: Any, tmp_path: Path) -> Path:
    save(build(), tokenizer, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def own_tokenizer(tokenizer: Any) -> Any:
    """A copy that a test may change."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def inverse_frequencies(lm: Any) -> torch.Tensor:
    return lm.model.rotary_emb.inv_freq


def test_theta_is_live_saved_and_reloaded(saved: Path, tokenizer: Any, tmp_path: Path) -> None:
    lm = model.load_model(
        saved, attn_implementation="sdpa", rope_theta=5_000_000, max_position_embeddings=512
    )
    wanted = torch.tensor([5_000_000 ** (-2 * i / 8) for i in range(4)])  # head_dim 8
    assert torch.allclose(inverse_frequencies(lm), wanted, rtol=1e-5)
    save(lm, tokenizer, tmp_path / "longer")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "longer")
    assert torch.equal(inverse_frequencies(again), inverse_frequencies(lm))
    assert again.config.rope_parameters["rope_theta"] == 5_000_000
    assert again.config.max_position_embeddings == 512


def test_the_checkpoint_s_own_theta_is_kept_where_none_is_asked_for(saved: Path) -> None:
    lm = model.load_model(saved, attn_implementation="sdpa")
    assert lm.config.rope_parameters["rope_theta"] == 50_000
    assert inverse_frequencies(lm)[1].item() == pytest.approx(50_000 ** (-1 / 4))


def test_frequencies_that_are_not_those_of_the_configuration_are_refused(build: Build) -> None:
    lm = build()
    lm.config.rope_parameters["rope_theta"] = 5e6
    with pytest.raises(Refusal, match=r"live RoPE frequencies .* are not those of theta 5e\+06"):
        model.check_rope(lm)


def test_training_from_scaled_rope_is_refused(build: Build, tokenizer: Any, tmp_path: Path) -> None:
    scaled = build(
        rope_parameters={"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0},
    )
    save(scaled, tokenizer, tmp_path / "scaled")
    with pytest.raises(Refusal, match="rope_type is linear"):
        model.load_model(tmp_path / "scaled", attn_implementation="sdpa", rope_theta=5e6)


def test_a_checkpoint_loads_in_float32_to_be_trained(saved: Path, tokenizer: Any, tmp_path: Path) -> None:
    half = model.load_model(saved, attn_implementation="sdpa", dtype=torch.bfloat16)
    save(half, tokenizer, tmp_path / "half")
    lm = model.load_model(tmp_path / "half", attn_implementation="sdpa")
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.float32}


@pytest.mark.parametrize("fault", ["lost", "added"])
def test_weights_that_do_not_fit_the_configuration_are_refused(saved: Path, fault: str) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    path = saved / "model.safetensors"
    tensors = load_file(path)
    if fault == "lost":
        del tensors[name]
    else:
        name = "model.layers.9.mlp.up_proj.weight"
        tensors[name] = torch.zeros(2)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Refusal, match=f"weights do not fit config.json .*{name}"):
        model.load_model(saved, attn_implementation="sdpa")


def test_a_weight_of_another_shape_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"model\.norm\.weight"):
        model.load_model(saved, attn_implementation="sdpa")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"no config\.json"):
        model.load_model(tmp_path, attn_implementation="sdpa")


def with_tokens(*tokens: str) -> config.MidRecipe:
    """A recipe that adds tokens, as the first of a chain may."""
    sources = [config.Source(name="s", generator="reasoning_chats", num_rows=1)]
    return config.MidRecipe(
        stage="mid", max_tokens=8, global_batch_size=1, num_steps=1, sources=sources, add_tokens=list(tokens)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_at_the_mean_and_tied_heads_stay_tied(
    build: Build, own_tokenizer: Any, tmp_path: Path, tied: bool
) -> None:
    lm = build(tied=tied)
    embeddings, head = lm.get_input_embeddings().weight.clone(), lm.get_output_embeddings().weight.clone()
    old = len(embeddings)
    words = vocabulary.of_run(with_tokens("<|tool|>", "<think>", "<extra>"), own_tokenizer, folder=tmp_path)
    model.embed_new(lm, words.new_ids)
    assert own_tokenizer.convert_tokens_to_ids(["<|tool|>", "<extra>"]) == [old, old + 1]
    assert lm.config.vocab_size == old + 2
    for weight, before in (
        (lm.get_input_embeddings().weight, embeddings),
        (lm.get_output_embeddings().weight, head),
    ):
        assert torch.equal(weight[:old], before)
        assert torch.allclose(weight[old:], before.mean(0).expand(2, -1), atol=1e-6)
    same = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert same == tied
    save(lm, own_tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, lm.get_output_embeddings().weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a<|tool|><extra>")["input_ids"][-2:] == [old, old + 1]
    assert tokenizer.decode([old, old + 1], skip_special_tokens=True) == "<extra>"


def test_adding_known_tokens_changes_nothing(build: Build, own_tokenizer: Any, tmp_path: Path) -> None:
    lm = build()
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    words = vocabulary.of_run(with_tokens("<think>", "<|im_end|>"), own_tokenizer, folder=tmp_path)
    assert words.new_ids == []
    model.embed_new(lm, words.new_ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())


def test_a_chat_model_ends_turns_and_generation_with_im_end(
    build: Build, own_tokenizer: Any, tmp_path: Path
) -> None:
    lm = build()
    vocabulary.of_run(with_tokens(), own_tokenizer, folder=tmp_path)
    model.set_chat(lm, own_tokenizer)
    save(lm, own_tokenizer, tmp_path)
    again, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    end, old = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", chat.load_template("chatml"))
    assert again.config.eos_token_id == end
    assert again.generation_config.eos_token_id == [end, old]
    assert again.generation_config.pad_token_id == again.config.pad_token_id == old


def test_weights_that_are_not_finite_are_not_saved_in_silence(
    build: Build, tokenizer: Any, tmp_path: Path
) -> None:
    lm = build()
    with torch.no_grad():
        lm.model.norm.weight[0] = float("nan")
    save(lm, tokenizer, tmp_path)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight has values that are not finite"):
        model.check_saved(shapes_of(lm), tmp_path)


def test_a_tensor_that_was_not_saved_is_an_error(build: Build, tokenizer: Any, tmp_path: Path) -> None:
    lm = build()
    save(lm, tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight was saved as None"):
        model.check_saved(shapes_of(lm), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("hidden_sizes", 8, "model.hidden_sizes: "), ("hidden_size", "wide", "hidden_size")],
)
def test_a_model_that_cannot_be_built_is_refused(build: Build, key: str, value: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        build(**{key: value})
    assert "\n" not in str(caught.value)
