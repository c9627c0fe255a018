"""What is kept of the answers: candidates in order -> rows, a ledger with a reason for each, and counts.

    rows.parquet     what the mixtures read
    ledger.jsonl     {"ids": ["5f0c..."], "source": "gsm8k", "row": 7, ..., "verdict": "too_long"}
    ledger.json      counts by source and reason, tokens, the length gap of pairs

A function of journal and recipe: the order in which answers came in is no part of it.
"""

import json
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from smol_post import manifest
from smol_post.asking import Prompt
from smol_post.generate_config import Generation
from smol_post.messages import REASONING_KEYS, function_of
from smol_post.scripts import Candidate, Unit

KEPT = "kept"
ROWS, LEDGER, COUNTS = "rows", "ledger.jsonl", "ledger.json"
LENGTH_ALONE = 0.7  # AUC from which on the length of an answer is said to give the choice away (ours)
_ROWS_AT_ONCE = 512


class Seen(Protocol):
    """Texts that were there already."""

    def seen(self, text: str) -> bool:
        """Whether this one was, or one near it; it is from now on."""
        ...


class Sift:
    """The rules that hold between candidates: duplicates, how many of a prompt, how many in all."""

    def __init__(
        self,
        recipe: Generation,
        *,
        seen: Seen | None,
        find: Callable[[str], str | None],
        write: Callable[[dict[str, Any]], object] = lambda row: None,
        note: Callable[[dict[str, Any]], object] = lambda entry: None,
    ) -> None:
        """`find`: the suite that a text is in; `write` is given every row kept, `note` every verdict."""
        self.recipe, self._seen, self._find, self._write, self._note = recipe, seen, find, write, note
        self.num_rows = 0
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.suites: Counter[str] = Counter()
        self.kept_modes: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()  # of kept candidates, and of all
        self.lengths: list[tuple[int, int]] = []
        self.example: dict[str, Any] = {}  # the first row

    @property
    def enough(self) -> bool:
        """Whether num_rows are there."""
        return self.recipe.num_rows is not None and self.num_rows >= self.recipe.num_rows

    def skip(self, unit: Unit) -> None:
        """Count a prompt that is not asked."""
        if unit.prompt is not None and (suite := self._find(said(unit.prompt))):
            self.suites[suite] += 1
        entry = {"ids": [], "source": unit.source, "row": unit.row, "mode": unit.mode, "tokens": 0}
        self._count(entry, str(unit.reason))

    def take(self, prompt: Prompt, candidates: Iterable[Candidate]) -> None:
        """Judge the candidates of one prompt."""
        kept = 0
        for one in candidates:
            if self.enough:
                return
            reason = one.reason or self._reason(prompt, one, kept)
            kept += reason is None
            entry = {"ids": one.ids, "source": prompt.source, "row": prompt.row, "mode": prompt.mode,
                     "sample": one.sample, "tokens": one.tokens}  # fmt: skip
            self._count(entry, reason or KEPT)
            if reason is None:
                for row in one.rows:
                    self.example = self.example or clean(row)
                    self._write(clean(row))
                self.num_rows += len(one.rows)
                self.kept_modes[prompt.mode] += 1
                if one.lengths:
                    self.lengths.append(one.lengths)

    def _reason(self, prompt: Prompt, one: Candidate, kept: int) -> str | None:
        if self.recipe.max_kept is not None and kept >= self.recipe.max_kept:
            return "over_max_kept"
        text = f"{said(prompt)}\n{one.text}"
        if suite := self._find(text):
            self.suites[suite] += 1
            return "contaminated"
        return "duplicate" if self._seen and self._seen.seen(text) else None

    def _count(self, entry: dict[str, Any], verdict: str) -> None:
        self.counts[entry["source"]][verdict] += 1
        self.tokens["all"] += entry["tokens"]
        self.tokens[KEPT] += entry["tokens"] * (verdict == KEPT)
        self._note(entry | {"verdict": verdict})

    def summary(self) -> dict[str, Any]:
        """What `ledger.json` says."""
        reasons = sum(self.counts.values(), Counter())
        return {
            "rows": self.num_rows,
            "kept": reasons.pop(KEPT, 0),
            "rejected": dict(sorted(reasons.items())),
            "sources": {name: dict(sorted(counts.items())) for name, counts in self.counts.items()},
            "modes": dict(self.kept_modes),
            "tokens": {"kept": self.tokens[KEPT], "all": self.tokens["all"]},
            "contaminated": dict(sorted(self.suites.items())),
            "length_gap": length_gap(self.lengths) if self.lengths else None,
        }


def said(prompt: Prompt) -> str:
    """What a prompt says, but for its system message."""
    return "\n".join(str(one.get("content", "")) for one in prompt.messages if one["role"] != "system")


