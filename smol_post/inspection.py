"""Which tokens are trained: rows as they stand in the packs, for a terminal, as JSON, as a page.

    Prepared (packs or pairs)
      | sample         the first rows of every source and mode; their packs are read as the trainer reads them
      v
    [Row(source="chats", mode="think", row=12, pack=0, document=3, tokens=[Token(...), ...]), ...]
      | to_json        a dict a row
      | to_terminal    a block a row: trained tokens in colour, or between {+ and +}
      v to_html        one page that needs no network

Rows count from 1, like the lines of a file; packs, documents of a pack and positions from 0, like the arrays
of the trainer. Positions are those that the model sees: they restart with every document, unless the packing
is wrapped_cross_document.
"""

import codecs
import math
import unicodedata
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, zip_longest
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from tokenizers.decoders import DecodeStream
from transformers.convert_slow_tokenizer import bytes_to_unicode

from smol_post.data import IGNORED, Prepared
from smol_post.documents import MODES
from smol_post.mixture import Pool
from smol_post.refusal import Refusal, did_you_mean

_BATCH_PACKS = 1000  # of the index at a time
_NARROW = 80  # columns of a terminal below which the answers of a pair stand one under the other
_UNTRAINED = "38;5;245"  # grey (SGR parameters of ECMA-48, as all styles here)
_TRAINED = ("38;5;231;48;5;22", "38;5;231;48;5;28")  # white on two greens in turn, so that borders show
_BOLD, _FAINT = "1", ";2"
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class Token(NamedTuple):
    """One token; `text` is what it adds to the text before it, "" where a character is not yet whole."""

    id: int
    text: str
    trained: bool
    document: int
    position: int


@dataclass(frozen=True)
class Row:
    """A document of a pack: a row of a source, or the part of its `row_tokens` that begins at `start`."""

    source: str
    mode: str
    row: int
    pack: int
    document: int
    tokens: list[Token]
    start: int
    row_tokens: int

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return sum(token.trained for token in self.tokens)


@dataclass(frozen=True)
class PairRow:
    """A preference pair: each answer follows the prompt, and is trained whole."""

    source: str
    mode: str
    row: int
    prompt: list[Token]
    chosen: list[Token]
    rejected: list[Token]

    @property
    def length_gap(self) -> int:
        """Tokens by which the chosen answer is longer."""
        return len(self.chosen) - len(self.rejected)


AnyRow = Row | PairRow


def sample(
    prepared: Prepared, tokenizer: Any, *, num_rows: int, source: str | None = None, mode: str | None = None
) -> list[AnyRow]:
    """The first `num_rows` rows, in the order of the packs, of every source and mode that occur together.

    Grouped by source, then by mode. Raises Refusal where there is no such source or mode, or no row has both.
    """
    sources = list(prepared.ledger["by_source"])
    for option, name, known in (("source", source, sources), ("mode", mode, [*map(str, MODES)])):
        if name is not None and name not in known:
            raise Refusal(f"--{option} {name}: no such {option}{did_you_mean(name, known)}")
    records = [store.records for store in prepared.stores]
    pool = Pool.of(prepared.stores)
    address, kind = pool.address, pool.source * len(MODES) + pool.mode
    first = np.cumsum([0, *map(len, records)])
    dataset, index = prepared.dataset, prepared.dataset.with_format(None)
    wanted = [
        at * len(MODES) + number
        for at in range(len(sources))
        for number in range(len(MODES))
        if source in (None, sources[at]) and mode in (None, MODES[number])
    ]
    rows: list[AnyRow] = []
    pairs = "num_pairs" in prepared.ledger
    firsts = _first_pieces(index.data, address, kind, wanted=wanted, num_rows=num_rows, pairs=pairs)
    for one, pieces in firsts.items():
        at, name = one // len(MODES), MODES[one % len(MODES)]
        for document, pack, number in pieces:
            record = records[at][document - first[at]]
            which = (sources[at], name, int(record["row"]))
            if pairs:
                rows.append(PairRow(*which, *_pair(dataset[pack], tokenizer)))
            else:
                start = index[pack]["address"][number] - int(address[document])
                tokens = _piece(dataset[pack], tokenizer, lengths=index[pack]["length"], number=number)
                rows.append(Row(*which, pack, number, tokens, start, int(record["length"])))
    if not rows:
        asked = " ".join(f"--{key} {name}" for key, name in (("source", source), ("mode", mode)) if name)
        raise Refusal(
            f"{asked}: no such row in the packs; modes there: {', '.join(prepared.ledger['by_mode'])}"
        )
    return rows


