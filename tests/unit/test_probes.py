"""Probes ask what they say, at the length they say; planted models score right; `eval` refuses, prints."""

import copy
import doctest
import json
import math
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from smol_post import commands, config, evals, evals_config, loading, manifest, plan, probes, scoring

Build = Callable[..., Any]
KINDS = ("single", "multi_key", "multi_value")
DATE = "01 July 2025"
STORY = "Zoë paid 12 €: the café was shut 🙂 at noon. 東京 is far. " * 30


def probe(kind: str = "single", **changes: Any) -> evals_config.Probe:
    return loading.validate(
        evals_config.Probe, {"kind": kind, "lengths": [512], **changes}, where="evals.yaml"
    )


def question(
    tokenizer: Any, asked: evals_config.Probe, index: int = 0, num_tokens: int = 512, seed: int = 0
) -> Any:
    return probes.question(tokenizer, asked, index, num_tokens=num_tokens, seed=seed, date_string=DATE)


@pytest.fixture
def story(tmp_path: Path) -> str:
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    return str(path)


@pytest.fixture
def checkpoint(build: Build, tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    build(max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_examples_hold() -> None:
    assert [doctest.testmod(module).failed for module in (probes, scoring)] == [0, 0]


@pytest.mark.parametrize("form", ["text", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_answer_fill_the_length_and_never_more(
    tokenizer: Any, story: str, kind: str, form: str
) -> None:
    for haystack in (None, story):
        for num_tokens in (600, 601, 1024, 4096):
            for index in range(3):
                asked = probe(kind, haystack=haystack, **{"as": form})
                found = question(tokenizer, asked, index, num_tokens)
                budget = num_tokens - probes.TOKENS_A_VALUE * len(found.wanted)
                assert 0 <= budget - len(found.ids) <= 3
                assert tokenizer.decode(found.ids) == found.text


def test_a_length_without_room_for_the_question_is_refused(tokenizer: Any) -> None:
    with pytest.raises(probes.Refusal, match=r"single: lengths: found 40, wanted at least \d+") as caught:
        question(tokenizer, probe(), num_tokens=40)
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    assert len(question(tokenizer, probe(), num_tokens=least).ids) == least - probes.TOKENS_A_VALUE


def test_a_text_begins_with_the_token_that_the_tokenizer_begins_one_with(tokenizer: Any) -> None:
    ours = copy.deepcopy(tokenizer)
    ours.bos_token = "<|endoftext|>"
    assert scoring.beginning(ours) == []
    bos = ("<|endoftext|>", ours.bos_token_id)
    ours.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert scoring.beginning(ours) == [ours.bos_token_id]
    found = question(ours, probe())
    assert (found.ids[0], len(found.ids)) == (ours.bos_token_id, 500)
    assert ours.bos_token_id not in question(ours, probe(**{"as": "chat"})).ids


def test_a_single_needle_is_in_the_prompt_once(tokenizer: Any, story: str) -> None:
    for index in range(20):
        found = question(tokenizer, probe(haystack=story if index % 2 else None), index)
        [(key, value)] = found.hidden
        assert (found.wanted, found.text.count(value)) == ([value], 1)
        assert found.text.count(key) == 3  # needle, question, the answer begun
        assert ("東京" in found.text) == bool(index % 2)


def test_distractors_have_other_keys_and_values_and_the_form_of_the_needle(tokenizer: Any) -> None:
    found = question(tokenizer, probe("multi_key", num_needles=6))
    keys, values = zip(*found.hidden, strict=True)
    assert len(set(keys)) == len(set(values)) == 6
    assert found.wanted == [values[0]]
    assert [found.text.count(key) for key in keys] == [3, 1, 1, 1, 1, 1]
    around = {re.sub(re.escape(key), "KEY", form(found.text, key, value)) for key, value in found.hidden}
    assert len(around) == 1


def form(text: str, key: str, value: str) -> str:
    """The sentence of a needle, its value left out."""
    [sentence] = [one for one in re.split(r"(?<=\.)\s", text) if value in one]
    assert key in sentence
    return sentence.strip().replace(value, "VALUE")


def test_all_values_of_the_one_key_are_wanted(tokenizer: Any) -> None:
    found = question(tokenizer, probe("multi_value", num_needles=5), num_tokens=700)
    assert len({key for key, _ in found.hidden}) == 1
    assert found.wanted == [value for _, value in found.hidden]
    assert len(set(found.wanted)) == 5
    assert all(found.text.count(value) == 1 for value in found.wanted)


def test_a_question_depends_on_seed_and_index_and_on_nothing_else(tokenizer: Any) -> None:
    first = question(tokenizer, probe(num_questions=1))
    assert question(tokenizer, probe(num_questions=50)) == first
    others = [question(tokenizer, probe(), index, seed=seed) for index, seed in ((1, 0), (0, 1))]
    assert all(one.hidden != first.hidden and one.text != first.text for one in others)
    longer = question(tokenizer, probe(), num_tokens=900)
    assert (longer.hidden, longer.text[:40]) == (first.hidden, first.text[:40])


def test_depths_are_uniform_and_layouts_vary(tokenizer: Any) -> None:
    found = [question(tokenizer, probe(), index, num_tokens=1200) for index in range(200)]
    depths = [one.text.index(one.wanted[0]) / len(one.text) for one in found]
    quarters = [sum(low <= 4 * depth < low + 1 for depth in depths) / 200 for low in range(4)]
    assert min(quarters) > 0.15, quarters
    assert len({one.text.splitlines()[0] for one in found}) == 3 * 3  # openings by things
    needles = {form(one.text, *one.hidden[0]).split(one.hidden[0][0])[0] for one in found}
    assert len(needles) == 2 * 3 + 1  # one phrasing begins with the key
    endings = {one.text.replace(one.hidden[0][0], "KEY").splitlines()[-1] for one in found}
    assert len(endings) == 2 * 3


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        (" 1234567.", ["1234567"], True),
        (" 1234568, 1234567", ["1234567"], False),
        (" 12345670", ["1234567"], False),
        (" 2222222 and 1111111. 3333333", ["1111111", "2222222"], True),
        (" 1111111, 3333333, 2222222", ["1111111", "2222222"], False),
        (" 1111111", ["1111111", "2222222"], False),
    ],
)
def test_the_first_numbers_said_must_be_those_wanted(said: str, wanted: list[str], right: bool) -> None:
    assert probes.is_right(said, wanted) == right


def teach(lm: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Any:
    """Overfit a small model on answers (`prompt`, `answer`), until greedy decoding says each."""
    optimizer = torch.optim.Adam(lm.parameters(), lr=1e-2)
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, -100)
    for row, (prompt, answer) in enumerate(rows):
        ids_BT[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels_BT[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    wanted, asked = labels_BT[:, 1:], labels_BT[:, 1:] >= 0
    for _ in range(400):
        logits = lm(ids_BT).logits[:, :-1][asked]
        if torch.equal(logits.argmax(-1), wanted[asked]):
            return lm.eval()
        torch.nn.functional.cross_entropy(logits, wanted[asked]).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("not learned in 400 steps")


@pytest.mark.usefixtures("one_thread")
def test_what_a_planted_model_knows_is_what_it_scores(build: Build, tokenizer: Any) -> None:
    """Taught two of three questions, the values of one in another order, and a wrong answer to the third."""
    asked = probe("multi_value", num_needles=2, num_questions=3)
    rows = []
    for index in range(3):
        one = question(tokenizer, asked, index, num_tokens=400)
        first, second = one.wanted if index != 1 else one.wanted[::-1]
        said = f" {first} and {second if index != 2 else 1000000}.<|im_end|>"
        rows.append((one.ids, tokenizer(said, add_special_tokens=False)["input_ids"]))
    lm = build(attention="sdpa", initializer_range=0.02, num_hidden_layers=2)
    how = {"num_tokens": 400, "seed": 0, "date_string": DATE}
    assert probes.ask(lm, tokenizer, asked, batch_size=1, **how)["value"] == 0
    teach(lm, rows)
    for batch_size in (1, 3):
        assert probes.ask(lm, tokenizer, asked, batch_size=batch_size, **how) == scoring.share(
            [True, True, False]
        )


@pytest.mark.parametrize(
    ("prompt", "text", "mode", "good"),
    [
        ("assistant\n<think>\n\n</think>\n", "7", "no_think", True),
        ("assistant\n<think>\n\n</think>\n", "<think>\n\n</think>\n7", "no_think", False),
        ("assistant\n", "<think>\n\n</think>\n7", "no_think", True),
        ("assistant\n", "<think>\n3\n</think>\n7", "no_think", False),
        ("assistant\n", "7", "no_think", True),
        ("assistant\n", "7", "think", False),
        ("assistant\n", "<think>\n3\n</think>\n7", "think", True),
        ("assistant\n<think>\n", "3\n</think>\n7", "think", True),
        ("assistant\n", "<think>\n\n</think>\n7", "think", False),
    ],
)
def test_a_turn_is_judged_with_the_block_that_its_prompt_began(
    prompt: str, text: str, mode: str, good: bool
) -> None:
    assert scoring.obeys(prompt, text, mode, ended=True) == good
    assert not scoring.obeys(prompt, text, mode, ended=False)


@pytest.mark.usefixtures("one_thread")
def test_the_third_turn_comes_after_own_answers_to_the_first_two(build: Build, tokenizer: Any) -> None:
    """Taught to answer plainly after its own answers, and to think after anything else."""
    answers = ("1<|im_end|>", "2<|im_end|>", "3<|im_end|>")
    thoughts = "<think>\n4\n</think>\n5<|im_end|>"

    def row(mode: str, said: Sequence[str | None], answer: str) -> tuple[list[int], list[int]]:
        messages = [{"role": "system", "content": f"/{mode}"}]
        for content, turn in zip(("a?", "b?", "c?"), said, strict=False):
            messages.append({"role": "user", "content": content})
            if turn:
                messages.append({"role": "assistant", "content": turn.removesuffix("<|im_end|>")})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, date_string=DATE
        )
        return ids, tokenizer(answer, add_special_tokens=False)["input_ids"]

    lm = build(attention="sdpa", initializer_range=0.02, num_hidden_layers=2)
    rows = [row("no_think", [*answers[:turn], None], answers[turn]) for turn in range(3)]
    rows += [row("no_think", [None] * turn, thoughts) for turn in (2, 3)]
    rows += [
        row("think", [*["6"] * turn, None], thoughts if turn < 2 else "7<|im_end|>") for turn in range(3)
    ]
    rows += [
        row("think", [thoughts, None], thoughts),
        row("think", [thoughts, thoughts, None], "6<|im_end|>"),
    ]
    teach(lm, rows)
    asked = {
        "conversations": [["a?", "b?", "c?"]],
        "date_string": DATE,
        "max_new_tokens": 24,
        "batch_size": 1,
    }
    assert [one["value"] for one in scoring.turns(lm, tokenizer, mode="no_think", **asked)] == [1, 1, 1]
    assert [one["value"] for one in scoring.turns(lm, tokenizer, mode="think", **asked)] == [1, 1, 0]


def test_conversations_are_arithmetic_or_prompts_of_a_file(tmp_path: Path) -> None:
    few, many = (scoring.questions(None, number, 3, {}) for number in (2, 5))
    assert (few, [len(one) for one in many]) == (many[:2], [3] * 5)
    assert all(re.fullmatch(r"\d([-+*]\d)+\?", content) for one in many for content in one)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(4)))
    few, many = (scoring.questions(str(path), number, 3, {}) for number in (2, 5))
    assert few == many[:2]
    assert all(len(set(one)) == 3 and set(one) <= {"p0", "p1", "p2", "p3"} for one in many)
    path.write_text('{"prompt": "p0"}\n')
    with pytest.raises(probes.Refusal, match="found 1 prompts, wanted three"):
        scoring.questions(str(path), 2, 3, {})


def test_perplexity_is_that_of_a_computation_by_hand(build: Build, tokenizer: Any) -> None:
    lm, texts = build(attention="sdpa"), ["the old road was long " * 8, "3+4=7;7*2=4", ""]
    losses, counts = [], []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for window in (ids[start : start + 16] for start in range(0, len(ids), 16)):
            if len(window) < 2:
                continue
            with torch.no_grad():
                logp = lm(torch.tensor([window])).logits[0].double().log_softmax(-1)
            losses.append(-sum(logp[at, token].item() for at, token in enumerate(window[1:])))
            counts.append(len(window) - 1)
    assert len(counts) >= 4
    assert len(set(counts)) > 1
    mean = sum(losses) / sum(counts)
    spread = [(loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True)]
    error = math.sqrt(sum(spread) * len(counts) / (len(counts) - 1)) / sum(counts)
    found = scoring.perplexity(lm, tokenizer, texts, max_tokens=16)
    assert found == {
        "value": pytest.approx(math.exp(mean), rel=1e-4),
        "stderr": pytest.approx(math.exp(mean) * error, rel=1e-3),
        "num": len(counts),
    }
    with pytest.raises(ValueError, match="found 0 windows"):
        scoring.perplexity(lm, tokenizer, [""], max_tokens=16)


SUITE: dict[str, Any] = {
    "stage": "evals",
    "num_threads": 1,
    "needle_tokens": [],
    "num_needle_questions": 0,
    "num_arithmetic_questions": 0,
    "num_preference_pairs": 0,
    "max_new_tokens": 4,
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"probe": []}, "probe: unknown key; did you mean 'probes'"),
    "as": ({"probes": [{"kind": "single", "lengths": [9], "ass": "chat"}]}, "did you mean 'as'"),
    "kind": ({"probes": [{"kind": "double", "lengths": [9]}]}, "probes.0.kind: found \"double\""),
    "single": ({"probes": [{"kind": "single", "lengths": [9], "num_needles": 3}]}, "probe hides one"),
    "twice": ({"probes": [{"kind": "single", "lengths": [9, 9]}]}, "single_9 is measured twice"),
    "yarn": ({"probes": [{"kind": "single", "lengths": [9], "yarn": True}]}, "give both 'yarn_context'"),
    "beyond yarn": (
        {"probes": [{"kind": "single", "lengths": [900], "yarn": True}], "yarn_context": 512},
        "900 with yarn is beyond yarn_context 512",
    ),
    "context": (
        {"probes": [{"kind": "single", "lengths": [513]}]},
        "max_position_embeddings: found 512, but single_513 takes 513 tokens",
    ),
    "window": (
        {"perplexity": [{"name": "hay", "path": "hay.txt", "max_tokens": 600}]},
        "max_position_embeddings: found 512, but perplexity_hay takes 600",
    ),
    "no file": (
        {"probes": [{"kind": "single", "lengths": [9], "haystack": "straw.txt"}]},
        "straw.txt: no such file",
    ),
    "empty": ({"probes": [{"kind": "single", "lengths": [250], "haystack": "none.txt"}]}, "found no text"),
    "rows": ({"perplexity": [{"name": "x", "path": "x.jsonl", "max_tokens": 9}]}, "row 2: no column text"),
    "one window": (
        {"perplexity": [{"name": "x", "path": "one.txt", "max_tokens": 99}]},
        "found 1 windows of 99 tokens, wanted two at least",
    ),
    "prompts": ({"turn_prompts": "x.jsonl"}, "num_turn_questions is 0"),
    "nothing": ({}, "it asks nothing: every number of questions is 0"),
    "nothing of chats": ({"num_turn_questions": 2}, "nothing of it can be asked"),
    **{
        f"needles of {length}": (
            {"needle_tokens": [length], "num_needle_questions": 2},
            f"needle_tokens.0: found {length}",
        )
        for length in (0, 5, -5, 9)
    },
    "yarn needles": ({"yarn_needle_tokens": [5], "yarn_context": 512}, "yarn_needle_tokens.0: found 5"),
    **{
        str(options): ({key: options}, message)
        for key, options, message in (
            ("needle_options", {"num_keys": 0}, "'num_keys': found 0 (int), wanted a whole number"),
            ("needle_options", {"max_overwrites": "many"}, "\"many\" (str), wanted a whole number from 0"),
            ("needle_options", {"num_tokens": 62}, "option 'num_tokens' is not to be chosen here"),
            ("arithmetic_options", {"enable_thinking": True}, "'enable_thinking' is not to be chosen here"),
            ("arithmetic_options", {"min_steps": 6, "max_steps": 3}, "min_steps 6 is more than max_steps 3"),
            ("arithmetic_options", {"max_steps": 2}, "min_steps 3 is more than max_steps 2"),
            ("arithmetic_options", {"flag_share": 2}, "found 2 (int), wanted a share, from 0 to 1"),
            ("preference_options", {"min_steps": True}, "found true (bool), wanted a whole number from 1"),
        )
    },
    "stage": ({"stage": "evil"}, "stage: found \"evil\""),
}  # fmt: skip


