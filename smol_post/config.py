"""What a recipe may say: one model a stage, and the pipeline. `loading` reads the files.

Quantities that are ours have our names (`max_tokens`, `global_batch_size`); the `trainer:` block takes any
field of the pinned TRL configuration by its own name.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from smol_post.evals_config import EvalsRecipe
from smol_post.refusal import did_you_mean
from smol_post.strict import FILES, PathText, Seed, Strict, Threads, is_local

# What a row may consist of; any other column is not read.
COLUMNS = (
    *("text", "prompt", "completion", "messages", "chosen", "rejected", "chat_template_kwargs"),
    *("enable_thinking", "tools", "xml_tools", "python_tools", "custom_instructions", "date_string"),
)


class Size(Strict):
    """What a source holds before `keep_fraction`, as published; it serves `smol-post plan` and no run."""

    rows: int | None = Field(default=None, gt=0)
    """Rows of the source."""
    tokens: int | None = Field(default=None, gt=0)
    """Tokens of the source."""

    @model_validator(mode="after")
    def _says_something(self) -> "Size":
        if self.rows is None and self.tokens is None:
            raise ValueError("give 'rows', 'tokens' or both")
        return self


class Source(Strict):
    """Where rows come from: a data set (`path`) or a generator of the package (`generator`)."""

    name: str = Field(pattern=r"^[^\x00-\x1f\x7f]+$")
    """What the ledger and the report call it; each source its own."""
    path: PathText | None = None
    """A file (.jsonl, .json, also .gz, or .parquet), a folder saved by `datasets`, or a Hub data set."""
    config: str | None = None
    """Configuration of a Hub data set."""
    split: str | None = None
    """Split of a data set that has several; none: train."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set; none: its head, whose commit is recorded."""
    generator: str | None = None
    """A generator of `smol_post/synthetic.py`, in place of `path`."""
    num_rows: int | None = Field(default=None, gt=0, lt=2**31)
    """Rows that the generator makes."""
    seed: Seed = 0
    """Of the generator, and of the shuffle before `keep_fraction`."""
    options: dict[str, Any] = {}
    """Options of the generator, by its parameters' names."""
    columns: dict[str, str] = {}
    """Our column's name: the data set's, such as {prompt: question, completion: answer}."""
    mode: Literal["think", "no_think"] | None = None
    """Mode of rows that do not say their own."""
    keep_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the source's own rows, after a shuffle with `seed`."""
    token_share: float | None = Field(default=None, gt=0, le=1)
    """Share of the mixture's tokens, by leaving rows out; of every source or of none, in all 1."""
    repeat: int = Field(default=1, ge=1, le=10_000)
    """How often each row stands in the mixture."""
    loss_on: Literal["all", "completion"] | None = None
    """Where the recipe's loss is on all tokens: on those of this source's completions only."""
    size: Size | None = None
    """What the source holds, as published; for `smol-post plan` alone."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if (self.path is None) == (self.generator is None):
            raise ValueError(f"source '{self.name}': give exactly one of 'path' and 'generator'")
        if self.generator is not None and self.num_rows is None:
            raise ValueError(f"source '{self.name}': a generator needs 'num_rows'")
        if self.path is not None and is_local(self.path) and (self.config or self.revision):
            raise ValueError(f"source '{self.name}': 'config' and 'revision' are for the Hub; remove them")
        if self.split is not None and (self.path or ".jsonl").endswith(FILES):
            raise ValueError(f"source '{self.name}': 'split' is for data sets, a file has none; remove it")
        unknown = [name for name in self.columns if name not in COLUMNS]
        if unknown:
            raise ValueError(
                f"source '{self.name}': columns: '{unknown[0]}' is no column we read"
                + did_you_mean(unknown[0], list(COLUMNS))
            )
        if self.generator is not None and self.columns:
            raise ValueError(f"source '{self.name}': 'columns' goes with 'path' only")
        if self.generator is None and (self.options or self.num_rows is not None):
            raise ValueError(f"source '{self.name}': 'options' and 'num_rows' go with 'generator' only")
        return self


class Bound(Strict):
    """What a metric must be: at least `min`, at most `max`."""

    min: float | None = None
    """The metric must be at least this."""
    max: float | None = None
    """The metric must be at most this."""

    @model_validator(mode="after")
    def _says_something(self) -> "Bound":
        if self.min is None and self.max is None:
            raise ValueError("give 'min', 'max' or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is more than max {self.max:g}, which no value is; swap them")
        return self

    def holds(self, value: float | None) -> bool:
        """Whether a measured value lies within; what was not measured does not.

        >>> Bound(min=0.5).holds(0.5), Bound(min=0.5, max=0.9).holds(0.95), Bound(min=0.5).holds(None)
        (True, False, False)
        """
        if value is None:
            return False
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)


class Made(Strict):
    """Any run."""

    gates: dict[str, Bound] = {}
    """Metric of the pipeline's evals: what the checkpoint must show, else the chain stops."""


