"""TRL's trainers on flat rows of token ids: losses that do not depend on how a batch is cut, and their tally.

    packs  loss = sum over trained tokens of -log p / trained tokens of the global batch
    pairs  loss = sum over pairs of l(log-ratio of chosen, of rejected) / pairs of the global batch

The head runs inside the model's own forward, on trained positions only, so wrappers (DDP, FSDP2, ZeRO, PEFT,
autocast) see what they always see, and full logits never exist.
"""

import contextlib
import dataclasses
import functools
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import accelerate.optimizer
import torch
from accelerate.utils import DistributedType, gather_object, is_peft_model
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import maybe_gather_lm_head_ctx

from smol_post import adapters, batches, losses
from smol_post.batches import Batch
from smol_post.data import IGNORED
from smol_post.refusal import Refusal
from smol_post.sequence import Parts

# So many logits (4 MiB in float32) are computed at once, gradients by torch: fewer operations. Our choice,
# measured on a CPU: a quarter off the head's time at 46 x 768, nothing at 100 x 8,192.
FEW_LOGITS = 2**20
# accelerate asks twice a step whether an optimiser is installed, and searches sys.path for it each time.
accelerate.optimizer.is_lomo_available = functools.cache(accelerate.optimizer.is_lomo_available)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def add_scoring(lm: PreTrainedModel) -> None:
    """Let lm(..., scored_labels=labels_BT) return the scores of trained tokens instead of logits (in place).

    reduction "sum": minus the sum of their log-probabilities, a scalar; "none": each of them, (N,), in order.
    labels are unshifted: position t is scored against label t + 1, where that is not IGNORED; there may be
    one more of them than of ids. Raises Refusal where the head is more than a matrix.
    """
    lm = lm.get_base_model() if is_peft_model(lm) else lm  # pyright: ignore[reportCallIssue]
    if getattr(lm, "scores_labels", False):
        return
    head, config = lm.get_output_embeddings(), lm.config
    scales = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    odd = [name for name in scales if getattr(config, name, None) not in (None, 1, 1.0)]
    if odd or head is None or getattr(head, "bias", None) is not None:
        found = odd[0] if odd else "a bias" if head is not None else "no weight"
        raise Refusal(
            f"{config.model_type}: the head has {found}, wanted a plain matrix; train another model"
        )
    forward = lm.forward

    @functools.wraps(type(lm).forward)  # generate() reads the signature
    def scoring_forward(
        self: Any, *args: Any, scored_labels: Any = None, reduction: str = "sum", **kwargs: Any
    ) -> Any:
        if scored_labels is None:
            return forward(*args, **kwargs)
        labels_BT = scored_labels[:, 1:]
        hidden_BTD = self.base_model(*args, **kwargs).last_hidden_state[:, : labels_BT.shape[1]]
        trained_BT = labels_BT != IGNORED
        weight_VD = self.get_output_embeddings().weight  # looked up each time: wrappers replace it
        if isinstance(weight_VD, DTensor):
            # each process has the gradient of its own tokens: to be averaged, not taken for everyone's
            average = [Partial("avg")] * weight_VD.device_mesh.ndim
            weight_VD = weight_VD.full_tensor(grad_placements=average)
        given = hidden_BTD[trained_BT], weight_VD, labels_BT[trained_BT]
        partitioned = hasattr(weight_VD, "ds_id")  # by ZeRO-3: whole here, but not in the backward pass
        whole = maybe_gather_lm_head_ctx(weight_VD) if partitioned else contextlib.nullcontext()  # type: ignore[arg-type]
        with whole:
            if reduction == "none":
                return losses.token_log_probs(*given)
            few = len(given[-1]) * len(weight_VD) <= FEW_LOGITS
            if few and not partitioned:
                return -losses.token_log_probs(*given).sum()
            return losses.summed_cross_entropy(*given)

    lm.forward = types.MethodType(scoring_forward, lm)
    lm.scores_labels = True  # pyright: ignore[reportArgumentType]


