"""Tools of one's own: a JSON file of them, and the commands that they run.

    [{"type": "function", "function": {"name": "weather", "parameters": {...}}, "command": ["./weather.py"]}]

A command gets the arguments of a call as JSON on standard input and says the result on standard output. Its
words stand in the file and nowhere else: there is no shell, and nothing that a model writes becomes a word.
"""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smol_post import tool_calls
from smol_post.refusal import Refusal, describe

TIMEOUT = 60.0  # seconds; our choice
MAX_RESULT = 100_000  # bytes; our choice: some 30,000 tokens, no context holds more beside a conversation


class Command(NamedTuple):
    """What a tool runs, and in which folder: that of its file."""

    words: list[str]
    folder: Path
    timeout: float


class Toolbox(NamedTuple):
    """Tools as a template is given them, and their commands by name."""

    tools: list[Any]
    commands: dict[str, Command]
    names: set[str]


def load(path: Path, *, python: bool = False) -> Toolbox:
    """Read a file of tools; with `python`, one may also be a signature, or {"signature": ...} in its place.

    Raises Refusal: no list of tools, a schema that is none, a name that stands twice, a command that is no
    list of words.
    """
    if not path.is_file():
        raise Refusal(f"{path}: no such file; give a JSON list of tools")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{path}: not readable as JSON ({error}); mend it") from None
    if not isinstance(given, list) or not given:
        raise Refusal(f"{path}: found {describe(given)}, wanted a JSON list of tools")
    box = Toolbox([], {}, set())
    for number, one in enumerate(given, 1):
        where = f"{path}: tool {number}"
        extra = (
            {key: one[key] for key in ("command", "timeout") if key in one} if isinstance(one, dict) else {}
        )
        shown = {key: one[key] for key in one if key not in extra} if isinstance(one, dict) else one
        if python and isinstance(shown, dict) and isinstance(shown.get("signature"), str):
            shown = shown["signature"]
        if not isinstance(shown, dict) and not (python and isinstance(shown, str)):
            raise Refusal(f"{where}: found {describe(one)}, wanted an object such as OpenAI's tools")
        try:
            name = tool_calls.read_tool(shown, python=python).name
        except ValueError as error:
            raise Refusal(f"{where}: {error}; mend it") from None
        if name in box.names:
            raise Refusal(f"{where}: the name '{name}' stands twice; a tool needs one of its own")
        box.tools.append(shown)
        box.names.add(name)
        if extra:
            box.commands[name] = _command(where, path, **extra)
    return box


def _command(where: str, path: Path, command: Any = None, timeout: Any = TIMEOUT) -> Command:
    if not isinstance(command, list) or not command or not all(_is_word(one) for one in command):
        raise Refusal(
            f'{where}: command: found {describe(command)}, wanted a list of words: ["./weather.py"]'
        )
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout <= 86_400:
        raise Refusal(f"{where}: timeout: found {describe(timeout)}, wanted seconds, a day at most")
    return Command(command, path.resolve().parent, float(timeout))


def _is_word(one: Any) -> bool:
    return isinstance(one, str) and bool(one) and "\0" not in one


def run(command: Command, arguments: Mapping[str, Any]) -> str:
    """What the command says, or a sentence on why it says nothing; its children end with it."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command.words, cwd=command.folder, stdin=subprocess.PIPE, stdout=said, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return f"error: the tool could not be started ({error.strerror})"
        try:
            process.communicate(json.dumps(arguments).encode(), timeout=command.timeout)
        except subprocess.TimeoutExpired:
            return f"error: the tool did not end within {command.timeout:g} seconds and was stopped"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        size = os.fstat(said.fileno()).st_size
        said.seek(0)
        if size > MAX_RESULT:
            return f"error: the tool said {size:,} bytes, more than the {MAX_RESULT:,} that a result may have"
        result = said.read(MAX_RESULT).decode(errors="replace").strip()
        if process.returncode:
            errors.seek(0)
            why = [*errors.read(MAX_RESULT).decode(errors="replace").split("\n"), result]
            last = next((line.strip() for line in reversed(why[:-1]) if line.strip()), result)
            return f"error: the tool failed with exit code {process.returncode}: {last[:500]}"
        return result
