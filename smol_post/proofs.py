"""Proofs before step 1, on the very model, data and launch: what a loss that falls nicely would not show.

    trainer.train()     model wrapped, optimiser made, a checkpoint loaded
      | Proofs          what the trainer does, held against what is counted or computed by hand (`rehearsal`)
      v verify.json     written first; then a proof that fails is a Refusal, and no step is made

A proof is a function whose name is the sentence it proves. The trainer's side goes through its own sampler,
collator, loss, wrapped model and optimiser. All processes take part, in the same order, and each proves it.
"""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smol_post import manifest
from smol_post.config import Training
from smol_post.data import IGNORED, Prepared
from smol_post.refusal import Refusal
from smol_post.rehearsal import Found, NotRun, Rehearsal, rehearse
from smol_post.trainers import PackTrainer, PairTrainer, answer_log_probs

# What rounding explains: in float32, and where products are rounded to 8 or 10 bits (autocast, TF32). Our
# choice; no GPU was measured. On CPUs we found 4e-7 and 2e-3 for gradients (of their norm), 1e-7 for losses
# (of themselves) and log-probabilities (nats a token); with every sum split in four, as other kernels may, 36
# layers gave 3e-6 and 2e-2 for gradients, 2e-5 and 9e-2 nats for a token.
LOSS, _LOG_PROBABILITY, _GRADIENT = (1e-4, 1e-2), (1e-3, 0.3), (1e-3, 0.1)
_FEW_TOKENS = 8  # a mean over fewer is taken as if they were so many: one token may be off by chance
AT_STEP_0 = {"apo_zero": 1.0, "apo_down": 1.0, "sigmoid": math.log(2), "hinge": 1.0}  # and ipo, by its beta
_WINDOW_TOKENS = 256  # of a document that is scored by hand
_QUICK_PAIRS = 4  # of which the log-ratios are looked at
_LOW_BITS = ("4bit", "8bit", "bnb", "anyprecision")  # names of optimisers that want less than float32


class Verified(Exception):
    """Every proof holds and no step was asked for; ends `trainer.train()`."""


def head_and_embedding_are_tied_as_the_config_says(look: Rehearsal) -> Found:
    """One tensor, or two; of adapters so are the rows or the copy that is trained in its place."""
    head, embedding = (
        list(one.parameters()) for one in (look.lm.get_output_embeddings(), look.lm.get_input_embeddings())
    )
    tied = len(head) == len(embedding) and all(map(_one_tensor, head, embedding))
    wanted = bool(look.lm.config.tie_word_embeddings)
    return Found({"tied": tied}, {"tied": wanted}, tied == wanted)


def _one_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    places = [(part.to_local() if isinstance(part, DTensor) else part).data_ptr() for part in (one, other)]
    return one is other or places[0] == places[1] != 0


def embeddings_are_not_decayed(look: Rehearsal) -> Found:
    """In the groups of the real optimiser, and with them heads that are tied to them, or trained rows."""
    decay = look.decay()
    rows = {name: one for name, one in look.lm.named_parameters() if "trainable_tokens_delta" in name}
    rows |= {
        name: module.weight
        for name, module in look.lm.named_modules()
        if isinstance(module, torch.nn.Embedding) and module.weight.requires_grad
    }
    found = {name: decay.get(id(one), "in no group") for name, one in rows.items()}
    return Found(found, dict.fromkeys(found, 0.0), not any(found.values()))


