"""What a recipe of `smol-post generate` may say: whom to ask, for what, and what is kept of the answers.

    stage: traces     prompts -> SFT rows
    stage: pairs      prompts -> preference pairs, strong against weak
    stage: turns      prompts -> conversations of several turns, modes switching and constraints adding up

Keys that say where a server is and how hard it may be pressed are no part of a dump: they change no answer.
"""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from smol_post.config import Source
from smol_post.judging_config import Check, Decontaminate, Deduplicate, Limits, Turns
from smol_post.refusal import describe, did_you_mean
from smol_post.strict import PathText, Seed, Strict

Mode = Literal["think", "no_think"]
OWNED = ("model", "messages", "tools", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed",
         "n", "stream", "stop")  # fmt: skip


def _a_url(text: str) -> str:
    """ValueError for what is no address of a server."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or not text.isprintable():
        raise ValueError(f"found {describe(text)}, wanted an address such as http://localhost:8000/v1")
    return text


def _a_body(tree: dict[str, Any]) -> dict[str, Any]:
    """ValueError where a key of a request is one that the recipe sets elsewhere."""
    for key in OWNED:
        if key in tree:
            raise ValueError(f"'{key}' is set by the recipe itself; remove it")
    return tree


Body = Annotated[dict[str, Any], AfterValidator(_a_body)]


class Sampling(Strict):
    """How answers of one mode are drawn, where that differs from the teacher's own keys."""

    temperature: float | None = Field(default=None, ge=0)
    """In place of the teacher's."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """In place of the teacher's."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """In place of the teacher's."""
    extra_body: Body | None = None
    """In place of the teacher's."""


