"""Recipe -> TRL arguments in one table; trainers; fit, resume, save. TRL trains, we say exactly what."""

import json
import math
import time
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from smol_post import data, manifest, model
from smol_post.config import ApoRecipe, BaseRecipe, LongContextRecipe, MidRecipe, SftRecipe, Training
from smol_post.refusal import Refusal
from smol_post.vocabulary import Vocabulary

# TRL reads a property that transformers renames; nothing a user of a recipe could do about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

Announce = Callable[[str], None]

LOG = "train_log.jsonl"


def accumulation_steps(recipe: Training, num_processes: int) -> int:
    """How many micro-batches a process accumulates for one step of `global_batch_size`.

    8 = 2 a micro-batch x 2 processes x 2 steps. Raises Refusal where it does not divide.
    """
    at_once = recipe.micro_batch_size * num_processes
    if recipe.global_batch_size % at_once:
        raise Refusal(
            f"global_batch_size: {recipe.global_batch_size} does not divide by micro_batch_size "
            f"{recipe.micro_batch_size} x {num_processes} processes; change one of the three"
        )
    return recipe.global_batch_size // at_once


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
        "save_strategy": "no",
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": device is not None,
        "use_cpu": device is None,
    }
    owned: dict[str, Any] = {
        "output_dir": str(run_dir / manifest.CHECKPOINTS),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "max_steps": recipe.num_steps if recipe.num_steps is not None else -1,
        "num_train_epochs": recipe.num_epochs if recipe.num_epochs is not None else 1.0,
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(recipe, num_processes),
        "max_length": None,
        "remove_unused_columns": False,  # rows are gathered when read, under names that no table has
    }
    if isinstance(recipe, ApoRecipe):
        defaults["loss_type"] = ["apo_zero"]
    return {**defaults, **recipe.trainer, **owned}


class NoEmbeddingDecay:
    """Mixin for trainers: no weight decay on embeddings (nor on a head tied to them), as SmolLM3."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters in the decay group: everything the Trainer decays but embedding weights."""
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        embeddings = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return [name for name in names if id(parameters[name]) not in embeddings]


class PackTrainer(NoEmbeddingDecay, SFTTrainer):
    """TRL's SFT trainer on packs of our own; the loss is the mean over the global batch's trained tokens."""

    @property
    def loss_type(self) -> str:
        """The token loss the recipe asks TRL for ("nll" unless the trainer block says "dft")."""
        return str(getattr(self.args, "loss_type", "nll"))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of cross-entropies of this micro-batch over the trained tokens of the whole step (a scalar).

        On one CPU process the head runs on trained positions only; TRL's fused head falls back there to
        several full passes (measured at twice the step time). Elsewhere TRL's own path is taken. Both equal
        loss = sum over trained t of -log p(token_t | its document before t) / num_items_in_batch.
        """
        alone = model is self.accelerator.unwrap_model(model) and inputs["input_ids"].device.type == "cpu"
        full = self.accelerator.mixed_precision == "no"
        plain = alone and full and self.loss_type == "nll" and not self.args.label_smoothing_factor
        if return_outputs or not plain or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels_BT = inputs["labels"][:, 1:]
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        hidden_BTD = model.base_model(**rest, use_cache=False).last_hidden_state[:, :-1]
        trained_BT = labels_BT != data.IGNORED
        logits_NV = model.get_output_embeddings()(hidden_BTD[trained_BT])
        total = torch.nn.functional.cross_entropy(logits_NV.float(), labels_BT[trained_BT], reduction="sum")
        return total / num_items_in_batch


class PairTrainer(NoEmbeddingDecay, DPOTrainer):
    """TRL's DPO trainer on pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        widened = super()._precompute_ref_logps(dataset, *args, **kwargs)  # which forgets how rows are read
        return widened.with_format(dataset.format["type"], **dataset.format["format_kwargs"])


T = typing.TypeVar("T", PackTrainer, PairTrainer)


def train_on_packs(
    recipe: BaseRecipe | LongContextRecipe | MidRecipe | SftRecipe,
    lm: PreTrainedModel,
    words: Vocabulary,
    *,
    folder: Path,
    run_dir: Path,
    cache_dir: Path,
    num_processes: int,
    announce: Announce,
) -> dict[str, Any]:
    """Sources -> packs -> trained checkpoint in `run_dir`; the outcome (data ledger and metrics).

    Raises Refusal as `data.prepare` does.
    """
    model.use_threads(recipe.num_threads)
    arguments = trainer_arguments(recipe, run_dir=run_dir, num_processes=num_processes)
    packs = data.prepare(recipe, words, folder=folder, cache_dir=cache_dir)
    announce(describe(packs.ledger))
    trainer = pack_trainer(lm, words.tokenizer, packs.dataset, arguments=arguments, announce=announce)
    metrics = fit(trainer, words.tokenizer, run_dir=run_dir, ledger=packs.ledger)
    return {"data": packs.ledger, "metrics": metrics}


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


