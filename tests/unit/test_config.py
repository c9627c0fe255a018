"""A recipe that is wrong is refused in one line that says where, what was found and what to do."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from smol_post import commands, config, loading
from smol_post.plan import make_plan
from smol_post.refusal import Refusal

SFT = "sft.yaml"


def edit(path: Path, **changes: Any) -> None:
    tree = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        loading.apply_override(tree, key.split("__"), value)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def refusal(folder: Path, **changes: Any) -> str:
    edit(folder / SFT, **changes)
    with pytest.raises(Refusal) as caught:
        loading.load_recipe(folder / SFT)
    message = str(caught.value)
    assert message.startswith(f"{folder / SFT}:")
    assert "\n" not in message
    return message.removeprefix(f"{folder / SFT}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources__0__num_row": 5}, "sources.0.num_row: unknown key; did you mean 'num_rows'?"),
        ({"max_tokens": True}, "max_tokens: found true \\(bool\\), wanted a valid integer"),
        ({"max_tokens": 512.0}, "max_tokens: found 512.0 \\(float\\), wanted a valid integer"),
        ({"num_steps": 0}, "num_steps: found 0 \\(int\\), wanted greater than 0"),
        ({"num_steps": None}, "give exactly one of 'num_steps' and 'num_epochs'"),
        ({"packing": "ffd"}, "packing: found .ffd."),
        ({"sources": []}, "sources: found \\[\\]"),
        ({"sources__0__keep_fraction": 0.0}, "sources.0.keep_fraction: found 0.0"),
        ({"sources__0__path": "rows.jsonl"}, "exactly one of 'path' and 'generator'"),
        (
            {"sources": [{"name": "s", "path": "r.jsonl.gz", "split": "test"}]},
            "'split' is for data sets, a file",
        ),
        ({"sources": [{"name": "s", "path": "r.json", "columns": {"promt": "q"}}]}, "did you mean 'prompt'"),
        ({"sources__0__columns": {"prompt": "q"}}, "'columns' goes with 'path' only"),
        ({"sources__0__token_share": 0.5}, "token_share: 1 of 1 sources have one, in all 0.5"),
        ({"sources__0__token_share": 1.0, "think_to_no_think": 1.0}, "think_to_no_think: the sources have"),
        ({"sources__0__mode": "thinking"}, "sources.0.mode: found .thinking."),
        ({"sources__0__repeat": 1.5}, "sources.0.repeat: found 1.5"),
        ({"on_bad_rows": "ignore"}, "on_bad_rows: found .ignore."),
        ({"trainer__gradient_checkpointing": True}, "trainer.gradient_checkpointing: .*activation_check"),
        ({"trainer__learning_rate": "1e-6"}, "trainer.learning_rate: .*write 1.0e-06"),
        ({"trainer__learning_rate": True}, "trainer.learning_rate: found true \\(bool\\), wanted float"),
        ({"trainer__logging_steps": "often"}, "trainer.logging_steps: found .often. \\(str\\)"),
        ({"trainer__lr_scheduler_type": "cosin"}, "trainer.lr_scheduler_type: .*did you mean 'cosine'"),
        ({"trainer__lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_a_wrong_key_or_value_is_named(recipe_folder: Path, changes: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(recipe_folder, **changes))


def test_a_misspelt_key_that_must_be_there_is_named_as_it_is_written(recipe_folder: Path) -> None:
    path = recipe_folder / SFT
    path.write_text(path.read_text().replace("max_tokens:", "max_token:"))
    with pytest.raises(Refusal, match="max_token: unknown key; did you mean 'max_tokens'"):
        loading.load_recipe(path)


def test_a_key_given_twice_is_refused_with_its_line(recipe_folder: Path) -> None:
    path = recipe_folder / SFT
    path.write_text(path.read_text() + "num_steps: 9\n")
    with pytest.raises(Refusal, match=r"'num_steps' is given twice") as caught:
        loading.load_recipe(path)
    number = re.search(r"line (\d+):", str(caught.value))
    assert number is not None
    assert "num_steps" in path.read_text().splitlines()[int(number[1]) - 1]


def test_the_whole_test_recipe_is_valid(recipe_folder: Path) -> None:
    assert commands.check([str(recipe_folder)]) == 0


def test_overrides_come_last_and_reach_into_lists(recipe_folder: Path) -> None:
    recipe = loading.load_recipe(
        recipe_folder / SFT,
        overrides={"seed": 1, "num_steps": 7},
        arguments=[
            "num_steps=8",
            "trainer.learning_rate=2.0e-4",
            "sources.0.num_rows=3",
            "trainer.optim=sgd",
        ],
    )
    assert isinstance(recipe, config.SftRecipe)
    assert (recipe.seed, recipe.num_steps, recipe.sources[0].num_rows) == (1, 8, 3)
    assert recipe.trainer["learning_rate"] == 2.0e-4
    assert recipe.trainer["optim"] == "sgd"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("num_step=5", "did you mean 'num_steps'"),
        ("num_steps=1e-6", "write 1.0e-06"),
        ("sources.zero.num_rows=5", "wanted a number under 1"),
    ],
)
def test_a_wrong_override_is_refused(recipe_folder: Path, argument: str, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        loading.load_recipe(recipe_folder / SFT, arguments=[argument])


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        ("merge", {"parents": ["../sft"]}, "'merge' has 1 parents; stage merge wants at least 2"),
        ("merge", {"parents": ["../sft", "../sft"]}, "names a parent twice"),
        ("mid", {"stage": "midd"}, "stage: found .midd."),
        ("mid", {"recipes": "x"}, "recipes: unknown key; did you mean 'recipe'"),
    ],
)
def test_a_wrong_pipeline_is_refused(
    recipe_folder: Path, run: str, changes: dict[str, Any], message: str
) -> None:
    path = recipe_folder / "pipeline.yaml"
    tree = yaml.safe_load(path.read_text())
    next(entry for entry in tree["runs"] if entry["name"] == run).update(changes)
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(Refusal, match=message) as caught:
        loading.load_pipeline(recipe_folder)
    assert str(path) in str(caught.value)


def test_only_the_first_run_of_a_chain_may_add_tokens(
    recipe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(recipe_folder / SFT, add_tokens=["<|tool|>"])
    assert commands.check([str(recipe_folder)]) == 2
    assert "add_tokens" in capsys.readouterr().err


def test_the_field_table_is_that_of_the_installed_trl() -> None:
    from smol_post import trl_fields

    written = Path(config.__file__).with_name("trl_fields.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(trl_fields.trl_field_table()))


def test_every_owned_or_inert_trainer_key_is_a_field_of_trl() -> None:
    """A key that TRL renamed would otherwise slip from the table into `no such field`, or be set twice."""
    from smol_post.trainer_block import INERT, INERT_IN_APO, OWNED, trl_fields

    known = trl_fields("sft").keys() | trl_fields("apo").keys()
    assert {*OWNED, *INERT, *INERT_IN_APO} - known == set()


@pytest.mark.parametrize(
    ("stage", "block", "message"),
    [
        ("sft", {"loss_type": "nnl"}, 'found "nnl" .*wanted nll or dft'),
        ("sft", {"loss_type": "dft", "label_smoothing_factor": 0.1}, "dft does not use it"),
        ("sft", {"save_only_model": True}, "a resumed run would not be the same run"),
        ("sft", {"hub_token": "secret"}, "published by hand"),
        ("sft", {"fp16": True}, "use bf16"),
        ("sft", {"save_strategy": "best"}, "no evaluation set"),
        ("sft", {"save_total_limit": 1}, "found 1, wanted 2 or more"),
        ("apo", {"loss_type": []}, "found none, wanted one of apo_zero"),
        ("apo", {"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0]}, "found 1 for 2 losses"),
        ("apo", {"beta": 0.0}, r"beta: found 0\.0, wanted more than 0"),
        ("apo", {"ld_alpha": 0.5}, "summed over the whole answer"),
        ("apo", {"label_smoothing": 0.1}, "no loss of this stage uses it"),
        ("apo", {"precompute_ref_log_probs": True}, "set reference instead"),
    ],
)
def test_a_trainer_key_that_would_be_ignored_or_break_the_run_is_refused(
    stage: str, block: dict[str, Any], message: str
) -> None:
    from smol_post.trainer_block import check_trainer_block

    with pytest.raises(Refusal, match=message):
        check_trainer_block(stage, block, where="r.yaml")
    check_trainer_block(stage, {"learning_rate": 1.0e-3}, where="r.yaml")


MERGE, GATE = "merge.yaml", "gate: {suite: evals.yaml, recover: needle_8x}"


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (SFT, "stage: sft", "stage: sft\nchat_template: smolpost", "no chat template 'smolpost'"),
        ("apo.yaml", "apo_zero", "nonsense", r"trainer\.loss_type: found \"nonsense\""),
        (
            "evals.yaml",
            "stage: evals",
            "stage: evals\nneedle_options: {max_overwrite: 1}",
            "no option 'max_overwrite'",
        ),
        (SFT, "stage: sft", "stage: sft\ngates: {think: {}}", "gates.think: give 'min', 'max' or both"),
        (
            SFT,
            "stage: sft",
            "stage: sft\ngates: {think: {min: 0.5, max: 0.4}}",
            "gates.think: min 0.5 is more than max 0.4",
        ),
        (
            MERGE,
            "stage: merge",
            f"stage: merge\nweights: [0, 0.1]\n{GATE}",
            "gate: its suite measures no 'needle_8x'; did you mean 'needle_",
        ),
        (
            MERGE,
            "stage: merge",
            "stage: merge\nweights: [0, 0.1]",
            "give both 'weights' and 'gate', or neither",
        ),
        (MERGE, "stage: merge", f"stage: merge\nweights: [0, 0]\n{GATE}", "weights: one is given twice"),
        (
            MERGE,
            "stage: merge",
            f"stage: merge\nweights: [0, 1]\n{GATE}",
            r"weights\.1: found 1 .int., wanted less than 1",
        ),
        (
            MERGE,
            "stage: merge",
            f"stage: merge\nweights: [0, 0.1]\nsoup_weight: 1.0\n{GATE}",
            "give one or the other",
        ),
        (
            MERGE,
            "stage: merge",
            f"stage: merge\nweights: [0, 0.1]\n{GATE.replace('evals', 'sft')}",
            "is of stage sft, wanted evals",
        ),
        (
            MERGE,
            "stage: merge",
            f"stage: merge\nweights: [0, 0.1]\n{GATE.replace('evals', 'e')}",
            r"e\.yaml: no such file",
        ),
    ],
)
def test_names_that_lead_nowhere_are_refused_before_anything_runs(
    recipe_folder: Path, name: str, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert commands.check([str(recipe_folder)]) == 2
    assert re.search(message, capsys.readouterr().err)


LORA = {"r": 16, "lora_alpha": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft": LORA | {"lora_dropot": 0.1}},
            "peft.lora_dropot: unknown key; did you mean 'lora_dropout'?",
        ),
        ({"peft": LORA | {"bias": "all"}}, "peft.bias: unknown key"),
        ({"peft": {"r": 0, "lora_alpha": 32}}, "peft.r: found 0 .int., wanted greater than 0"),
        ({"peft": {"r": 16}}, "peft.lora_alpha: this key is missing"),
        ({"peft": LORA | {"lora_dropout": 1.0}}, "peft.lora_dropout: found 1.0 .float., wanted less than 1"),
        ({"peft": LORA | {"target_modules": []}}, "peft.target_modules"),
        (
            {"peft": LORA | {"load_in_4bit": "nf4"}},
            "peft.load_in_4bit: found .nf4. .str., wanted a valid boolean",
        ),
        ({"peft": True}, "peft: found true"),
    ],
)
def test_a_wrong_block_of_adapters_is_refused_by_key(
    recipe_folder: Path, changes: dict[str, Any], message: str
) -> None:
    assert re.match(message, refusal(recipe_folder, **changes))


@pytest.mark.parametrize("stage", ["base", "long_context_1", "mid"])
def test_a_stage_that_trains_all_weights_takes_no_adapters(recipe_folder: Path, stage: str) -> None:
    edit(recipe_folder / f"{stage}.yaml", peft=LORA)
    with pytest.raises(Refusal, match="peft: adapters are for SFT and APO only"):
        loading.load_recipe(recipe_folder / f"{stage}.yaml")


def test_dropout_that_the_preference_trainer_would_take_out_is_refused(recipe_folder: Path) -> None:
    edit(recipe_folder / "apo.yaml", peft=LORA | {"lora_dropout": 0.1})
    with pytest.raises(Refusal, match=r"peft.lora_dropout: found 0.1, but trainer.disable_dropout"):
        loading.load_recipe(recipe_folder / "apo.yaml")
    edit(recipe_folder / "apo.yaml", trainer__disable_dropout=False)
    loading.load_recipe(recipe_folder / "apo.yaml")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_their_library_are_refused_with_its_extra(
    recipe_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(recipe_folder / SFT, peft=LORA | {"load_in_4bit": True})
    assert commands.check([str(recipe_folder)]) == 2
    assert (
        "peft.load_in_4bit: no bitsandbytes here; pip install 'smol_post[qlora]'" in capsys.readouterr().err
    )


@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_the_large_recipe_takes_adapters(repo: Path, stage: str) -> None:
    path = repo / "recipes" / "smollm3" / f"{stage}.yaml"
    block = "peft={r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj], modules_to_save: [embed_tokens]}"
    recipe: Any = make_plan(path, run_root=None, arguments=[block]).jobs[0].recipe
    assert (recipe.peft.r, recipe.peft.use_dora, recipe.peft.target_modules) == (
        16,
        False,
        ["q_proj", "v_proj"],
    )