def length_gap(lengths: Sequence[tuple[int, int]]) -> dict[str, float]:
    """How the lengths of chosen and rejected answers, in tokens, differ.

    auc: how often a chosen answer drawn at random is longer than a rejected one drawn at random, ties counted
    as half (Mann and Whitney, 1947): 0.5 says nothing, and towards 1 or 0 length alone tells them apart.

    >>> gap = length_gap([(4, 2), (3, 3), (9, 1)])
    >>> gap["chosen_mean"], gap["rejected_median"], gap["chosen_longer"], gap["auc"]
    (5.333, 2, 0.667, 0.944)
    """
    chosen, rejected = [one for one, _ in lengths], sorted(one for _, one in lengths)
    above = sum(bisect_left(rejected, one) + bisect_right(rejected, one) for one in chosen)
    return {
        "pairs": len(lengths),
        "chosen_mean": round(statistics.fmean(chosen), 3),
        "chosen_median": statistics.median(chosen),
        "rejected_mean": round(statistics.fmean(rejected), 3),
        "rejected_median": statistics.median(rejected),
        "chosen_longer": round(sum(one > other for one, other in lengths) / len(lengths), 3),
        "auc": round(above / 2 / len(lengths) ** 2, 3),
    }


def length_warning(gap: dict[str, float] | None) -> str | None:
    """A line where length alone tells chosen from rejected; None where it does not, or there are no pairs."""
    if gap is None or max(gap["auc"], 1 - gap["auc"]) <= LENGTH_ALONE:
        return None
    which = "longer" if gap["auc"] > 0.5 else "shorter"
    return (
        f"length alone tells chosen from rejected (AUC {gap['auc']:.2f}): chosen answers are {which}, "
        f"{gap['chosen_mean']:.0f} tokens against {gap['rejected_mean']:.0f} in the mean; a model may learn "
        "that and nothing else; set filters.max_length_ratio"
    )


_REMEDIES = {
    "failed": "answers.jsonl says why of each",
    "unfinished": "raise the teacher's max_new_tokens",
    "wrong_mode": "try mode_by: system; a teacher that does not think has modes: [no_think], mode_by: none",
}


def advice(summary: dict[str, Any]) -> str | None:
    """A line where one fault that a recipe can mend left out half of the candidates or more; else None.

    >>> advice({"kept": 1, "rejected": {"unfinished": 8}})
    "8 of 9 answers are unfinished: raise the teacher's max_new_tokens"
    >>> advice({"kept": 9, "rejected": {"unfinished": 8}})
    """
    number, reason = max((summary["rejected"].get(one, 0), one) for one in _REMEDIES)
    total = summary["kept"] + sum(summary["rejected"].values())
    if not number or 2 * number < total:
        return None
    return f"{number:,} of {total:,} answers are {reason}: {_REMEDIES[reason]}"


_TEXTS = ("role", "content", *REASONING_KEYS, "name", "tool_call_id")


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the keys that its Parquet file has, and no others; arguments of calls as JSON text."""
    return {key: [_message(one) for one in value] if isinstance(value, list) else value
            for key, value in row.items()}  # fmt: skip


def _message(message: dict[str, Any]) -> dict[str, Any]:
    kept = {key: message[key] for key in (*_TEXTS, "weight") if message.get(key) is not None}
    if calls := message.get("tool_calls"):
        kept["tool_calls"] = [_call(function_of(call)) for call in calls]
    return kept


def _call(inner: dict[str, Any]) -> dict[str, Any]:
    given = inner.get("arguments", {})
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {"type": "function", "function": {"name": inner["name"], "arguments": text}}


class Rows:
    """The file of rows while it is written, beside its place; `finish` puts it there."""

    def __init__(self, folder: Path, form: str, kind: str) -> None:
        """`form`: jsonl or parquet; `kind`: pairs, or else SFT rows."""
        self.path = folder / f"{ROWS}.{form}"
        self._part = self.path.with_name(self.path.name + ".tmp")
        self._waiting: list[dict[str, Any]] = []
        if form == "jsonl":
            self._stream: Any = self._part.open("w", encoding="utf-8")
        else:
            import pyarrow.parquet as pq

            self._stream = pq.ParquetWriter(self._part, schema(kind))

    def write(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._waiting.append(row)
        if len(self._waiting) == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self.path.suffix == ".jsonl":
            self._stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._waiting)
        else:
            import pyarrow as pa

            self._stream.write_table(pa.Table.from_pylist(self._waiting, schema=self._stream.schema))
        self._waiting = []

    def finish(self) -> Path:
        """The file, whole and in its place."""
        self._flush()
        self._stream.close()
        manifest.sync(self._part)
        self._part.replace(self.path)
        return self.path


def schema(kind: str) -> Any:
    """The columns of a Parquet file, the same whatever its rows have, so that files can be mixed."""
    import pyarrow as pa

    texts = pa.list_(pa.string())
    function = pa.struct({"name": pa.string(), "arguments": pa.string()})
    call = pa.struct({"type": pa.string(), "function": function})
    turn = {key: pa.string() for key in _TEXTS} | {"weight": pa.int64(), "tool_calls": pa.list_(call)}
    messages = pa.list_(pa.struct(turn))
    kwargs = {"enable_thinking": pa.bool_(), "tools": texts, "xml_tools": texts, "python_tools": texts}
    kwargs |= {"custom_instructions": pa.string(), "date_string": pa.string()}
    columns = ("prompt", "chosen", "rejected") if kind == "pairs" else ("messages",)
    fields = {key: messages for key in columns} | {"chat_template_kwargs": pa.struct(kwargs)}
    return pa.schema(fields | {"source": pa.string()})
