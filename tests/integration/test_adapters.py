"""LoRA: what is trained is what is merged, nothing else moves, and the chain goes on from it as ever."""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from smol_post import adapters, config, manifest, training, vocabulary
from smol_post.refusal import Refusal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
Build = Callable[..., Any]
Chain = tuple[Path, Path]
Command = Callable[..., subprocess.CompletedProcess[str]]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8}
CHATS = config.Source(name="chats", generator="dual_mode_chats", num_rows=24)
PAIRS = config.Source(name="pairs", generator="preference_pairs", num_rows=12)
IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def unrest(lm: Any) -> None:
    """What is trained moves, as far as a long run may move it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn_like(parameter)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "block",
    [
        {},
        {"use_rslora": True, "target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head", "model.norm"]},
    ],
    ids=str,
)
def test_a_merged_checkpoint_computes_what_its_adapter_did_and_without_it_the_parent(
    build: Build, tmp_path: Path, block: dict[str, Any], tied: bool
) -> None:
    lm, parent = (build(tied=tied, initializer_range=0.1) for _ in range(2))
    before = parent(IDS).logits
    adapted: Any = adapters.add_adapters(lm, config.Peft(**LORA, **block), new_ids=[7, 298], seed=0)
    torch.testing.assert_close(adapted(IDS).logits, before, rtol=0, atol=1e-5 if "use_dora" in block else 0)
    unrest(adapted)
    on = adapted(IDS).logits
    with adapters.off(adapted):
        assert torch.equal(adapted(IDS).logits, before)
        base = adapted.get_base_model()
        hidden, weight = base.model(IDS).last_hidden_state, base.get_output_embeddings().weight
        assert torch.equal(hidden @ weight.T, before)  # the head as our losses use it
    adapted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    names = [name for name, _ in parent.named_parameters()]
    merged: Any = adapters.merge(parent, tmp_path)
    torch.testing.assert_close(merged(IDS).logits, on, rtol=0, atol=1e-5)
    assert (on - before).abs().max() > 0.1
    assert [name for name, _ in merged.named_parameters()] == names
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    untouched = {
        name
        for name, one in build(tied=tied, initializer_range=0.1).named_parameters()
        if torch.equal(one, merged.get_parameter(name))
    }
    wanted = {name for name in names if "norm" in name and name not in ("model.norm.weight",)}
    assert untouched >= wanted
    rows = torch.ones(len(merged.model.embed_tokens.weight), dtype=torch.bool)
    rows[[7, 298]] = False
    for end in ("embed_tokens", "lm_head"):
        saved = end in str(block) or (tied and "modules_to_save" in block)
        one, other = (
            lm.get_input_embeddings().weight if end == "embed_tokens" else lm.get_output_embeddings().weight
            for lm in (merged, build(tied=tied, initializer_range=0.1))
        )
        assert torch.equal(one[rows], other[rows]) != saved
        assert not torch.equal(one[7], other[7])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_prj"]},
            "peft.target_modules: the model has no module 'v_prj', such as",
        ),
        ({"target_modules": ["v_prj"]}, "peft: Target modules .*not found"),
        ({"target_modules": "nothing.*"}, "peft: Target modules nothing.* not found"),
        ({"target_modules": ["q_proj", "lm_head"]}, "embedding and head take no matrices of low rank"),
        ({"target_modules": ["embed_tokens"]}, "put model.embed_tokens into modules_to_save"),
        ({"modules_to_save": ["embed_token"]}, "peft.modules_to_save: the model has no module 'embed_token'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_name_that_fits_no_module_or_the_wrong_one_is_refused(
    build: Build, block: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        adapters.add_adapters(build(), config.Peft(**LORA, **block), new_ids=[], seed=0)
    assert "\n" not in str(caught.value)


def test_four_bits_without_a_gpu_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = config.ApoRecipe(
        stage="apo", max_tokens=8, global_batch_size=1, num_steps=1, sources=[PAIRS],
        peft=config.Peft(**LORA, load_in_4bit=True),
    )  # fmt: skip
    with pytest.raises(Refusal, match="load_in_4bit: found no GPU"):
        adapters.start(lambda **quantized: pytest.fail("loaded"), recipe, new_ids=[])


@pytest.fixture
def train(build: Build, tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """Three steps of a stage with adapters, through the door of stages; the run directory.

    new: the recipe adds a token, for which the parent has no row.
    """

    def call(stage: str, name: str, *, new: bool = False, resume: Path | None = None, **changes: Any) -> Path:
        given = {"max_tokens": 256, "global_batch_size": 4, "num_steps": 3}
        block = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05, "weight_decay": 0.1}
        given |= {
            "sources": [PAIRS if stage == "apo" else CHATS],
            "peft": config.Peft(**LORA),
            "trainer": block,
        }
        given |= {} if stage == "apo" else {"micro_batch_size": 2}
        recipe: Any = config.RECIPES[stage](stage=stage, **given | changes)
        given_tokenizer = copy.deepcopy(tokenizer)
        size = len(given_tokenizer)
        if new:
            given_tokenizer.add_tokens(["<|new|>"], special_tokens=True)

        def load() -> Any:
            from smol_post import model

            lm = build()
            model.embed_new(lm, [size] if new else [])
            return lm

        run_dir = tmp_path / name
        if resume:
            shutil.copytree(resume / "checkpoints", run_dir / "checkpoints")
            for step in (2, 3):
                shutil.rmtree(run_dir / "checkpoints" / f"checkpoint-{step}")
        words = vocabulary.of_run(recipe, given_tokenizer, folder=tmp_path)
        lm = adapters.start(load, recipe, new_ids=[size] if new else [])
        place = {"folder": tmp_path, "run_dir": run_dir, "cache_dir": tmp_path / "cache", "num_processes": 1,
                 "num_parts": 1,
                 "only_verify": False, "announce": str, "load": load}  # fmt: skip
        if stage == "apo":
            training.train_on_pairs(recipe, lm, None, words, weights="w", **place)
        else:
            training.train_on_packs(recipe, lm, words, **place)
        return run_dir

    return call


def proofs_of(run: Path) -> dict[str, Any]:
    return {one["name"]: one for one in json.loads((run / "verify.json").read_text())["proofs"]}


def test_a_new_token_is_learned_by_its_row_alone_and_the_tied_head_agrees(train: Any, build: Build) -> None:
    run = train("sft", "run", new=True, verify="full")
    before, after = build().state_dict(), load_file(run / "model.safetensors")
    old = before["model.embed_tokens.weight"]
    rows = after["model.embed_tokens.weight"]
    assert rows.shape[0] == old.shape[0] + 1
    assert torch.equal(rows[:-1], old)
    assert (rows[-1] - old.mean(0)).abs().max() > 1e-3
    assert "lm_head.weight" not in after  # tied
    moved = {
        name
        for name in after
        if name in before and not torch.equal(after[name], before[name][: len(after[name])])
    }
    linear = {name for name in after if "_proj" in name}
    assert moved - {"model.embed_tokens.weight"} == linear
    decayed = proofs_of(run)["embeddings are not decayed"]
    assert list(decayed["found"]) == ["model.embed_tokens.token_adapter.trainable_tokens_delta.default"]


def test_the_optimiser_holds_what_the_adapter_file_holds_and_nothing_else(train: Any) -> None:
    run = train("sft", "run", new=True)
    state = torch.load(run / "checkpoints" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    held = sorted(tuple(one["exp_avg"].shape) for one in state["state"].values())
    assert held == sorted(
        tuple(one.shape) for one in load_file(run / "adapter" / "adapter_model.safetensors").values()
    )


@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(train: Any, stage: str) -> None:
    """With dropout, and with a new token or a module trained whole."""
    changes: dict[str, Any] = {"new": True, "peft": config.Peft(**LORA, lora_dropout=0.2)}
    if stage == "apo":
        changes = {"peft": config.Peft(**LORA, modules_to_save=["embed_tokens"])}
    first = train(stage, "first", **changes)
    second = train(stage, "second", resume=first, **changes)
    assert manifest.is_sealed(first / "checkpoints" / "checkpoint-1")
    assert json.loads((second / "verify.json").read_text())["step"] == 1
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_reference_is_the_model_without_its_adapter_cached_or_live(train: Any) -> None:
    """Though the embedding, which is the head too, is trained whole."""
    block = config.Peft(**LORA, modules_to_save=["embed_tokens"])
    curves = []
    for reference in ("cached", "live"):
        run = train("apo", reference, reference=reference, peft=block)
        lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
        curves.append([line["loss"] for line in lines])
        assert {one["status"] for one in proofs_of(run).values()} == {"passed"}
    assert curves[0][0] == pytest.approx(1, abs=1e-6)
    assert abs(curves[0][-1] - 1) > 1e-3
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)


@pytest.fixture(scope="module")
def lora_chain(chain: Chain, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run root of the chain made again from SFT on, SFT and both APO runs with adapters."""
    where = tmp_path_factory.mktemp("lora")
    recipe, root = Path(shutil.copytree(chain[0], where / "recipe")), where / "runs"
    for name in ("sft", "apo"):
        tree = yaml.safe_load((recipe / f"{name}.yaml").read_text())
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(tree | {"peft": LORA}))
    tree = yaml.safe_load((recipe / "pipeline.yaml").read_text())
    (recipe / "pipeline.yaml").write_text(yaml.safe_dump({"runs": tree["runs"]}))
    for name in ("base", "long_context_1", "mid"):
        shutil.copytree(chain[1] / name, root / name)
    made = command("smol-post", "run", recipe, "--run-dir", root)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "sft: adapter: 8,192 of 64,544 parameters are trained (12.69%)" in made.stdout
    return root


