"""What a release changes of a checkpoint's files, and what its card says: no model is built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smol_post import config, manifest, model_card, release
from smol_post.lineage import Node
from smol_post.plan import Job
from smol_post.points import Point
from smol_post.refusal import Refusal
from smol_post.report import to_markdown

PLAIN = {"rope_type": "default", "rope_theta": 5e6}
YARN = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 2.0, "original_max_position_embeddings": 512}


def test_theta_stands_where_older_versions_look_for_it() -> None:
    tree = {"rope_parameters": PLAIN, "dtype": "bfloat16", "max_position_embeddings": 512}
    old = {"rope_theta": 5e6, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert release.for_old_readers(tree) == tree | old


def test_yarn_stands_there_without_theta() -> None:
    made = release.for_old_readers({"rope_parameters": YARN})
    assert made["rope_scaling"] == {key: YARN[key] for key in YARN if key != "rope_theta"}
    assert (made["rope_parameters"], made["rope_theta"]) == (YARN, 5e6)


@pytest.mark.parametrize("rope", [None, {}, {"full_attention": PLAIN, "sliding_attention": PLAIN}])
def test_rope_that_older_versions_cannot_say_is_refused(rope: Any) -> None:
    with pytest.raises(Refusal, match="transformers 4 would read another"):
        release.for_old_readers({"rope_parameters": rope})


def test_a_tokenizer_of_version_5_gets_a_class_that_older_versions_know() -> None:
    tree = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True,
            "eos_token": "<|im_end|>", "extra_special_tokens": ["<a>"]}  # fmt: skip
    assert release.tokenizer_for_old_readers(tree) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<a>"],
        "model_input_names": ["input_ids", "attention_mask"],
    }


def test_a_class_of_its_own_and_what_the_tokenizer_says_of_inputs_stay() -> None:
    tree = {"tokenizer_class": "GPT2Tokenizer", "model_input_names": ["input_ids"]}
    assert release.tokenizer_for_old_readers(tree) == tree


def test_weights_in_smaller_files_are_the_same_bits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}": torch.randn(50, 5, generator=generator).bfloat16() for i in range(5)}
    tensors["scale"] = torch.tensor(float("nan"))
    (tmp_path / "out").mkdir()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    release.reshard([tmp_path / "model.safetensors"], tmp_path / "out", 1000, dtype=None)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = manifest.read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert {name: file for file in files for name in load_file(file)} == {
        name: tmp_path / "out" / file for name, file in index.items()
    }
    assert release.check_tensors([tmp_path / "model.safetensors"], files, dtype=None) == 5 * 250 + 1


def test_weights_are_rounded_once_where_that_is_asked_and_held_against_it(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(50, 5, generator=torch.Generator().manual_seed(0)), "n": torch.tensor([3])}
    before = [tmp_path / "model.safetensors"]
    (tmp_path / "out").mkdir()
    save_file(tensors, before[0])
    release.reshard(before, tmp_path / "out", 10**9, dtype="bfloat16")
    after = list((tmp_path / "out").glob("*.safetensors"))
    made = load_file(after[0])
    assert (made["a"].dtype, made["n"].dtype) == (torch.bfloat16, torch.int64)
    assert torch.equal(made["a"], tensors["a"].bfloat16())
    assert release.check_tensors(before, after, dtype="bfloat16") == 251
    with pytest.raises(RuntimeError, match="is not that of the run"):
        release.check_tensors(before, after, dtype=None)
    made["a"][0, 0] += 1
    save_file(made, after[0])
    with pytest.raises(RuntimeError, match="is not that of the run"):
        release.check_tensors(before, after, dtype="bfloat16")


@pytest.mark.parametrize("change", [{"a": torch.tensor([0.0, -0.0])}, {"b": torch.zeros(1)}, {"a": None}])
def test_weights_that_are_not_the_run_s_bits_are_never_released(tmp_path: Path, change: Any) -> None:
    tensors = {"a": torch.zeros(2), "c": torch.ones(1)}
    other = {name: one for name, one in (tensors | change).items() if one is not None}
    save_file(tensors, tmp_path / "one.safetensors")
    save_file(other, tmp_path / "two.safetensors")
    with pytest.raises(RuntimeError, match=r"is not that of the run|not in both"):
        release.check_tensors([tmp_path / "one.safetensors"], [tmp_path / "two.safetensors"], dtype=None)


def test_of_two_recipe_files_of_one_name_none_is_lost(tmp_path: Path) -> None:
    jobs = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sft.yaml").write_text(name)
        recipe: Any = None
        jobs.append(
            Job("sft", recipe, tmp_path / name / "sft.yaml", tmp_path / "run", [], folder=tmp_path / "here")
        )
    (tmp_path / "out").mkdir()
    with pytest.raises(Refusal, match="one name for two files of one release"):
        release.copy_records(release.Source(tmp_path / "run", jobs[0], jobs, {}, [], ""), tmp_path / "out")


def test_a_secret_in_a_recipe_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "sft.yaml").write_text("path: https://ann:pw@host/rows.jsonl\n")
    with pytest.raises(Refusal, match=r"recipe/sft.yaml: holds what looks like a token"):
        release.check_secrets(tmp_path)


@pytest.mark.parametrize(("size", "number"), [("5GB", 5 * 10**9), ("300MB", 3 * 10**8), ("10KB", 10**4)])
def test_sizes_are_read_as_people_write_them(size: str, number: int) -> None:
    assert release.shard_bytes(size) == number


HUB = {"name": "chats", "path": "org/chats", "config": "SFT", "split": "train", "keep_fraction": 0.5}
LOCAL = {"name": "own", "path": "./secret/place/rows.jsonl", "keep_fraction": 1.0}


def point(name: str, stage: str, *, sources: list[Any] = [], **about: Any) -> Point:  # noqa: B006
    data = {"by_source": {"chats": {"num_documents": 7, "num_tokens": 70, "num_trained_tokens": 30}},
            "revisions": {"chats": "0123456789abcdef"}}  # fmt: skip
    made = {"recipe": {"sources": sources}, "data": data, "metrics": {}, "digest": "sha256:1", **about}
    return Point(name, True, made, {}, [], stage, about.get("parents", {}), digest="sha256:1")


@pytest.fixture
def rendered(tmp_path: Path) -> str:
    """The card of a run without template or evals, made from a checkpoint of the Hub."""
    parent = ({"path": "org/base@v1"}, Node("org/base@0123", None))
    tree = {".": Node(".", tmp_path, {"digest": "sha256:1"}, parents=[parent]), "org/base@0123": parent[1]}
    about = {"num_parameters": 12345, "yarn": None, "int8": None, "short_of_gates": "", "report": False,
             "recipe_is_whole": True,
             "options": {"license": "apache-2.0"}, "versions": {"smol-post": "1"}}  # fmt: skip
    tree_of = {"architectures": ["SmolLM3ForCausalLM"], "dtype": "bfloat16", "max_position_embeddings": 512}
    points = [point("sft", "sft", sources=[HUB, LOCAL])]
    assert "makes it again" not in model_card.render(
        points, tree, tree_of, about | {"recipe_is_whole": False}, name="me/tiny"
    )
    return model_card.render(points, tree, tree_of, about, name="me/tiny")


def test_a_card_s_metadata_is_what_the_hub_s_client_reads(rendered: str) -> None:
    from huggingface_hub import ModelCard

    assert ModelCard(rendered).data.to_dict() == {
        "base_model": "org/base",
        "datasets": ["org/chats"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["smol_post"],
    }


def test_a_card_says_where_data_came_from_and_no_place_on_the_disk(rendered: str) -> None:
    assert "| sft | chats | org/chats SFT train at 0123456789ab, 0.5 of it | 7 | 70 | 30 |" in rendered
    assert "| own | local file rows.jsonl |" in rendered
    assert "secret" not in rendered


def test_a_card_names_the_teacher_of_generated_rows_while_they_are_those_trained_on(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    made = {"schema": manifest.SCHEMA, "run": "traces", "stage": "traces", "digest": "sha256:1", "files": {},
            "recipe": {"teacher": {"model": "/secret/teacher"}}, "made": {"rows.jsonl": "sha256:rows"},
            "fingerprint": "sha256:2", "parents": []}  # fmt: skip
    manifest.write_json(tmp_path / "traces" / manifest.MANIFEST, made)
    source = {"name": "own", "path": "../traces/rows.jsonl"}
    tree = {".": Node(".", tmp_path / "sft", {"digest": "sha256:1"})}

    def table(digest: str) -> str:
        known = {"files": {"sources.own": digest}}
        origin = {"recipe": "../recipe/sft.yaml"}
        (tmp_path / "recipe").mkdir(exist_ok=True)
        run = point("sft", "sft", sources=[source], inputs=known, origin=origin)
        return to_markdown(model_card.source_table([run], tree))

    assert "local file rows.jsonl, answers of teacher |" in table("sha256:rows")
    assert "local file rows.jsonl |" in table("sha256:others")


def test_a_card_does_not_claim_what_was_not_measured_or_what_a_model_without_template_cannot(
    rendered: str,
) -> None:
    assert "Not measured: no evals." in rendered
    assert rendered.endswith(
        "`smol-post run recipe` makes it again; data from local files are not part of it.\n"
    )
    assert not any(
        word in rendered for word in ("apply_chat_template", "/no_think", "xml_tools", "## License")
    )


def test_a_merge_is_told_with_its_weights() -> None:
    merge = point("merge", "merge", metrics={"weights": [0.9, 0.09999999999999998]},
                  parents={"apo_seed0": "1", "apo_seed1": "2", "long": "3"})  # fmt: skip
    told = "merge: 0.9 of the average of apo_seed0 and apo_seed1, 0.1 of long"
    assert model_card.merge_sentence(merge) == told


def test_every_stage_has_a_title() -> None:
    assert model_card.TITLES.keys() == config.NUM_PARENTS.keys()