class Training(Made):
    """What every training stage has in common."""

    seed: Seed = 0
    """Of the order of rows, and of what is drawn in training."""
    num_threads: Threads | None = None
    """Threads of one process on a CPU; none: torch's choice."""
    max_tokens: int = Field(gt=1, lt=2**31)
    """Tokens of a pack; in APO of one side of a pair, prompt included."""
    global_batch_size: int = Field(gt=0, le=2**20)
    """Packs (in APO pairs) of one update, over all processes."""
    num_steps: int | None = Field(default=None, gt=0, lt=2**31)
    """Updates to make; this or `num_epochs`."""
    num_epochs: float | None = Field(default=None, gt=0)
    """Times that the mixture is gone through, in whole batches; this or `num_steps`."""
    attention: Literal["varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "varlen"
    """How attention is computed; varlen goes a document at a time on any device."""
    date_string: str = "01 July 2025"
    """The date in system blocks, so that tokens do not change from day to day."""
    sources: list[Source] = Field(min_length=1)
    """The mixture."""
    think_to_no_think: float | None = Field(default=None, gt=0)
    """Ratio of trained tokens of the modes, reached by leaving rows out."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """What a row that cannot be trained does: end the run, or be left out and counted."""
    max_row_characters: int = Field(default=10_000_000, gt=0)
    """A longer row is a bad row."""
    verify: Literal["quick", "full", "off"] = "quick"
    """What is proved before step 1."""
    stated_tokens: int | None = Field(default=None, gt=0)
    """Tokens of the whole mixture, once; for `smol-post plan` alone."""
    trainer: dict[str, Any] = {}
    """Fields of the pinned TRL configuration (SFTConfig, of APO DPOConfig) by their own names."""

    @model_validator(mode="before")
    @classmethod
    def _adapters_where_they_are_merged(cls, tree: Any) -> Any:
        if "peft" in tree and "peft" not in cls.model_fields:
            raise ValueError(
                "peft: adapters are for SFT and APO only, this stage trains all weights; remove it"
            )
        return tree

    @field_validator("verify", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false

    @model_validator(mode="after")
    def _one_length(self) -> "Training":
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of 'num_steps' and 'num_epochs'")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: the name '{name}' is used twice; give each source its own")
        shares = [one.token_share for one in self.sources if one.token_share is not None]
        if shares and (len(shares) < len(names) or abs(sum(shares) - 1) > 1e-6):
            raise ValueError(
                f"sources: token_share: {len(shares)} of {len(names)} sources have one, in all "
                f"{sum(shares):g}; give every source one, in all 1"
            )
        if shares and self.think_to_no_think is not None:
            raise ValueError("think_to_no_think: the sources have a token_share; give one or the other")
        return self

    def num_checkpoints(self, steps: int | None) -> int | None:
        """How many checkpoints a run of so many steps makes, the last step's among them; None: not known."""
        strategy, every = self.trainer.get("save_strategy", "no"), self.trainer.get("save_steps", 500)
        if strategy == "no":
            return 0
        if strategy == "epoch":
            return math.ceil(self.num_epochs or 1)
        return math.ceil(steps / (math.ceil(every * steps) if every < 1 else every)) if steps else None


class Continued(Training):
    """Training that starts from a checkpoint."""

    trust_remote_code: bool = False
    """Run the Python code that the parent's checkpoint brings."""


class Packed(Training):
    """Training on packs."""

    micro_batch_size: int = Field(default=1, gt=0)
    """Packs that a process holds at once, at most: memory and speed, not the step."""
    overlong_rows: Literal["drop", "truncate", "split"] = "drop"
    """What happens to rows longer than a pack."""

    def rows_at_once(self, share: int) -> int:
        """Rows of a micro-batch where a process has `share` rows of a global batch: of 9, at most 4, 3."""
        return max(one for one in range(1, self.micro_batch_size + 1) if share % one == 0)

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "Packed":
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} does not divide by micro_batch_size "
                f"{self.micro_batch_size}; choose a micro_batch_size that divides it"
            )
        return self

    @model_validator(mode="after")
    def _nothing_ignored(self) -> "Packed":
        packing, loss_on = getattr(self, "packing", "bfd"), getattr(self, "loss_on", "all")
        if "overlong_rows" in self.model_fields_set and packing != "bfd":
            raise ValueError(
                f"overlong_rows: packing {packing} cuts the stream, no row is too long; remove it"
            )
        for source in self.sources:
            if source.loss_on is not None and loss_on != "all":
                raise ValueError(
                    f"source '{source.name}': loss_on goes with the recipe's loss_on: all; remove it"
                )
        return self


