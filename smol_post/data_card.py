"""The dataset card of generated rows: README.md with metadata of the Hub, from what the run recorded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smol_post.refusal import redacted

NAME = "README.md"
_LONGEST = 600  # characters of a text in the example
_KINDS = {
    "traces": "Answers of a teacher to given prompts, as rows for supervised fine-tuning.",
    "pairs": "Preference pairs: to each prompt a chosen and a rejected answer.",
    "turns": "Conversations of several turns, in which each turn adds a constraint a program can verify, "
    "and modes may switch between turns; after Multi-IF (He et al., 2024, arXiv:2410.15553).",
}
_REASONS = {
    "unfinished": "cut, or a thought that never closes",
    "bad_text": "a control token, or half a character",
    "empty": "no answer",
    "wrong_mode": "no thought in thinking mode, or one without it",
    "too_long": "more tokens than the recipe allows",
    "repetition": "a loop",
    "wrong_answer": "not what the reference of the row says",
    "equal": "both answers alike",
    "length_skewed": "one answer much longer than the other",
    "contaminated": "shares n words in a row with an evaluation suite",
    "duplicate": "there already, or one near it",
    "failed": "the teacher would not answer",
    "both_right": "the rejected answer is right as well",
    "over_max_kept": "enough answers to this prompt were kept",
    "bad_row": "the row of the source cannot be read; not asked",
    "other_mode": "the row fixes a mode that was not asked for; not asked",
    "fixed_mode": "the row fixes a mode, which is to switch; not asked",
    "no_question": "the row does not end with a question; not asked",
    "no_answer": "the row has no answer to be chosen; not asked",
    "python_tools": "a server has no place for the row's tools; not asked",
}
_COLUMNS = {
    "messages": "the conversation; thoughts stand in `<think>` blocks of the content, and a turn with "
    "`weight` 0 carries no loss",
    "prompt": "the conversation up to where the model speaks",
    "chosen": "one assistant message",
    "rejected": "one assistant message",
    "chat_template_kwargs": "variables of the chat template: `enable_thinking`, and tools if there are some",
    "source": "the name of the source of the prompt",
}


def write(folder: Path, about: Mapping[str, Any]) -> Path:
    """Write the card; its path.

    about: name; stage (traces, pairs, turns); file (of the rows); recipe (its dump); sources (name ->
    what it comes from: {"path", "revision", ...}); ledger (what ledger.json says: rows, kept, rejected,
    sources, tokens, contaminated, length_gap); warnings (lines); versions; example (a row); teachers (key
    -> what is known of them).
    """
    from huggingface_hub import DatasetCard

    path = folder / NAME
    DatasetCard(redacted(text(about))).save(path)
    return path


def text(about: Mapping[str, Any]) -> str:
    """The card: a block of YAML between dashes, then Markdown."""
    from huggingface_hub import DatasetCardData

    number = about["ledger"]["rows"]
    data = DatasetCardData(
        pretty_name=about["name"],
        task_categories=["text-generation"],
        size_categories=[_size(number)],
        tags=["synthetic", "conversational", about["stage"]],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": about["file"]}]}],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(about)}"


def _size(rows: int) -> str:
    """The Hub's size category.

    >>> _size(999), _size(1000), _size(2_500_000)
    ('n<1K', '1K<n<10K', '1M<n<10M')
    """
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    at = len(str(rows)) - 3
    return "n<1K" if at <= 0 else f"{names[at - 1]}<n<{names[at]}" if at < len(names) else "n>1B"


def _body(about: Mapping[str, Any]) -> str:
    ledger, recipe = about["ledger"], about["recipe"]
    parts = [
        f"# {about['name']}",
        f"{_KINDS[about['stage']]} {_whose(about)} "
        f"{ledger['rows']:,} rows, {ledger['tokens']['kept']:,} tokens of answers.",
        "## How it was made",
        _table(["teacher", "what", "sampling"], [_teacher(*one) for one in about["teachers"].items()]),
        "Prompts come from:",
        _table(["source", "from", "asked and kept"], [_source(about, name) for name in about["sources"]]),
        "## What was left out",
        f"{ledger['kept']:,} candidates were kept. The others, by the first rule that they break:",
        _table(
            ["reason", "candidates", "meaning"],
            [[key, f"{count:,}", _meaning(key)] for key, count in ledger["rejected"].items()],
        ),
        *_contamination(recipe.get("decontaminate"), ledger.get("contaminated") or {}),
        *_lengths(ledger.get("length_gap")),
        *(f"**Warning:** {line}." for line in about.get("warnings", ())),
        "## Columns",
        _table(["column", "holds"], [[f"`{key}`", _COLUMNS.get(key, "")] for key in about["example"]]),
        "One row, long texts cut:",
        f"```json\n{json.dumps(_cut(about['example']), ensure_ascii=False, indent=2)}\n```",
        "## Limits",
        "Answers were judged by rules, not read by people: what no rule looks at may be wrong. A teacher's "
        "errors, opinions and style are in its answers.",
        "The licences of the sources, and the terms of the teachers, are not known here; whoever publishes "
        "these rows has to look them up. No language is declared, since none was measured.",
        "## Recipe",
        f"```json\n{json.dumps(recipe, ensure_ascii=False, indent=2, default=str)}\n```",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _whose(about: Mapping[str, Any]) -> str:
    if about["stage"] == "pairs" and "strong" not in about["teachers"]:
        return "Rejected answers were written by a model; chosen ones are those of the sources."
    return "Answers without a `weight` were written by a model, none by a person."


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; nothing without rows."""
    lines = [heads, ["---"] * len(heads), *rows] if rows else []
    return "\n".join(
        f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in line)} |" for line in lines
    )