def _first_pieces(
    index: Any,
    address: np.ndarray,
    kind: np.ndarray,
    *,
    wanted: Sequence[int],
    num_rows: int,
    pairs: bool,
) -> dict[int, list[tuple[int, int, int]]]:
    """(document, pack, number in the pack) of the first pieces of each kind wanted.

    address, kind: (num_documents,); of pairs, the chosen side is looked for. The index is read as far as
    there is something left to find. Addresses are looked up among the documents of kinds that lack some: a
    rare kind costs a quick pass over the index.
    """
    occurring = set(np.flatnonzero(np.bincount(kind)).tolist())
    end = np.append(address[1:], np.iinfo(np.int64).max)
    found: dict[int, list[tuple[int, int, int]]] = {one: [] for one in wanted}
    candidate = first = last = np.empty(0, np.int64)
    before: list[int] = []
    for piece, pack, number in _index_pieces(index):
        if pairs:
            piece, pack, number = piece[::2], pack[::2], number[::2]
        lacking = [one for one in wanted if one in occurring and len(found[one]) < num_rows]
        if not lacking:
            break
        if lacking != before:
            before, candidate = lacking, np.flatnonzero(np.isin(kind, lacking))
            first, last = address[candidate], end[candidate]
        at = np.searchsorted(first, piece, side="right") - 1
        hit = np.flatnonzero((at >= 0) & (piece < last[at]))
        document = candidate[at[hit]]
        for one in lacking:
            these = np.flatnonzero(kind[document] == one)[: num_rows - len(found[one])]
            every = (document[these], pack[hit[these]], number[hit[these]])
            found[one] += zip(*(values.tolist() for values in every), strict=True)
    return found