@pytest.fixture
def suite(tmp_path: Path) -> Callable[..., str]:
    (tmp_path / "hay.txt").write_text(STORY)
    (tmp_path / "none.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("the old road")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"prompt": "b"}\n')

    def written(**changes: Any) -> str:
        path = tmp_path / "evals.yaml"
        path.write_text(json.dumps({**SUITE, **changes}))
        return str(path)

    return written


@pytest.mark.parametrize("case", BAD)
def test_a_suite_that_cannot_be_asked_is_refused_in_one_line(
    checkpoint: Path, suite: Callable[..., str], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    changes, message = BAD[case]
    if case == "nothing of chats":
        (checkpoint / "chat_template.jinja").unlink()
    assert commands.evaluate([str(checkpoint), "--suite", suite(**changes)]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert message in error


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{# enable_thinking #}"
)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "num_arithmetic_questions",
            "its chat template refuses a chat of system, user (System role not supp",
        ),
        (
            "num_turn_questions",
            "its chat template refuses a chat of system, user (System role not supported)",
        ),
        ("num_preference_pairs", "preference pairs: the chat template refuses the row: System role not supp"),
    ],
)
def test_a_template_that_refuses_a_system_message_is_told_in_one_line(
    checkpoint: Path, suite: Callable[..., str], capsys: pytest.CaptureFixture[str], asked: str, said: str
) -> None:
    (checkpoint / "chat_template.jinja").write_text(NO_SYSTEM)
    assert commands.evaluate([str(checkpoint), "--suite", suite(**{asked: 20})]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"refused: {checkpoint}: {said}")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("one_thread")