def test_apo_and_merge_consume_runs_with_adapters_as_any_other(lora_chain: Path, chain: Chain) -> None:
    whole = {
        name: json.loads((lora_chain / name / "manifest.json").read_text())
        for name in ("sft", "apo_seed0", "merge")
    }
    assert whole["apo_seed0"]["parents"][0]["digest"] == whole["sft"]["digest"]
    assert whole["apo_seed0"]["metrics"]["first_loss"] == pytest.approx(1, abs=1e-6)
    assert [one["path"] for one in whole["merge"]["parents"]][:2] == ["../apo_seed0", "../apo_seed1"]
    for name in ("sft", "apo_seed0", "merge"):
        for file in ("config.json", "generation_config.json"):
            assert (lora_chain / name / file).read_bytes() == (chain[1] / name / file).read_bytes()
        shapes = [
            {key: (one.shape, one.dtype) for key, one in load_file(root / name / "model.safetensors").items()}
            for root in (lora_chain, chain[1])
        ]
        assert shapes[0] == shapes[1]


def test_the_kept_adapter_is_one_that_peft_itself_loads_and_no_part_of_the_digest(lora_chain: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    parent, merged = (AutoModelForCausalLM.from_pretrained(lora_chain / name) for name in ("mid", "sft"))
    before = parent(IDS).logits
    on = PeftModel.from_pretrained(parent, lora_chain / "sft" / "adapter")(IDS).logits
    torch.testing.assert_close(merged(IDS).logits, on, rtol=0, atol=1e-5)
    assert (on - before).abs().max() > 1e-3
    assert not [name for name in manifest.content_files(lora_chain / "sft") if "adapter" in name]


def test_two_processes_train_the_adapter_of_one(
    chain: Chain, command: Command, repo: Path, tmp_path: Path
) -> None:
    recipe = Path(shutil.copytree(chain[0], tmp_path / "recipe"))
    runs = [{"name": "apo", "stage": "apo", "recipe": "apo.yaml", "parents": ["../sft"]}]
    chats = {"name": "sft", "stage": "sft", "recipe": "sft.yaml", "parents": [str(chain[1] / "mid")]}
    (recipe / "pipeline.yaml").write_text(yaml.safe_dump({"runs": [chats, *runs]}))
    words = ["--config", recipe / "apo.yaml", "global_batch_size=12", f"peft={json.dumps(LORA)}"]
    words += ["reference=live", "trainer.optim=sgd", "trainer.learning_rate=0.5", "--run-dir"]
    for name in ("one", "two"):
        shutil.copytree(chain[1] / "sft", tmp_path / name / "sft")
    alone = command("smol-post", "apo", *words, tmp_path / "one")
    both = command(
        "torchrun",
        "--standalone",
        "--nproc_per_node",
        "2",
        repo / "smol_post" / "apo.py",
        *words,
        tmp_path / "two",
    )
    assert (alone.returncode, both.returncode) == (0, 0), alone.stderr + both.stderr
    one, two = (load_file(tmp_path / name / "apo" / "model.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "one" / "sft" / "model.safetensors")
    assert max((one[name] - start[name]).abs().max().item() for name in one) > 5e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