class Exact:
    """What both trainers share: undecayed embeddings, and a tally of every step.

    `tally` holds what this process has added up over the optimiser step under way: the loss (as the Trainer
    means it: averaged over processes it is the loss of the global batch), tokens, trained tokens, of pairs
    sums of their rewards; `addresses` those of the documents. `gauges` tells trackers more than TRL does.
    Processes that share sequences (`parts`) get the same rows, and the first of them tallies those.
    """

    loss_is_scaled_for_ga = True  # every loss is divided by what the global batch has
    tally: defaultdict[str, Any]
    parts: Parts
    grad_norm: Any = None
    learning_rate: float = 0.0
    gauges: Callable[[], dict[str, float]] = dict

    def __init__(self, *args: Any, model: PreTrainedModel, num_parts: int = 1, **kwargs: Any) -> None:
        """`model` gets its scoring forward before anything wraps it."""
        self.tally, self.addresses = defaultdict(int), list[int]()
        add_scoring(model)
        super().__init__(*args, model=model, **kwargs)  # pyright: ignore[reportCallIssue]
        self.parts = Parts(num_parts)

    def get_train_dataloader(self) -> Any:
        """TRL's, with the same rows for all processes that share a sequence."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        if self.parts.size > 1:
            shard = loader.batch_sampler  # accelerate's: every num_processes-th batch, from process_index on
            shard.num_processes //= self.parts.size
            shard.process_index //= self.parts.size
        return loader

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """TRL's; after a checkpoint of the last step nothing is left, where it would make one step more."""
        done = super()._init_training_state(max_steps, *args, **kwargs)  # type: ignore[misc]
        return (sys.maxsize, 0) if self.state.global_step >= max_steps else done  # type: ignore[attr-defined]

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_num_items_in_batch(*args, **kwargs)  # type: ignore[misc]
        return found if found is None or self.parts.size == 1 else found // self.parts.size  # counted by each

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator; FSDP2 is kept from summing gradients and rounding losses in bfloat16."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)  # type: ignore[attr-defined]
        if plugin and plugin.fsdp_version == 2 and plugin.mixed_precision_policy:
            exact = {"reduce_dtype": torch.float32, "output_dtype": None}
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **exact)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters in the decay group: no embedding is, nor a head tied to one."""
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        embeddings = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        embeddings |= {
            id(one) for name, one in parameters.items() if "trainable_tokens_delta" in name
        }  # rows
        return [name for name in names if id(parameters[name]) not in embeddings]

    def floating_point_ops(self, inputs: Batch) -> int:
        """As the Trainer counts them, who counts the parameters in every step: 6 a parameter and token."""
        return 6 * inputs["input_ids"].numel() * self._num_parameters // self.parts.size

    @functools.cached_property
    def _num_parameters(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)  # type: ignore[attr-defined]

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch, tallied; its part of the loss."""
        if model is self.model and "train" not in vars(model):  # type: ignore[attr-defined]
            model.train = functools.partial(_train, model)  # else every module is visited in every step
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        first = self.parts.index == 0
        self.tally["loss"] += loss
        self.tally["num_tokens"] += inputs["input_ids"].numel() * first
        self.tally["num_trained_tokens"] += sum(inputs["num_trained"]) * first
        self.addresses += inputs["address"] * first
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.learning_rate = self._get_learning_rate()  # type: ignore[attr-defined]
        return self.grad_norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model as it is loaded again: whole, in float32, each tensor once, however training shards it.

        Of adapters what is trained alone, as peft saves it.
        TRL's own way for checkpoints on the way, which engines resume from.
        """
        if _internal_call or self.accelerator.distributed_type not in SHARDED:  # type: ignore[attr-defined]
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        else:
            self._save(output_dir, state_dict=_whole_state(self.accelerator, self.model_wrapped))  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, the values of a step beside what the instruments measure."""
        if "loss" in logs:
            self._metrics["train"].pop("num_tokens", None)  # type: ignore[attr-defined]  # not kept by a resume
            logs = {**self.gauges(), **logs}
        super().log(logs, start_time)  # type: ignore[misc]