def _index_pieces(index: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(address, pack, number in the pack) of all pieces in order, some packs at a time.

    packs [[70, 40], [10]] -> [70 40 10], [0 0 1], [0 1 0]
    """
    num_packs = 0
    for batch in index.to_batches(max_chunksize=_BATCH_PACKS):
        column = batch["address"]
        bounds = column.offsets.to_numpy() - column.offsets[0].as_py()
        pack = np.repeat(np.arange(len(batch)), np.diff(bounds))
        yield column.flatten().to_numpy(), pack + num_packs, np.arange(len(pack)) - bounds[pack]
        num_packs += len(batch)


def _piece(pack: Mapping[str, Any], tokenizer: Any, *, lengths: Sequence[int], number: int) -> list[Token]:
    """The tokens of one document of a pack; `lengths` are those of all its documents.

    seq_lengths 3 2, document 1: positions 0 1 (seq_lengths 5, across documents: 3 4)
    """
    piece = slice(sum(lengths[:number]), sum(lengths[: number + 1]))
    ids, labels = pack["input_ids"][piece].tolist(), pack["labels"][piece].tolist()
    positions = [position for length in pack["seq_lengths"] for position in range(length)][piece]
    return [
        Token(token, text, label != IGNORED, number, position)
        for token, text, label, position in zip(ids, texts(ids, tokenizer), labels, positions, strict=True)
    ]


def _pair(pair: Mapping[str, Any], tokenizer: Any) -> Iterator[list[Token]]:
    """The tokens of prompt, chosen and rejected; both answers begin where the prompt ends."""
    border = pair["seq_lengths"][0]
    ids, trained = pair["input_ids"].tolist(), pair["labels"] != IGNORED
    start = int(np.argmax(trained))
    parts = (slice(start), slice(start, border), slice(border + start, None))
    for part, first in zip(parts, (0, start, start), strict=True):
        every = enumerate(zip(ids[part], texts(ids[part], tokenizer), strict=True), first)
        yield [Token(token, text, first > 0, 0, position) for position, (token, text) in every]


def texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text; joined, they are all ids decoded, special tokens and all.

    A character whose bytes are three tokens: "", "", the character. What is no text is U+FFFD, as in decode.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    made = [decoder.decode(_bytes(token)) for token in tokenizer.convert_ids_to_tokens(ids)]
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if "".join(made) + decoder.decode(b"", True) != whole:  # the vocabulary is not byte-level
        stream = DecodeStream(skip_special_tokens=False)
        made = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
    made[-1:] = [last + whole[len("".join(made)) :] for last in made[-1:]]
    return made


def _bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; an added token may be plain text."""
    plain = any(character not in _BYTE_OF for character in token)
    return token.encode() if plain else bytes(_BYTE_OF[character] for character in token)


def mean_length_gaps(rows: Sequence[AnyRow]) -> dict[str, float]:
    """The mean length gap of pairs by mode; {} where there are none."""
    gaps: dict[str, list[int]] = {}
    for row in rows:
        if isinstance(row, PairRow):
            gaps.setdefault(row.mode, []).append(row.length_gap)
    return {mode: mean(of_mode) for mode, of_mode in gaps.items()}


def to_json(row: AnyRow) -> dict[str, Any]:
    """A row as a JSON object, each token an object of id, text, trained, document and position."""
    pair = isinstance(row, PairRow)
    made: dict[str, Any] = {"source": row.source, "mode": row.mode, "row": row.row}
    for part in ("prompt", "chosen", "rejected") if pair else ("tokens",):
        made[part] = [token._asdict() for token in getattr(row, part)]
    return made | ({"length_gap": row.length_gap} if pair else {"pack": row.pack})


def visible(text: str) -> Iterator[tuple[str, bool]]:
    r"""Runs of `text`, and whether a run is an escape: nothing moves a cursor, reorders or hides text.

    >>> list(visible("a\x1b[2J\n"))
    [('a', False), ('\\x1b', True), ('[2J', False), ('\\n\n', True)]
    """
    for printable, run in groupby(text, key=str.isprintable):
        shown = "".join(run)
        if not printable:
            shown = "".join(character.encode("unicode_escape").decode() for character in shown)
        yield shown.replace(r"\n", "\\n\n") if not printable else shown, not printable


Line = list[tuple[str, str]]  # texts and their styles; "" for none


def to_terminal(rows: Sequence[AnyRow], *, color: bool, width: int) -> Iterator[str]:
    r"""Blocks of lines, one a row; before pairs, their mean length gaps.

    chats | think | row 2 | pack 0 | document 1 | tokens 8 | trained 2 | positions 0-7
    2 + 2 = {+4<|im_end|>+}\n
    """
    gaps = [f"{mode} {gap:+.1f}" for mode, gap in mean_length_gaps(rows).items()]
    if gaps:
        yield f"mean length gap (tokens of chosen - rejected): {', '.join(gaps)}\n"
    for row in rows:
        if isinstance(row, PairRow):
            facts, body = [f"prompt {len(row.prompt)}"], _side_by_side(row, color=color, width=width)
        else:
            facts = [f"pack {row.pack}", f"document {row.document}", f"tokens {len(row.tokens)}"]
            facts += [f"trained {row.num_trained}"]
            facts += [f"positions {row.tokens[0].position}-{row.tokens[-1].position}"]
            if len(row.tokens) < row.row_tokens:
                last = row.start + len(row.tokens) - 1
                facts += [f"cut: tokens {row.start}-{last} of the row's {row.row_tokens}"]
            body = _lines(_runs(row.tokens, color=color))
        lines = [[(" | ".join([row.source, row.mode, f"row {row.row}", *facts]), _BOLD)], *body]
        yield "".join(_painted(line, color=color) + "\n" for line in lines)


def _side_by_side(row: PairRow, *, color: bool, width: int) -> list[Line]:
    """The prompt; the answers in two columns, or one under the other; the length gap."""
    narrow = width < _NARROW
    room = width if narrow else (width - 3) // 2
    left, right = (
        [[(f"{name} {len(tokens)}", _BOLD)], *_lines(_runs(tokens, color=color), width=room)]
        for name, tokens in (("chosen", row.chosen), ("rejected", row.rejected))
    )
    beside: list[Line] = [*left, *right] if narrow else []
    for one, other in () if narrow else zip_longest(left, right, fillvalue=[]):
        padding = room - sum(_columns(character) for text, _ in one for character in text)
        beside.append([*one, (" " * padding + " | ", ""), *other])
    return [*_lines(_runs(row.prompt, color=color)), *beside, [(f"length gap {row.length_gap:+d}", _BOLD)]]


def _runs(tokens: Sequence[Token], *, color: bool) -> Iterator[tuple[str, str]]:
    """The texts of tokens and their styles; without colour, marks around what is trained."""
    for trained, group in groupby(tokens, key=lambda token: token.trained):
        marks = ("{+", "+}") if trained and not color else ("", "")
        yield marks[0], ""
        for number, token in enumerate(group):
            style = _TRAINED[number % 2] if trained else _UNTRAINED
            yield from ((text, style + _FAINT * escaped) for text, escaped in visible(token.text))
        yield marks[1], ""


def _lines(runs: Iterable[tuple[str, str]], *, width: float = math.inf) -> list[Line]:
    """Lines end where a text has a line end, before a text that would pass `width`, or within a wider one."""
    lines: list[Line] = [[]]
    used = 0
    for text, style in runs:
        if used and used + sum(map(_columns, text.partition("\n")[0])) > width:
            lines.append([])
            used = 0
        start = 0
        for at, character in enumerate(text):
            ends, columns = character == "\n", _columns(character)
            if ends or used + columns > width:
                lines[-1].append((text[start:at], style))
                lines.append([])
                start, used = at + ends, 0
            used += columns
        lines[-1].append((text[start:], style))
    return lines if any(text for text, _ in lines[-1]) else lines[:-1]


def _columns(character: str) -> int:
    """Columns of a terminal that a character fills."""
    if character == "\n" or unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _painted(line: Line, *, color: bool) -> str:
    parts = [("".join(text for text, _ in run), style) for style, run in groupby(line, lambda one: one[1])]
    return "".join(f"\x1b[{style}m{text}\x1b[0m" if color and style else text for text, style in parts)


def to_html(rows: Sequence[AnyRow], *, title: str, ledger: Mapping[str, Any]) -> str:
    """One self-contained page with a card a row; all that comes from data is escaped."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    rules = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    page = jinja2.Environment(loader=folder, autoescape=True, **rules).get_template("inspect.html.jinja")
    filters = {key: list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("source", "mode")}
    gaps = mean_length_gaps(rows)
    return page.render(
        title=title, rows=rows, ledger=ledger, gaps=gaps, filters=filters, visible=visible, script_hash=_hash
    )


def _hash(script: str) -> str:
    """As a Content-Security-Policy names the one script that may run."""
    return b64encode(sha256(script.encode()).digest()).decode()
