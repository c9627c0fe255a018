"""What rows share with suites of evals, and with each other."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from smol_post import probes, synthetic
from smol_post.evals_config import Probe
from smol_post.judging_config import Decontaminate, Deduplicate
from smol_post.overlap import Seen, Suites
from smol_post.refusal import Refusal

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]


def sentence(seed: int, length: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def suites(folder: Path, texts: list[str], **fields: Any) -> Suites:
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    (folder / "asked.jsonl").write_text(rows)
    return Suites(Decontaminate(paths=["asked.jsonl"], **fields), folder)


def test_thirteen_words_in_a_row_are_contamination_and_twelve_are_none(tmp_path: Path) -> None:
    question, other = sentence(0, 30), sentence(1, 40)
    found = suites(tmp_path, [" ".join(question)])
    for number, name in ((12, None), (13, "asked.jsonl")):
        assert found.find(" ".join([*other, *question[5 : 5 + number], *other])) == name
    assert suites(tmp_path, [" ".join(question)], n=12).find(" ".join(question[5:17])) == "asked.jsonl"


def test_case_and_punctuation_make_no_difference(tmp_path: Path) -> None:
    question = sentence(0, 13)
    assert suites(tmp_path, [" ".join(question)]).find(" -- ".join(question).upper() + "?!")


def test_the_unicode_form_makes_no_difference(tmp_path: Path) -> None:
    question = "\u00e9t\u00e9 " * 12 + "\uff21\uff22\uff23"
    assert suites(tmp_path, [question]).find("e\u0301te\u0301 " * 12 + "abc")
    assert suites(tmp_path, ["Caf\u00e9?"]).find("cafe\u0301?")


def test_a_question_without_words_is_in_no_text(tmp_path: Path) -> None:
    found = suites(tmp_path, [" ", "---", "2?"])
    assert found.find("Hello.\n\n---\nIt rains.") is None
    assert found.find("2?")


def test_scripts_without_spaces_are_compared_too(tmp_path: Path) -> None:
    question = "\u5c0f\u660e\u6709\u4e09\u4e2a\u82f9\u679c\u4e24\u4e2a\u68a8\u4e00\u5171\u6709\u51e0\u4e2a"
    assert suites(tmp_path, [question]).find(f"\u95ee\uff1a{question}\u3002")


def test_a_short_question_is_compared_whole_with_whole_lines(tmp_path: Path) -> None:
    found = suites(tmp_path, ["3+4*2?", "What is the\ncapital of Peru?"])
    for text in ("3+4*2?", " 3+4*2?\n3+4=7;7*2=4\n4", "what  is the capital of peru?"):
        assert found.find(text) == "asked.jsonl", text
    for text in ("3-4*2?", "13+4*2?", "3+4*2+1?", "Say what 3+4*2? is"):
        assert found.find(text) is None, text


def test_the_wording_that_a_suite_shares_is_no_question(tmp_path: Path) -> None:
    frame = " ".join(sentence(0, 20))
    asked = [f"{frame} {' '.join(sentence(seed, 20))}" for seed in range(1, 12)]
    assert suites(tmp_path, asked).find(f"{frame} or else") is None
    assert suites(tmp_path, asked[:10]).find(f"{frame} or else") == "asked.jsonl"
    assert suites(tmp_path, asked).find(asked[3]) == "asked.jsonl"


def test_all_that_the_tiny_suite_generates_is_found_and_training_rows_are_not() -> None:
    found = Suites(Decontaminate(suites=["evals.yaml"]), TINY)
    asked = {
        "needle questions": ("needle_questions", {"num_tokens": 248, "max_overwrites": 1}, "prompt"),
        "arithmetic questions": ("arithmetic_questions", {}, "messages"),
        "preference pairs": ("preference_pairs", {}, "prompt"),
    }
    for name, (generator, options, column) in asked.items():
        rows = list(synthetic.generate(generator, num_rows=100, seed=1_000_000, **options))
        for row in rows:
            text = row[column] if isinstance(row[column], str) else row[column][-1]["content"]
            assert found.find(f"{text}\nand an answer") == f"evals.yaml: {name}"
    for row in synthetic.generate("needles", num_rows=300, seed=3, num_tokens=248):
        assert found.find(row["prompt"] + row["completion"]) is None


def test_probes_turns_and_perplexity_texts_are_asked_about(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "story.txt").write_text(" ".join(sentence(5, 50)))
    turns = [" ".join(sentence(seed, 20)) for seed in (6, 7, 8)]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in turns))
    (tmp_path / "evals.yaml").write_text(
        "stage: evals\nneedle_tokens: []\nnum_needle_questions: 0\nnum_arithmetic_questions: 0\n"
        "num_preference_pairs: 0\nprobes: [{kind: multi_key, lengths: [512], num_questions: 2}]\n"
        "perplexity: [{name: story, path: story.txt, max_tokens: 64}]\n"
        "num_turn_questions: 1\nturn_prompts: turns.jsonl\n"
    )
    found = Suites(Decontaminate(suites=["evals.yaml"]), tmp_path)
    assert found.find("x " + " ".join(sentence(5, 50)[20:40])) == "evals.yaml: perplexity story"
    assert found.find(turns[1]) == "evals.yaml: turns"
    probe = Probe(kind="multi_key", lengths=[512], num_questions=2)
    asked = probes.question(tokenizer, probe, 1, num_tokens=512, seed=1_000_000, date_string="").text
    assert found.find(asked) == "evals.yaml: multi_key"
    asked = probes.question(tokenizer, probe, 1, num_tokens=512, seed=5, date_string="").text
    assert found.find(asked) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.yaml", "stage: merge\n", "x.yaml: found a recipe of stage merge, wanted one of evals"),
        ("x.jsonl", '{"label": 3}\n', "row 1: no text, prompt, messages or chosen; mend the row"),
        ("x.jsonl", "{\n", "row 1: not JSON"),
        ("x.txt", "\xff", "not readable as text"),
    ],
)
def test_a_suite_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    key = "suites" if name.endswith("yaml") else "paths"
    with pytest.raises(Refusal, match=message):
        Suites(Decontaminate(**{key: [name]}), tmp_path)


def test_a_text_that_comes_again_is_seen_whatever_its_case_and_spaces() -> None:
    seen = Seen(Deduplicate(near=False))
    assert [seen.seen(text) for text in ("3 + 4", "3  + 4\n", "3 - 4", "Yes", "yes")] == [0, 1, 0, 0, 1]


def test_texts_that_are_nearly_equal_are_seen_and_others_are_not() -> None:
    """Of a hundred words one changed: Jaccard 91 / 101 of 5-grams, met with probability 0.9999."""
    seen, again, exact = Seen(Deduplicate()), 0, Seen(Deduplicate(near=False))
    for seed in range(200):
        words = sentence(seed, 100)
        assert not seen.seen(" ".join(words))
        again += seen.seen(" ".join([*words[:50], "other", *words[51:]]))
        assert not exact.seen(" ".join(words))
        assert not exact.seen(" ".join([*words[:50], "other", *words[51:]]))
    assert again >= 198


def test_as_many_near_texts_meet_as_their_similarity_says() -> None:
    """Every 10th of 100 words changed: 46 of 96 5-grams stay, s = 46 / 146; 1 - (1 - s^8)^14 = 0.001."""
    seen = Seen(Deduplicate())
    hits = 0
    for seed in range(200):
        words = sentence(seed, 100)
        seen.seen(" ".join(words))
        hits += seen.seen(" ".join(f"x{i}" if i % 10 == 5 else word for i, word in enumerate(words)))
    assert hits <= 4


def test_samples_of_one_prompt_are_no_duplicates() -> None:
    prompt = " ".join(sentence(0, 50))
    seen = Seen(Deduplicate())
    assert not any(seen.seen(f"{prompt}\n{' '.join(sentence(seed, 100))}") for seed in range(1, 50))
