"""Recipe -> TRL arguments in one table; trainers; fit, resume, save. TRL trains, we say exactly what."""

import math
import shutil
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from smol_post import (
    adapters,
    batches,
    data,
    disk,
    launch,
    manifest,
    model,
    proofs,
    reference,
    rehearsal,
    sequence,
)
from smol_post.config import ApoRecipe, BaseRecipe, LongContextRecipe, MidRecipe, Packed, SftRecipe, Training
from smol_post.instruments import GONE, TORN, TOTALS, Announce, Instruments, launch_of
from smol_post.refusal import Failure, Refusal
from smol_post.trainers import PackTrainer, PairTrainer, add_scoring
from smol_post.vocabulary import Vocabulary

# TRL reads a property that transformers renames; nothing a user of a recipe could do about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
# peft means the copy of an adapter that TRL makes and we remove.
warnings.filterwarnings("ignore", message=".*no tied modules were found.*", category=UserWarning)


def accumulation_steps(recipe: Training, num_processes: int) -> int:
    """How many micro-batches a process accumulates for its share of `global_batch_size`, as few as can be.

    They are alike, of at most `micro_batch_size` rows: 12 rows, 2 processes, at most 4: 2 of 3. Of pairs 1,
    since their trainer cuts the share itself. Raises Refusal where the batch does not divide.
    """
    share, rest = divmod(recipe.global_batch_size, num_processes)
    if rest:
        raise Refusal(
            f"global_batch_size: {recipe.global_batch_size} does not divide by {num_processes} processes; "
            "change one of them"
        )
    if not isinstance(recipe, Packed):
        return 1
    return share // recipe.rows_at_once(share)


