"""LoRA and QLoRA: adapters on a frozen parent, trained by the same trainers, merged at the end.

    parent, frozen   load_in_4bit: its linear layers in NF4
      | add_adapters     PeftModel: matrices of low rank, rows of new tokens, modules_to_save
      v training         adapter/ in the run directory, a plain peft adapter
    parent, loaded anew in float32 --merge--> the checkpoint, of a full run's names and shapes

The merge is into the parent's own weights: what carries no adapter is the parent's bit for bit, however
training kept it. Of QLoRA this is a choice. What was trained is NF4(W) + BA, and the checkpoint W + BA,
without the rounding error NF4(W) - W, for which BA may have learned to make up in part. Merged into NF4(W),
it would be the trained function, and every weight in it would keep that error, as would every soup and merge
made of it. The adapter is kept for those who want the other.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, is_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import align_special_tokens

from smol_post.config import ApoRecipe, Peft, SftRecipe
from smol_post.refusal import Refusal

ADAPTER = "adapter"  # in a run directory; no part of its digest, since the merged weights are


def start(
    load: Callable[..., PreTrainedModel], recipe: SftRecipe | ApoRecipe, *, new_ids: list[int]
) -> PreTrainedModel:
    """What is trained: the model that `load` gives, with adapters (and quantised) where the recipe asks."""
    if recipe.peft is None:
        return load()
    in_4bit = quantization(bf16=bool(recipe.trainer.get("bf16"))) if recipe.peft.load_in_4bit else {}
    return add_adapters(load(**in_4bit), recipe.peft, new_ids=new_ids, seed=recipe.seed)


def quantization(*, bf16: bool) -> dict[str, Any]:
    """How `load_model` is to quantise: linear layers but the head, on the device of this process.

    NF4 with quantised constants, 4.1 bits a weight, products in bfloat16 where training rounds to that.
    Source: QLoRA (arXiv:2305.14314), section 3. Refusal without a GPU: on a CPU bitsandbytes 0.50 may round
    its weights anew, to bfloat16, in any forward pass without gradients, and keep them so.
    """
    if (device := PartialState().device) is None or device.type == "cpu":
        raise Refusal("peft.load_in_4bit: found no GPU, which it is for; remove it, or run where one is")
    numbers = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    return {"quantization_config": numbers, "device_map": {"": device}}


def add_adapters(lm: PreTrainedModel, block: Peft, *, new_ids: list[int], seed: int) -> PreTrainedModel:
    """A PeftModel around `lm`, which is frozen and at first computes the same.

    Rows of `new_ids` are trained, in the embedding and, where it is not tied to that, in the head, unless
    modules_to_save has all rows. Raises Refusal where a name of the block fits no module, or where embedding
    or head would get a matrix of low rank: to our losses the head is a plain matrix, which may be tied.
    """
    from peft import LoraConfig, get_peft_model

    names = [name for name, _ in lm.named_modules()]
    ends = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    embedding, head = (next(name for name, one in lm.named_modules() if one is end) for end in ends)
    for name in block.modules_to_save:
        if not any(one.endswith(name) for one in names):
            raise Refusal(
                f"peft.modules_to_save: the model has no module '{name}', such as {embedding}; mend it"
            )
    tied = lm.config.tie_word_embeddings
    whole = {end for end in (embedding, head) if any(map(end.endswith, block.modules_to_save))}
    single = set[str]() if tied and whole else {embedding} if tied else {embedding, head} - whole
    config = LoraConfig(
        task_type="CAUSAL_LM",
        trainable_token_indices={end: new_ids for end in sorted(single)} if new_ids and single else None,
        ensure_weight_tying=bool(tied and whole),
        **block.model_dump(exclude={"modules_to_save", "load_in_4bit"}),
        modules_to_save=list(block.modules_to_save) or None,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted: Any = get_peft_model(lm, config)
    except (TypeError, ValueError) as error:
        raise Refusal(f"peft: {str(error).splitlines()[0]}; mend the block") from None
    found = adapted.base_model.targeted_module_names
    for name in block.target_modules if isinstance(block.target_modules, list) else []:
        if not any(f".{one}".endswith(f".{name}") for one in found):
            raise Refusal(
                f"peft.target_modules: the model has no module '{name}', such as {found[0]}; mend it"
            )
    if {embedding, head} & set(found):
        raise Refusal(
            "peft.target_modules: embedding and head take no matrices of low rank here; to train them, put "
            f"{embedding} into modules_to_save"
        )
    # else peft saves the whole embedding where tokens were added, and TRL rounds what is trained to bfloat16
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    adapted.is_loaded_in_4bit = False
    return adapted


def describe(lm: PreTrainedModel) -> str:
    """How many parameters are trained, and their share, as one line for a person."""
    trained, every = cast(Any, lm).get_nb_trainable_parameters()
    return f"adapter: {trained:,} of {every:,} parameters are trained ({trained / every:.2%})"


def off(lm: Any) -> contextlib.AbstractContextManager[None]:
    """`lm` as its parent for a while: adapters, trained rows and modules_to_save disabled."""
    return lm.disable_adapter() if is_peft_model(lm) else contextlib.nullcontext()


def check_engine(accelerator: Any, lm: Any) -> None:
    """Refuse engines under which a PeftModel was not seen to end in the right weights."""
    zero = getattr(accelerator.state.deepspeed_plugin, "zero_stage", None)
    if zero == 3:
        raise Refusal(
            "peft: not with ZeRO-3, which would part the parent at the merge; take ddp, fsdp2 or zero2"
        )
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    if fsdp and any(one.requires_grad and "lora_" not in name for name, one in lm.named_parameters()):
        raise Refusal(
            "peft: FSDP takes neither new tokens nor modules_to_save with it; launch with ddp or zero2"
        )
    if lm.get_base_model().__dict__.get("is_loaded_in_4bit") and accelerator.distributed_type in (
        DistributedType.FSDP, DistributedType.DEEPSPEED,
    ):  # fmt: skip
        raise Refusal("peft.load_in_4bit: not with FSDP or ZeRO; launch with ddp, or remove it")


def save_merged(
    parent: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: Path
) -> dict[str, list[int]]:
    """Write `parent` with the adapter of a run merged, as a run without adapters would; names and shapes."""
    shapes = {name: list(parameter.shape) for name, parameter in parent.named_parameters()}
    merged = merge(parent, run_dir / ADAPTER)
    align_special_tokens(merged, tokenizer)  # as the Trainer does to what it trains
    merged.save_pretrained(run_dir)
    (run_dir / ADAPTER / "training_args.bin").unlink()
    return shapes


def merge(parent: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`parent` (float32, and changed in place) with the adapter in `folder` merged; a plain model again.

    W + s BA, s = lora_alpha / r (/ sqrt(r)), in float32; rows of new tokens and modules_to_save replace the
    parent's. RuntimeError where the files lack a part of the adapter, of which peft only warns.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    adapted = PeftModel.from_pretrained(parent, folder)
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    saved = load_file(folder / "adapter_model.safetensors")
    if wanted.keys() != saved.keys():
        raise RuntimeError(f"{folder}: not the whole adapter: {min(wanted.keys() ^ saved.keys())}")
    return adapted.merge_and_unload()  # type: ignore[return-value]
