"""The benchmarks run from nothing and say what they compared; how fast anything is, no test asks."""

import doctest
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import smol_post

sys.path.append(str(Path(smol_post.__file__).parents[1]))

from benchmarks import corpus, measure, run

FIELDS = (
    *("name", "peer", "ours", "ratio", "bar", "promises", "repetitions"),
    *("commit", "hardware", "versions", "compared", "samples"),
)
LIBRARIES = ("numpy", "pyarrow", "datasets", "tokenizers", "transformers", "trl", "torch")
SOME = 100_000  # characters of the library are enough for a test


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run a benchmark at a tiny size in this process; its report as read back from its file."""

    def call(name: str, **arguments: Any) -> dict[str, Any]:
        results = tmp_path_factory.mktemp("results")
        run.run(name, results=results, call=measure.here, repetitions=1, **arguments)
        return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))

    return call


def test_the_same_seed_makes_the_same_corpus() -> None:
    first, again = (list(corpus.conversations(20, seed=3, num_characters=SOME)) for _ in range(2))
    assert first == again
    assert first != list(corpus.conversations(20, seed=4, num_characters=SOME))
    assert np.array_equal(corpus.chat_lengths(50, seed=1), corpus.chat_lengths(50, seed=1))
    texts = [list(corpus.short_texts(5, seed=2, num_characters=SOME)) for _ in range(2)]
    assert texts[0] == texts[1]
    made = [corpus.train_tokenizer(vocab_size=1000, num_characters=SOME) for _ in range(2)]
    assert made[0].backend_tokenizer.to_str() == made[1].backend_tokenizer.to_str()


def test_chats_have_one_to_three_turns_and_every_other_one_thinks() -> None:
    rows = list(corpus.conversations(40, seed=0, num_characters=SOME))
    assert [row["chat_template_kwargs"]["enable_thinking"] for row in rows] == [True, False] * 20
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 1 <= len(roles) // 2 <= 3
        answers = [one["content"] for one in row["messages"] if one["role"] == "assistant"]
        thinks = row["chat_template_kwargs"]["enable_thinking"]
        assert all(answer.startswith("<think>\n") == thinks for answer in answers)
    assert {len(row["messages"]) for row in rows} == {2, 4, 6}


def test_a_chat_has_about_a_thousand_tokens_and_a_short_text_twenty() -> None:
    tokenizer = corpus.train_tokenizer(vocab_size=corpus.VOCAB_SIZE, num_characters=SOME)
    texts = [
        tokenizer.apply_chat_template(row["messages"], tokenize=False, **row["chat_template_kwargs"])
        for row in corpus.conversations(200, seed=0, num_characters=SOME)
    ]
    assert 700 < np.mean([len(ids) for ids in tokenizer(texts)["input_ids"]]) < 1300
    short = [row["text"] for row in corpus.short_texts(200, seed=0, num_characters=SOME)]
    assert 14 < np.mean([len(ids) for ids in tokenizer(short)["input_ids"]]) < 30


def test_lengths_are_as_uneven_as_those_of_chats() -> None:
    lengths = corpus.chat_lengths(20_000, seed=0)
    assert lengths.min() >= 8
    assert lengths.max() <= 65_536
    assert 570 < np.median(lengths) < 630
    assert 0.95 < np.log(lengths).std() < 1.05


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bin_assignment", {"size": 500}),
        ("prepare", {"size": 6, "num_characters": SOME}),
        ("packs", {"size": 300}),
        ("memory", {"size": 50, "num_characters": SOME}),
    ],
)
def test_a_report_says_what_was_measured_with_what(
    name: str, arguments: dict[str, Any], reported: Callable[..., dict[str, Any]]
) -> None:
    report = reported(name, **arguments)
    assert set(FIELDS) <= set(report)
    assert (report["name"], report["repetitions"]) == (name, 1)
    assert set(report["commit"]) == {"sha", "dirty"}
    assert set(report["hardware"]) == {"cpu", "num_cores", "memory_bytes", "system"}
    assert set(report["versions"]) == {"python", *LIBRARIES}
    for key in {**report["peer"], **report["ours"]}:
        assert key.endswith(("_seconds", "_bytes")) or key.startswith("num_") or key == "utilisation"
    assert name in run.table([report])


def test_both_sides_pack_the_same_documents_as_full(reported: Callable[..., dict[str, Any]]) -> None:
    report = reported("bin_assignment", size=2000)
    assert report["peer"]["num_packs"] == report["ours"]["num_packs"]
    assert report["peer"]["utilisation"] == report["ours"]["utilisation"]


def test_both_sides_make_the_same_tokens_and_masks(reported: Callable[..., dict[str, Any]]) -> None:
    report = reported("prepare", size=5, num_characters=SOME)
    assert report["equal"] is True
    assert report["num_rows"] == 5
    assert 0 < report["num_trained_tokens"] < report["num_tokens"]


def test_a_measurement_can_run_in_a_process_of_its_own() -> None:
    assert measure.apart(os.getpid) != os.getpid()


@pytest.mark.parametrize("module", [measure, run], ids=lambda module: module.__name__)
def test_examples_in_the_docstrings_hold(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