def trainer_arguments(recipe: Training, *, run_dir: Path, num_processes: int) -> dict[str, Any]:
    """The one table from recipe keys to TRL's names; the recipe's `trainer:` block is laid over the defaults.

    Defaults that differ from TRL's are our choice: full precision and no activation checkpointing unless the
    recipe asks, no trackers, no checkpoints between start and end.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    defaults: dict[str, Any] = {
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "run_name": run_dir.name,
        "project": run_dir.parent.name,
        "save_strategy": "no",
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": device is not None,
        "use_cpu": device is None,
        "ddp_find_unused_parameters": False,  # every parameter is used; looking costs a walk each step
    }
    accumulated = accumulation_steps(recipe, num_processes)
    owned: dict[str, Any] = {
        "output_dir": str(run_dir / manifest.CHECKPOINTS),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "max_steps": recipe.num_steps if recipe.num_steps is not None else -1,
        "num_train_epochs": recipe.num_epochs if recipe.num_epochs is not None else 1.0,
        "per_device_train_batch_size": recipe.global_batch_size // (num_processes * accumulated),
        "gradient_accumulation_steps": accumulated,
        "max_length": None,
        "remove_unused_columns": False,  # rows are gathered when read, under names that no table has
        "save_total_limit": None,  # Instruments removes them: the Trainer would before the new one is whole
    }
    if isinstance(recipe, ApoRecipe):
        defaults["loss_type"] = ["apo_zero"]
    return {**defaults, **recipe.trainer, **owned}


PROBE_TOKENS = 256  # of the data, on which a saved checkpoint is held against the model in memory

T = TypeVar("T", PackTrainer, PairTrainer)


def train_on_packs(
    recipe: BaseRecipe | LongContextRecipe | MidRecipe | SftRecipe,
    lm: PreTrainedModel,
    words: Vocabulary,
    *,
    load: Callable[[], PreTrainedModel] | None = None,
    folder: Path,
    run_dir: Path,
    cache_dir: Path,
    num_processes: int,
    num_parts: int,
    only_verify: bool,
    pinned: Collection[str] = (),
    announce: Announce,
) -> dict[str, Any]:
    """Sources -> packs -> trained checkpoint in `run_dir`; the outcome (data ledger and metrics).

    `num_parts` processes share each sequence. `load`: where `lm` has adapters, what gives the model that they
    are merged into. Raises Refusal as `data.prepare` does.
    """
    model.use_threads(recipe.num_threads)
    arguments = trainer_arguments(recipe, run_dir=run_dir, num_processes=num_processes // num_parts)
    if num_parts > 1:
        check_split(recipe, lm, num_parts)
        announce(f"each sequence is split over {num_parts} processes; documents stay apart")
    arguments |= {"report_to": "none"} if only_verify else {}
    packs = data.prepare(recipe, words, folder=folder, cache_dir=cache_dir)
    announce(describe(packs.ledger))
    trainer = pack_trainer(lm, words.tokenizer, packs.dataset, arguments=arguments, num_parts=num_parts)
    metrics = fit(
        trainer, words.tokenizer, load=load, prepared=packs, recipe=recipe, run_dir=run_dir,
        only_verify=only_verify, pinned=pinned, announce=announce,
    )  # fmt: skip
    stores = [store.folder.name for store in packs.stores]
    return {"data": packs.ledger, "documents": stores, "metrics": metrics}


def describe(ledger: dict[str, Any]) -> str:
    """The ledger of a prepared set as one line for a person."""
    full = (
        f" in {ledger['num_packs']:,} packs, {ledger['utilisation']:.1%} full"
        if "num_packs" in ledger
        else ""
    )
    lost = [
        f", {ledger[f'num_{key}']:,} {what}"
        for key, what in (
            ("truncated_rows", "rows truncated"),
            ("turns_cut", "turns cut"),
            ("split_rows", "rows split"),
            ("dropped_rows", f"rows dropped ({ledger['dropped']})"),
            ("skipped_rows", "rows skipped"),
            ("unused", "left over by whole batches"),
        )
        if ledger.get(f"num_{key}")
    ]
    return (
        f"{ledger['num_documents']:,} documents{full}; {ledger['num_tokens']:,} tokens, "
        f"{ledger['num_trained_tokens']:,} trained{''.join(lost)}"
    )


def check_split(recipe: Training, lm: PreTrainedModel, num_parts: int) -> None:
    """Sequences can be split over so many processes; Refusal where the loss or the heads do not allow it."""
    sequence.check_heads(lm.config, num_parts)
    for key in ("loss_type", "label_smoothing_factor"):
        if recipe.trainer.get(key) not in (None, 0, 0.0, "nll"):
            raise Refusal(
                f"trainer.{key}: found {recipe.trainer[key]}, which wants whole sequences; remove it, or "
                "parallelism_config_sp_size from the launch file"
            )


def check_length(recipe: Training, parent: PreTrainedModel) -> None:
    """A pack may not be longer than the parent's context; Refusal with both numbers."""
    limit = getattr(parent.config, "max_position_embeddings", None)
    if limit is not None and recipe.max_tokens > limit:
        raise Refusal(
            f"max_tokens: found {recipe.max_tokens}, wanted at most {limit}, the parent's context; "
            "extend it first (stage long_context) or lower max_tokens"
        )


