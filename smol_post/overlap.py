"""What generated rows share with suites of evals, and with each other.

    Suites(Decontaminate(suites=["evals.yaml"]), folder).find("Notes: pet cat. the old lake. ...")
    ->  "evals.yaml: needle questions": 13 words in a row are those of a question; None where none are
    Seen(Deduplicate()).seen("a text")  ->  False, and True when it comes again, or one near it

A million rows of 300 words take one core 9 minutes against suites of whatever size, and 13 minutes and 1 GB
against each other.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from smol_post import loading, synthetic
from smol_post.evals_config import EvalsRecipe, Harness, Probe
from smol_post.judging_config import Decontaminate, Deduplicate
from smol_post.refusal import Refusal
from smol_post.strict import local_path

_COMMON = 10  # documents of a suite
# Letters, digits and _ in a row; of scripts without spaces each letter.
_WORD = re.compile(r"[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+|\w")
Texts = Iterable[str]


class Suites:
    """N-grams of words of all that models are asked in evals; case and punctuation make no difference.

    As in appendix C of GPT-3 (Brown et al., 2020), one n-gram in common is contamination. An n-gram that
    more than 10 documents of a suite have in common is a wording of the suite (ours), which identifies no
    question: it is left out. A text of fewer than n words is compared whole, marks and all, with a text
    and with each of its lines: "3+4*2" is in no way "3-4*2", nor a part of "13+4*2". Needle documents of
    the tiny recipe, made of seventeen words and some values, need no rule of their own: of 20,000 rows by
    other seeds none had 13 words in a row in common with the questions.
    """

    def __init__(self, config: Decontaminate, folder: Path) -> None:
        """Paths count from `folder`. Raises Refusal where a recipe or file cannot be read."""
        self.n = config.n
        self.names: list[str] = []
        self._grams: dict[int, int] = {}  # hash of n words -> index of the name
        self._short: dict[str, int] = {}  # a text of fewer -> the same
        for path in config.suites:
            recipe = loading.load_recipe(local_path(path, folder))
            if not isinstance(recipe, EvalsRecipe):
                raise Refusal(f"{path}: found a recipe of stage {recipe.stage}, wanted one of evals")
            for name, texts in questions(recipe):
                self._add(f"{path}: {name}", texts)
        for path in config.paths:
            self._add(path, _texts_of(str(local_path(path, folder))))

    def _add(self, name: str, texts: Texts) -> None:
        counts: Counter[int] = Counter()
        for text in texts:
            words = _words(text)
            if 0 < len(words) < self.n:  # of marks alone there are lines in any text
                self._short.setdefault(_plain(text), len(self.names))
            counts.update(set(_grams(words, self.n)))
        for gram, number in counts.items():
            if number <= _COMMON:
                self._grams.setdefault(gram, len(self.names))
        self.names.append(name)

    def find(self, text: str) -> str | None:
        """The first suite that has something in common with a text; None: none has."""
        grams = _grams(_words(text), self.n)
        found = next((self._grams[one] for one in grams if one in self._grams), None)
        if found is None and self._short:
            whole = (_plain(one) for one in (text, *text.splitlines()))
            found = next((self._short[one] for one in whole if one in self._short), None)
        return None if found is None else self.names[found]


def _words(text: str) -> list[str]:
    """Words in one case and one Unicode form, of which accents and widths have several."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _grams(words: list[str], n: int) -> Iterator[int]:
    return (hash(gram) for gram in zip(*(words[at:] for at in range(n)), strict=False))


