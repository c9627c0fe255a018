"""What is shown is what is trained, token by token, and nothing in the data takes hold of who looks at it."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smol_post import data, inspection
from smol_post.config import ApoRecipe, MidRecipe, SftRecipe, Source, Training
from smol_post.inspection import PairRow, Row, Token, sample, texts, to_html, to_json, to_terminal, visible
from smol_post.refusal import Refusal
from smol_post.vocabulary import Vocabulary

END = "<|endoftext|>"
EVERY = 10**6
NOTES = [{"text": f"note {number}: naïve 日本語 👩\u200d🚀" + " and on" * number} for number in range(1, 8)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{number} + {number}?"},
            {"role": "assistant", "content": ("<think>\nadd\n</think>\n" if think else "") + f"{2 * number}"},
        ],
        "chat_template_kwargs": {"enable_thinking": think},
    }
    for number in range(1, 11)
    for think in (True, False)
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"{number} + 1?"}],
        "chosen": [{"role": "assistant", "content": f"{number + 1}"}],
        "rejected": [{"role": "assistant", "content": "one more 🎉" * (number % 2)}],
        "chat_template_kwargs": {"enable_thinking": number > 3},
    }
    for number in range(1, 7)
]
Prepare = Callable[..., data.Prepared]


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Path) -> Prepare:
    """Packs (or pairs) of the files chats, notes and pairs."""
    for name, rows in (("chats", CHATS), ("notes", NOTES), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(kind: type[Training] = SftRecipe, **changes: Any) -> data.Prepared:
        stage = {SftRecipe: "sft", MidRecipe: "mid", ApoRecipe: "apo"}[kind]
        names = ["pairs"] if kind is ApoRecipe else ["chats", "notes"]
        given: dict[str, Any] = {
            "sources": [Source(name=name, path=f"{name}.jsonl") for name in names],
            "max_tokens": 250,
            "global_batch_size": 1,
            "num_epochs": 1.0,
        }
        words = Vocabulary(tokenizer, tokenizer.chat_template, END, [])
        recipe = kind(stage=stage, **given | changes)
        return data.prepare(recipe, words, folder=tmp_path, cache_dir=tmp_path / "cache")

    return made


def packs_of(rows: list[Any]) -> dict[int, list[Token]]:
    """The tokens of every pack, from its rows."""
    found: dict[int, list[Token]] = {}
    for row in sorted(rows, key=lambda row: (row.pack, row.document)):
        found.setdefault(row.pack, []).extend(row.tokens)
    return found


def text(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def tokens_of(*given: tuple[str, bool]) -> list[Token]:
    return [Token(100 + n, one, trained, 1, n) for n, (one, trained) in enumerate(given)]


def row_of(*given: tuple[str, bool], **changes: Any) -> Row:
    fields: dict[str, Any] = {"source": "chats", "mode": "think", "row": 2, "pack": 0, "document": 1}
    return Row(**fields | {"tokens": tokens_of(*given), "start": 0, "row_tokens": len(given)} | changes)


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_every_source_and_mode_is_sampled_first_in_pack_order(
    prepare: Prepare, tokenizer: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_BATCH_PACKS", batch)
    made = prepare()
    every = sample(made, tokenizer, num_rows=EVERY)
    kinds = [("chats", "think"), ("chats", "no_think"), ("notes", "text")]
    assert Counter((row.source, row.mode) for row in every) == dict(zip(kinds, (10, 10, 7), strict=True))
    of_kind = {kind: [row for row in every if (row.source, row.mode) == kind] for kind in kinds}
    for rows in of_kind.values():
        places = [(row.pack, row.document) for row in rows if isinstance(row, Row)]
        assert places == sorted(places)
        assert len({row.row for row in rows}) == len(rows)
    few = sample(made, tokenizer, num_rows=2)
    assert few == [row for kind in kinds for row in of_kind[kind][:2]]


def test_a_row_number_is_the_line_of_the_file(prepare: Prepare, tokenizer: Any) -> None:
    rows = sample(prepare(), tokenizer, num_rows=EVERY)
    assert {row.row: text(row.tokens) for row in rows if row.source == "notes"} == {
        number: note["text"] + END for number, note in enumerate(NOTES, 1)
    }
    for row in rows:
        if row.source == "chats":
            chat = CHATS[row.row - 1]
            assert chat["messages"][0]["content"] in text(row.tokens)
            assert row.mode == ("think" if chat["chat_template_kwargs"]["enable_thinking"] else "no_think")


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "wrapped_cross_document"])
def test_the_rows_of_a_pack_are_the_pack_of_the_trainer(
    prepare: Prepare, tokenizer: Any, packing: str
) -> None:
    made = prepare(MidRecipe, packing=packing)
    rows = sample(made, tokenizer, num_rows=EVERY)
    packs = packs_of(rows)
    assert sorted(packs) == list(range(len(made.dataset)))
    for number, tokens in packs.items():
        pack = made.dataset[number]
        assert [token.id for token in tokens] == pack["input_ids"].tolist()
        assert [token.trained for token in tokens] == (pack["labels"] != -100).tolist()
        positions = np.concatenate([np.arange(length) for length in pack["seq_lengths"]])
        assert [token.position for token in tokens] == positions.tolist()
        documents = [token.document for token in tokens]
        assert documents == sorted(documents)
        assert set(documents) == set(range(documents[-1] + 1))
    assert all(token.document == row.document for row in rows for token in row.tokens)
    later = [row.tokens[0] for row in rows if row.document > 0]
    assert later
    across = packing == "wrapped_cross_document"
    assert all((token.position > 0, token.trained) == (across, across) for token in later)


def test_packs_beyond_the_last_whole_batch_are_not_shown(prepare: Prepare, tokenizer: Any) -> None:
    num_packs = len(prepare().dataset)
    made = prepare(global_batch_size=num_packs - 1)
    packs = packs_of(sample(made, tokenizer, num_rows=EVERY))
    assert sorted(packs) == list(range(num_packs - 1))


def test_loss_is_shown_on_the_assistant_alone(prepare: Prepare, tokenizer: Any) -> None:
    for row in sample(prepare(), tokenizer, num_rows=EVERY, source="chats"):
        answer = CHATS[row.row - 1]["messages"][1]["content"]
        assert text([token for token in row.tokens if token.trained]) == answer + "<|im_end|>"
        assert row.num_trained == sum(token.trained for token in row.tokens)


def test_a_turn_of_weight_0_is_shown_without_loss(prepare: Prepare, tokenizer: Any, tmp_path: Path) -> None:
    turns = [*CHATS[1]["messages"], *CHATS[3]["messages"]]
    row = {"messages": [turns[0], turns[1] | {"weight": 0}, *turns[2:]], "enable_thinking": False}
    (tmp_path / "weighed.jsonl").write_text(json.dumps(row) + "\n")
    made = prepare(sources=[Source(name="weighed", path="weighed.jsonl")])
    (shown,) = sample(made, tokenizer, num_rows=1, source="weighed")
    assert text([token for token in shown.tokens if token.trained]) == "4<|im_end|>"
    assert "2<|im_end|>" in text(shown.tokens)


def test_only_the_packs_shown_are_read_and_shown_as_they_are_read(
    prepare: Prepare, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls, read = prepare(), [], data.PackReader.__call__

    def spy(self: Any, batch: Any) -> Any:
        calls.append(len(batch["address"]))
        changed = read(self, batch)
        return changed | {"labels": [labels * 0 - 100 for labels in changed["labels"]]}

    monkeypatch.setattr(data.PackReader, "__call__", spy)
    rows = sample(made, tokenizer, num_rows=1)
    assert calls == [1, 1, 1]
    assert len(made.dataset) > 3
    assert not any(token.trained for row in rows for token in row.tokens)


def test_the_parts_of_a_cut_row_make_the_row(prepare: Prepare, tokenizer: Any) -> None:
    rows = sample(prepare(MidRecipe, packing="wrapped", max_tokens=20), tokenizer, num_rows=EVERY)
    parts: dict[int, list[Row]] = {}
    for row in rows:
        if row.source == "notes":
            parts.setdefault(row.row, []).append(row)
    assert max(map(len, parts.values())) > 2
    for number, found in parts.items():
        found.sort(key=lambda row: row.start)
        ids = [token.id for row in found for token in row.tokens]
        assert tokenizer.decode(ids) == NOTES[number - 1]["text"] + END
        sizes = [len(row.tokens) for row in found]
        assert [row.start for row in found] == [sum(sizes[:n]) for n in range(len(sizes))]
        assert {row.row_tokens for row in found} == {sum(sizes)}


def test_the_same_file_under_many_names_is_shown_under_each(prepare: Prepare, tokenizer: Any) -> None:
    names = [f"source {number}" for number in range(100)]  # more kinds than a byte can count
    made = prepare(sources=[Source(name=name, path="notes.jsonl") for name in names])
    rows = sample(made, tokenizer, num_rows=1)
    assert [(row.source, row.mode) for row in rows] == [(name, "text") for name in names]


def test_filters(prepare: Prepare, tokenizer: Any) -> None:
    made = prepare()
    every = sample(made, tokenizer, num_rows=2)
    assert sample(made, tokenizer, num_rows=2, source="notes") == [r for r in every if r.source == "notes"]
    assert sample(made, tokenizer, num_rows=2, mode="think") == [r for r in every if r.mode == "think"]
    (one,) = sample(made, tokenizer, num_rows=1, source="chats", mode="no_think")
    assert (one.source, one.mode) == ("chats", "no_think")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"source": "chat"}, "--source chat: no such source; did you mean 'chats'?"),
        ({"mode": "nothink"}, "--mode nothink: no such mode; did you mean 'no_think'?"),
        (
            {"source": "notes", "mode": "think"},
            "--source notes --mode think: no such row in the packs; modes there: text, think, no_think",
        ),
    ],
)
def test_what_there_is_none_of_is_refused(
    prepare: Prepare, tokenizer: Any, asked: dict[str, str], said: str
) -> None:
    with pytest.raises(Refusal) as refused:
        sample(prepare(), tokenizer, num_rows=1, **asked)
    assert str(refused.value) == said


def test_a_character_of_several_tokens_stands_at_the_last(tokenizer: Any) -> None:
    ids = tokenizer("é<think>日", add_special_tokens=False).input_ids
    assert texts(ids, tokenizer) == ["", "é", "<think>", "", "", "日"]
    assert texts(ids[:-1], tokenizer) == ["", "é", "<think>", "", "\ufffd"]
    assert texts([], tokenizer) == []
    lost = tokenizer("\ufffd", add_special_tokens=False).input_ids  # in the data, not made by decoding
    assert texts([ids[0], *lost, ids[0]], tokenizer) == ["", "\ufffd", "", "\ufffd", "\ufffd"]


def test_joined_texts_are_the_decoded_ids_whatever_the_ids(tokenizer: Any) -> None:
    rng = random.Random(0)
    some = tokenizer("naïve 日本語 \ufffd\ufffd 👩\u200d🚀<|im_end|>\n", add_special_tokens=False).input_ids
    for _ in range(300):
        ids = [rng.choice([rng.randrange(len(tokenizer)), *some]) for _ in range(rng.randrange(12))]
        made = texts(ids, tokenizer)
        assert len(made) == len(ids)
        assert "".join(made) == tokenizer.decode(ids)
    assert "".join(texts(some, tokenizer)) == tokenizer.decode(some)


def test_a_vocabulary_that_is_not_byte_level_is_shown_as_it_decodes() -> None:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    backend.decoder = decoders.Metaspace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(["two words of two words"] * 9, trainer)
    made = texts(backend.encode("two words").ids, PreTrainedTokenizerFast(tokenizer_object=backend))
    assert made == ["two", " words"]


def test_a_row_as_json(prepare: Prepare, tokenizer: Any) -> None:
    (row,) = sample(prepare(), tokenizer, num_rows=1, source="chats", mode="think")
    assert isinstance(row, Row)
    made = json.loads(json.dumps(to_json(row)))
    assert made.keys() == {"source", "mode", "row", "pack", "tokens"}
    assert (made["source"], made["mode"], made["row"], made["pack"]) == ("chats", "think", row.row, row.pack)
    names = ("id", "text", "trained", "document", "position")
    assert made["tokens"] == [dict(zip(names, token, strict=True)) for token in row.tokens]


def test_pairs_are_shown_as_the_trainer_gets_them(prepare: Prepare, tokenizer: Any) -> None:
    made = prepare(ApoRecipe)
    rows = sample(made, tokenizer, num_rows=2)
    assert [(row.source, row.mode) for row in rows] == [("pairs", "think")] * 2 + [("pairs", "no_think")] * 2
    rows = sample(made, tokenizer, num_rows=EVERY)
    assert sorted(row.row for row in rows) == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert isinstance(row, PairRow)
        assert row.mode == ("think" if row.row > 3 else "no_think")
        given = PAIRS[row.row - 1]
        assert given["prompt"][0]["content"] in text(row.prompt)
        assert text(row.chosen) == given["chosen"][0]["content"] + "<|im_end|>"
        assert text(row.rejected) == given["rejected"][0]["content"] + "<|im_end|>"
        for answer in (row.chosen, row.rejected):
            whole = [*row.prompt, *answer]
            assert [token.position for token in whole] == list(range(len(whole)))
            assert [token.trained for token in whole] == [False] * len(row.prompt) + [True] * len(answer)
        assert row.length_gap == len(row.chosen) - len(row.rejected) != 0
        sides = {part: to_json(row)[part] for part in ("prompt", "chosen", "rejected")}
        assert sides == {part: [token._asdict() for token in getattr(row, part)] for part in sides}
        assert to_json(row) == {
            "source": "pairs", "mode": row.mode, "row": row.row, **sides, "length_gap": row.length_gap
        }  # fmt: skip


def test_control_characters_and_their_like_become_escapes() -> None:
    nasty = "a\x1b[31m\x9b2J\r\x07\x7f\u202eb\u200bc\u2028\t é日 d\n"
    shown = "".join(part for part, _ in visible(nasty))
    assert shown == r"a\x1b[31m\x9b2J\r\x07\x7f\u202eb\u200bc\u2028\t é日 d\n" + "\n"
    assert list(visible("a\tb")) == [("a", False), (r"\t", True), ("b", False)]
    assert list(visible(r"\n")) == [(r"\n", False)]  # two characters, no line end


def test_a_row_without_colour_by_eye() -> None:
    row = row_of(
        ("2 +", False), (" 2\n", False), ("= ", False), ("4", True), ("<|im_end|>", True), ("\n", False)
    )
    assert list(to_terminal([row], color=False, width=80)) == [
        "chats | think | row 2 | pack 0 | document 1 | tokens 6 | trained 2 | positions 0-5\n"
        "2 + 2\\n\n"
        "= {+4<|im_end|>+}\\n\n"
    ]


def test_a_cut_row_says_so() -> None:
    (block,) = to_terminal([row_of(("a", True), ("b", True), start=7, row_tokens=12)], color=False, width=80)
    assert block.splitlines()[0].endswith(" | cut: tokens 7-8 of the row's 12")


def test_colours_add_nothing_but_colours() -> None:
    row = row_of(("a\x1b[0m", False), ("b", True), ("c\nd", True), ("e", False))
    (block,) = to_terminal([row], color=True, width=80)
    assert re.sub(r"\x1b\[[\d;]*m", "", block).splitlines()[1:] == [r"a\x1b[0mbc\n", "de"]
    styles = {shown: style for style, shown in re.findall(r"\x1b\[([\d;]*)m([^\x1b]*)\x1b\[0m", block)}
    assert styles["a"] == styles["e"] == inspection._UNTRAINED
    assert (styles["b"], styles["c"]) == inspection._TRAINED
    assert styles["d"] == styles["c"]
    assert all("\n" not in shown for shown in styles)  # a colour ends before the line does


def pair_of(chosen: list[tuple[str, bool]], rejected: list[tuple[str, bool]], **changes: Any) -> PairRow:
    fields: dict[str, Any] = {
        "source": "pairs",
        "mode": "think",
        "row": 3,
        "prompt": tokens_of(("1?\n", False)),
    }
    return PairRow(**fields | {"chosen": tokens_of(*chosen), "rejected": tokens_of(*rejected)} | changes)


def test_answers_stand_side_by_side_or_on_a_narrow_terminal_one_under_the_other() -> None:
    accent = "e\u0301"  # two characters, one column
    pair = pair_of(
        [(f"日本{accent}", True), ("e" * 40, True)], [("no\n", True), ("w" * 35, True), (".", True)]
    )
    gap, block = to_terminal([pair], color=False, width=80)
    assert gap == "mean length gap (tokens of chosen - rejected): think -1.0\n"
    assert block.splitlines() == [
        "pairs | think | row 3 | prompt 1",
        "1?\\n",
        "chosen 2                               | rejected 3",
        f"{{+日本{accent}                                | {{+no\\n",
        "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee | wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww.+}",
        "ee+}                                   | ",
        "length gap -1",
    ]
    _, block = to_terminal([pair], color=False, width=79)
    under = ["chosen 2", f"{{+日本{accent}" + "e" * 40 + "+}", "rejected 3", "{+no\\n", "w" * 35 + ".+}"]
    assert block.splitlines()[2:-1] == under
    _, block = to_terminal([pair], color=False, width=30)
    assert block.splitlines()[2:6] == ["chosen 2", f"{{+日本{accent}", "e" * 30, "e" * 10 + "+}"]


def test_the_mean_length_gap_is_taken_by_mode() -> None:
    one, two = [("a", True)], [("a", True), ("b", True)]
    pairs = [pair_of(two, one), pair_of(one, one), pair_of(one, two, mode="no_think")]
    assert inspection.mean_length_gaps(pairs) == {"think": 0.5, "no_think": -1}
    assert next(to_terminal(pairs, color=False, width=80)).endswith(": think +0.5, no_think -1.0\n")
    page = to_html(pairs, title="t", ledger={})
    assert "think <b>+0.5</b>" in page
    assert "no_think <b>-1.0</b>" in page
    assert inspection.mean_length_gaps([row_of(("a", True))]) == {}


class Page(HTMLParser):
    """The tags of a page, and the spans of its rows: (class, title, text)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.spans: list[list[str]] = []
        self.inside = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "span" and "title" in found:
            self.spans.append([str(found["class"]), str(found["title"]), ""])
            self.inside = 1

    def handle_endtag(self, tag: str) -> None:
        self.inside = 0 if tag == "span" else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.spans[-1][2] += data


