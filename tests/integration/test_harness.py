"""Standard benchmarks through lm-eval, offline: a tiny model that has learned to think first, or not."""

import copy
import doctest
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smol_post import chat, config, evals, loading, model, overlap, plan
from smol_post.judging_config import Decontaminate
from smol_post.refusal import Refusal

pytestmark = pytest.mark.slow
QUESTIONS = {"1+1": "2", "2+3": "5"}
DATE = "01 July 2025"
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
doc_to_text: "{{question}}?"
"""
SUMS = """
task: sums
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["="], do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: as-is, filter: [{function: take_first}]}
  - {name: digit, filter: [{function: regex, regex_pattern: "(\\\\d)"}, {function: take_first}]}
"""
GROUP = """
group: all_sums
task: [sums, sums_again]
aggregate_metric_list: [{metric: exact_match, filter_list: [digit]}]
"""
CHOICES = """
task: sums_choices
output_type: multiple_choice
doc_to_choice: ["2", "5"]
doc_to_target: "{{['2', '5'].index(answer)}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def entry(folder: Path, **changes: Any) -> config.Harness:
    given = {"tasks": ["sums"], "modes": ["think", "no_think"], "include_path": str(folder)}
    tree = {**given, "max_new_tokens": 24, "temperature": None, "batch_size": 2, **changes}
    return loading.validate(config.Harness, tree, where="evals.yaml")


def prompt(tokenizer: Any, question: str, *, thinking: bool) -> str:
    """Written by the tokenizer, not by lm-eval."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{question}?"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
        date_string=DATE,
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.dumps({"question": question, "answer": found}) for question, found in QUESTIONS.items()]
    (folder / "questions.jsonl").write_text("\n".join(rows))
    (folder / "sums.yaml").write_text(SUMS + DATA)
    (folder / "choices.yaml").write_text(CHOICES + DATA)
    (folder / "group.yaml").write_text(GROUP)
    (folder / "again.yaml").write_text((SUMS + DATA).replace("task: sums", "task: sums_again"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Any, build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows four chats by heart: both questions, thought about and not."""
    import torch

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = chat.END_OF_TURN
    torch.set_num_threads(1)
    lm = build(attention="sdpa", hidden_size=64, initializer_range=0.05).train()
    rows = []
    for question, found in QUESTIONS.items():
        thought = f"<think>\n{question}={found}\n</think>\n{found}"
        for thinking, text in ((True, thought), (False, found)):
            start = tokenizer(prompt(tokenizer, question, thinking=thinking))["input_ids"]
            rows.append((start, tokenizer(f"{text}<|im_end|>")["input_ids"]))
    optimiser = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    for _ in range(150):
        losses = [
            lm(input_ids=torch.tensor([start + end]), labels=torch.tensor([[-100] * len(start) + end])).loss
            for start, end in rows
        ]
        total = torch.stack(losses).mean()
        total.backward()
        optimiser.step()
        optimiser.zero_grad()
        if total.item() < 0.005:
            break
    assert total.item() < 0.005
    folder = tmp_path_factory.mktemp("checkpoint")
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    from smol_post import vocabulary

    return model.load_model(checkpoint, attn_implementation="sdpa").eval(), vocabulary.load_tokenizer(
        checkpoint
    )


def test_rows_are_held_against_the_questions_of_tasks(tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "evals.yaml").write_text(
        "stage: evals\nneedle_tokens: []\nnum_arithmetic_questions: 0\nnum_preference_pairs: 0\n"
        f"harness: [{{tasks: [all_sums], modes: [base], include_path: {tasks}}}]\n"
    )
    found = overlap.Suites(Decontaminate(suites=["evals.yaml"]), tmp_path)
    assert found.find("2+3?\n5") == "evals.yaml: sums"
    assert found.find("2+4?\n6") is None
    assert "evals.yaml: sums_again" in found.names


def samples(loaded: tuple[Any, Any], asked: config.Harness, mode: str) -> list[dict[str, Any]]:
    """What lm-eval logged of the one task asked."""
    from smol_post import harness

    found = harness.run(*loaded, asked, harness.load(asked), mode=mode, date_string=DATE)
    return found["samples"][asked.tasks[0]]


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_the_model_gets_the_template_s_prompt_and_the_task_its_answer(
    loaded: tuple[Any, Any], tasks: Path, mode: str
) -> None:
    found = [one for one in samples(loaded, entry(tasks), mode) if one["filter"] == "as-is"]
    for sample, (question, wanted) in zip(found, QUESTIONS.items(), strict=True):
        assert sample["arguments"][0][0] == prompt(loaded[1], question, thinking=mode == "think")
        assert sample["resps"] == [[wanted]]  # neither the thought nor its "=", a stop string