class TokenizerSpec(Strict):
    """The byte-level BPE tokenizer of the tiny base."""

    vocab_size: int = Field(gt=256, lt=2**31)
    """Entries, special tokens included."""
    corpus_seed: Seed = 0
    """Of the text that it is trained on."""


class BaseRecipe(Packed):
    """A base model from nothing (tiny recipe only)."""

    stage: Literal["base"]
    loss_on: Literal["all", "completion"] = "completion"
    """Which tokens are trained."""
    packing: Literal["bfd"] = "bfd"
    """How documents fill packs: best-fit decreasing."""
    chat_template: PathText = "chatml"
    """smol_post, chatml, or a .jinja file beside the recipe."""
    model: dict[str, Any]
    """Keys of SmolLM3Config."""
    tokenizer: TokenizerSpec
    """The tokenizer to train."""


class LongContextRecipe(Packed, Continued):
    """Long-context extension: RoPE theta and sequence length grow, documents stay isolated."""

    stage: Literal["long_context"]
    loss_on: Literal["all", "completion"] = "all"
    """Which tokens are trained."""
    packing: Literal["bfd", "wrapped"] = "wrapped"
    """bfd: whole documents, best-fit decreasing; wrapped: the stream is cut every `max_tokens`."""
    text_end: str | None = None
    """Token put after each text; none: the tokenizer's end of sequence."""
    rope_theta: float = Field(gt=1)
    """The base of RoPE from here on."""
    chat_template: PathText | None = None
    """Template of sources that are chats; none: the parent's."""
    add_tokens: list[str] = []
    """Special tokens that the vocabulary gets."""


class MidRecipe(Packed, Continued):
    """Reasoning mid-training: ChatML, wrapped packing, loss on all tokens."""

    stage: Literal["mid"]
    loss_on: Literal["all", "completion"] = "all"
    """Which tokens are trained."""
    packing: Literal["wrapped", "wrapped_cross_document", "bfd"] = "wrapped"
    """wrapped isolates documents; wrapped_cross_document lets them see each other, as TRL's wrapped does."""
    text_end: str | None = None
    """Token put after each text; none: the tokenizer's end of sequence."""
    chat_template: PathText = "chatml"
    """smol_post, chatml, or a .jinja file beside the recipe."""
    add_tokens: list[str] = []
    """Special tokens that the vocabulary gets."""