def _teacher(key: str, about: Mapping[str, Any]) -> list[str]:
    what = str(about.get("model") or about.get("checkpoint") or "")
    others = {name: value for name, value in about.items() if name not in ("model", "checkpoint")}
    said = ", ".join(f"{name} {value}" for name, value in others.items() if value not in (None, {}, []))
    return [key, what, said]


def _meaning(reason: str) -> str:
    whose, _, fault = reason.partition("_")
    if whose in ("chosen", "rejected") and fault in _REASONS:
        return f"of the {whose} answer: {_REASONS[fault]}"
    return _REASONS.get(reason, "")


def _source(about: Mapping[str, Any], name: str) -> list[str]:
    origin = about["sources"][name]
    known = origin.items() if isinstance(origin, Mapping) else [("", origin)]
    where = ", ".join(f"{key} {value}".strip() for key, value in known if value is not None)
    counts = about["ledger"]["sources"].get(name, {})
    return [name, where, f"{sum(counts.values()):,} and {counts.get('kept', 0):,}"]


def _contamination(asked: Mapping[str, Any] | None, found: Mapping[str, int]) -> list[str]:
    if not asked:
        return ["Nothing was held against evaluation suites: do not report scores on any without doing so."]
    suites = ", ".join([*asked["suites"], *asked["paths"]])
    lines = [f"Held against {suites}: rows that share {asked['n']} words in a row with them were left out."]
    rows = [[name, f"{count:,}"] for name, count in found.items()]
    return [*lines, _table(["suite", "candidates left out"], rows)]


def _lengths(gap: Mapping[str, float] | None) -> list[str]:
    if not gap:
        return []
    line = (
        f"Chosen answers have {gap['chosen_mean']:,.1f} tokens in the mean, rejected ones "
        f"{gap['rejected_mean']:,.1f}; chosen is longer in {gap['chosen_longer']:.0%} of pairs, length "
        f"alone tells them apart with an AUC of {gap['auc']:.2f} (0.5: not at all)."
    )
    return ["## Lengths", line]


def _cut(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_cut(one) for one in value]
    return f"{value[:_LONGEST]} ..." if isinstance(value, str) and len(value) > _LONGEST else value