def test_without_the_stripping_the_thought_would_be_there(loaded: tuple[Any, Any], tasks: Path) -> None:
    """The checkpoint really thinks: lm-eval's own class, asked the same, sees it, cut at the stop string."""
    from smol_post import harness

    lm, tokenizer = loaded
    asked = entry(tasks)
    plain = harness.HFLM(lm, tokenizer=tokenizer, chat_template_args={"date_string": DATE})
    found = harness.simple_evaluate(
        plain,
        tasks=harness.load(asked),
        task_manager=harness.find(asked),
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": 24},
    )
    assert found["samples"]["sums"][0]["resps"] == [["<think>\n1+1"]]


def test_base_asks_without_a_template(loaded: tuple[Any, Any], tasks: Path) -> None:
    found = samples(loaded, entry(tasks, modes=["base"], tasks=["sums_choices"]), "base")
    assert [sample["arguments"] for sample in found] == [
        [(f"{question}?", "2"), (f"{question}?", "5")] for question in QUESTIONS
    ]


def test_choices_are_scored_after_the_empty_thought(loaded: tuple[Any, Any], tasks: Path) -> None:
    found = samples(loaded, entry(tasks, modes=["no_think"], tasks=["sums_choices"]), "no_think")
    for sample, question in zip(found, QUESTIONS, strict=True):
        assert [context for context, _ in sample["arguments"]] == 2 * [
            prompt(loaded[1], question, thinking=False)
        ]
        assert sample["acc"] == 1.0


def test_evals_has_the_metrics_in_our_shape(checkpoint: Path, tasks: Path) -> None:
    asked = [
        entry(tasks),
        entry(tasks, tasks=["sums_choices"], modes=["base", "no_think"], limit=1),
    ]
    tree = {"stage": "evals", "num_threads": 1, "needle_tokens": [], "num_arithmetic_questions": 0}
    recipe = loading.validate(
        config.EvalsRecipe,
        {**tree, "num_preference_pairs": 0, "harness": [one.model_dump(exclude_unset=True) for one in asked]},
        where="evals.yaml",
    )
    metrics, _ = evals.evaluate(checkpoint, recipe)
    right = {"value": 1.0, "stderr": 0.0, "num": 2}
    ours = {f"sums_exact_match_{filter_}_{mode}" for filter_ in ("as-is", "digit") for mode in asked[0].modes}
    assert {name: metrics[name] for name in ours} == dict.fromkeys(ours, right)
    assert metrics["sums_choices_acc_no_think"] == {"value": 1.0, "stderr": None, "num": 1}
    assert set(metrics) == ours | {"sums_choices_acc_base", "sums_choices_acc_no_think"}


def test_a_group_stands_for_its_tasks(loaded: tuple[Any, Any], tasks: Path) -> None:
    from smol_post import harness

    found = harness.evaluate(*loaded, entry(tasks, tasks=["all_sums"], modes=["think"]), date_string=DATE)
    assert found == {"all_sums_exact_match_digit_think": {"value": 1.0, "stderr": 0.0, "num": 4}}


def test_standard_errors_are_lm_eval_s(loaded: tuple[Any, Any], tasks: Path, tmp_path: Path) -> None:
    """One of two right: sample deviation 0.7071 over the root of 2."""
    from smol_post import harness

    for path in tasks.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "questions.jsonl").write_text(
        '{"question": "1+1", "answer": "2"}\n{"question": "2+3", "answer": "2"}'
    )
    found = harness.evaluate(*loaded, entry(tmp_path, modes=["think"]), date_string=DATE)
    assert found["sums_exact_match_as-is_think"] == {"value": 0.5, "stderr": 0.5, "num": 2}


def test_samples_follow_the_seed_and_the_temperature(loaded: tuple[Any, Any], tasks: Path) -> None:
    def texts(**changes: Any) -> list[Any]:
        hot = {"temperature": 5.0, "top_p": 1.0, "modes": ["no_think"], **changes}
        return [one["resps"] for one in samples(loaded, entry(tasks, **hot), "no_think")]

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert texts(seed=1, top_p=1e-9) == texts(seed=2, top_p=1e-9)  # a nucleus of one token


