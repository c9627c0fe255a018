"""A trainer about to begin, rehearsed: what it would do is looked at, and no trace is left.

    trainer (model wrapped, optimiser made), Prepared
      | undisturbed   dropout off; random states, modes, gradients and tallies put back in the end
      | Rehearsal     rows as the loader reads them and as they are stored; losses, hidden states, gradients
      v rehearse      each proof on it: {"level": "quick", "step": 0, "proofs": [{"name": ...}, ...], ...}

What is proved stands in `proofs`.
"""

import contextlib
import copy
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object, is_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from smol_post import manifest
from smol_post.config import Training
from smol_post.data import Prepared
from smol_post.documents import MODES
from smol_post.mixture import Pool
from smol_post.trainers import PairTrainer

_FIRST_ROWS = 64  # of the data set, from which small batches are chosen
_KEPT = ("tally", "addresses", "grad_norm", "learning_rate", "_metrics", "_total_train_tokens",
         "num_chosen_tokens", "micro_batch_tokens", "current_gradient_accumulation_steps")  # fmt: skip


@contextlib.contextmanager
def undisturbed(trainer: Any) -> Iterator[None]:
    """Let a trainer compute without dropout, and leave everything in and around it as it was.

    Layers that recompute their activations stay in training mode: only there they do.
    """
    model, accelerator = trainer.model_wrapped, trainer.accelerator
    modes = [(module, module.training) for module in model.modules()]
    kept = {name: trainer.__dict__[name] for name in _KEPT if name in trainer.__dict__}
    loaders, syncs = list(accelerator._dataloaders), accelerator.gradient_state.sync_gradients
    device = torch if accelerator.device.type == "cpu" else getattr(torch, accelerator.device.type)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), device.get_rng_state()
    trainer.__dict__ |= copy.deepcopy(kept) | {"tally": defaultdict(int), "num_chosen_tokens": 1}
    model.train = lambda mode=True: model  # training_step would switch dropout on
    for module, _ in modes:
        module.training = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    try:
        yield
    finally:
        del model.train
        for module, mode in modes:
            module.training = mode
        shard(model)
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            model.zero_grad()
        for name in _KEPT:
            trainer.__dict__.pop(name, None)
        trainer.__dict__ |= kept
        accelerator._dataloaders[:] = loaders
        accelerator.gradient_state._set_sync_gradients(syncs)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        device.set_rng_state(states[3])


