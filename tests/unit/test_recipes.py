"""The recipes of the repository pass `check` offline, say what the published recipe says, and say whence."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smol_post import config, loading, synthetic, toolbox

RECIPES = Path(__file__).parents[2] / "recipes"
FOLDERS = sorted(path.parent for path in RECIPES.glob("*/pipeline.yaml"))
# huggingface/alignment-handbook, recipes/smollm3/sft/sft.yaml: split and weight, in its order.
SFT_SPLITS = {
    "smoltalk_smollm3_everyday_conversations_no_think": 1.0,
    "smoltalk_smollm3_systemchats_30k_no_think": 1.0,
    "tulu_3_sft_personas_instruction_following_no_think": 1.0,
    "hermes_function_calling_v1_no_think": 1.0,
    "smoltalk_smollm3_smol_magpie_ultra_no_think": 0.5,
    "smoltalk_multilingual_8languages_lang_5_no_think": 1.0,
    "table_gpt_no_think": 1.0,
    "OpenHermes_2.5_no_think": 0.5,
    "OpenThoughts3_1.2M_no_think_no_think": 0.4,
    "Mixture_of_Thoughts_science_no_think": 1.0,
    "smoltalk_smollm3_explore_instruct_rewriting_no_think": 1.0,
    "smoltalk_smollm3_smol_rewrite_no_think": 1.0,
    "smoltalk_smollm3_smol_summarize_no_think": 1.0,
    "LongAlign_64k_context_lang_annotated_lang_6_no_think": 1.0,
    "multi_turn_reasoning_if_think": 1.0,
    "smoltalk_everyday_convs_reasoning_Qwen3_32B_think": 1.0,
    "smoltalk_systemchats_Qwen3_32B_think": 1.0,
    "xlam_traces_no_think": 1.0,
    "smolagents_toolcalling_traces_think": 1.0,
    "s1k_1.1_think": 1.0,
    "LongAlign_64k_Qwen3_32B_yarn_131k_think": 1.0,
    "aya_dataset_Qwen3_32B_think": 1.0,
    "smoltalk_multilingual8_Qwen3_32B_think": 0.3,
    "OpenThoughts3_1.2M_think": 0.02,
    "table_gpt_Qwen3_32B_think": 1.0,
}
# recipes/smollm3-as-published/README.md, its first table: (file, key) -> (launch post, published file).
DIFFERENCES = {
    ("long_context_1.yaml", "rope_theta"): (1_500_000.0, 2_000_000.0),
    ("mid.yaml", "num_epochs"): (4.0, 5.0),
    ("mid.yaml", "packing"): ("wrapped", "bfd"),
    ("mid.yaml", "overlong_rows"): (None, "truncate"),
    ("sft.yaml", "num_epochs"): (4.0, 5.0),
}


def tree(folder: str, name: str) -> dict[str, Any]:
    return loading.read_yaml(RECIPES / folder / name)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_recipe_folder_passes_check_offline(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smol_post", "check", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    checked = sorted(line.removeprefix("ok: ") for line in done.stdout.splitlines())
    assert checked == sorted(str(path) for path in folder.glob("*.yaml"))


def test_the_recipes_of_the_real_models_are_there() -> None:
    assert {"smollm3", "smollm3-as-published", "smollm2-135m"} <= {path.name for path in FOLDERS}


@pytest.mark.parametrize("folder", ["smollm3", "smollm3-as-published"])
def test_sft_has_the_25_published_splits_in_order_with_their_weights(folder: str) -> None:
    recipe = loading.load_recipe(RECIPES / folder / "sft.yaml")
    assert isinstance(recipe, config.SftRecipe)
    assert [(one.split, one.keep_fraction) for one in recipe.sources] == list(SFT_SPLITS.items())
    assert {(one.path, one.config, one.seed) for one in recipe.sources} == {
        ("HuggingFaceTB/smoltalk2", "SFT", 0)
    }
    assert sum("_no_think" in one.name for one in recipe.sources) == 15


@pytest.mark.parametrize("folder", ["smollm3", "smollm3-as-published"])
def test_mid_training_and_apo_have_both_published_splits(folder: str) -> None:
    kept = {
        name: {one["split"]: one["keep_fraction"] for one in tree(folder, name)["sources"]}
        for name in ("mid.yaml", "apo.yaml")
    }
    assert kept == {
        "mid.yaml": {"Llama_Nemotron_Post_Training_Dataset_reasoning_r1": 1.0, "OpenThoughts3_1.2M": 1.0},
        "apo.yaml": {
            "llama_3.1_tulu_3_8b_preference_mixture_no_think": 0.5,
            "tulu_3_8b_pref_mix_Qwen3_32B_Qwen3_0.6B_think": 0.25,
        },
    }


def test_every_step_of_the_long_context_extension_has_the_published_number_of_tokens() -> None:
    for name in ("long_context_1.yaml", "long_context_2.yaml"):
        recipe = tree("smollm3", name)
        assert recipe["global_batch_size"] * recipe["max_tokens"] == 2_359_296  # card: GBS in tokens


def test_as_published_differs_from_the_launch_post_in_exactly_the_listed_keys() -> None:
    """Of the runs; how they are asked afterwards (harness.yaml) is one file for both."""
    ours = {path.name for path in (RECIPES / "smollm3").glob("*.yaml")}
    names = sorted(ours - {"harness.yaml", "traces.yaml", "pairs.yaml", "turns.yaml"})
    assert names == sorted(path.name for path in (RECIPES / "smollm3-as-published").glob("*.yaml"))
    found = {}
    for name in names:
        blog, published = tree("smollm3", name), tree("smollm3-as-published", name)
        found.update(
            {
                (name, key): (blog.get(key), published.get(key))
                for key in {*blog, *published}
                if blog.get(key) != published.get(key)
            }
        )
    assert found == DIFFERENCES
    listed = (RECIPES / "smollm3-as-published" / "README.md").read_text()
    for name, key in DIFFERENCES:
        assert f"| `{name.removesuffix('.yaml')}.{key}` |" in listed


def uncommented_numbers(text: str) -> list[str]:
    """Lines that bear a number and neither carry a comment nor stand under one.

    A key of the top level wants its comment on the line or on the line before; what is indented may stand
    under a comment further up, with no blank line between.

    >>> uncommented_numbers("a: 1  # why\\nb: 2\\nc:\\n  # why\\n  d: 3\\n  e: 4\\n\\n  f: 5")
    ['b: 2', '  f: 5']
    """
    found, under, above = [], False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            under = True
        elif not line.strip():
            under = False
        elif "#" not in line and re.search(r"\d", line):
            covered = under if line.startswith(" ") else above.startswith("#")
            found += [] if covered else [line]
        above = line
    return found


def test_a_bare_number_in_a_recipe_is_found() -> None:
    text = "a: 1  # why\nb: 2\nc:\n  # why\n  d: 3\n  e: 4\n\n  f: 5"
    assert uncommented_numbers(text) == ["b: 2", "  f: 5"]


@pytest.mark.parametrize("folder", ["smollm3", "smollm3-as-published"])
def test_every_number_of_the_3b_recipes_has_its_source_beside_it(folder: str) -> None:
    for path in (RECIPES / folder).glob("*.yaml"):
        assert uncommented_numbers(path.read_text()) == [], path


def test_the_calculator_of_tiny_is_the_one_that_it_is_taught() -> None:
    box = toolbox.load(RECIPES / "tiny" / "tools.json")
    assert json.dumps(box.tools) == json.dumps([synthetic.XML_TOOL])
    for seed in range(3):
        *_, told, _ = synthetic._call(
            synthetic._problem(random.Random(seed), 1, 6), think=False, python=False
        )
        asked = synthetic._question(synthetic._problem(random.Random(seed), 1, 6))
        assert toolbox.run(box.commands["calc"], {"sum": asked}) == told["content"]
    assert "wanted digits" in toolbox.run(box.commands["calc"], {"sum": "__import__('os')"})