class Peft(Strict):
    """LoRA: fields of peft's LoraConfig by their own names; the frozen weights in NF4 too is QLoRA.

    Sources: LoRA (Hu et al., 2021); all linear layers but the head, as QLoRA (Dettmers et al., 2023) advises;
    use_rslora: Kalajdzievski, 2023; use_dora: DoRA (Liu et al., 2024).
    """

    r: int = Field(gt=0)
    """Rank."""
    lora_alpha: int = Field(gt=0)
    """Scale; the update is multiplied by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    target_modules: str | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Modules that get an adapter: all-linear, names, or a regular expression."""
    modules_to_save: list[str] = []
    """Modules trained whole, such as [embed_tokens]."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    use_dora: bool = False
    """Weights split into size and direction."""
    load_in_4bit: bool = False
    """Frozen weights in NF4 (QLoRA); needs a GPU and bitsandbytes."""


class SftRecipe(Packed, Continued):
    """Dual-mode SFT: BFD packing over the whole set, loss on assistant turns."""

    stage: Literal["sft"]
    loss_on: Literal["assistant"] = "assistant"
    """Assistant turns: from where generation begins to the end of the turn."""
    packing: Literal["bfd"] = "bfd"
    """Best-fit decreasing over the whole set."""
    text_end: str | None = None
    """Token put after each text; none: the tokenizer's end of sequence."""
    chat_template: PathText = "smol_post"
    """smol_post, chatml, or a .jinja file beside the recipe."""
    add_tokens: list[str] = []
    """Special tokens that the vocabulary gets."""
    peft: Peft | None = None
    """Train adapters on a frozen parent."""


class ApoRecipe(Continued):
    """Anchored preference optimisation; `global_batch_size` counts pairs, `max_tokens` is of one side.

    A process cuts its share of the batch into micro-batches of at most `micro_batch_tokens` tokens; the loss
    does not depend on it. reference: live with `peft` is the same model, adapter off.
    """

    stage: Literal["apo"]
    chat_template: PathText | None = None
    """Template of the prompts; none: the parent's."""
    micro_batch_tokens: int | None = Field(default=None, gt=0)
    """Tokens of a micro-batch, at most; none: one pair of the longest, 2 max_tokens."""
    reference: Literal["cached", "live"] = "cached"
    """Log-probabilities computed once and kept, or a second model in memory."""
    peft: Peft | None = None
    """Train adapters on a frozen parent."""

    @model_validator(mode="after")
    def _dropout_that_stays(self) -> "ApoRecipe":
        if self.peft and self.peft.lora_dropout and self.trainer.get("disable_dropout", True):
            raise ValueError(
                f"peft.lora_dropout: found {self.peft.lora_dropout:g}, but trainer.disable_dropout, true by "
                "default, takes it out; set that to false, or remove lora_dropout"
            )
        return self

    @model_validator(mode="after")
    def _on_answers(self) -> "ApoRecipe":
        if (self.micro_batch_tokens or 2 * self.max_tokens) < 2 * self.max_tokens:
            raise ValueError(
                f"micro_batch_tokens: found {self.micro_batch_tokens}, wanted at least "
                f"{2 * self.max_tokens}, the longest pair (2 x max_tokens)"
            )
        for source in self.sources:
            if source.loss_on is not None:
                raise ValueError(
                    f"source '{source.name}': loss_on: pairs are judged by their answers; remove it"
                )
        return self


class MergeGate(Strict):
    """How a sweep chooses: the best `recover` among candidates that lose little of each metric of `keep`.

    Texts of perplexity and tasks of the harness are the very ones of a report.
    """

    suite: PathText
    """An evals recipe, asked of every candidate."""
    seed: Seed = 2_000_000
    """Of its generated questions: another than any report's."""
    recover: str
    """The metric to make best."""
    keep: dict[str, float] = {}
    """Metric: points (hundredths) that it may be worse than the soup's."""


