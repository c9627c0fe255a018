"""Verifiable constraints on an answer, as in IFEval (Zhou et al., 2023), in the words of lm-eval's registry.

draw(rng, kinds=["punctuation:no_comma"])
->  Constraint("punctuation:no_comma", {}): "In your entire response, refrain from the use of any commas."
"""

import functools
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from smol_post.refusal import Refusal, describe, did_you_mean

# What an answer of any subject and length can keep to: no counts of rare letters, no JSON, no other language.
KINDS = (
    "keywords:existence",
    "keywords:forbidden_words",
    "length_constraints:number_paragraphs",
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "detectable_format:multiple_sections",
    "detectable_format:title",
    "startend:end_checker",
    "startend:quotation",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "punctuation:no_comma",
)
# They count by nltk's punkt_tab, which is not in the package.
_BY_NLTK = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
_PROMPT = "combination:repeat_prompt"  # its argument is a prompt, which is not drawn
# Beyond the registry's own table: sections are marked "Section" or "SECTION".
_CASES = {
    "change_case:english_capital",
    "change_case:english_lowercase",
    "detectable_format:multiple_sections",
}


class Constraint(NamedTuple):
    """An instruction of the registry, with its arguments."""

    id: str
    kwargs: dict[str, Any]

    @property
    def instruction(self) -> str:
        """What a person asks for, in the registry's words."""
        return self._built()[1]

    def holds(self, text: str) -> bool:
        """Whether an answer keeps to it, strictly: no first or last line is forgiven."""
        return bool(text.strip()) and bool(self._built()[0].check_following(text))

    def _built(self) -> tuple[Any, str]:
        checker = _registry().INSTRUCTION_DICT[self.id](self.id)
        return checker, checker.build_description(**self.kwargs)


@functools.cache
def _registry() -> Any:
    """lm-eval's registry, from an import that fetches nothing, and a language detector that draws nothing."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"  # the first process would download data of nltk
    try:
        import langdetect
        from lm_eval.tasks.ifeval import instructions_registry
    except ImportError as error:
        raise Refusal(
            f"constraints: lm-eval cannot be imported ({error}); pip install 'smol_post[eval]'"
        ) from None
    finally:
        os.environ.pop("LOCAL_RANK")
        os.environ.update({"LOCAL_RANK": before} if before is not None else {})
    langdetect.DetectorFactory.seed = 0
    return instructions_registry


def check_kinds(kinds: Sequence[str]) -> None:
    """ValueError for a kind that cannot be drawn, or judged without data of nltk."""
    for kind in kinds:
        if kind in (*_BY_NLTK, _PROMPT):
            raise ValueError(f"kinds: '{kind}' needs a prompt or data of nltk; remove it")
        if kind not in _registry().INSTRUCTION_DICT:
            known = sorted(set(_registry().INSTRUCTION_DICT) - {*_BY_NLTK, _PROMPT})
            raise ValueError(f"kinds: lm-eval knows no '{kind}'{did_you_mean(kind, known)}")


def draw(
    rng: random.Random, *, kinds: Sequence[str] = KINDS, so_far: Sequence[Constraint] = ()
) -> Constraint | None:
    """A constraint that contradicts none so far, its arguments drawn by the registry; None: none is left."""
    left = [kind for kind in kinds if all(_go_together(kind, one.id) for one in so_far)]
    while left:
        kind, state = rng.choice(left), random.getstate()
        random.seed(rng.getrandbits(64))  # the registry draws from the global generator
        try:
            checker = _registry().INSTRUCTION_DICT[kind](kind)
            checker.build_description()
        finally:
            random.setstate(state)
        drawn = Constraint(kind, checker.get_instruction_args() or {})
        if not _forbids([*so_far, drawn]):
            return drawn
        left.remove(kind)
    return None


def _go_together(kind: str, other: str) -> bool:
    conflicts = _registry().INSTRUCTION_CONFLICTS
    known = kind == other or kind in conflicts.get(other, ()) or other in conflicts.get(kind, ())
    return not known and not {kind, other} <= _CASES


def _forbids(wanted: Sequence[Constraint]) -> bool:
    """Whether one constraint forbids a word that another one demands."""
    forbidden = {word for one in wanted for word in one.kwargs.get("forbidden_words") or ()}
    keys = ("keywords", "keyword", "first_word", "end_phrase")
    demanded = " ".join(str(one.kwargs[key]) for one in wanted for key in keys if one.kwargs.get(key)).lower()
    return any(re.search(rf"\b{re.escape(word.lower())}\b", demanded) for word in forbidden)


def read(
    ids: Any, kwargs: Any, columns: tuple[str, str] = ("instruction_id_list", "kwargs")
) -> list[Constraint]:
    """Constraints from the two columns of google/IFEval, or its kin: arguments as objects or as JSON text.

    Arguments that are null were filled in by Arrow, and go. Raises ValueError, naming the column, for unknown
    instructions, and for arguments that their instruction does not take.
    """
    if isinstance(kwargs, str):
        kwargs = _parsed(kwargs, columns[1])
    if not isinstance(ids, list) or not ids or not all(isinstance(one, str) for one in ids):
        raise ValueError(f"{columns[0]}: found {describe(ids)}, wanted a list of instructions")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        raise ValueError(f"{columns[1]}: found {describe(kwargs)}, wanted a list of {len(ids)} objects")
    found = []
    for name, given in zip(ids, kwargs, strict=True):
        given = _parsed(given, columns[1]) if isinstance(given, str) else given
        if name not in _registry().INSTRUCTION_DICT:
            hint = did_you_mean(name, sorted(_registry().INSTRUCTION_DICT))
            raise ValueError(f"{columns[0]}: lm-eval knows no '{name}'{hint}")
        if not isinstance(given, Mapping | None):
            raise ValueError(f"{columns[1]}: found {describe(given)}, wanted an object")
        one = Constraint(name, {key: value for key, value in (given or {}).items() if value is not None})
        missing = (
            set(_registry().INSTRUCTION_DICT[name](name).get_instruction_args_keys()) - one.kwargs.keys()
        )
        if missing:  # else the registry would draw it, and judge by another one than was asked
            raise ValueError(f"{columns[1]}: {name}: {', '.join(sorted(missing))} is missing")
        try:
            one.holds("a word")
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise ValueError(f"{columns[1]}: {name}: {' '.join(str(error).split())}") from None
        except LookupError:
            raise ValueError(
                f"{columns[0]}: {name} wants nltk's punkt_tab; fetch it: python -m nltk.downloader punkt_tab"
            ) from None
        found.append(one)
    return found


def _parsed(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{column}: not JSON ({error})") from None