def check_length(recipe: Training, parent: PreTrainedModel) -> None:
    """A pack may not be longer than the parent's context; Refusal with both numbers."""
    limit = getattr(parent.config, "max_position_embeddings", None)
    if limit is not None and recipe.max_tokens > limit:
        raise Refusal(
            f"max_tokens: found {recipe.max_tokens}, wanted at most {limit}, the parent's context; "
            "extend it first (stage long_context) or lower max_tokens"
        )


def pack_trainer(
    parent: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packs: Dataset,
    *,
    arguments: dict[str, Any],
    announce: Announce,
) -> PackTrainer:
    """A trainer over packs: each pack one row, positions restarting at every document, no attention mask."""
    args = SFTConfig(
        **arguments,
        packing=False,
        padding_free=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        shuffle_dataset=False,
    )
    trainer = PackTrainer(model=parent, args=args, train_dataset=packs, processing_class=tokenizer)
    return _with_log(trainer, announce)


def pair_trainer(
    parent: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    arguments: dict[str, Any],
    announce: Announce,
) -> PairTrainer:
    """A trainer over preference pairs; without `reference`, log-probabilities are computed before step 1."""
    trainer = PairTrainer(
        model=parent,
        ref_model=reference,
        args=DPOConfig(**arguments),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    return _with_log(trainer, announce)


def _with_log(trainer: T, announce: Announce) -> T:
    wanted = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "no"
    found = trainer.accelerator.mixed_precision
    if found != wanted:
        raise Refusal(f"mixed_precision: the launch file says {found}, the recipe {wanted}; make them agree")
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Log(announce))
    return trainer


class Log(TrainerCallback):
    """A line of progress an interval, the same in `train_log.jsonl`, and a seal on every checkpoint."""

    def __init__(self, announce: Announce) -> None:
        """`announce` shows one line to the person who waits."""
        self.announce = announce
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; on resume, cut the log back to the step that training resumes from."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            path = self._path(args)
            old = path.read_text().splitlines() if path.is_file() else []
            kept = [line for line in old if _step(line) <= state.global_step]
            path.write_text("".join(line + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line for the file and one for the person."""
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise RuntimeError(
                f"step {state.global_step}: the loss is {logs['loss']}; lower the learning rate"
            )
        if not state.is_world_process_zero:
            return
        with self._path(args).open("a") as stream:
            stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / max(done, 1) * (state.max_steps - state.global_step)
        rate = f"  lr {logs['learning_rate']:.1e}" if "learning_rate" in logs else ""
        self.announce(
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}{rate}  {left:.0f} s left"
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seal a checkpoint: names and sizes of its files, written once all of them are there."""
        PartialState().wait_for_everyone()  # every rank has written its part
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            manifest.seal(folder)

    @staticmethod
    def _path(args: TrainingArguments) -> Path:
        return Path(str(args.output_dir)).parent / LOG


def _step(line: str) -> float:
    """The step of a line of the log; a torn last line counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is sealed and has all its files; torn ones are passed over."""
    found = sorted(
        (run_dir / manifest.CHECKPOINTS).glob("checkpoint-*"),
        key=lambda path: -int(path.name.rsplit("-", 1)[1]),
    )
    return next(filter(manifest.is_sealed, found), None)


def fit(
    trainer: PackTrainer | PairTrainer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    run_dir: Path,
    ledger: dict[str, Any],
) -> dict[str, Any]:
    """Train (from the last whole checkpoint, if any), save a plain checkpoint into `run_dir`, return metrics.

    Raises Refusal where an unfinished run was made from other data, RuntimeError where the loss or a saved
    weight is not finite.
    """
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    shapes = {name: list(parameter.shape) for name, parameter in trained.named_parameters()}
    resumed = last_checkpoint(run_dir)
    note = run_dir / manifest.CHECKPOINTS / "data.json"
    if resumed and manifest.read_json(note)["fingerprint"] != ledger["fingerprint"]:
        raise Refusal(f"{resumed}: was made from other data or other code; remove {run_dir} to begin again")
    if trainer.is_world_process_zero():
        note.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_json(note, {"fingerprint": ledger["fingerprint"]})
    started = time.monotonic()
    result = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    seconds = time.monotonic() - started
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    trained.config.use_cache = True
    trainer.save_model(str(run_dir))
    if trainer.is_world_process_zero():
        (run_dir / "training_args.bin").unlink(missing_ok=True)
        tokenizer.save_pretrained(run_dir)
        model.check_saved(shapes, run_dir)
        if not any((run_dir / manifest.CHECKPOINTS).glob("checkpoint-*")):
            note.unlink()
            note.parent.rmdir()
    epochs = float(trainer.state.epoch or 0)
    return {
        "num_steps": trainer.state.global_step,
        "num_epochs": round(epochs, 3),
        "num_tokens_seen": round(ledger["num_tokens"] * epochs),  # in expectation: packs are drawn at random
        "train_loss": round(result.training_loss, 5),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "resumed_from_step": int(resumed.name.rsplit("-", 1)[1]) if resumed else 0,
        "training_seconds": round(seconds, 1),
    }
