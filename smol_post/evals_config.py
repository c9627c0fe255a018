"""What an evals recipe may say: what is measured on every checkpoint of a chain."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from smol_post.refusal import Refusal
from smol_post.strict import FILES, PathText, Seed, Strict, Threads, local_path


class Probe(Strict):
    """Needles in a haystack, of each of `lengths` in the model's own tokens, answer included.

    kind: one needle; one key asked among `num_needles`; or all `num_needles` values of one key. haystack: a
    text file, else generated sentences. as: raw text, or a chat in no_think mode. yarn: at `yarn_context`.
    """

    kind: Literal["single", "multi_key", "multi_value"]
    """single: one needle; multi_key: one of several is asked; multi_value: all values of one key."""
    lengths: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    """Tokens of document, question and answer, by the model's own tokenizer."""
    num_questions: int = Field(default=100, gt=0)
    """Questions of each length."""
    num_needles: int = Field(default=4, ge=2, le=100)
    """Needles in a document."""
    haystack: PathText | None = Field(default=None, exclude=True)
    """A text file to hide needles in; none: generated sentences."""
    form: Literal["text", "chat"] = Field(default="text", alias="as")
    """Asked as raw text, or in a chat in no_think mode."""
    yarn: bool = False
    """Asked with YaRN at `yarn_context`, of the last run alone."""

    @model_validator(mode="after")
    def _one_needle(self) -> "Probe":
        if self.kind == "single" and "num_needles" in self.model_fields_set:
            raise ValueError("num_needles: a single probe hides one; remove it, or take another kind")
        return self

    def metric(self, length: int) -> str:
        """`multi_key_4096`, `single_8192_chat_yarn`."""
        return f"{self.kind}_{length}{'_chat' * (self.form == 'chat')}{'_yarn' * self.yarn}"


class Texts(Strict):
    """Texts whose perplexity is measured in windows of `max_tokens`: a text file, or rows with a `text`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """The metric is perplexity_<name>."""
    path: PathText = Field(exclude=True)
    """A text file, or rows with a `text`."""
    max_tokens: int = Field(gt=1, lt=2**31)
    """Tokens of a window."""


class Harness(Strict):
    """Tasks of lm-eval, each in every mode asked that a checkpoint has.

    base: text without a chat template. num_fewshot, max_new_tokens: None is the task's own. temperature: None
    is greedy decoding. limit: the first documents only. include_path: a folder with task files of one's own,
    counted from the recipe's; their data files count from that folder. Task files are programs (`!function`
    names Python code beside them, which runs): give a folder only where you would run its code.
    """

    tasks: list[str] = Field(min_length=1)
    """Tasks and groups by lm-eval's names."""
    modes: list[Literal["base", "think", "no_think"]] = Field(min_length=1)
    """base: text without a chat template; else a chat in the mode."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; none: the task's own number."""
    limit: int | None = Field(default=None, gt=0)
    """The first documents only."""
    max_new_tokens: int | None = Field(default=32768, gt=0)
    """Room for an answer, thoughts included; none: the task's own."""
    temperature: float | None = Field(default=0.6, gt=0)
    """Of sampling; none: greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Of sampling."""
    batch_size: int = Field(default=1, gt=0)
    """Prompts at once."""
    seed: Seed = 1234
    """Of few-shot examples and sampling."""
    include_path: PathText | None = None
    """A folder with task files of your own. Their code runs."""

    @model_validator(mode="after")
    def _top_p_of_samples(self) -> "Harness":
        if self.temperature is None and "top_p" in self.model_fields_set:
            raise ValueError("top_p: decoding is greedy without a temperature; remove it")
        return self