def train_on_pairs(
    recipe: ApoRecipe,
    lm: PreTrainedModel,
    live: PreTrainedModel | None,
    words: Vocabulary,
    *,
    load: Callable[[], PreTrainedModel] | None = None,
    weights: str,
    folder: Path,
    run_dir: Path,
    cache_dir: Path,
    num_processes: int,
    num_parts: int,
    only_verify: bool,
    pinned: Collection[str] = (),
    announce: Announce,
) -> dict[str, Any]:
    """Sources -> pairs -> trained checkpoint in `run_dir`; the outcome (data ledger and metrics).

    `live` is the reference, if it is to stay in memory beside `lm`; else it is cached, under `weights`, the
    digest of what `lm` was loaded from, or `lm` without its adapters. `load`: as in `train_on_packs`.
    """
    if num_parts > 1:
        raise Refusal(
            "launch file: parallelism_config_sp_size: pairs are not split over processes; launch without it"
        )
    arguments = trainer_arguments(recipe, run_dir=run_dir, num_processes=num_processes)
    arguments |= {"report_to": "none"} if only_verify else {}
    pairs = data.prepare(recipe, words, folder=folder, cache_dir=cache_dir)
    announce(describe(pairs.ledger))
    micro_batch_tokens = recipe.micro_batch_tokens or 2 * recipe.max_tokens
    trainer = pair_trainer(
        lm, live, words.tokenizer, pairs.dataset, micro_batch_tokens=micro_batch_tokens, arguments=arguments
    )
    if recipe.reference == "cached":
        pairs = reference.with_reference(
            pairs,
            lm,
            weights=weights,
            cache_dir=cache_dir,
            micro_batch_tokens=micro_batch_tokens,
            rounding=reference.rounding_of(trainer.accelerator),
            announce=announce,
        )
        trainer.train_dataset = pairs.dataset
    metrics = fit(
        trainer, words.tokenizer, load=load, prepared=pairs, recipe=recipe, run_dir=run_dir,
        only_verify=only_verify, pinned=pinned, announce=announce,
    )  # fmt: skip
    stores = [store.folder.name for store in pairs.stores]
    return {"data": pairs.ledger, "documents": stores, "metrics": metrics}


def pack_trainer(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packs: Dataset,
    *,
    arguments: dict[str, Any],
    num_parts: int = 1,
) -> PackTrainer:
    """A trainer over packs: a batch is one row, positions restart at every document, no attention mask."""
    args = SFTConfig(
        **arguments, packing=False, dataset_kwargs={"skip_prepare_dataset": True}, shuffle_dataset=False
    )
    trainer = PackTrainer(
        model=lm,
        args=args,
        train_dataset=packs,
        processing_class=tokenizer,
        data_collator=batches.collate,
        num_parts=num_parts,
    )
    return _checked(trainer)


def pair_trainer(
    lm: PreTrainedModel,
    live: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    micro_batch_tokens: int,
    arguments: dict[str, Any],
) -> PairTrainer:
    """A trainer over preference pairs; without `live`, rows bring their `reference` log-probabilities."""
    trainer = PairTrainer(
        model=lm,
        ref_model=live,
        args=DPOConfig(**arguments, precompute_ref_log_probs=live is None),
        train_dataset=pairs,
        processing_class=tokenizer,
        data_collator=batches.collate,
        micro_batch_tokens=micro_batch_tokens,
    )
    return _checked(trainer)