class MergeRecipe(Made):
    """A uniform soup of all parents but the last, then a linear merge with the last (long context)."""

    stage: Literal["merge"]
    seed: Seed = 0
    """Recorded; a merge draws nothing."""
    soup_weight: float = Field(default=0.9, gt=0, le=1)
    """Weight of the soup; the long-context checkpoint has the rest."""
    weights: list[Annotated[float, Field(ge=0, lt=1)]] | None = Field(default=None, min_length=2)
    """Candidates for the long-context checkpoint's weight, of which `gate` chooses."""
    gate: MergeGate | None = None
    """How the sweep chooses."""
    dtype: Literal["float32"] = "float32"
    """What the merge computes in."""
    out_dtype: Literal["float32", "bfloat16", "parent"] = "parent"
    """What the merged weights are written in."""
    out_shard_size: int = Field(default=500_000_000, gt=0)
    """Bytes of a file of weights, at most."""

    @model_validator(mode="after")
    def _one_choice(self) -> "MergeRecipe":
        if (self.weights is None) != (self.gate is None):
            raise ValueError("give both 'weights' and 'gate', or neither")
        if self.weights and "soup_weight" in self.model_fields_set:
            raise ValueError("soup_weight: the gate chooses from 'weights'; give one or the other")
        if len(set(self.weights or [])) != len(self.weights or []):
            raise ValueError("weights: one is given twice; remove it")
        return self


Recipe = BaseRecipe | LongContextRecipe | MidRecipe | SftRecipe | ApoRecipe | MergeRecipe | EvalsRecipe
RECIPES: dict[str, type[Strict]] = {
    "base": BaseRecipe,
    "long_context": LongContextRecipe,
    "mid": MidRecipe,
    "sft": SftRecipe,
    "apo": ApoRecipe,
    "merge": MergeRecipe,
    "evals": EvalsRecipe,
}
NUM_PARENTS = {
    "base": (0, 0),
    "long_context": (1, 1),
    "mid": (1, 1),
    "sft": (1, 1),
    "apo": (1, 1),
    "merge": (2, 99),
}


# What else stands beside the runs, under these names.
RESERVED = ("evals", "cache", "report.html", "report.md", "metrics.json")


class Entry(Strict):
    """One run of a pipeline."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """Folder of the run in the run directory."""
    stage: Literal["base", "long_context", "mid", "sft", "apo", "merge"]
    """What is done."""
    recipe: PathText
    """Recipe file, from this folder."""
    parents: list[PathText] = []
    """`../run` of this pipeline, a folder, or a Hub id `org/name@rev`; of a merge long context is last."""
    overrides: dict[str, Any] = {}
    """Keys of the recipe that this run has otherwise."""


class Pipeline(Strict):
    """Runs in order."""

    runs: list[Entry] = Field(min_length=1)
    """The runs, in order."""
    build_parents: bool = False
    """Whether a single stage's command makes missing parents first."""
    architecture: dict[str, Any] = {}
    """Keys of SmolLM3Config of the first parents, for `plan` where none is at hand."""
    evals: PathText | None = None
    """The evals recipe of the pipeline."""

    @model_validator(mode="after")
    def _chain(self) -> "Pipeline":
        known: list[str] = []
        merges = {entry.name for entry in self.runs if entry.stage == "merge"}
        for entry in self.runs:
            where = f"runs: '{entry.name}'"
            if entry.name in known or entry.name in RESERVED or entry.name.startswith(("gates_", "verify_")):
                raise ValueError(f"{where} is used twice or reserved; every run needs a name of its own")
            if entry.name.endswith("_soup") and entry.name[:-5] in merges:
                raise ValueError(
                    f"{where} is what the soup of '{entry.name[:-5]}' is called; take another name"
                )
            low, high = NUM_PARENTS[entry.stage]
            if not low <= len(entry.parents) <= high:
                wanted = str(low) if low == high else f"at least {low}"
                raise ValueError(
                    f"{where} has {len(entry.parents)} parents; stage {entry.stage} wants {wanted}"
                )
            for parent in entry.parents:
                if parent.startswith("../") and ".." in parent[3:].split("/"):
                    raise ValueError(f"{where} has the parent '{parent}', which leaves its run; name a run")
                if parent.startswith("../") and parent[3:].split("/")[0] not in known:
                    hint = did_you_mean(parent[3:].split("/")[0], known)
                    raise ValueError(f"{where} has the parent '{parent}', which is no earlier run{hint}")
            if entry.parents and len(set(entry.parents)) != len(entry.parents):
                raise ValueError(f"{where} names a parent twice; a merge counts each checkpoint once")
            known.append(entry.name)
        return self
