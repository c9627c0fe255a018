"""Load, build and check weights; RoPE theta; rows for new tokens. The only loader of models.

RoPE frequencies are computed when a model is built, so theta is set in the configuration before that and then
checked on the live model: editing `model.config` afterwards would train with the old theta and save the new
one.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from smol_post import attention
from smol_post.refusal import Refusal
from smol_post.vocabulary import token_id

logging.disable_progress_bar()  # of transformers; progress is ours to show
if not torch.cuda.is_available():  # else DeepSpeed looks for a GPU and says so at every start
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def use_threads(number: int | None) -> None:
    """CPU threads of this process; with one, small models are fast and sums come out alike everywhere."""
    if number is not None:
        torch.set_num_threads(number)


def load_model(
    folder: Path,
    *,
    attn_implementation: str,
    dtype: torch.dtype = torch.float32,
    rope_theta: float | None = None,
    max_position_embeddings: int | None = None,
) -> PreTrainedModel:
    """The checkpoint in `folder` as a causal language model, in `dtype` (float32 to train: master weights).

    `rope_theta` and `max_position_embeddings` replace the checkpoint's before the model is built; the live
    frequencies are then held against the configuration. Raises Refusal where the folder is no checkpoint, a
    weight is missing, or the model keeps its RoPE elsewhere.
    """
    config = load_config(folder)
    if rope_theta is not None:
        parameters = dict(getattr(config, "rope_parameters", None) or {})
        if "rope_theta" not in parameters:
            raise Refusal(
                f"{folder}: {config.model_type} has no rope_parameters.rope_theta; leave this stage out"
            )
        if parameters.get("rope_type", "default") != "default":
            raise Refusal(
                f"{folder}: rope_type is {parameters['rope_type']}; train from a checkpoint without scaling"
            )
        config.rope_parameters = {**parameters, "rope_theta": float(rope_theta)}
    if max_position_embeddings is not None:
        config.max_position_embeddings = max_position_embeddings
    attention.register()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the next lines name them
        )
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{folder}: no loadable weights ({reason}); mend the parent") from None
    lost = (
        sorted(info["missing_keys"])
        + sorted(info["unexpected_keys"])
        + sorted(map(str, info["mismatched_keys"]))
    )
    if lost:
        raise Refusal(
            f"{folder}: weights do not fit config.json ({lost[0]}, {len(lost)} in all); mend the checkpoint"
        )
    check_rope(model)
    return model


def load_config(folder: Path) -> PreTrainedConfig:
    """config.json of a checkpoint; Refusal where it is missing or unreadable."""
    if not (folder / "config.json").is_file():
        raise Refusal(f"{folder}: no config.json, so no Hugging Face checkpoint; mend the parent")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(
            f"{folder / 'config.json'}: not a model configuration ({reason}); mend the parent"
        ) from None


def inverse_frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """RoPE inverse frequencies of a default-type configuration: theta ** (-2 i / head_dim), shape (D / 2,).

    Source: RoFormer (Su et al., 2021), equation 15.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponent)


def check_rope(model: PreTrainedModel) -> None:
    """Live RoPE frequencies equal what config.json will say; Refusal with both where they differ."""
    if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") != "default":
        return
    wanted = inverse_frequencies(model.config)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            live = buffer.detach().float().cpu()
            if live.shape != wanted.shape or not torch.allclose(live, wanted, rtol=1e-5):
                raise Refusal(
                    f"{name}: live RoPE frequencies ({live[1]:.3e}, ...) are not those of theta "
                    f"{model.config.rope_parameters['rope_theta']:g} ({wanted[1]:.3e}, ...)"
                )


def embed_new(model: PreTrainedModel, new_ids: list[int]) -> None:
    """Give tokens that the parent lacked the mean of its embedding rows (in place; a tied head follows).

    Source: "Vocabulary expansion" (Hewitt, 2021): the mean keeps the new token's logit from dominating.
    """
    if not new_ids:
        return
    old_rows = _embedding_weights(model)[0].shape[0]
    if max(new_ids) >= old_rows:
        model.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in _embedding_weights(model):
            weight[new_ids] = weight[:old_rows].mean(0)


def _embedding_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The input embedding and, where it is not tied, the head: each of shape (vocabulary, D)."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [one.weight for one in modules if one is not None and isinstance(one.weight, torch.Tensor)]
    return weights[:1] if len(weights) == 2 and weights[0] is weights[1] else weights


def set_chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the checkpoint a chat model: `<|im_end|>`, its tokenizer's eos, ends turns and generation."""
    end = token_id(tokenizer, str(tokenizer.eos_token))
    ends = [end, *_as_list(model.generation_config.eos_token_id if model.generation_config else None)]
    ends += _as_list(model.config.eos_token_id)
    model.config.eos_token_id = end
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=list(dict.fromkeys(ends)),
        pad_token_id=model.config.pad_token_id,
    )


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def check_saved(shapes: dict[str, list[int]], folder: Path) -> None:
    """Every parameter stands in the saved files with its shape and finite values; RuntimeError otherwise.

    `shapes` by name as before any sharding; a tied parameter is listed, and saved, once.
    """
    from safetensors import safe_open

    saved: dict[str, list[int]] = {}
    for path in safetensors_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                tensor = file.get_tensor(name)
                saved[name] = list(tensor.shape)
                if not torch.isfinite(tensor).all():
                    raise RuntimeError(f"{folder}: {name} has values that are not finite: training diverged")
    for name, shape in shapes.items():
        if saved.get(name) != shape:
            raise RuntimeError(f"{folder}: {name} was saved as {saved.get(name)}, wanted {shape}")


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: those of the index, or every .safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


def build_model(
    parameters: dict[str, Any], *, vocab_size: int, token_ids: dict[str, int], attn_implementation: str
) -> PreTrainedModel:
    """A freshly initialised SmolLM3 from configuration keys; Refusal where the configuration refuses them."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    attention.register()
    try:
        known = SmolLM3Config()
        for key in parameters:
            if not hasattr(known, key):
                raise Refusal(f"model.{key}: SmolLM3Config has no such key; see its documentation")
        config = SmolLM3Config(vocab_size=vocab_size, **token_ids, **parameters)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise Refusal(f"model: {str(error).strip().splitlines()[0]}; mend the recipe") from None
    config._attn_implementation = attn_implementation
    return SmolLM3ForCausalLM(config)