class ToolCalls(Strict):
    """Rows with tools whose first answer is asked for: the calls that the row makes, or none.

    path: a file of SFT rows with messages and `tools`, `xml_tools` or `python_tools`; or a generator of them.
    Rows without tools are passed over. num_questions: drawn by the recipe's seed; None: all rows of a file.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Metrics are tool_calls_<name>_<mode> and ..._valid."""
    path: PathText | None = Field(default=None, exclude=True)
    """A file of SFT rows with tools."""
    generator: str | None = None
    """A generator of such rows, in place of `path`."""
    options: dict[str, Any] = {}
    """Options of the generator."""
    num_questions: int | None = Field(default=None, gt=0, lt=2**31)
    """How many are asked, drawn by the recipe's seed; none: all rows of a file."""
    modes: list[Literal["think", "no_think"]] = Field(default=["think", "no_think"], min_length=1)
    """Modes to ask in."""
    max_new_tokens: int = Field(default=512, gt=0)
    """Room for an answer, thoughts included."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ToolCalls":
        if (self.path is None) == (self.generator is None):
            raise ValueError(f"tool_calls '{self.name}': give exactly one of 'path' and 'generator'")
        if self.generator is not None and self.num_questions is None:
            raise ValueError(f"tool_calls '{self.name}': a generator needs 'num_questions'")
        if self.path is not None and not self.path.endswith(FILES):
            raise ValueError(f"tool_calls '{self.name}': path: wanted {', '.join(FILES)}")
        if self.path is not None and self.options:
            raise ValueError(f"tool_calls '{self.name}': 'options' go with 'generator' only")
        if len(set(self.modes)) < len(self.modes):
            raise ValueError(f"tool_calls '{self.name}': modes: one stands twice; remove it")
        return self

    def metrics(self, mode: str) -> tuple[str, str]:
        """`tool_calls_bfcl_think` and `tool_calls_bfcl_think_valid`."""
        return f"tool_calls_{self.name}_{mode}", f"tool_calls_{self.name}_{mode}_valid"


# The shortest document with a needle, its question and the answer.
NeedleTokens = Annotated[int, Field(ge=10)]


class EvalsRecipe(Strict):
    """What is measured on every checkpoint of the chain; `yarn_...`: on its last run, with YaRN and without.

    num_threads: of one checkpoint; as many are measured at once as the cores then allow. num_turn_questions:
    conversations of three turns in each mode, about arithmetic or from the `prompt` column of `turn_prompts`.
    Paths are no part of a dump: what counts is what the files hold.
    """

    stage: Literal["evals"]
    seed: Seed = 1_000_000
    """Of all that is generated and sampled: far from the seeds of training."""
    num_threads: Threads | None = None
    """Of one checkpoint; as many are measured at once as the cores then allow."""
    needle_tokens: list[NeedleTokens] = [64, 256, 512]
    """Lengths of tiny's needle documents."""
    num_needle_questions: int = Field(default=200, ge=0)
    """Questions of each length; 0: none."""
    needle_options: dict[str, Any] = {}
    """Options of the generator `needle_questions`."""
    yarn_context: int | None = Field(default=None, gt=0)
    """Context of the last run with YaRN."""
    yarn_needle_tokens: list[NeedleTokens] = []
    """Lengths asked of the last run, with YaRN and without."""
    num_yarn_questions: int = Field(default=100, gt=0)
    """Questions of each of those."""
    num_arithmetic_questions: int = Field(default=200, ge=0)
    """Sums in each mode, greedy and sampled; 0: none."""
    arithmetic_options: dict[str, Any] = {}
    """Options of the generator `arithmetic_questions`."""
    num_preference_pairs: int = Field(default=200, ge=0)
    """Pairs whose chosen answer should be likelier; 0: none."""
    preference_options: dict[str, Any] = {}
    """Options of the generator `preference_pairs`."""
    probes: list[Probe] = []
    """Needles in text of any length."""
    perplexity: list[Texts] = []
    """Texts of your own."""
    tool_calls: list[ToolCalls] = []
    """Rows with tools: are the right calls made?"""
    num_turn_questions: int = Field(default=0, ge=0)
    """Conversations of three turns in each mode: is the mode kept?"""
    turn_prompts: PathText | None = Field(default=None, exclude=True)
    """A file whose `prompt` column they are made of; none: sums."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampled sums."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of sampled sums."""
    max_new_tokens: int = Field(default=96, gt=0)
    """Room for an answer to a sum or in a conversation."""
    batch_size: int = Field(default=64, gt=0)
    """Prompts at once; fewer of long ones."""
    date_string: str = "01 July 2025"
    """The date in system blocks."""
    num_samples: int = Field(default=2, ge=0)
    """Transcripts of each mode in the report."""
    harness: list[Harness] = []
    """Standard benchmarks, by lm-eval."""

    @model_validator(mode="after")
    def _each_task_once(self) -> "EvalsRecipe":
        seen: set[tuple[str, str]] = set()
        for pair in [(task, mode) for one in self.harness for task in one.tasks for mode in one.modes]:
            if pair in seen:
                raise ValueError(f"harness: task '{pair[0]}' is asked twice in mode {pair[1]}; remove one")
            seen.add(pair)
        return self

    @model_validator(mode="after")
    def _whole_yarn(self) -> "EvalsRecipe":
        asked = self.yarn_needle_tokens or any(one.yarn for one in self.probes)
        if (self.yarn_context is None) != (not asked):
            raise ValueError("give both 'yarn_context' and 'yarn_needle_tokens', or neither (or yarn probes)")
        for length in (length for one in self.probes if one.yarn for length in one.lengths):
            if length > (self.yarn_context or 0):
                raise ValueError(
                    f"probes: lengths: {length} with yarn is beyond yarn_context {self.yarn_context}"
                )
        return self

    @model_validator(mode="after")
    def _each_once(self) -> "EvalsRecipe":
        names = [one.metric(length) for one in self.probes for length in one.lengths]
        names += [f"perplexity_{one.name}" for one in self.perplexity]
        names += [name for one in self.tool_calls for mode in one.modes for name in one.metrics(mode)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is measured twice; remove one, or give it another length or name")
        if self.turn_prompts and not self.num_turn_questions:
            raise ValueError("turn_prompts: num_turn_questions is 0, so nothing is asked; give a number")
        return self

    def needle(self, num_tokens: int) -> str:
        """`needle_4x`: a document of four times the shortest."""
        return f"needle_{num_tokens / min(self.needle_tokens, default=1):g}x"

    def metric_names(self, *, yarn: bool = True) -> list[str]:
        """All that it measures of a checkpoint with both modes, but for tasks of the harness."""
        yarn = yarn and self.yarn_context is not None
        found = [self.needle(length) for length in self.needle_tokens if self.num_needle_questions]
        for length in self.yarn_needle_tokens if yarn else []:
            found += [f"{self.needle(length)}_yarn"]
            found += [self.needle(length)] if length not in self.needle_tokens else []
        for mode in ("think", "no_think"):
            if self.num_arithmetic_questions:
                found += [f"{mode}_greedy", f"{mode}_sampled", f"mode_{mode}", f"mode_{mode}_sampled"]
            if self.num_turn_questions:
                found += [f"mode_{mode}_flag", f"mode_{mode}_turn3"]
            found += [name for one in self.tool_calls if mode in one.modes for name in one.metrics(mode)]
        found += ["preference_accuracy"] if self.num_preference_pairs else []
        found += [one.metric(length) for one in self.probes if yarn or not one.yarn for length in one.lengths]
        return [*found, *(f"perplexity_{one.name}" for one in self.perplexity)]

    def files(self) -> list[str]:
        """The files that are asked about."""
        found = [*(one.haystack for one in self.probes), *(one.path for one in self.perplexity)]
        found += [one.path for one in self.tool_calls]
        return [path for path in [*found, self.turn_prompts] if path]

    def located(self, file: Path) -> "EvalsRecipe":
        """The same with whole paths, from the folder of the recipe's `file`; Refusal where one is missing."""

        def whole(path: str | None) -> str | None:
            return path and str(local_path(path, file.parent))

        for path in self.files():
            if not local_path(path, file.parent).is_file():
                raise Refusal(f"{file}: {path}: no such file beside the recipe; mend the path")
        return self.model_copy(
            update={
                "probes": [one.model_copy(update={"haystack": whole(one.haystack)}) for one in self.probes],
                "perplexity": [one.model_copy(update={"path": whole(one.path)}) for one in self.perplexity],
                "tool_calls": [one.model_copy(update={"path": whole(one.path)}) for one in self.tool_calls],
                "turn_prompts": whole(self.turn_prompts),
                "harness": [
                    one.model_copy(update={"include_path": whole(one.include_path)}) for one in self.harness
                ],
            }
        )
