"""Text that every Python installation has, as a tokenizer, chats, short texts and document lengths.

The prose is the topics of `help()` and the docstrings of the standard library, the code its functions. Files
are read in sorted order and everything is drawn with a seed, so one version of Python makes one corpus.
"""

import ast
import functools
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATE = "01 July 2025"
END_OF_TEXT = "<|endoftext|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
VOCAB_SIZE = 16_000
_CHARACTERS_A_CHAT = 3_700  # of content; with the template about 1,000 tokens
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@functools.cache
def pieces(num_characters: int | None = None) -> tuple[list[str], list[str]]:
    """Paragraphs of prose and functions of code; `num_characters` of files are enough (None: all of them)."""
    prose = [part.strip() for name in sorted(topics) for part in topics[name].split("\n\n")]
    code: list[str] = []
    root = Path(ast.__file__).parent
    num_read = 0
    for path in sorted(root.rglob("*.py")):
        if _NOT_THE_LIBRARY & set(path.relative_to(root).parts):
            continue
        if num_characters is not None and num_read >= num_characters:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        num_read += len(text)
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                prose.extend(part.strip() for part in (ast.get_docstring(node) or "").split("\n\n"))
            if isinstance(node, ast.FunctionDef):
                code.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
    return [text for text in prose if 80 <= len(text) <= 2000], [
        text for text in code if 200 <= len(text) <= 2000
    ]


def train_tokenizer(*, vocab_size: int, num_characters: int | None = None) -> "PreTrainedTokenizerFast":
    """Byte-level BPE with the word pattern of GPT-2, the tokens of ChatML and the dual-mode template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from smol_post import chat

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prose, code = pieces(num_characters)
    made.train_from_iterator([*prose, *code], trainer)
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=chat.load_template("smol_post"),
    )


def conversations(num_rows: int, *, seed: int, num_characters: int | None = None) -> Iterator[dict[str, Any]]:
    """Chats of 1 to 3 turns; every other one thinks before each answer.

    {"messages": [{"role": "user", ...}, {"role": "assistant", "content": "<think>\\n...\\n</think>\\n..."}],
     "chat_template_kwargs": {"enable_thinking": true}}
    """
    rng = np.random.default_rng(seed)
    prose, code = pieces(num_characters)
    for number in range(num_rows):
        thinks = number % 2 == 0
        num_turns = int(rng.integers(1, 4))
        room = rng.lognormal(np.log(_CHARACTERS_A_CHAT), 0.5) / np.exp(0.125) / num_turns
        messages = []
        for _ in range(num_turns):
            thought = _text(prose, code, room * 0.4, rng)
            answer = _text(prose, code, room * (0.4 if thinks else 0.8), rng)
            messages += [
                {"role": "user", "content": "Please explain this.\n\n" + _text(prose, code, room * 0.2, rng)},
                {
                    "role": "assistant",
                    "content": f"<think>\n{thought}\n</think>\n{answer}" if thinks else answer,
                },
            ]
        yield {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinks}}


def _text(prose: list[str], code: list[str], room: float, rng: np.random.Generator) -> str:
    """Paragraphs, about one in three of them code, until `room` characters are full; the last one is cut."""
    parts: list[str] = []
    while room > 0:
        kind = code if rng.random() < 0.3 else prose
        part = kind[int(rng.integers(len(kind)))][: max(int(room), 20)]
        parts.append(part.strip())
        room -= len(part) + 2
    return "\n\n".join(parts)


def short_texts(num_rows: int, *, seed: int, num_characters: int | None = None) -> Iterator[dict[str, str]]:
    """Runs of about 20 tokens of the prose: {"text": "..."}."""
    words = " ".join(pieces(num_characters)[0]).split()
    rng = np.random.default_rng(seed)
    for start in rng.integers(0, len(words) - 14, num_rows).tolist():
        yield {"text": " ".join(words[start : start + 14])}


def chat_lengths(num_documents: int, *, seed: int) -> np.ndarray:
    """Tokens of documents as long and as uneven as chats: log-normal, median 600, sigma 1, 8 to 65,536."""
    drawn = np.random.default_rng(seed).lognormal(np.log(600), 1.0, num_documents)
    return np.clip(drawn, 8, 65_536).astype(np.int64)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, one a line."""
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def write_chats(folder: Path, *, num_rows: int, seed: int, num_characters: int | None = None) -> None:
    """`tokenizer/` and `chats.jsonl` in `folder`."""
    write_tokenizer(folder, num_characters=num_characters)
    _write_jsonl(folder / "chats.jsonl", conversations(num_rows, seed=seed, num_characters=num_characters))


def write_tokenizer(folder: Path, *, num_characters: int | None = None) -> None:
    """`tokenizer/` in `folder`."""
    train_tokenizer(vocab_size=VOCAB_SIZE, num_characters=num_characters).save_pretrained(
        folder / "tokenizer"
    )


def write_short_texts(path: Path, *, num_rows: int, seed: int, num_characters: int | None = None) -> None:
    """JSONL of short texts."""
    _write_jsonl(path, short_texts(num_rows, seed=seed, num_characters=num_characters))


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