def test_a_mode_that_a_checkpoint_lacks_is_absent(loaded: tuple[Any, Any], tasks: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from smol_post import harness

    lm, tokenizer = loaded
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=chat.END_OF_TURN)
    assert harness.modes(bare) == ["base"]
    bare.chat_template = chat.load_template("chatml")
    assert harness.modes(bare) == ["base", "think"]
    assert harness.modes(tokenizer) == ["base", "think", "no_think"]
    found = harness.evaluate(lm, bare, entry(tasks, modes=["no_think"]), date_string=DATE)
    assert found == {}


@pytest.mark.parametrize(
    ("text", "opened", "wanted"),
    [
        ("<think>\n1+1=2\n</think>\n2", False, "2"),
        ("1+1=2\n</think>\n2", True, "2"),
        ("1+1=2", True, ""),
        ("<think>\n1+1=2", False, ""),
        ("<think>a</think>b<think>c</think> d", False, "d"),
        ("<think>a</think>b<think>c", False, "b"),
        (" 2\n", False, " 2\n"),
    ],
)
def test_only_what_follows_the_thought_is_an_answer(text: str, opened: bool, wanted: str) -> None:
    from smol_post import scoring

    assert scoring.answer(text, opened=opened) == wanted
    assert doctest.testmod(scoring).failed == 0


def refusal(loaded: tuple[Any, Any], asked: config.Harness) -> str:
    from smol_post import harness

    with pytest.raises(Refusal) as found:
        harness.evaluate(*loaded, asked, date_string=DATE)
    (line,) = str(found.value).splitlines()
    return line


def test_an_unknown_task_is_refused_with_the_nearest(loaded: tuple[Any, Any], tasks: Path) -> None:
    asked = entry(tasks, tasks=["hellaswag", "hellaswagg"], include_path=None)
    assert "has no task 'hellaswagg'; did you mean 'hellaswag'?" in refusal(loaded, asked)
    asked = entry(tasks, tasks=["no such thing at all"], include_path=None)
    assert "`lm-eval ls tasks`" in refusal(loaded, asked)


def test_lm_eval_has_the_tasks_of_the_example(repo: Path) -> None:
    from smol_post import harness

    recipe = loading.load_recipe(repo / "recipes" / "smollm3" / "harness.yaml")
    assert isinstance(recipe, config.EvalsRecipe)
    for asked in recipe.harness:
        harness.find(asked)


def test_a_task_without_its_data_is_refused_by_name(
    loaded: tuple[Any, Any], tasks: Path, tmp_path: Path
) -> None:
    (tmp_path / "sums.yaml").write_text((tasks / "sums.yaml").read_text())
    assert "data of task sums" in refusal(loaded, entry(tmp_path))


def test_a_thought_is_not_asked_of_a_choice(loaded: tuple[Any, Any], tasks: Path, tmp_path: Path) -> None:
    line = refusal(loaded, entry(tasks, tasks=["sums_choices"]))
    assert "task sums_choices is of type multiple_choice" in line
    (tmp_path / "questions.jsonl").write_text((tasks / "questions.jsonl").read_text())
    (tmp_path / "sums.yaml").write_text(SUMS + DATA + 'gen_prefix: "It is"\n')
    assert "begins the answer with 'It is'" in refusal(loaded, entry(tmp_path))


def test_prompts_are_never_cut(loaded: tuple[Any, Any], tasks: Path) -> None:
    assert "sums: prompt and answer may take 3" in refusal(loaded, entry(tasks, max_new_tokens=200))
    lm = loaded[0]
    before, lm.config.max_position_embeddings = lm.config.max_position_embeddings, 3
    try:
        asked = entry(tasks, tasks=["sums_choices"], modes=["base"])
        assert "and a choice may take" in refusal(loaded, asked)
    finally:
        lm.config.max_position_embeddings = before


def test_a_task_of_its_own_number_of_examples_keeps_it(
    loaded: tuple[Any, Any], tasks: Path, tmp_path: Path
) -> None:
    (tmp_path / "questions.jsonl").write_text((tasks / "questions.jsonl").read_text())
    (tmp_path / "sums.yaml").write_text(SUMS + DATA + "num_fewshot: 0\n")
    assert "remove num_fewshot" in refusal(loaded, entry(tmp_path, num_fewshot=1))


