"""What a recipe may say of how generated rows are judged, and of how conversations go on."""

from typing import Literal

from pydantic import Field, model_validator

from smol_post.strict import PathText, Strict


class Limits(Strict):
    """What any answer must keep to.

    Repetition is Gopher's measure of duplicate n-grams (Rae et al., 2021, table A1), in windows, so that a
    loop counts however long the text before it. The numbers are ours: at n = 10 parallel tool calls repeat
    0.74 of their words, at 24 no more than 0.26, technical documents 0.34; a paragraph said twice 0.5.
    """

    max_tokens: int | None = Field(default=None, gt=0)
    """Of an answer, thoughts included; none: not judged."""
    max_repetition: float = Field(default=0.4, gt=0, le=1)
    """Share of words that may lie in n-grams that stood before; 1: all."""
    repetition_n: int = Field(default=24, gt=1, le=100)
    """Words of such an n-gram."""
    repetition_window: int = Field(default=512, ge=20, le=100_000)
    """Words in a row that are looked at."""
    max_length_ratio: float | None = Field(default=None, ge=1)
    """Of the tokens of a pair's answers, either way; none: not judged."""

    @model_validator(mode="after")
    def _windows_of_ngrams(self) -> "Limits":
        if self.repetition_window < 2 * self.repetition_n:
            raise ValueError(
                f"repetition_window: found {self.repetition_window}, wanted at least "
                f"{2 * self.repetition_n}, two n-grams of repetition_n"
            )
        return self


class Check(Strict):
    """How an answer is held against its row: what follows the thought, and the column with the reference.

    numeric: the last number, or the one that is boxed or said to be the answer; column: a number, or a
    text with one. tolerance: relative. choice: a letter; column: the letter, the option's index from 0
    or its text; options: the column with the list of texts. json_schema: JSON, bare or in one fence;
    column: the schema. constraints: every instruction of IFEval (Zhou et al., 2023); column: their ids,
    kwargs: their arguments.
    """

    kind: Literal["numeric", "choice", "json_schema", "constraints"]
    """How an answer is held against its row."""
    column: str
    """Column with the reference: number, letter, schema or instruction ids."""
    tolerance: float = Field(default=0.0, ge=0, lt=1)
    """Relative, of numbers."""
    options: str | None = None
    """Column with the options' texts, of choices."""
    kwargs: str = "kwargs"
    """Column with the instructions' arguments, of constraints."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> "Check":
        for name, kind in (("tolerance", "numeric"), ("options", "choice"), ("kwargs", "constraints")):
            if name in self.model_fields_set and self.kind != kind:
                raise ValueError(f"{name}: goes with kind: {kind}, this check is {self.kind}; remove it")
        return self

    def columns(self) -> list[str]:
        """The columns of a row that it reads."""
        return [
            self.column,
            *([self.options] if self.options else []),
            *([self.kwargs] if self.kind == "constraints" else []),
        ]


class Decontaminate(Strict):
    """Evals recipes and files that share no `n` words in a row with rows (Brown et al., 2020, app. C)."""

    n: int = Field(default=13, gt=1, le=100)
    """Words in a row that count as overlap."""
    suites: list[PathText] = Field(default=[])
    """Evals recipes."""
    paths: list[PathText] = Field(default=[])
    """Files: rows or text."""


class Deduplicate(Strict):
    """Rows that are left out as copies: equal after normalisation, and by MinHash of n-grams of words.

    Defaults are FineWeb's (Penedo et al., 2024): 5-grams, 14 buckets of 8 hashes. Two texts of Jaccard
    similarity s meet in a bucket with probability 1 - (1 - s^8)^14: 0.77 at s = 0.75, 0.05 at 0.5.
    """

    near: bool = True
    """Near copies too, by MinHash."""
    n: int = Field(default=5, gt=0, le=100)
    """Words of an n-gram."""
    num_buckets: int = Field(default=14, gt=0, le=256)
    """More find more."""
    hashes_a_bucket: int = Field(default=8, gt=0, le=64)
    """More find less."""


class Turns(Strict):
    """How conversations go on. switch_share: chance that a turn is in the other mode than the one before.

    num_turns: Multi-IF has three (He et al., 2024). kinds: of constraints, by lm-eval's names; None: those
    that an answer to any question can keep to (`constraints.KINDS`).
    """

    num_turns: int = Field(default=3, ge=1, le=20)
    """Turns of a conversation."""
    switch_share: float = Field(default=0.5, ge=0, le=1)
    """Chance that a turn is in the other mode than the one before."""
    kinds: list[str] | None = Field(default=None, min_length=1)
    """Constraints to draw from, by lm-eval's names; none: those that any answer can keep to."""