def test_the_names_of_a_suite_are_those_of_what_it_measures(
    checkpoint: Path, suite: Callable[..., str]
) -> None:
    path = suite(
        needle_tokens=[20, 50],
        num_needle_questions=1,
        yarn_context=1024,
        yarn_needle_tokens=[50, 90],
        num_arithmetic_questions=1,
        num_preference_pairs=1,
        num_turn_questions=1,
        probes=[
            {"kind": "single", "lengths": [240], "num_questions": 1},
            {"kind": "single", "lengths": [400], "num_questions": 1, "as": "chat", "yarn": True},
        ],
        perplexity=[{"name": "hay", "path": "hay.txt", "max_tokens": 64}],
    )
    recipe = commands.load_suite(Path(path))
    found, _ = evals.evaluate(checkpoint, recipe)
    assert sorted(found) == sorted(recipe.metric_names())
    found, _ = evals.evaluate(checkpoint, recipe.model_copy(update=evals.WITHOUT_YARN))
    assert sorted(found) == sorted(recipe.metric_names(yarn=False))


@pytest.mark.parametrize("model", ["none", "./no/such", "runs/tiny/none"])
def test_a_model_that_is_nowhere_is_refused(
    suite: Callable[..., str], capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert commands.evaluate([model, "--suite", suite()]) == 2
    assert capsys.readouterr().err.startswith(f"refused: {model}: no such folder and no Hub id")


@pytest.mark.usefixtures("one_thread")
def test_eval_prints_json_or_a_table_and_leaves_the_model_as_it_was(
    checkpoint: Path, suite: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in checkpoint.rglob("*")}
    path = suite(
        probes=[
            {"kind": "single", "lengths": [240], "num_questions": 2},
            {"kind": "single", "lengths": [400], "num_questions": 2, "as": "chat"},
            {"kind": "multi_key", "lengths": [600], "num_needles": 2, "num_questions": 1, "yarn": True},
        ],
        yarn_context=1024,
        perplexity=[{"name": "hay", "path": "hay.txt", "max_tokens": 64}],
        num_turn_questions=2,
    )
    assert commands.evaluate([str(checkpoint), "--suite", path, "--json", "--mode", "no_think"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["mode_no_think_flag", "mode_no_think_turn3", "single_240", "single_400_chat", "perplexity_hay"]
    assert list(found["metrics"]) == [*names, "multi_key_600_yarn"]
    assert all(one.keys() == {"value", "stderr", "num"} for one in found["metrics"].values())
    assert found["metrics"]["single_240"] == {"value": 0.0, "stderr": 0.0, "num": 2}
    assert commands.evaluate([str(checkpoint), "--suite", path, "num_turn_questions=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", "value", "error", "number"]
    assert [line.split()[0] for line in lines[1:]] == [
        "mode_think_flag",
        "mode_think_turn3",
        *names,
        "multi_key_600_yarn",
    ]
    assert {path: path.read_bytes() for path in checkpoint.rglob("*")} == before


@pytest.mark.usefixtures("one_thread")
def test_greedy_is_greedy_whatever_the_checkpoint_asks_of_generation(
    checkpoint: Path, suite: Callable[..., str]
) -> None:
    recipe = commands.load_suite(Path(suite(num_arithmetic_questions=2, max_new_tokens=12)))
    _, plain = evals.evaluate(checkpoint, recipe)
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 3.0}))
    _, penalised = evals.evaluate(checkpoint, recipe)
    assert len(plain) == 4
    assert penalised == plain


def test_a_suite_counts_what_its_files_hold_not_where_they_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hay.txt").write_text(STORY)
        texts = {"name": "hay", "path": "hay.txt", "max_tokens": 9}
        (tmp_path / name / "evals.yaml").write_text(json.dumps({**SUITE, "perplexity": [texts]}))
    one, other = (commands.load_suite(tmp_path / name / "evals.yaml") for name in ("a", "b"))
    assert one.files() == [str(tmp_path / "a" / "hay.txt")] != other.files()
    assert one.model_dump() == other.model_dump()
    assert "hay.txt" not in str(one.model_dump())
    assert evals._what(one) == evals._what(other)
    assert "hay.txt" not in str(evals._what(one))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """How many of one checkpoint's results a suite measures anew."""
    monkeypatch.setattr(manifest, "read_manifest", lambda _: {"digest": "sha256:same"})
    monkeypatch.setattr(manifest, "is_whole", lambda _: True)
    monkeypatch.setattr(evals, "evaluate", lambda *_: ({}, []))
    job = plan.Job("one", config.MergeRecipe(stage="merge"), tmp_path / "m.yaml", tmp_path / "one", [])

    def number(recipe: config.EvalsRecipe) -> int:
        counted: list[Any] = []
        real = evals.measure
        monkeypatch.setattr(evals, "measure", lambda *task: counted.append(task) or real(*task))
        evals.evaluate_all(recipe, [job])
        monkeypatch.setattr(evals, "measure", real)
        return len(counted)

    return number


def test_a_result_is_measured_again_where_a_file_moves_to_another_question(
    suite: Callable[..., str], measured: Callable[..., int], tmp_path: Path
) -> None:
    """The same files in other places: another haystack, or the haystack of another kind."""
    (tmp_path / "other.txt").write_text(STORY[::-1])

    def asking(*haystacks: str | None) -> config.EvalsRecipe:
        kinds = zip(("single", "multi_key"), haystacks, strict=True)
        probes = [{"kind": kind, "lengths": [240], "haystack": hay} for kind, hay in kinds]
        return commands.load_suite(Path(suite(probes=probes)))

    for haystacks in (
        ("hay.txt", "other.txt"), ("other.txt", "hay.txt"), ("hay.txt", None), (None, "hay.txt")
    ):  # fmt: skip
        assert measured(asking(*haystacks)) == 1
        assert measured(asking(*haystacks)) == 0


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"num_threads": 2}, True),
        ({"batch_size": 1}, True),
        ({"num_yarn_questions": 1}, True),
        ({"yarn_context": 512, "yarn_needle_tokens": [64]}, True),
        ({"probes": [{"kind": "single", "lengths": [99], "yarn": True}], "yarn_context": 512}, True),
        ({"probes": [{"kind": "single", "lengths": [99]}]}, False),
        ({"seed": 3}, False),
        ({"max_new_tokens": 5}, False),
        ({"needle_options": {"max_overwrites": 1}}, False),
    ],
)
def test_evals_say_what_was_asked_whatever_code_and_yarn(
    suite: Callable[..., str],
    measured: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    same: bool,
) -> None:
    found = []
    for recipe in ({}, changes):
        assert measured(commands.load_suite(Path(suite(**recipe)))) == 1
        found.append(json.loads((tmp_path / "evals" / "one.json").read_text())["asked_digest"])
        monkeypatch.setattr(evals, "CODE", evals.CODE[1:])
    assert (found[0] == found[1]) is same