def _whole_state(accelerator: Any, model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a sharded model on the CPU of the main process; takes part in every process."""
    lm = accelerator.unwrap_model(model)
    once = dict(lm.named_parameters())
    tied = dict(lm.named_parameters(remove_duplicate=False)).keys() - once.keys()
    fsdp, adapted = accelerator.distributed_type == DistributedType.FSDP, is_peft_model(lm)
    if fsdp and not adapted:
        state = accelerator.get_state_dict(model)
        return {name: tensor for name, tensor in state.items() if name not in tied}
    state = {name: tensor for name, tensor in lm.state_dict().items() if name not in once.keys() | tied}
    for name, parameter in once.items():
        if adapted and not parameter.requires_grad:
            continue
        if fsdp:
            tensor: Any = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        else:
            from deepspeed.utils import safe_get_full_fp32_param

            tensor = safe_get_full_fp32_param(parameter)  # what the optimiser updates; the model's is rounded
        if accelerator.is_main_process:
            state[name] = tensor.detach().float().cpu()
    return state


def _train(lm: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    """The model's own `train`, where it is not in that mode already."""
    return lm if lm.training == mode else type(lm).train(lm, mode)


class PackTrainer(Exact, SFTTrainer):
    """TRL's SFT trainer on packs of our own."""

    @property
    def trl_loss(self) -> bool:
        """Whether the recipe asks for one of TRL's losses: another loss_type, or label smoothing."""
        other = getattr(self.args, "loss_type", "nll") != "nll"
        return other or self.args.label_smoothing_factor > 0

    def sums(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
        """(sum of the losses of this part, how many there are in all) of a batch: of its trained tokens."""
        return model(**batches.part_inputs(batch, self.parts)), sum(batch["num_trained"])

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed cross-entropy of the micro-batch over the trained tokens of the global batch (a scalar).

        DDP averages gradients over processes, hence the factor. TRL's own path where `trl_loss`.
        """
        if self.trl_loss:
            given = {**batches.model_inputs(inputs), "labels": inputs["labels"]}
            return super().compute_loss(model, given, return_outputs, num_items_in_batch)
        assert num_items_in_batch is not None
        return self.sums(model, inputs)[0] / num_items_in_batch * self.accelerator.num_processes


class PairTrainer(Exact, DPOTrainer):
    """TRL's DPO trainer on pairs that are token ids, without padding, its micro-batches cut by tokens.

    A batch is the whole share of this process; `training_step` cuts it. Processes agree on the number of
    micro-batches, since a sharded model talks in every forward.
    """

    def __init__(self, *args: Any, micro_batch_tokens: int, **kwargs: Any) -> None:
        """`ref_model`: the live reference; without it batches bring their `reference` log-probabilities.

        Or, where adapters are trained, the reference is the same model without them.
        """
        self.micro_batch_tokens = micro_batch_tokens
        self.num_chosen_tokens: Any = None  # of the global batch under way
        if kwargs.get("ref_model") is not None:
            add_scoring(kwargs["ref_model"])
        super().__init__(*args, **kwargs)
        lm: Any = self.model
        if "ref" in getattr(lm, "peft_config", {}):  # TRL's reference, a copy of the adapter
            lm.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of this process's share of the global batch, a micro-batch at a time."""
        parts = batches.cut(inputs, max_tokens=self.micro_batch_tokens)
        if self.accelerator.num_processes > 1:
            most = max(gather_object([len(parts)]))
            parts = batches.cut(inputs, max_tokens=self.micro_batch_tokens, at_least=most)
        if "sft" in self.loss_types:
            self.num_chosen_tokens = sum(gather_object([sum(inputs["num_trained"][::2])]))
        total = torch.zeros((), device=self.accelerator.device)
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            self.accelerator.gradient_state._set_sync_gradients(last)
            alone = last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
            with contextlib.nullcontext() if alone else self.accelerator.no_sync(model=model):
                total = total + super().training_step(model, part, num_items_in_batch)
        return total

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed losses of the micro-batch's pairs over the pairs of this process's share (a scalar)."""
        total, ratios_P2, log_probs_P2 = self._score(model, inputs)
        rewards_P2 = self.beta * ratios_P2.detach()
        for side, name in enumerate(("chosen", "rejected")):
            self.tally[f"rewards/{name}"] += rewards_P2[:, side].sum()
            self.tally[f"logps/{name}"] += log_probs_P2[:, side].detach().sum()
        self.tally["rewards/accuracies"] += (rewards_P2[:, 0] > rewards_P2[:, 1]).sum()
        self.tally["rewards/margins"] += (rewards_P2[:, 0] - rewards_P2[:, 1]).sum()
        self.tally["num_pairs"] += len(rewards_P2)
        return total / self.args.per_device_train_batch_size

    def sums(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
        """(sum of the losses, how many there are) of a batch: of its pairs."""
        return self._score(model, batch)[0], len(batch["seq_lengths"]) // 2

    def log_ratios(self, model: Any, batch: Batch) -> torch.Tensor:
        """log pi / pi_ref of the answers, (P, 2): chosen, rejected."""
        return self._score(model, batch)[1]

    def _score(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        log_probs_P2 = answer_log_probs(model, batch)
        if "reference" in batch:
            reference_P2 = torch.tensor(batch["reference"], device=log_probs_P2.device).view(-1, 2)
        else:
            lm = self.accelerator.unwrap_model(model) if self.ref_model is None else self.ref_model
            with torch.no_grad(), adapters.off(lm):
                reference_P2 = answer_log_probs(lm, batch)
        ratios_P2 = log_probs_P2 - reference_P2
        counts_P2 = torch.tensor(batch["num_trained"], device=ratios_P2.device).view(-1, 2)
        total = torch.zeros((), device=ratios_P2.device)
        for loss_type, weight in zip(self.loss_types, self.loss_weights, strict=True):
            each_P = losses.preference_losses(
                loss_type,
                beta=self.beta,
                chosen_P=ratios_P2[:, 0],
                rejected_P=ratios_P2[:, 1],
                chosen_tokens_P=counts_P2[:, 0],
                rejected_tokens_P=counts_P2[:, 1],
                chosen_log_probs_P=log_probs_P2[:, 0],
                num_chosen_tokens=self.num_chosen_tokens,
                num_pairs=self.args.per_device_train_batch_size * self.accelerator.num_processes,
            )
            total = total + weight * each_P.sum()
        return total, ratios_P2, log_probs_P2


def answer_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """log p of each answer given its prompt, (P, 2): chosen, rejected; summed over the answer's tokens."""
    each_N = model(**batches.model_inputs(batch), scored_labels=batch["labels"], reduction="none")
    sums = [one.sum() for one in each_N.split(batch["num_trained"])]
    return torch.stack(sums).view(-1, 2)