def _plain(text: str) -> str:
    """A text without what does not count between rows: case, and how much space there is."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def questions(recipe: EvalsRecipe) -> Iterator[tuple[str, Texts]]:
    """(name, texts) of all that a recipe asks, with its own seed and options."""

    def made(
        name: str, number: int, pick: Callable[[dict[str, Any]], Texts], **options: Any
    ) -> Iterator[str]:
        rows = synthetic.generate(name, num_rows=number, seed=recipe.seed, **options)
        return (text for row in rows for text in pick(row))

    lengths = [(one, recipe.num_needle_questions) for one in recipe.needle_tokens]
    lengths += [(one, recipe.num_yarn_questions) for one in recipe.yarn_needle_tokens]
    options = recipe.needle_options
    needles = [
        made("needle_questions", number, lambda row: [row["prompt"]], num_tokens=length, **options)
        for length, number in lengths
    ]
    yield "needle questions", chain.from_iterable(needles)
    number, options = recipe.num_arithmetic_questions, recipe.arithmetic_options
    if number:
        yield "arithmetic questions", made("arithmetic_questions", number, _last, **options)
    if recipe.num_preference_pairs:
        yield (
            "preference pairs",
            made("preference_pairs", recipe.num_preference_pairs, _last, **recipe.preference_options),
        )
    if recipe.num_turn_questions:
        from smol_post import scoring

        said = scoring.questions(recipe.turn_prompts, recipe.num_turn_questions, recipe.seed, options)
        yield "turns", chain.from_iterable(said)
    for probe in recipe.probes:
        yield probe.metric(min(probe.lengths)).rpartition("_")[0] or probe.kind, _needles(probe, recipe)
    for one in recipe.perplexity:
        yield f"perplexity {one.name}", _texts_of(one.path)
    for asked in recipe.harness:
        yield from _tasks(asked)


def _last(row: dict[str, Any]) -> Texts:
    """What is asked; the system message only sets the mode."""
    return [(row.get("prompt") or row["messages"])[-1]["content"]]


class _Words:
    """Stands for a tokenizer, which keys and values of a probe do not depend on."""

    bos_token_id = None

    def __call__(self, text: str, **how: Any) -> dict[str, list[str]]:
        return {"input_ids": text.split()}


def _needles(probe: Probe, recipe: EvalsRecipe) -> Iterator[str]:
    """The questions of a probe, with as much of their haystack as they have needles."""
    from smol_post import probes

    plain, how = probe.model_copy(update={"form": "text"}), {"date_string": "", "seed": recipe.seed}
    length = 200 + 40 * probe.num_needles
    for index in range(probe.num_questions):
        yield probes.question(_Words(), plain, index, num_tokens=length, **how).text  # type: ignore[arg-type]


def _tasks(asked: Harness) -> Iterator[tuple[str, Texts]]:
    """The questions of lm-eval's tasks, few-shot examples aside; Refusal where lm-eval is not there."""
    from smol_post import harness

    for one in harness.load(asked):
        for task in one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one]:
            texts = [(task.doc_to_text(doc), doc) for doc in task.eval_docs]
            yield (
                task.task_name,
                [text if isinstance(text, str) and text.strip() else str(doc) for text, doc in texts],
            )


def _texts_of(path: str) -> Iterator[str]:
    """The texts of a file: of its rows text, prompt or the user's messages; of another file all of it."""
    from smol_post import sources
    from smol_post.config import Source
    from smol_post.strict import FILES

    if not path.endswith(FILES):
        try:
            yield Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"{path}: not readable as text ({error}); give a UTF-8 file") from None
        return
    for raw in sources.read_rows(Source(name=path, path=path), folder=Path()):
        try:
            row = sources.parse_row(raw.content, columns={})
            said = next((row[key] for key in ("text", "prompt", "messages", "chosen") if row.get(key)), None)
            if isinstance(said, list):
                said = "\n".join(one["content"] for one in said if one["role"] == "user")
            if not isinstance(said, str):
                raise ValueError("no text, prompt, messages or chosen")
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(f"{path}: row {raw.number}: {error}; mend the row") from None
        yield said


class Seen:
    """Texts that were there: equal but for case and spaces, or near by MinHash (Broder, 1997) in buckets.

    A shingle is n words; its hash h becomes (a h + b mod 2^64) >> 32 for each of the odd a. Texts of
    fewer than n words are only compared whole. A row takes 8 bytes and an entry of a set for each bucket;
    answers to one long prompt are near each other if they are short.
    """

    def __init__(self, config: Deduplicate) -> None:
        """Nothing was there."""
        self.config = config
        number = config.num_buckets * config.hashes_a_bucket
        drawn = np.random.default_rng(0).integers(2**64, size=(2, number, 1), dtype=np.uint64)
        self._factors, self._terms = drawn[0] | np.uint64(1), drawn[1]
        self._there: set[int] = set()

    def seen(self, text: str) -> bool:
        """Whether this text was there, or one near it; it is from now on."""
        keys = [hash(_plain(text)), *self._buckets(text)]
        if any(key in self._there for key in keys):
            return True
        self._there.update(keys)
        return False

    def _buckets(self, text: str) -> Iterator[int]:
        words, n = _words(text), self.config.n
        if not self.config.near or len(words) < n:
            return iter(())
        grams = {" ".join(gram).encode() for gram in zip(*(words[at:] for at in range(n)), strict=False)}
        digests = b"".join(blake2b(gram, digest_size=8).digest() for gram in sorted(grams))
        hashes = np.frombuffer(digests, np.uint64)
        least = ((self._factors * hashes + self._terms) >> np.uint64(32)).min(axis=1).astype(np.uint32)
        rows = least.reshape(self.config.num_buckets, -1)
        return (hash((at, row.tobytes())) for at, row in enumerate(rows))
