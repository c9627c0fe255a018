"""Refusals: what was found, what was wanted, what to do, in one line. Exit code 2, no traceback."""

import difflib
import json
import re
from typing import Any

# Tokens by the forms in use, the user part of a URL, and signed queries.
SECRET = re.compile(
    r"\b(?:hf_|gh[pousr]_|sk-)[A-Za-z0-9]{20,}|\b(?:github_pat_|glpat-|sk-(?:proj|ant)-)[\w-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/\s@'\"]+(?=@)"
    r"|(?<=[?&])(?i:[\w-]*(?:token|signature|secret|api_?key))=[^&\s'\"]+"
)


def redacted(text: str) -> str:
    """A text without what looks like a secret.

    >>> redacted("https://ann:pw@host/rows.jsonl?page=2 with hf_abcdefghijklmnopqrstuvw")
    'https://***@host/rows.jsonl?page=2 with ***'
    """
    return SECRET.sub("***", text)


class _OneLine(Exception):
    """A message of one printable line, not endless and without secrets, whatever it quotes."""

    def __init__(self, text: str) -> None:
        r"""Whatever would not print is escaped.

        >>> str(Refusal("a\nb: found \ud800"))
        'a\\nb: found \\ud800'
        """
        text = redacted(text)
        text = text if len(text) <= 1500 else f"{text[:1000]} ... {text[-400:]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


class Refusal(_OneLine):
    """Input we will not run: one line that says where, what was found, what was wanted and what to do."""


class Failure(_OneLine):
    """A run that cannot go on, for a reason we know: one line as in a Refusal, exit code 1, no traceback."""


class Stopped(KeyboardInterrupt):
    """SIGTERM, or SIGUSR1 while training: what is under way is saved, and the process ends; exit code 75."""


def did_you_mean(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` or the list of what exists, for the end of a refusal."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def describe(value: Any) -> str:
    """A value and its type for an error, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def text_number(value: Any) -> str:
    """The remedy for a number that YAML read as text (`1e-6` has no dot), else nothing."""
    if isinstance(value, str):
        try:
            return f"; YAML reads {value} as text, write {float(value):.1e}"
        except ValueError:
            pass
    return ""