def shard(model: torch.nn.Module) -> None:
    """Let FSDP2 part its weights: a forward pass without a backward leaves some whole, without gradients."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def rounded(accelerator: Any) -> bool:
    """Whether products are taken to fewer bits than float32 has: under autocast, or as TF32."""
    tf32 = torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")
    return tf32 or accelerator.mixed_precision != "no"


class Found(NamedTuple):
    """What a proof found and wanted, whether that is good enough, and if not, whether others would crash."""

    found: dict[str, Any]
    wanted: dict[str, Any]
    holds: bool
    fatal: bool = False


class NotRun(Exception):
    """Why a proof can say nothing about this run."""


class Piece(NamedTuple):
    """A document of a pack as it is stored: its mode, how many of its tokens carry loss, its ids."""

    mode: str
    num_trained: int
    ids: np.ndarray


class Rehearsal:
    """A trainer, what preparation stored for it, and ways to look at both; to be used `undisturbed`."""

    def __init__(self, trainer: Any, prepared: Prepared, recipe: Training) -> None:
        """`rows`: of the first packs those with most documents, then the shortest; alike on all processes."""
        self.trainer, self.prepared, self.recipe = trainer, prepared, recipe
        self.full = recipe.verify == "full"
        self.accelerator, self.model = trainer.accelerator, trainer.model_wrapped
        lm = self.accelerator.unwrap_model(self.model)
        self.lm = lm.get_base_model() if is_peft_model(lm) else lm
        embedding = self.lm.get_input_embeddings()
        self.embedding = getattr(embedding, "original_module", embedding)  # inside what peft puts around it
        self.pairs, self.parts = isinstance(trainer, PairTrainer), trainer.parts
        # processes that share sequences have one share of the batch, as one process else
        self.num_shares = self.accelerator.num_processes // self.parts.size
        self.share = self.accelerator.process_index // self.parts.size
        self.size = trainer.args.per_device_train_batch_size  # of pairs: this process's part of the batch
        self.isolated = getattr(recipe, "packing", "bfd") != "wrapped_cross_document"
        self.zero = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.rounded = rounded(self.accelerator)
        self.trl_loss = not self.pairs and trainer.trl_loss
        self.loader = trainer.get_train_dataloader()
        self.pool = Pool.of(prepared.stores)
        self.bases = np.cumsum([0, *(len(store.tokens) for store in prepared.stores)])
        number = min(max(_FIRST_ROWS, 2 * self.num_shares), len(prepared.dataset))
        self.lengths: list[list[int]] = prepared.index[:number]["length"]
        self.rows = sorted(range(number), key=lambda row: (-len(self.lengths[row]), sum(self.lengths[row])))

    def read(self, row: int) -> dict[str, Any]:
        """A row as the trainer's loader reads it."""
        return dict(self.loader.dataset[row])

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch as the trainer's loader makes it, on its device."""
        return self.trainer._prepare_inputs(self.loader.collate_fn(list(rows)))

    def first_batches(self, num_updates: int) -> list[list[int]]:
        """The rows of this process's first batches, in the order of training."""
        number = num_updates * self.trainer.args.gradient_accumulation_steps
        return list(islice(iter(self.loader.batch_sampler), number))

    def small_batches(self) -> list[list[int]]:
        """Some of `rows`: two, or eight times two if full; one by one where a micro-batch holds no two."""
        chosen = self.rows[: 16 if self.full else 2]
        size = min(2, self.size)
        if self.pairs and 2 * max(sum(self.lengths[row]) for row in chosen) > self.trainer.micro_batch_tokens:
            size = 1
        return [chosen[at : at + size] for at in range(0, len(chosen), size)]

    def pieces(self, row: int) -> Iterator[Piece]:
        """The documents of a pack as the stores hold them.

        What is trained: of a whole document as its record says, of a part as its stored tokens say.
        """
        entry, pool = self.prepared.index[row], self.pool
        for number, (address, length) in enumerate(zip(entry["address"], entry["length"], strict=True)):
            at = int(np.searchsorted(pool.address, address, side="right")) - 1
            begin = address - int(self.bases[pool.source[at]])
            stored = np.asarray(self.prepared.stores[pool.source[at]].tokens[begin : begin + length])
            if (address, length) == (pool.address[at], pool.length[at]):
                trained, first = int(pool.num_trained[at]), bool(pool.trains_first[at])
            else:
                trained, first = int((stored[1:] >= 0).sum()), bool(stored[0] >= 0)
            trained += first and number > 0 and not self.isolated
            yield Piece(MODES[pool.mode[at]], trained, np.where(stored < 0, ~stored, stored))

    @torch.no_grad()
    def loss(self, batch: dict[str, Any], items: Any = 1) -> float:
        """The loss of a batch as training computes it; `items` are the trained tokens of the global batch."""
        loss = self.trainer.compute_loss(self.model, batch, num_items_in_batch=torch.as_tensor(items))
        return self.parts.total(float(loss)) / self.parts.size

    @torch.no_grad()
    def summed(self, batch: dict[str, Any]) -> float:
        """The sum of a batch's losses."""
        return self.parts.total(float(self.trainer.sums(self.model, batch)[0]))

    def hidden_states(self, batch: dict[str, Any]) -> torch.Tensor:
        """The last hidden states (T, D) behind that loss; a logit is a function of those of its position.

        Of a split sequence those of this process's part.
        """
        seen: list[Any] = []
        with self.lm.base_model.register_forward_hook(lambda *call: seen.append(call[-1])):
            self.loss(batch)
        return seen[0].last_hidden_state[0].float()

    def step(self, micro_batches: Sequence[dict[str, Any]]) -> float:
        """Forward and backward passes of one step as the Trainer makes them; the loss of this process.

        Gradients are added to those there are. Under ZeRO forward passes alone.
        """
        trainer, number, total = self.trainer, len(micro_batches), 0.0
        samples, items = trainer.get_batch_samples(iter(micro_batches), number, trainer.args.device)
        if self.zero:
            return sum(self.loss(batch, items) for batch in samples)
        trainer.current_gradient_accumulation_steps = number
        for at, batch in enumerate(samples, 1):
            self.accelerator.gradient_state._set_sync_gradients(at == number)
            with contextlib.nullcontext() if at == number else self.accelerator.no_sync(model=self.model):
                total += float(trainer.training_step(self.model, batch, items))
        return self.parts.total(total) / self.parts.size

    def decay(self) -> dict[int, float]:
        """Weight decay of parameters, by their ids, in the groups of the real optimiser."""
        groups = self.trainer.optimizer.param_groups
        parts = [group["params"] for group in groups]
        if self.zero:  # which has flattened these, and keeps what they were
            inner = self.model.optimizer
            parts = getattr(inner, "fp16_groups", None) or inner.bit16_groups
            groups = [groups[at] for at in getattr(inner, "sub_group_to_group_id", range(len(parts)))]
        pairs = zip(groups, parts, strict=True)
        return {id(one): group["weight_decay"] for group, part in pairs for one in part}

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that are trained."""
        return [one for one in self.lm.parameters() if one.requires_grad]

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients, in place."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor

    def gradient_norm(self) -> float:
        """Euclidean norm over all gradients."""
        norm = torch.nn.utils.get_total_norm([one.grad for one in self.parameters() if one.grad is not None])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


Proof = Callable[[Rehearsal], Found]


def rehearse(
    proofs: Sequence[Proof], trainer: Any, prepared: Prepared, *, recipe: Training
) -> dict[str, Any]:
    """Each proof "passed", "failed" or "not run", for a reason; of processes, the first where it failed.

    `recipe.verify` is the level. What fails fatally is the last.
    """
    started, results, accelerator = time.monotonic(), list[dict[str, Any]](), trainer.accelerator
    with undisturbed(trainer):
        look = Rehearsal(trainer, prepared, recipe)
        for proof in proofs:
            mine = {
                "name": getattr(proof, "__name__", "").replace("_", " "),
                "process": accelerator.process_index,
            }
            everyone = gather_object([mine | _result(proof, look)])
            shard(look.model)
            results.append(next((one for one in everyone if one["status"] == "failed"), everyone[0]))
            if results[-1].pop("fatal"):
                break
    return {
        "level": recipe.verify,
        "step": trainer.state.global_step,
        "data": prepared.ledger["fingerprint"],
        "num_processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "time": manifest.now(),
        "seconds": round(time.monotonic() - started, 2),
        "proofs": results,
    }


def _result(proof: Proof, look: Rehearsal) -> dict[str, Any]:
    started, fatal = time.monotonic(), False
    result: dict[str, Any]
    try:
        found, wanted, holds, fatal = proof(look)
        result = {"status": "passed" if holds else "failed", "found": found, "wanted": wanted}
        fatal = fatal and not holds
    except NotRun as reason:
        result = {"status": "not run", "reason": str(reason)}
    except (ValueError, IndexError, RuntimeError) as error:
        if look.accelerator.num_processes > 1 or isinstance(error, torch.OutOfMemoryError):
            raise  # other processes may wait for this one
        result = {"status": "failed", "found": f"{type(error).__name__}: {error}", "wanted": "no error"}
    return {**result, "fatal": fatal, "seconds": round(time.monotonic() - started, 3)}