def test_the_page_shows_every_token_and_runs_nothing_of_the_data() -> None:
    evil = "</pre><script>alert(1)</script>"
    row = row_of(
        (evil, False), ("<b>&amp;\n", True), ("\u202e", True), ("", True), source='"><script>', mode="think"
    )
    page = Page(to_html([row, row_of(("x", True))], title="<script>", ledger={"num_tokens": 12345}))
    assert page.spans == [
        ["", "id 100 position 0 not trained", evil],
        ["t", "id 101 position 1 trained", "<b>&amp;\\n\n"],
        ["t", "id 102 position 2 trained", r"\u202e"],
        ["t part", "id 103 position 3 trained", ""],
        ["t", "id 100 position 0 trained", "x"],
    ]
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1
    assert names.count("b") == sum(tag == "b" for tag in names)
    cards = [found for tag, found in page.tags if tag == "section"]
    assert [(one["data-source"], one["data-mode"]) for one in cards] == [
        ('"><script>', "think"),
        ("chats", "think"),
    ]


def test_the_page_needs_no_network_and_filters_by_source_and_mode(prepare: Prepare, tokenizer: Any) -> None:
    for made in (prepare(), prepare(ApoRecipe)):
        rows = sample(made, tokenizer, num_rows=1)
        page = to_html(rows, title="inspect", ledger=made.ledger)
        tags = Page(page).tags
        assert not any({"src", "href"} & found.keys() for _, found in tags)
        assert "http:" not in page
        assert "https:" not in page
        assert "@import" not in page
        assert [found["name"] for tag, found in tags if tag == "select"] == ["source", "mode"]
        for name in {row.source for row in rows} | {row.mode for row in rows}:
            assert f"<option>{name}</option>" in page
        assert f"{made.ledger['num_trained_tokens']:,}</b> trained tokens" in page
    cut = to_html([row_of(("a", True), start=1000, row_tokens=3000)], title="t", ledger={})
    assert "began 1,000 tokens earlier" in cut
    assert "goes on for 1,999 tokens" in cut