def _checked(trainer: T) -> T:
    wanted = "bf16" if trainer.args.bf16 else "no"
    found = trainer.accelerator.mixed_precision
    if found != wanted:
        raise Refusal(f"mixed_precision: the launch file says {found}, the recipe {wanted}; make them agree")
    kind = trainer.accelerator.distributed_type
    asked = launch.engine()
    if asked and kind.value != asked:
        raise Refusal(
            f"launch file: distributed_type: asks for {asked}, accelerate made {kind.value} of "
            f"{trainer.accelerator.num_processes} processes on {trainer.accelerator.device.type}; it wants "
            "several GPUs (trainer.use_cpu=false); on a CPU take recipes/accelerate/cpu.yaml"
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


@torch.no_grad()
def _loss_of(lm: Any, ids: Any, device: torch.device) -> float:
    """Nats a token of a text under a model; all processes take part where it is in shards."""
    training, lm_ids = lm.training, torch.as_tensor(ids, device=device)[None]
    lm.eval()
    total = lm(input_ids=lm_ids, scored_labels=lm_ids, use_cache=False)
    lm.train(training)
    return float(total) / max(len(ids) - 1, 1)


def check_reloaded(
    run_dir: Path, ids: Any, live: float, *, rounded: bool, trust_remote_code: bool = False
) -> None:
    """The saved checkpoint, loaded on the CPU, gives the loss of the model in memory; Failure if not."""
    unset_hf_deepspeed_config()  # else ZeRO-3 would part this model too, over processes that have ended
    saved = model.load_model(run_dir, attn_implementation="sdpa", trust_remote_code=trust_remote_code)
    add_scoring(saved)
    found = _loss_of(saved, ids, torch.device("cpu"))
    if not math.isclose(found, live, rel_tol=proofs.LOSS[rounded], abs_tol=proofs.LOSS[rounded]):
        raise Failure(
            f"{run_dir}: what was saved gives a loss of {found:.6g} on the first {len(ids)} tokens of the "
            f"data, the model in memory {live:.6g}; its checkpoints are kept, report this"
        )


def last_checkpoint(run_dir: Path, *, announce: Announce) -> Path | None:
    """The newest checkpoint whose files all have their digests; torn ones are set aside and named."""
    folder = run_dir / manifest.CHECKPOINTS
    shutil.rmtree(folder / GONE, ignore_errors=True)  # its removal was cut short
    for _, path in reversed(manifest.checkpoints(run_dir)):
        if not (lost := manifest.broken(path)):
            return path
        aside = folder / TORN / path.name
        shutil.rmtree(folder / TORN, ignore_errors=True)  # one is enough to look at, and takes room enough
        aside.parent.mkdir()
        path.rename(aside)
        announce(f"{path.name} is torn ({lost[0]}): set aside as {aside}, until the run is whole")
    return None


def required_bytes(recipe: Training, lm: torch.nn.Module, run_dir: Path, steps: int) -> float:
    """What a run still has to write: float32 weights at the end, checkpoints with AdamW's moments before.

    One more than `save_total_limit` is there for a moment. Weights that an attempt left are written over.
    """
    every = sum(one.numel() for one in lm.parameters())
    trained = sum(one.numel() for one in lm.parameters() if one.requires_grad)
    checkpoint_bytes = 12 * trained  # of adapters too: the frozen weights are not in a checkpoint
    made, limit = recipe.num_checkpoints(steps) or 0, recipe.trainer.get("save_total_limit")
    there = len(manifest.checkpoints(run_dir))
    number = min(made, limit + 1) if limit else made
    left = sum(path.stat().st_size for path in run_dir.glob("*.safetensors"))
    return max(4 * every - left, 0) + max(number - there, 0) * checkpoint_bytes


def check_launch(checkpoint: Path, accelerator: Accelerator, run_dir: Path) -> None:
    """A checkpoint resumes under the engine that wrote it; Refusal where this launch cannot read it.

    Whole replicas (one process, DDP) and FSDP2's shards resume on any number of processes, ZeRO's on as many.
    """
    saved = manifest.read_json(checkpoint / TOTALS, wanted={"launch": dict[str, Any]})["launch"]
    here = launch_of(accelerator)
    if saved.get("engine") == here["engine"] and (saved == here or here["engine"] != "DEEPSPEED"):
        return
    raise Refusal(
        f"{checkpoint}: was saved by {saved.get('num_processes')} processes ({saved.get('engine')}), this "
        f"launch has {here['num_processes']} ({here['engine']}), which cannot read its optimiser; launch as "
        f"before, or remove {run_dir} to begin again"
    )


def fit(
    trainer: PackTrainer | PairTrainer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    load: Callable[[], PreTrainedModel] | None = None,
    prepared: data.Prepared,
    recipe: Training,
    run_dir: Path,
    only_verify: bool,
    pinned: Collection[str] = (),
    announce: Announce,
) -> dict[str, Any]:
    """Train (from the last whole checkpoint, if any), save a plain checkpoint into `run_dir`, return metrics.

    `only_verify`: stop before step 1, when what the recipe's `verify` asks for is proved; {}. `pinned`: names
    of checkpoints that other runs start from. Adapters are saved apart, and merged into what `load` gives.
    Raises Refusal where a proof fails or an unfinished run was made from other data, Failure where the loss
    is not finite or explodes, RuntimeError where a saved weight is not finite.
    """
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    shapes = {name: list(parameter.shape) for name, parameter in trained.named_parameters()}
    if adapted := is_peft_model(trained):
        adapters.check_engine(trainer.accelerator, trained)
        announce(adapters.describe(trained))
    first = trainer.is_world_process_zero()
    found = [last_checkpoint(run_dir, announce=announce) if first else None]
    resumed: Path | None = broadcast_object_list(found)[0]
    if resumed:
        check_launch(resumed, trainer.accelerator, run_dir)
    ledger = prepared.ledger
    if first:
        steps = recipe.num_steps or math.ceil((recipe.num_epochs or 1) * ledger["updates_per_epoch"])
        disk.require(run_dir, required_bytes(recipe, trained, run_dir, steps), what="the run")
    note = run_dir / manifest.CHECKPOINTS / "data.json"
    if (
        resumed
        and manifest.read_json(note, wanted={"fingerprint": str})["fingerprint"] != ledger["fingerprint"]
    ):
        raise Refusal(f"{resumed}: was made from other data or other code; remove {run_dir} to begin again")
    if first:
        note.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_json(note, {"fingerprint": ledger["fingerprint"]})
    if trainer.accelerator.device.type == "cpu":
        model.return_freed_memory(trained)
    room = recipe.global_batch_size * recipe.max_tokens if isinstance(recipe, Packed) else None
    place: dict[str, Any] = {"prepared": prepared, "run_dir": run_dir, "announce": announce}
    limit = recipe.trainer.get("save_total_limit")
    instruments = Instruments(trainer, room_tokens=room, keep=(limit, pinned), **place)
    if recipe.verify != "off":
        trainer.add_callback(proofs.Proofs(trainer, recipe=recipe, only=only_verify, **place))
    trainer.add_callback(instruments)
    with instruments:  # until all is saved: what is asked meanwhile would lose it
        try:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except proofs.Verified:
            return {}
        trained.config.use_cache = True
        ids = prepared.dataset[0]["input_ids"][:PROBE_TOKENS]
        live = _loss_of(trainer.model_wrapped, ids, trainer.accelerator.device)
        rehearsal.shard(trained)
        trainer.save_model(str(run_dir / adapters.ADAPTER if adapted else run_dir))
        if first:
            if adapted:
                assert load
                shapes = adapters.save_merged(load(), tokenizer, run_dir)
            (run_dir / "training_args.bin").unlink(missing_ok=True)
            tokenizer.save_pretrained(run_dir)
            model.check_saved(shapes, run_dir)
            block = getattr(recipe, "peft", None)
            if not block or not block.load_in_4bit:  # else merged into what was not rounded
                trusted = getattr(recipe, "trust_remote_code", False)
                rounded = rehearsal.rounded(trainer.accelerator)
                check_reloaded(run_dir, ids, live, rounded=rounded, trust_remote_code=trusted)
            for name in (TORN, GONE):
                shutil.rmtree(note.parent / name, ignore_errors=True)
            if not manifest.checkpoints(run_dir):
                shutil.rmtree(note.parent)
    totals = instruments.totals
    return {
        "num_steps": trainer.state.global_step,
        "num_epochs": round(float(trainer.state.epoch or 0), 3),
        "num_tokens_seen": totals["num_tokens"],
        "num_trained_tokens_seen": totals["num_trained_tokens"],
        "train_loss": round(totals["loss"] / max(trainer.state.global_step, 1), 5),
        "first_loss": totals.get("first_loss"),
        "last_loss": instruments.last_loss,
        "resumed_from_step": int(resumed.name.rsplit("-", 1)[1]) if resumed else 0,
        "training_seconds": round(totals["seconds"], 1),
    }
