"""An exported variant is the checkpoint with YaRN and nothing else, whole or not there."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, SmolLM3Config

from smol_post import export, manifest, model
from smol_post.refusal import Refusal

Build = Callable[..., Any]
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "max_position_embeddings": 65536}
YARN = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 2.0, "original_max_position_embeddings": 65536}


@pytest.fixture
def saved(build: Build, tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint of a tiny model trained to 256 tokens, in no run."""
    build().save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "tree",
    [
        PLAIN,
        {"rope_theta": 5e6, "rope_scaling": None, "max_position_embeddings": 65536},
        {"rope_theta": 1.0, **PLAIN},
    ],
    ids=["as transformers 5 writes it", "as transformers 4 wrote it", "both: the new form counts"],
)
def test_the_configuration_for_128k_is_the_model_card_s(tree: dict[str, Any]) -> None:
    made = export.yarn(tree, context=131072, where=Path("config.json"))
    assert made == {"rope_parameters": YARN, "max_position_embeddings": 131072}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"max_position_embeddings": 64}, "found no rope_parameters.rope_theta"),
        ({**PLAIN, "max_position_embeddings": None}, "found no .* with max_position_embeddings"),
        ({**PLAIN, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one RoPE for all layers"),
        ({**PLAIN, "rope_parameters": YARN}, "scaled or partial already .*'yarn'"),
        ({**PLAIN, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial already"),
        ({**PLAIN, "rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "linear"),
        ({**PLAIN, "max_position_embeddings": 131072}, "nothing to extend"),
    ],
    ids=["no RoPE", "no length", "two RoPEs", "YaRN already", "partial", "scaled, old form", "long enough"],
)
def test_what_yarn_cannot_extend_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        export.yarn(tree, context=131072, where=Path("config.json"))


def test_yarn_keeps_fast_frequencies_and_halves_slow_ones() -> None:
    """The worked example of `yarn_frequencies`."""
    config = SmolLM3Config(hidden_size=64, num_attention_heads=4, max_position_embeddings=512)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e6}
    found, factor = model.yarn_frequencies(config, context=1024)
    shares = [1, 5 / 6, 2 / 3, 1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2]
    assert found.tolist() == pytest.approx([5e6 ** (-i / 8) * share for i, share in enumerate(shares)])
    assert factor == pytest.approx(0.1 * math.log(2) + 1)


@pytest.mark.parametrize(
    ("config", "context"),
    [(SmolLM3Config(max_position_embeddings=65536), 131072), (LlamaConfig(), 5000)],
    ids=["SmolLM3 3B to 128k", "Llama 7B to a length that is no multiple"],
)
def test_the_rope_of_a_big_model_is_checked_without_its_weights(config: Any, context: int) -> None:
    scaled = copy.deepcopy(config)
    scaled.update(export.yarn(config.to_dict(), context=context, where=Path()))
    shell = model.without_weights(config)
    model.use_yarn(shell, scaled)
    assert {parameter.device.type for parameter in shell.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("theta", "change"),
    [(5e4, {"original_max_position_embeddings": 4096}), (5e4, {"factor": 15.9}), (1e20, {"factor": 15.9})],
    ids=["another original length", "another factor", "slow frequencies are not let off as tiny"],
)
def test_live_frequencies_that_are_not_yarn_s_are_an_error(
    build: Build, theta: float, change: dict[str, Any]
) -> None:
    """An original length that is left out is the new one to transformers, without a word."""
    lm = build(rope_parameters={"rope_type": "default", "rope_theta": theta})
    scaled = copy.deepcopy(lm.config)
    scaled.update(export.yarn(lm.config.to_dict(), context=4096, where=Path()))
    attention_factor = 0.1 * math.log(16) + 1
    scaled.rope_parameters = {**scaled.rope_parameters, "attention_factor": attention_factor, **change}
    with pytest.raises(RuntimeError, match="are not YaRN's"):
        model.use_yarn(lm, scaled)


def test_a_wrong_attention_factor_is_an_error(build: Build) -> None:
    lm = build()
    scaled = copy.deepcopy(lm.config)
    scaled.update(export.yarn(lm.config.to_dict(), context=512, where=Path()))
    scaled.rope_parameters = {**scaled.rope_parameters, "attention_factor": 1.0}
    with pytest.raises(RuntimeError, match=r"factor 1.0000 are not YaRN's .*1.0693"):
        model.use_yarn(lm, scaled)


def test_a_model_whose_rope_cannot_be_seen_is_an_error(build: Build) -> None:
    lm = build()
    lm.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="found no inv_freq"):
        model.use_yarn(lm, lm.config)


def test_a_model_given_yarn_in_place_equals_the_exported_one(saved: Path, tmp_path: Path) -> None:
    export.write(saved, tmp_path / "long", context=512)
    lm = model.load_model(saved, attn_implementation="sdpa").eval()
    ids = torch.randint(0, 300, (1, 400), generator=torch.Generator().manual_seed(0))
    plain = lm(ids).logits
    model.use_yarn(lm, AutoConfig.from_pretrained(tmp_path / "long"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "long").eval()
    assert torch.equal(lm(ids).logits, exported(ids).logits)
    assert (lm(ids).logits - plain).abs().max() > 0.01
    assert lm.config.rope_parameters == exported.config.rope_parameters
    assert lm.config.max_position_embeddings == 512


def test_sharded_weights_go_with_their_index(build: Build, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    build().save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    names = set(read(folder / "model.safetensors.index.json")["weight_map"].values())
    assert len(names) > 1
    export.write(folder, tmp_path / "out", context=512)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    (folder / max(names)).unlink()
    with pytest.raises(Refusal, match=f"{max(names)}: no loadable weights"):
        export.write(folder, tmp_path / "again", context=512)


def test_weights_that_were_cut_short_or_are_not_there_are_refused(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(Refusal, match=r"model.safetensors: no loadable weights"):
        export.write(saved, tmp_path / "out", context=512)
    weights.unlink()
    with pytest.raises(Refusal, match=r"found no .safetensors"):
        export.write(saved, tmp_path / "out", context=512)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_of_a_run_under_way_leaves_its_training_behind(saved: Path, tmp_path: Path) -> None:
    for name in ("trainer_state.json", "optimizer.pt", "train_log.jsonl"):
        (saved / name).write_text("{}")
    manifest.seal(saved)
    made = export.write(saved, tmp_path / "out", context=512)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"export.json"}
    assert made["source"] == {
        "path": str(saved),
        "run": None,
        "stage": None,
        "digest": manifest.content_digest(manifest.content_files(saved)),
    }


def test_generation_still_ends_where_there_was_no_generation_config(saved: Path, tmp_path: Path) -> None:
    (saved / "generation_config.json").unlink()
    export.write(saved, tmp_path / "out", context=512)
    found = read(tmp_path / "out" / "generation_config.json")
    ends = {key: read(saved / "config.json")[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert found == {**ends, "do_sample": True, "temperature": 0.6, "top_p": 0.95}


@pytest.mark.parametrize(("stated", "wanted"), [(256, 512), (2048, 512), (10**30, 10**30)])
def test_a_tokenizer_that_states_a_limit_states_the_new_one(
    saved: Path, tmp_path: Path, stated: int, wanted: int
) -> None:
    edit(saved / "tokenizer_config.json", model_max_length=stated)
    export.write(saved, tmp_path / "out", context=512)
    assert read(tmp_path / "out" / "tokenizer_config.json") == {
        **read(saved / "tokenizer_config.json"),
        "model_max_length": wanted,
    }


def test_the_old_form_of_a_configuration_is_written_in_the_new_one(saved: Path, tmp_path: Path) -> None:
    tree = read(saved / "config.json")
    theta = tree.pop("rope_parameters")["rope_theta"]
    (saved / "config.json").write_text(json.dumps({**tree, "rope_theta": theta, "rope_scaling": None}))
    export.write(saved, tmp_path / "out", context=512)
    found = read(tmp_path / "out" / "config.json")
    assert not {"rope_theta", "rope_scaling"} & found.keys()
    assert found["rope_parameters"]["rope_theta"] == theta


def break_copy(source: Path, to: Path) -> None:
    to.write_bytes(source.read_bytes()[:-1])


def fill_disk(source: Path, to: Path) -> None:
    raise OSError(28, "No space left on device")


def interrupt(source: Path, to: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("copyfile", "error", "message"),
    [
        (break_copy, RuntimeError, "is not the .* of .*checkpoint; export again"),
        (fill_disk, Refusal, "out: cannot be written .No space left on device."),
        (interrupt, KeyboardInterrupt, None),
    ],
)
def test_an_export_that_fails_leaves_nothing(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    copyfile: Any,
    error: type[BaseException],
    message: str | None,
) -> None:
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(error, match=message):
        export.write(saved, tmp_path / "out", context=512)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_export_whose_rope_is_not_yarn_leaves_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_out(tree: dict[str, Any], **_: Any) -> dict[str, Any]:
        made = yarn(tree, **_)
        made["rope_parameters"]["factor"] = 1.5
        return made

    yarn = export.yarn
    monkeypatch.setattr(export, "yarn", leave_out)
    with pytest.raises(RuntimeError, match="are not YaRN's"):
        export.write(saved, tmp_path / "out", context=512)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_a_killed_export_left_is_cleared_away(saved: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.part"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # an empty folder may be there
    made = export.write(saved, tmp_path / "out", context=512)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*made["files"], "export.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_the_empty_folder_one_stands_in_will_do(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    made = export.write(saved, Path(), context=512)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*made["files"], "export.json"}