def test_the_folder_counts_from_the_recipe_and_must_be_there(tasks: Path) -> None:
    path = tasks.parent / "evals.yaml"
    tree = "stage: evals\nharness: [{tasks: [sums], modes: [think], include_path: %s}]\n"
    path.write_text(tree % tasks.name)
    recipe = loading.load_recipe(path)
    plan.check_names(recipe, path)
    assert isinstance(recipe, config.EvalsRecipe)
    assert recipe.harness[0].include_path == str(tasks)
    path.write_text(tree % "nowhere")
    with pytest.raises(Refusal, match=r"include_path: no such folder .*nowhere"):
        plan.check_names(loading.load_recipe(path), path)
    path.write_text("stage: evals\nharness: [{tasks: [sums, sums], modes: [think]}]\n")
    with pytest.raises(Refusal, match="'sums' is asked twice in mode think"):
        loading.load_recipe(path)


def test_results_are_of_the_task_files_wherever_they_are(tasks: Path, tmp_path: Path) -> None:
    def what(folder: Path) -> dict[str, Any]:
        return evals._what(config.EvalsRecipe(stage="evals", harness=[entry(folder)]))

    for path in tasks.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_text(path.read_text())
    assert what(tmp_path) == what(tasks)
    (tmp_path / "questions.jsonl").write_text("{}")
    assert what(tmp_path) != what(tasks)


@pytest.mark.parametrize("lacking", ["lm_eval", "nltk"])
def test_a_missing_extra_is_one_line(tmp_path: Path, tasks: Path, lacking: str) -> None:
    """An interpreter without the package: `check` looks for lm-eval itself, evals for all that it needs."""
    path = tmp_path / "evals.yaml"
    path.write_text(f"stage: evals\nharness: [{{tasks: [sums], modes: [think], include_path: {tasks}}}]\n")
    code = f"""
import sys
sys.modules[{lacking!r}] = None
from pathlib import Path
from smol_post import loading, plan, refusal
path = Path({str(path)!r})
try:
    recipe = loading.load_recipe(path)
    plan.check_names(recipe, path)
    from smol_post import harness
except refusal.Refusal as error:
    print(error)
    print(sorted({{"torch"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, torch = done.stdout.splitlines()
    assert "pip install 'smol_post[eval]'" in line
    assert torch == ("[]" if lacking == "lm_eval" else "['torch']")


def test_the_words_of_nltk_are_there_before_the_answers_are(
    loaded: tuple[Any, Any], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    (tmp_path / "questions.jsonl").write_text((tasks / "questions.jsonl").read_text())
    (tmp_path / "sums.yaml").write_text((SUMS + DATA).replace("task: sums", "task: sums_ifeval"))
    assert "nltk.downloader punkt_tab" in refusal(loaded, entry(tmp_path, tasks=["sums_ifeval"]))


def test_a_think_token_that_decoding_hides_is_refused(loaded: tuple[Any, Any], tasks: Path) -> None:
    from transformers import AddedToken

    hiding = copy.deepcopy(loaded[1])
    hiding.add_tokens([AddedToken("</think>", special=True, normalized=False)])
    assert "is a special token here" in refusal((loaded[0], hiding), entry(tasks))


def test_a_task_that_lm_eval_cannot_build_is_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "sums.yaml").write_text("task: sums\noutput_type: nonsense\ndataset_path: json\n")
    assert "task sums cannot be loaded" in refusal(loaded, entry(tmp_path))


def test_the_command_refuses_a_task_before_it_measures_and_reports_what_it_measured(
    recipe_folder: Path, tasks: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(tasks, recipe_folder / "tasks")
    path = recipe_folder / "evals.yaml"
    harness = "harness: [{tasks: [%s], modes: [base, think], max_new_tokens: 8, include_path: tasks}]\n"
    before = path.read_text()
    path.write_text(before + harness % "sums")
    assert command("smol-post", "run", recipe_folder, "--run-dir", runs, "--until", "base").returncode == 0
    assert command("smol-post", "evals", recipe_folder, "--run-dir", runs).returncode == 0
    result = (runs / "evals" / "base.json").read_text()
    wanted = {f"sums_exact_match_{by}_base" for by in ("as-is", "digit")}
    assert wanted <= set(json.loads(result)["metrics"])  # a base has no chat to think in
    again = command("smol-post", "evals", recipe_folder, "--run-dir", runs)
    assert "kept, same checkpoint and suite" in again.stdout
    path.write_text(before + harness % "gsm8kk")
    done = command("smol-post", "evals", recipe_folder, "--run-dir", runs)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("refused: harness: tasks: lm-eval has no task 'gsm8kk'")
    assert (runs / "evals" / "base.json").read_text() == result