def rope_frequencies_are_those_of_theta(look: Rehearsal) -> Found:
    """Live inverse frequencies are theta^(-2i/d); theta is the recipe's, and the config's, which is saved."""
    rope = getattr(look.lm.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default" or "rope_theta" not in rope:
        raise NotRun(f"rope_type is {rope.get('rope_type')}")
    theta = getattr(look.recipe, "rope_theta", rope["rope_theta"])
    found, holds = {"config": rope["rope_theta"]}, rope["rope_theta"] == theta
    for name, buffer in look.lm.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            live = buffer.detach().cpu().double()
            exponents = torch.arange(len(live), dtype=torch.float64) / len(live)
            found[name] = float(f"{(live[1] ** (-1 / exponents[1])).item():.6g}")  # the theta it comes to
            holds = holds and torch.allclose(live, theta**-exponents, rtol=1e-5, atol=0)
    return Found(found, dict.fromkeys(found, theta), holds and len(found) > 1)


def every_id_has_a_row_in_the_embedding(look: Rehearsal) -> Found:
    """The largest id of the packs looked at (full: of all) is less than the rows; else a GPU only aborts."""
    rows = range(len(look.prepared.dataset)) if look.full else look.rows
    largest = max(int(piece.ids.max()) for row in rows for piece in look.pieces(row))
    size = look.embedding.num_embeddings
    return Found({"largest id": largest}, {"largest id": f"< {size}"}, largest < size, fatal=True)


def positions_turn_the_layers_that_the_config_names(look: Rehearsal) -> Found:
    """Without rotation, attention gives something else in a RoPE layer, and the same in a NoPE layer."""
    turns: dict[int, bool] = {}

    def again(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        angles = kwargs.get("position_embeddings")
        if angles is not None and module.layer_idx not in turns:
            none = (torch.ones_like(angles[0]), torch.zeros_like(angles[1]))  # cosine and sine of 0
            both = (
                module.forward(*args, **{**kwargs, "position_embeddings": one})[0] for one in (angles, none)
            )
            repeated, still = ((one - output[0]).abs().max() for one in both)
            turns[module.layer_idx] = bool(still > repeated)

    with contextlib.ExitStack() as hooks:
        for module in look.lm.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):  # attention, in transformers
                hooks.enter_context(module.register_forward_hook(again, with_kwargs=True))
        look.loss(look.collate([look.read(look.rows[0])]))
    if not turns:
        raise NotRun("attention of this model takes no position_embeddings")
    asked = getattr(look.lm.config, "no_rope_layers", None)
    if not asked and not all(turns.values()):
        raise NotRun("the config does not say which layers are turned, and not all are")
    asked = asked or [1] * look.lm.config.num_hidden_layers
    found, wanted = (
        {"NoPE layers": [at for at, one in enumerate(layers) if not one], "layers": len(layers)}
        for layers in ([turns[at] for at in sorted(turns)], asked)
    )
    return Found(found, wanted, found == wanted)


def trained_tokens_are_those_that_preparation_promised(look: Rehearsal) -> Found:
    """Labels of collated batches, counted by mode, against records of the stores; ids are the stored ones.

    quick: the first two global batches in the order of training; full: every row, and the ledger's sums.
    """
    size = len(look.prepared.dataset)
    mine = range(look.share, len(look.prepared.index), look.num_shares)
    trained, promised, wrong = Counter[str](), Counter[str](), list[str]()
    for rows in [[row] for row in mine if row < size] if look.full else look.first_batches(2):
        batch, stop = look.collate([look.read(row) for row in rows]), 0
        ids, labels = (batch[key].flatten().cpu().numpy() for key in ("input_ids", "labels"))
        pieces = [(row, at, piece) for row in rows for at, piece in enumerate(look.pieces(row))]
        for row, at, piece in pieces:
            start, stop = stop, stop + len(piece.ids)
            has_loss = labels[start:stop] != IGNORED
            trained[piece.mode] += int(has_loss.sum())
            promised[piece.mode] += piece.num_trained
            same = np.array_equal(ids[start:stop], piece.ids) and has_loss.sum() == piece.num_trained
            if not same or not np.array_equal(labels[start:stop][has_loss], piece.ids[has_loss]):
                wrong.append(f"row {row}, document {at}")
        if stop != len(ids):
            wrong.append(f"{len(ids)} tokens where the index has {stop}")
    found: dict[str, Any] = {"trained tokens": dict(trained), "wrong": wrong[:3]}
    wanted: dict[str, Any] = {"trained tokens": dict(promised), "wrong": []}
    if look.full:
        for piece in (one for row in mine if row >= size for one in look.pieces(row)):  # left over
            promised[piece.mode] += piece.num_trained
        shares = gather_object([promised])[:: look.parts.size]
        found["in all packs"] = dict(sum(map(Counter, shares), Counter()))
        ledger = {mode: one["num_trained_tokens"] for mode, one in look.prepared.ledger["by_mode"].items()}
        wanted["in all packs"] = dict(+Counter(ledger))
    return Found(found, wanted, found == wanted)


def documents_do_not_see_each_other(look: Rehearsal) -> Found:
    """Another first token moves later hidden states of its own document, and none of any other.

    Bit for bit, but for what the same batch moves by itself (0 where kernels repeat): shapes are the same,
    and what is masked is multiplied by an exact 0. Where documents lie is known from the index.
    """
    if not look.isolated:
        raise NotRun("packing wrapped_cross_document lets the documents of a pack see each other")
    own, others, noise, number = math.inf, 0.0, 0.0, 0
    for rows in look.small_batches():
        lengths = [length for row in rows for length in look.lengths[row]]
        long = [at for at, length in enumerate(lengths[:-1]) if length > 1] or [0]  # others come later
        at = long[0 if look.pairs else len(long) // 2]
        start, stop = sum(lengths[:at]), sum(lengths[: at + 1])
        batch = look.collate([look.read(row) for row in rows])
        ids_1T = batch["input_ids"].clone()
        different = ids_1T[ids_1T != ids_1T[0, start]]
        ids_1T[0, start] = different.min() if len(different) else 0  # the largest are new, and may be alike
        before, again, after = map(look.hidden_states, (batch, batch, {**batch, "input_ids": ids_1T}))
        moved_T, noise_T = (look.parts.join((one - before).abs().amax(-1)) for one in (after, again))
        if len(lengths) > 1 and stop - start > 1:
            number += len(lengths)
            noise = max(noise, float(noise_T.max()))
            own = min(own, float(moved_T[start + 1 : stop].max()))
            others = max(others, float(torch.cat([moved_T[:start], moved_T[stop:]]).max()))
    if not number:
        raise NotRun("the packs looked at hold one document each")
    found = {"its own document moves by": own, "others by": others, "documents": number}
    return Found(found, {"its own document moves by": "more", "others by": noise}, others <= noise < own)


@torch.no_grad()
def the_loss_is_that_of_each_document_alone(look: Rehearsal) -> Found:
    """Each document as training scores it in a packed batch, against its logits alone and labels by hand.

    Documents are cut to a window, so that full logits fit.
    """
    if look.trl_loss:
        raise NotRun("the recipe asks for another loss than minus the log-probability")
    size = max(16, min(_WINDOW_TOKENS, 2**25 // look.embedding.num_embeddings))
    worst, number = 0.0, 0
    for rows in look.small_batches():
        cut = [one for row in rows for one in _windows(look.read(row), size)]
        if look.pairs:
            found = (-answer_log_probs(look.model, look.collate([_packed(cut)]))).flatten().tolist()
        else:
            found = [look.loss(look.collate([_packed(cut, only=at)])) for at in range(len(cut))]
            found = [one / look.num_shares for one in found]
        for (ids, labels), score in zip(cut, found, strict=True):
            ids_1T = torch.from_numpy(ids)[None].to(look.accelerator.device)
            log_probs_TV = look.model(input_ids=ids_1T, use_cache=False).logits[0].float().log_softmax(-1)
            at = np.flatnonzero(labels != IGNORED)
            wanted = -float(log_probs_TV[at - 1, labels[at]].sum())
            worst, number = max(worst, abs(score - wanted) / max(len(at), _FEW_TOKENS)), number + 1
    if not number:
        raise NotRun("nothing is trained in the packs looked at")
    allowed = _LOG_PROBABILITY[look.rounded]
    return Found(
        {"nats a token": worst, "documents": number}, {"nats a token": f"<= {allowed}"}, worst <= allowed
    )


def _windows(row: dict[str, Any], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels) of the first two documents that are trained, `size` tokens around where that begins."""
    edges = np.cumsum(row["seq_lengths"])[:-1]
    parts = (np.split(np.asarray(row[key]), edges) for key in ("input_ids", "labels"))
    trained = ((ids, labels) for ids, labels in zip(*parts, strict=True) if (labels[1:] != IGNORED).any())
    for ids, labels in islice(trained, 2):
        start = max(0, int(np.argmax(labels[1:] != IGNORED)) - size // 2)
        window = labels[start : start + size].copy()
        window[0] = IGNORED
        yield ids[start : start + size], window


def _packed(cut: Sequence[tuple[np.ndarray, np.ndarray]], only: int | None = None) -> dict[str, Any]:
    """Documents (ids, labels) as a row, trained all or `only` one."""
    labels = [one if only in (None, at) else np.full_like(one, IGNORED) for at, (_, one) in enumerate(cut)]
    ids = [one for one, _ in cut]
    return {
        "input_ids": np.concatenate(ids),
        "labels": np.concatenate(labels),
        "seq_lengths": list(map(len, ids)),
    }


def accumulation_does_not_change_the_step(look: Rehearsal) -> Found:
    """One micro-batch of N gives loss and gradients of N micro-batches of one; the loss is the sum by hand.

    One cut is added to the negative gradients of the other: what is left is their difference. Where one pack
    fills a micro-batch, the first cut is N steps of one each, weighted by hand. Most labels of a second pack
    are left out, for means of means are right where packs are alike. quick: two packs or pairs; full: all
    that this process has in a global batch.
    """
    if look.zero and look.pairs:
        raise NotRun("ZeRO keeps gradients to itself, and a loss of pairs is a plain sum")
    rows = [row for batch in look.first_batches(1) for row in batch]
    if not look.full:
        first, number = 2 * look.share, min(2, len(rows))
        rows = [look.rows[at % len(look.rows)] for at in range(first, first + number)]
    read = [look.read(row) for row in rows]
    if not look.pairs and len(read) > 1:
        labels = read[1]["labels"] = np.array(read[1]["labels"])
        trained = np.flatnonzero(labels != IGNORED)
        labels[trained[len(trained) // 4 + 1 :]] = IGNORED
    singles = [look.collate([row]) for row in read]
    whole = [look.collate(read[at : at + look.size]) for at in range(0, len(read), look.size)]
    coarse, fine, total = [(1.0, whole)], singles, float(look.size)
    if look.pairs:
        fine = whole  # their trainer cuts, by its budget of tokens
    else:
        counts = gather_object([[int((one["labels"][:, 1:] != IGNORED).sum()) for one in singles]])
        each = [sum(of_shares) for of_shares in zip(*counts[:: look.parts.size], strict=True)]
        if not all(each):
            raise NotRun("a pack looked at has nothing to train")
        total = sum(each) / look.num_shares
        if look.size == 1:
            coarse = [(one / sum(each), [batch]) for one, batch in zip(each, singles, strict=True)]
    losses = [0.0]
    for weight, micro_batches in coarse:
        look.scale_gradients(1 / weight)
        losses[0] += weight * look.step(micro_batches)
        look.scale_gradients(weight)
    norm = 0.0 if look.zero else look.gradient_norm()
    look.scale_gradients(-1)
    if look.pairs:
        longest = max(sum(row["seq_lengths"]) for row in read)
        look.trainer.micro_batch_tokens = max(gather_object([longest]))
    losses.append(look.step(fine))
    apart = None if look.zero else look.gradient_norm() / norm if norm else math.inf
    by_hand = sum(map(look.summed, singles)) / total
    wanted, allowed = losses[0] if look.trl_loss else by_hand, _GRADIENT[look.rounded]
    holds = all(math.isclose(one, wanted, rel_tol=LOSS[look.rounded]) for one in losses)
    holds = holds and (apart is None or apart <= allowed)
    found = {"losses": losses, "gradients differ by": "not to be seen" if apart is None else apart}
    return Found(found, {"losses": wanted, "gradients differ by": f"<= {allowed}"}, holds)


def numbers_are_kept_in_full_precision(look: Rehearsal) -> Found:
    """Trained parameters and their gradients are float32, none is missing; so is the optimiser's state.

    Of ZeRO: the weights that its optimiser updates. Else gradients are those of the proof before, and the
    real optimiser makes a step on one parameter, with gradient and learning rate 0, which is then forgotten.
    """
    parameters = look.parameters()
    if look.zero:  # whose model may have rounded copies, and which keeps gradients to itself
        inner = look.model.optimizer
        parts = getattr(inner, "single_partition_of_fp32_groups", None) or inner.fp32_partitioned_groups_flat
        updated, full = _types(parts), {"float32": len(parts)}
        return Found({"what is updated": updated}, {"what is updated": full}, updated == full)
    types: dict[str, Any] = {"parameters": _types(parameters)}
    types["gradients"] = _types([one.grad for one in parameters])
    wanted: dict[str, Any] = {key: {"float32": len(parameters)} for key in types}
    types["state"] = wanted["state"] = _state_types(look)
    if not any(word in look.trainer.args.optim for word in _LOW_BITS):
        wanted["state"] = dict.fromkeys(types["state"], "float32")
    return Found(types, wanted, types == wanted)


def _types(tensors: Sequence[torch.Tensor | None]) -> dict[str, int]:
    return dict(Counter("missing" if one is None else _name(one) for one in tensors))


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _state_types(look: Rehearsal) -> dict[str, str]:
    """Types of what the optimiser keeps of a parameter, such as {"exp_avg": "float32"}; it ends as it was."""
    optimizer = look.trainer.optimizer.optimizer  # inside accelerate's
    if not optimizer.state:
        look.model.zero_grad()
        groups = optimizer.param_groups
        parameter = min((one for group in groups for one in group["params"]), key=torch.numel)
        parameter.grad, before = torch.zeros_like(parameter), parameter.detach().clone()
        options = [dict(group) for group in groups]
        for group in groups:
            group["lr"] = 0.0
        type(optimizer).step(optimizer)  # not the step that schedulers count
        state = dict(optimizer.state[parameter])
        optimizer.state.clear()
        for group, option in zip(groups, options, strict=True):
            group.clear()
            group.update(option)
        parameter.grad = None
        with torch.no_grad():
            parameter.copy_(before)
    else:
        state = next(iter(optimizer.state.values()))
    return {key: _name(one) for key, one in state.items() if isinstance(one, torch.Tensor)}


def preference_training_starts_at_its_reference(look: Rehearsal) -> Found:
    """At step 0 policy and reference agree: log-ratios are 0, and the loss is what it is there.

    quick: the first pairs of this process; full: all that it has in the first batch.
    """
    trainer = look.trainer
    if not look.pairs:
        raise NotRun("packs have no reference")
    if trainer.state.global_step:
        raise NotRun(
            f"step {trainer.state.global_step} is resumed; policy and reference agree at step 0 only"
        )
    rows = look.first_batches(1)[0][: None if look.full else _QUICK_PAIRS]
    ratio = per_token = loss = 0.0
    for row in rows:
        batch = look.collate([look.read(row)])
        with torch.no_grad():
            ratios = trainer.log_ratios(look.model, batch)[0].abs().tolist()
        counts = [int((part != IGNORED).sum()) for part in batch["labels"][0].split(batch["seq_lengths"])]
        ratio = max(ratio, *ratios)
        per_token = max(
            per_token, *(one / max(count, _FEW_TOKENS) for one, count in zip(ratios, counts, strict=True))
        )
        loss += look.loss(batch) * look.size / len(rows)
    known, weights = AT_STEP_0 | {"ipo": 1 / (4 * trainer.beta**2)}, trainer.loss_weights
    start = sum(
        weight * known.get(kind, math.nan) for kind, weight in zip(trainer.loss_types, weights, strict=True)
    )
    allowed = _LOG_PROBABILITY[look.rounded]
    slack = 1e-5 + trainer.beta * ratio + per_token / trainer.beta  # no loss is steeper; the latter for ipo
    found = {"log-ratio": ratio, "of a token": per_token, "loss": loss, "pairs": len(rows)}
    wanted = {"log-ratio": 0.0, "of a token": f"<= {allowed}", "loss": None if math.isnan(start) else start}
    return Found(found, wanted, per_token <= allowed and not abs(loss - start) > slack)


# Every proof, and what to do where it fails. Gradients are computed before they are looked at.
PROOFS: dict[Callable[[Rehearsal], Found], str] = {
    head_and_embedding_are_tied_as_the_config_says: "mend tie_word_embeddings in the parent's config.json",
    embeddings_are_not_decayed: "mend get_decay_parameter_names of the trainer",
    rope_frequencies_are_those_of_theta: "set theta before the model is built, as load_model does",
    every_id_has_a_row_in_the_embedding: "take the parent's own tokenizer",
    positions_turn_the_layers_that_the_config_names: "mend no_rope_layers in the parent's config.json",
    trained_tokens_are_those_that_preparation_promised: "remove the cache beside the runs; look with inspect",
    documents_do_not_see_each_other: "choose another attention, and report this one",
    the_loss_is_that_of_each_document_alone: "choose another attention, and report this one",
    accumulation_does_not_change_the_step: "report this, with verify.json",
    numbers_are_kept_in_full_precision: "load (ZeRO: update) weights in float32; for speed, set trainer.bf16",
    preference_training_starts_at_its_reference: "remove the cache beside the runs, or set reference: live",
}


class Proofs(TrainerCallback):
    """The proofs when training begins, into `verify.json`; Refusal where one fails."""

    def __init__(
        self,
        trainer: PackTrainer | PairTrainer,
        *,
        prepared: Prepared,
        recipe: Training,
        run_dir: Path,
        announce: Callable[[str], None],
        only: bool,
    ) -> None:
        """`only`: show every proof, and raise Verified where all hold; `announce` shows one line."""
        self.trainer, self.prepared, self.recipe, self.only = trainer, prepared, recipe, only
        self.path, self.announce = run_dir / manifest.VERIFY, announce

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prove, write down, then judge."""
        self.announce(f"verifying by {len(PROOFS)} proofs before step 1")
        report = rehearse(list(PROOFS), self.trainer, self.prepared, recipe=self.recipe)
        if state.is_world_process_zero:
            manifest.write_json(self.path, report)
        for one in report["proofs"] if self.only else []:
            self.announce(f"{one['status']:<8} {one['name']}: {one.get('reason') or _text(one['found'])}")
        for one, todo in zip(report["proofs"], PROOFS.values(), strict=False):
            if one["status"] == "failed":
                raise Refusal(
                    f"verify: it is not true that {one['name']}: found {_text(one['found'])}, "
                    f"wanted {_text(one['wanted'])}; {todo}"
                )
        number = Counter(one["status"] for one in report["proofs"])
        rest = f", {number['not run']} not run" if number["not run"] else ""
        self.announce(f"verified: {number['passed']} proofs in {report['seconds']:.1f} s{rest}")
        if self.only:
            raise Verified


def _text(found: Any) -> str:
    return json.dumps(found, ensure_ascii=False, default=str)