class Teacher(Strict):
    """Who answers: a server that speaks OpenAI's chat completions (`base_url`, `model`), or a `checkpoint`.

    mode_by: `kwargs` as vLLM, SGLang, llama.cpp and transformers take it; `system`: /think or /no_think.
    """

    base_url: Annotated[str, AfterValidator(_a_url)] | None = Field(default=None, exclude=True)
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    model: str | None = Field(default=None, min_length=1)
    """The model's name there."""
    checkpoint: PathText | None = None
    """In place of a server: a run beside the output (../sft), an absolute folder or a Hub id."""
    # Qwen3 model card, thinking mode: "Temperature=0.6, TopP=0.95", output length 32,768
    temperature: float = Field(default=0.6, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Of sampling."""
    max_new_tokens: int = Field(default=32768, gt=0)
    """Room for an answer, thoughts included."""
    seed: Seed | None = 0
    """Sent with each request, plus the number of the sample; null: not sent."""
    think: Sampling | None = None
    """What differs in this mode."""
    no_think: Sampling | None = None
    """What differs in this mode."""
    mode_by: Literal["kwargs", "system", "none"] = "kwargs"
    """How a server is told the mode: in chat_template_kwargs, by a flag in the system message, or not."""
    extra_body: Body = Field(default={})
    """Further keys of the request's body."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$", exclude=True)
    """Name of the environment variable that holds the key."""
    concurrency: int = Field(default=16, gt=0, le=1000, exclude=True)
    """Requests at once."""
    timeout_seconds: float = Field(default=1800.0, gt=0, exclude=True)
    """Of one request."""
    give_up_seconds: float = Field(default=600.0, ge=0, exclude=True)
    """How long nothing but failures is borne."""
    backoff_seconds: float = Field(default=1.0, gt=0, exclude=True)
    """The first wait after a failure; doubled up to a minute."""
    requests_per_minute: float | None = Field(default=None, gt=0, exclude=True)
    """Limit of rate."""
    tokens_per_minute: float | None = Field(default=None, gt=0, exclude=True)
    """Limit of rate, prompts and answers together."""
    price_prompt: float = Field(default=0.0, ge=0, exclude=True)
    """Of a million tokens, in any currency."""
    price_completion: float = Field(default=0.0, ge=0, exclude=True)
    """Of a million tokens, in any currency."""
    batch_size: int = Field(default=16, gt=0)
    """Prompts at once, of a checkpoint."""
    date_string: str = "01 July 2025"
    """The date in system blocks, of a checkpoint."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Teacher":
        if (self.base_url is None) == (self.checkpoint is None):
            raise ValueError("give exactly one of 'base_url' (with 'model') and 'checkpoint'")
        if (self.base_url is None) != (self.model is None):
            raise ValueError("give both 'base_url' and 'model', or neither")
        server = ("mode_by", "extra_body", "api_key_env", "concurrency", "timeout_seconds", "give_up_seconds",
                  "backoff_seconds", "requests_per_minute", "tokens_per_minute", "price_prompt",
                  "price_completion")  # fmt: skip
        alien = server if self.checkpoint else ("batch_size", "date_string")
        for key in alien:
            if key in self.model_fields_set:
                wanted = "base_url" if self.checkpoint else "checkpoint"
                raise ValueError(f"'{key}' goes with '{wanted}' only; remove it")
        return self

    def sampling(self, mode: Mode) -> dict[str, Any]:
        """temperature, top_p, max_new_tokens and extra_body of a mode."""
        own = self.model_dump(include=set(Sampling.model_fields))
        change = getattr(self, mode)
        return own | (change.model_dump(exclude_none=True) if change else {})


class Generation(Strict):
    """What every generator has in common.

    A prompt is a row's messages up to its last assistant turn, or its `prompt`.
    """

    seed: Seed = 0
    """Of what is drawn: samples, modes, constraints."""
    sources: list[Source] = Field(min_length=1)
    """Where prompts come from, as in the mixtures."""
    modes: list[Mode] = Field(default=["think"], min_length=1, max_length=2)
    """Modes to be answered in."""
    num_samples: int = Field(default=1, gt=0, le=1000)
    """Answers to a prompt in each mode."""
    max_kept: int | None = Field(default=None, gt=0)
    """How many of them become rows, at most; none: all that pass."""
    num_rows: int | None = Field(default=None, gt=0)
    """Rows to stop at, in the order of the sources; none: all."""
    filters: Limits = Limits()
    """What any answer must keep to."""
    checks: dict[str, Check] = Field(default={})
    """Source's name: how its answers are held against their rows."""
    deduplicate: Deduplicate | None = Deduplicate()
    """Copies to leave out; null: none."""
    decontaminate: Decontaminate | None = None
    """What rows must not overlap with."""
    format: Literal["jsonl", "parquet"] = "parquet"
    """Of the rows."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """What a row that cannot be read does: end it all, or be left out and counted."""

    @model_validator(mode="after")
    def _whole(self) -> "Generation":
        names = [source.name for source in self.sources]
        for source in self.sources:
            if names.count(source.name) > 1:
                raise ValueError(f"sources: the name '{source.name}' is used twice; give each source its own")
            for key in ("token_share", "repeat", "loss_on"):
                if key in source.model_fields_set:
                    raise ValueError(f"source '{source.name}': '{key}' is for training; remove it")
        for name in self.checks:
            if name not in names:
                raise ValueError(f"checks: '{name}' is no source{did_you_mean(name, names)}")
        if len(set(self.modes)) != len(self.modes):
            raise ValueError(f"modes: '{self.modes[0]}' is given twice; remove one")
        for name, teacher in self.teachers().items():
            for mode in self.modes:
                if self.num_samples > 1 and teacher.sampling(mode)["temperature"] == 0:
                    raise ValueError(
                        f"num_samples: {name} is greedy in mode {mode} (temperature 0), so all samples would "
                        "be alike; give a temperature, or one sample"
                    )
        return self

    def teachers(self) -> dict[str, Teacher]:
        """Those who are asked, by key."""
        return {key: getattr(self, key) for key in ("teacher", "strong", "weak") if getattr(self, key, None)}


class TracesRecipe(Generation):
    """Answers of a teacher as SFT rows."""

    stage: Literal["traces"]
    teacher: Teacher
    """Who answers."""


class PairsRecipe(Generation):
    """Answers of a strong teacher chosen over those of a weak one.

    Without `strong` the row's own answer is chosen, in the row's own mode: the last assistant turn, `chosen`
    or `completion`.
    """

    stage: Literal["pairs"]
    modes: list[Mode] = Field(default=["think", "no_think"], min_length=1, max_length=2)
    """Modes to be answered in."""
    strong: Teacher | None = None
    """Whose answers are chosen; none: the row's own answer is."""
    weak: Teacher
    """Whose answers are rejected."""
    rejected_may_be: list[Literal["unfinished", "wrong_mode", "too_long", "repetition"]] = Field(default=[])
    """Faults of a rejected answer that leave it in."""


class TurnsRecipe(Generation):
    """Conversations: each prompt goes on for several turns, modes switching and constraints adding up."""

    stage: Literal["turns"]
    modes: list[Mode] = Field(default=["think", "no_think"], min_length=1, max_length=2)
    """Of the first turn; a prompt begins a conversation in each."""
    teacher: Teacher
    """Who answers."""
    turns: Turns = Turns()
    """How conversations go on."""


GENERATIONS: dict[str, type[Strict]] = {"traces": TracesRecipe, "pairs": PairsRecipe, "turns": TurnsRecipe}
