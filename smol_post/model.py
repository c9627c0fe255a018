"""Load, build and check weights; RoPE theta; rows for new tokens. The only loader of models.

RoPE frequencies are computed when a model is built, so theta is set in the configuration before that and then
checked on the live model: editing `model.config` afterwards would train with the old theta and save the new
one.
"""

import ctypes
import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
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

from smol_post import attention, manifest
from smol_post.refusal import Refusal, describe
from smol_post.trust import check_checkpoint
from smol_post.vocabulary import token_id

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads")  # fmt: skip
# What transformers raises over a config.json that is none.
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    StrictDataclassError,
)
logging.disable_progress_bar()  # of transformers; progress is ours to show
if not torch.cuda.is_available():  # else DeepSpeed looks for a GPU and says so at every start
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def use_threads(number: int | None) -> None:
    """CPU threads of this process; with one, small models are fast and sums come out alike everywhere."""
    if number is not None:
        torch.set_num_threads(number)


def return_freed_memory(lm: torch.nn.Module) -> None:
    """Let a process that trains on a Linux CPU give freed large blocks back, if the model is not tiny.

    glibc keeps blocks of up to 32 MiB, cut up by what is allocated in between: 135M parameters at 4,096
    tokens with checkpointing took twice what was in use (5.2 GB, not 2.4). Each block from 1 MiB on is mapped
    by itself instead, which costs time; a model below 64 MiB (our choice) has little to give back.
    """
    large = sum(one.nbytes for one in lm.parameters()) >= 2**26
    if large and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def load_model(
    folder: Path,
    *,
    attn_implementation: str,
    dtype: torch.dtype = torch.float32,
    rope_theta: float | None = None,
    max_position_embeddings: int | None = None,
    trust_remote_code: bool = False,
    **quantized: Any,
) -> PreTrainedModel:
    """The checkpoint in `folder` as a causal language model, in `dtype` (float32 to train: master weights).

    `quantized`: how else transformers is to hold its linear layers, and where; see `adapters.quantization`.

    `rope_theta` and `max_position_embeddings` replace the checkpoint's before the model is built; the live
    frequencies are then held against the configuration. Raises Refusal where the folder is no checkpoint, a
    weight is missing or not finite, or the model keeps its RoPE elsewhere, and as `check_checkpoint` does.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    safetensors_files(folder)
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
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that the next lines name them
            **quantized,
        )
    except (OSError, ValueError, SafetensorError) as error:
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
    check_finite(model, folder)
    check_rope(model)
    return model


def check_finite(model: PreTrainedModel, folder: Path) -> None:
    """Refusal where a tensor of a loaded checkpoint holds NaN or infinity: the first loss would be NaN.

    By sums, which those pass through: one reading of the weights, and no copy of them.
    """
    for name, tensor in model.named_parameters():
        if (
            tensor.is_meta
            or not tensor.is_floating_point()
            or tensor.detach().sum(dtype=torch.float32).isfinite()
        ):
            continue
        if number := int((~tensor.isfinite()).sum()):
            raise Refusal(
                f"{folder}: {name}: found {number:,} of {tensor.numel():,} values that are NaN or infinite, "
                "wanted finite weights; take a checkpoint from before training diverged"
            )


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """config.json of a checkpoint; Refusal where it is missing, unreadable or not to be trusted."""
    check_checkpoint(folder, trust_remote_code=trust_remote_code)
    if not (folder / "config.json").is_file():
        raise Refusal(f"{folder}: no config.json, so no Hugging Face checkpoint; mend the parent")
    tree = manifest.read_json(folder / "config.json", remedy="mend the parent")
    for key in _SIZES:
        if (size := tree.get(key)) is not None and not (isinstance(size, int) and size > 0):
            raise Refusal(
                f"{folder / 'config.json'}: {key}: found {describe(size)}, wanted a whole number above 0; "
                "mend the parent"
            )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _UNREADABLE as error:
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


def yarn_frequencies(config: PreTrainedConfig, *, context: int) -> tuple[torch.Tensor, float]:
    """What YaRN makes of the RoPE of `config`, trained at `max_position_embeddings`, for `context` tokens.

    Inverse frequencies, shape (D / 2,), and the factor on cos and sin. A frequency that turns at least 32
    times in the trained length stays, one that turns less than once is divided by s = context / trained, and
    the others pass from one to the other, evenly over whole dimensions:

        D 16, theta 5e6, 512 tokens:  turns 81, 12, 1.7, 0.25, ...  32 and 1 turns: dimensions 0.5 and 2.3
        -> kept 1, 2/3, 1/3, 0, ...   times s = 2:  f0, 5/6 f1, 2/3 f2, 1/2 f3, ...   factor 1.0693

    Source: YaRN (Peng et al., 2023): NTK-by-parts with alpha 1 and beta 32, and 0.1 ln(s) + 1. Over
    dimensions, as in its authors' code and every library; the paper's ramp runs over turns.
    """
    plain, trained = inverse_frequencies(config), config.max_position_embeddings
    scale, num_pairs = context / trained, len(plain)
    low, high = (
        num_pairs * math.log(trained / (turns * 2 * math.pi)) / math.log(config.rope_parameters["rope_theta"])
        for turns in (32, 1)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * num_pairs - 1)
    kept = 1 - ((torch.arange(num_pairs) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (kept + (1 - kept) / scale), 0.1 * math.log(scale) + 1


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The modules that a configuration builds, their tensors without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def use_yarn(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Build the RoPE of `model` anew from `config`, its own with YaRN, in place.

    RuntimeError where frequencies or factor are not `yarn_frequencies` of the model's own configuration: what
    `config` leaves out is taken from nowhere else.
    """
    wanted, factor = yarn_frequencies(model.config, context=config.max_position_embeddings)
    names = [name for name, buffer in model.named_buffers() if name.endswith(".inv_freq")]
    if not names:
        raise RuntimeError(f"{type(model).__name__}: found no inv_freq, so its RoPE cannot be checked")
    for name in names:
        place = name.rpartition(".")[0]
        built: Any = type(model.get_submodule(place))(config)
        live = built.inv_freq.float()
        if (
            live.shape != wanted.shape
            or not torch.allclose(live, wanted, rtol=1e-5, atol=0)
            or not math.isclose(built.attention_scaling, factor, rel_tol=1e-5)
        ):
            raise RuntimeError(
                f"{name}: live RoPE frequencies ({live[1]:.3e}, ...) and factor "
                f"{built.attention_scaling:.4f} are not YaRN's ({wanted[1]:.3e}, ...), {factor:.4f}"
            )
        model.set_submodule(place, built.to(model.device))
    model.config.update({key: getattr(config, key) for key in ("rope_parameters", "max_position_embeddings")})


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
    """Every parameter stands in the saved files in float32, with its shape and finite values, and no other.

    `shapes` by name as before any sharding; a tied parameter is listed, and saved, once. RuntimeError
    otherwise.
    """
    from safetensors import safe_open

    saved: dict[str, list[int]] = {}
    for path in safetensors_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                tensor = file.get_tensor(name)
                saved[name] = list(tensor.shape)
                if tensor.dtype != torch.float32:
                    raise RuntimeError(f"{folder}: {name} was saved as {tensor.dtype}, wanted torch.float32")
                if not torch.isfinite(tensor).all():
                    raise RuntimeError(f"{folder}: {name} has values that are not finite: training diverged")
    for name in shapes | saved:
        if saved.get(name) != shapes.get(name):
            found, wanted = saved.get(name), shapes.get(name)
            raise RuntimeError(f"{folder}: {name} was saved as {found}, wanted {wanted}")


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: those of the index, or every .safetensors.

    Refusal where there are none, or the index names a file that does not lie in the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if found := sorted(folder.glob("*.safetensors")):
            return found
        raise Refusal(
            f"{folder}: found no .safetensors, wanted the weights in that form; convert or add them"
        )
    remedy = "mend the checkpoint"
    found = manifest.read_json(index, remedy=remedy, wanted={"weight_map": dict[str, str]})
    names = sorted(set(found["weight_map"].values()))
    for name in names:
        if name != Path(name).name or not (folder / name).is_file():
            raise Refusal(f"{index}: found '{name}', wanted a file of {folder}; {remedy}")
    return [folder / name for name in names]


def build_model(
    parameters: dict[str, Any], *, vocab_size: int, token_ids: dict[str, int], attn_implementation: str
) -> PreTrainedModel:
    """A freshly initialised SmolLM3 from configuration keys; Refusal where the configuration refuses them."""
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