@pytest.mark.parametrize("text", ['{"run": "on', "[1]", "\xff"])
def test_a_result_that_is_not_readable_is_measured_again(
    suite: Callable[..., str], measured: Callable[..., int], tmp_path: Path, text: str
) -> None:
    recipe = commands.load_suite(Path(suite()))
    assert measured(recipe) == 1
    (tmp_path / "evals" / "one.json").write_text(text, encoding="latin-1")
    assert measured(recipe) == 1
    assert measured(recipe) == 0


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_result_is_measured_again_with_another_version_of_a_library(
    suite: Callable[..., str], measured: Callable[..., int], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    recipe, real = commands.load_suite(Path(suite())), metadata.version
    assert (measured(recipe), measured(recipe)) == (1, 0)
    monkeypatch.setattr(metadata, "version", lambda name: "9" if name == library else real(name))
    assert (measured(recipe), measured(recipe)) == (1, 0)


def test_all_code_that_decides_a_result_is_part_of_its_key() -> None:
    """Every module of ours that a measurement imports, but for recipes, refusals and bookkeeping."""
    folder, found = Path(evals.__file__).parent, set[str]()
    todo = {"scoring", "probes", "tool_scores", "harness", "model", "vocabulary"}
    while todo:
        found.add(name := todo.pop())
        text = (folder / f"{name}.py").read_text()
        todo |= set(re.findall(r"^from smol_post\.(\w+) import", text, re.MULTILINE))
        for names in re.findall(r"^from smol_post import (.+)", text, re.MULTILINE):
            todo |= set(names.split(", "))
        todo -= {*found, "config", "evals_config", "strict", "refusal", "hub", "manifest", "trust"}
    assert {f"{name}.py" for name in found} <= set(evals.CODE)
