"""`smol-post plan`: counts are the real trainer's and the published ones, bytes those of torch and ZeRO."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from smol_post import budget, config, costs, launch_files, loading, runner
from smol_post.costs import GIB, Shape, Work
from smol_post.launch_files import Launch
from smol_post.plan import Job
from smol_post.refusal import Refusal

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = Shape(
    hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, vocab_size=32, tie_word_embeddings=True,
)  # fmt: skip
SMOLLM3 = Shape.of({}, where="here")
WORK = Work(tokens=32768, bf16=True, checkpointing=True, accumulates=True, optimizer="adamw_torch_fused")


def planned(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert budget.plan([*map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def by_name(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in tree["runs"]}


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert budget.plan([*map(str, words)]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.count("\n") == 1
    return shown.err


def warned(tree: dict[str, Any], name: str) -> str:
    return " | ".join(by_name(tree)[name]["warnings"])


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A pipeline of one SFT run of SmolLM3's size, with other values; `trainer` and `size` by name."""

    def made(*, trainer: dict[str, Any] | None = None, tokens: int | None = 10**10, **changes: Any) -> Path:
        source: dict[str, Any] = {"name": "chats", "path": "someone/chats", "mode": "think"}
        source |= {"size": {"tokens": tokens}} if tokens else {}
        recipe = {
            "stage": "sft",
            "max_tokens": 32768,
            "global_batch_size": 32,
            "num_epochs": 1.0,
            "sources": [source],
            "trainer": {"bf16": True, "activation_checkpointing": True, **(trainer or {})},
        }
        where = tmp_path / "recipe"
        where.mkdir(exist_ok=True)
        (where / "sft.yaml").write_text(yaml.safe_dump(recipe | changes))
        run = {"name": "sft", "stage": "sft", "recipe": "sft.yaml", "parents": ["someone/model"]}
        pipeline = {"runs": [run], "architecture": {"num_hidden_layers": 36}}
        (where / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
        return where

    return made


def launch_file(tmp_path: Path, **keys: Any) -> Path:
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump({"num_processes": 8, **keys}))
    return path


def test_the_published_counts_come_out_of_the_published_sizes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tree = planned(capsys, RECIPES / "smollm3", "--run-dir", tmp_path)
    assert tree["num_parameters"] == 3_075_098_624
    runs = by_name(tree)
    mid, sft, apo = runs["mid"], runs["sft"], runs["apo_seed42"]
    assert mid["tokens"] == 35_170_000_000
    assert mid["steps_per_epoch"] == 8385  # 8,386 with a last one in part
    assert (mid["steps"], sft["steps_per_epoch"], sft["steps"]) == (4 * 8385, 225, 900)
    assert (apo["packs"], apo["steps"]) == (169_346, 5292)
    assert [runs[f"long_context_{part}"]["steps"] for part in (1, 2)] == [20_000, 22_000]
    assert runs["apo_seed42"]["flops"] > runs["apo_seed43"]["flops"]  # the reference is scored once


def test_a_run_has_the_keys_that_programs_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tree = planned(capsys, RECIPES / "smollm3", "--run-dir", tmp_path)
    keys = {"name", "stage", "tokens", "packs", "steps", "steps_per_epoch", "device_hours", "memory_gib"}
    for run in tree["runs"]:
        assert run.keys() >= keys | {"warnings"}
        parts = run["memory_gib"]
        assert sum(parts.values()) == pytest.approx(2 * parts["total"], abs=0.01)
    assert {"runs", "totals", "inference", "assumptions"} <= tree.keys()
    total = sum(run["device_hours"] for run in tree["runs"])
    assert tree["totals"]["device_hours"] == pytest.approx(total, rel=1e-3)
    assert {one["context"] for one in tree["inference"]} == {4096, 32768, 65536, 131072}


@pytest.mark.parametrize("epochs", [1.0, 2.5, 0.4])
@pytest.mark.parametrize("num_packs", [4, 7])
def test_steps_are_those_of_the_real_trainer(
    build: Callable[..., Any], tokenizer: Any, tmp_path: Path, epochs: float, num_packs: int
) -> None:
    import datasets

    from smol_post import training

    source = config.Source(name="s", generator="dual_mode_chats", num_rows=1)
    recipe = config.SftRecipe(
        stage="sft", max_tokens=4, global_batch_size=2, micro_batch_size=1, num_epochs=epochs,
        sources=[source], stated_tokens=4 * num_packs, trainer={"logging_steps": 1},
    )  # fmt: skip
    found = budget._run(
        Job("s", recipe, Path("s.yaml"), tmp_path, ["../x"]),
        recipe,
        SMALL,
        budget.stated(recipe),
        budget.Hardware(Launch(), GIB, 1.0),
        scores=False,
    )
    row = {"input_ids": [5, 6], "labels": [-100, 6], "seq_lengths": [2], "address": [0]}
    whole = datasets.Dataset.from_list([row] * (num_packs // 2 * 2))  # as `data.prepare` cuts it
    arguments = training.trainer_arguments(recipe, run_dir=tmp_path, num_processes=1)
    trainer = training.pack_trainer(build(), tokenizer, whole, arguments=arguments)
    trainer.train()
    assert found["steps"] == trainer.state.max_steps == trainer.state.global_step
    assert found["packs"] == num_packs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["SmolLM3", "Llama", "Qwen2"])
def test_parameters_are_counted_as_transformers_counts_them(kind: str, tied: bool) -> None:
    import transformers

    from smol_post import model

    made = getattr(transformers, f"{kind}Config")(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=100, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    shape = Shape.of(made.to_dict(), where="config.json")
    assert shape.num_parameters == model.without_weights(made).num_parameters()


def test_chunks_of_logits_are_those_of_the_loss() -> None:
    from smol_post import losses, trainers

    assert (costs.CHUNK_ELEMENTS, costs.FEW_LOGITS) == (losses.CHUNK_ELEMENTS, trainers.FEW_LOGITS)


@pytest.mark.parametrize("how", ["float32", "autocast", "bfloat16", "checkpointed"])
def test_what_a_layer_keeps_for_backward_is_what_torch_saves(how: str) -> None:
    import torch
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    from smol_post import attention, batches, trainers

    attention.register()
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2,
             "vocab_size": 50, "head_dim": 16}  # fmt: skip
    ids = torch.arange(64)[None] % 50
    batch = {"input_ids": ids, "labels": ids, "seq_lengths": [24, 40]}

    def saved(num_layers: int) -> int:
        made = SmolLM3Config(
            **sizes, num_hidden_layers=num_layers, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
        made._attn_implementation = "varlen"
        lm: Any = SmolLM3ForCausalLM(made).to(torch.bfloat16 if how == "bfloat16" else torch.float32).train()
        if how == "checkpointed":
            lm.activation_checkpointing_enable({"use_reentrant": False})
        trainers.add_scoring(lm)
        parameters = {one.untyped_storage().data_ptr() for one in lm.parameters()}
        kept: dict[int, Any] = {}

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage  # held, so that no other takes its place
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        ):
            lm(**batches.model_inputs(batch), scored_labels=ids)
        return sum(storage.nbytes() for storage in kept.values())

    shape = Shape.of(sizes, where="here")
    wanted = 64 * costs.layer_bytes_per_token(shape, bf16=how in ("autocast", "bfloat16"),
                                              sharded=how == "bfloat16")  # fmt: skip
    wanted += 2 * sum(shape.matrices) if how == "autocast" else 0
    wanted = 64 * 4 * 96 if how == "checkpointed" else wanted
    assert saved(3) - saved(2) == wanted


def test_operations_of_a_token_by_hand() -> None:
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 32 * 8
    assert SMALL.matmul_parameters == matrices
    plain = costs.flops_per_token(SMALL, document_tokens=10, checkpointing=False)
    assert plain == 6 * matrices + 6 * 2 * 8 * 10
    assert costs.flops_per_token(SMALL, document_tokens=10, checkpointing=True) == pytest.approx(
        plain * 4 / 3
    )
    assert costs.forward_flops_per_token(SMALL, document_tokens=10) == pytest.approx(plain / 3)


@pytest.mark.parametrize(
    ("launch", "bytes_a_parameter"),
    [
        (Launch(), (4, 4, 8)),
        (Launch("DDP", 4), (4, 4, 8)),
        (Launch("FSDP2", 4), (1, 1, 2)),
        (Launch("ZeRO-1", 4, zero_stage=1), (2, 2, 3)),
        (Launch("ZeRO-2", 4, zero_stage=2), (2, 0.5, 3)),
        (Launch("ZeRO-3", 4, zero_stage=3), (0.5, 0.5, 3)),
    ],
    ids=lambda one: one.kind if isinstance(one, Launch) else "",
)
def test_what_is_kept_from_step_to_step_is_as_the_zero_paper_has_it(
    launch: Launch, bytes_a_parameter: tuple[float, ...]
) -> None:
    parts, host = costs.memory(SMALL, replace(WORK, tokens=4), launch)
    found = tuple(parts[key] for key in ("weights", "gradients", "optimizer"))
    assert found == tuple(one * SMALL.num_parameters for one in bytes_a_parameter)
    assert not any(host.values())


def test_offloading_moves_states_to_main_memory() -> None:
    launch = Launch("ZeRO-3", 4, zero_stage=3, offload_optimizer=True, offload_parameters=True)
    parts, host = costs.memory(SMOLLM3, WORK, launch)
    assert parts["weights"] == parts["optimizer"] == 0
    assert host["optimizer"] == 3 * SMOLLM3.num_parameters
    assert host["weights"] == SMOLLM3.num_parameters / 2


def test_splitting_sequences_divides_activations_and_checkpointing_leaves_a_few() -> None:
    def activations(**changes: Any) -> float:
        return costs.memory(SMOLLM3, replace(WORK, **changes), Launch("FSDP2", 8))[0]["activations"]

    whole = activations(checkpointing=False)
    assert activations(checkpointing=False, tokens=8192) == pytest.approx(whole / 4)
    assert whole > 5 * activations()


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"distributed_type": "NO"}, Launch()),
        ({"distributed_type": "MULTI_GPU"}, Launch("DDP", 8)),
        ({"distributed_type": "MULTI_CPU"}, Launch("DDP", 8, cpu=True)),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2},
          "parallelism_config": {"parallelism_config_sp_size": 4}}, Launch("FSDP2", 8, 4)),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}},
         Launch("FSDP2", 8, offload_optimizer=True, offload_parameters=True)),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
         Launch("ZeRO-2", 8, zero_stage=2)),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {
            "zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none"}},
         Launch("ZeRO-3", 8, zero_stage=3, offload_optimizer=True)),
    ],
)  # fmt: skip
def test_a_launch_file_is_read_as_accelerate_writes_it(
    tmp_path: Path, keys: dict[str, Any], wanted: Launch
) -> None:
    assert launch_files.read_launch(launch_file(tmp_path, **keys)) == wanted


def test_deepspeed_s_own_file_is_read_from_beside_the_launch_file(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    given = {"deepspeed_config_file": "zero.json"}
    path = launch_file(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=given)
    assert launch_files.read_launch(path) == Launch("ZeRO-3", 8, zero_stage=3, offload_parameters=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distributed_type": "XLA"}, "distributed_type: found"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "fsdp_version: wanted 2"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}}, "wanted 1, 2 or 3"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "no"}}, "no such"),
        ({"distributed_type": "MULTI_GPU", "num_processes": "two"}, "num_processes: found"),
        ({"distributed_type": "MULTI_GPU", "parallelism_config": {"parallelism_config_tp_size": 2}}, "tp"),
    ],
)  # fmt: skip
def test_a_launch_file_that_is_not_counted_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    folder: Callable[..., Path],
    tmp_path: Path,
    keys: dict[str, Any],
    message: str,
) -> None:
    assert message in refusal(capsys, folder(), "--launch", launch_file(tmp_path, **keys))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mfu", "1.5"], "--mfu: found 1.5"),
        (["--devices", "0"], "--devices: found 0"),
        (["--tflops", "-1"], "--tflops: found -1.0"),
        (["--device-memory-gib", "nan"], "--device-memory-gib: found nan"),
        (["--launch", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], folder: Callable[..., Path], words: list[str], message: str
) -> None:
    assert message in refusal(capsys, folder(), *words)
    assert "no such folder" in refusal(capsys, "nowhere")


def test_few_updates_are_warned_of_and_a_smaller_batch_is_not(
    capsys: pytest.CaptureFixture[str], folder: Callable[..., Path]
) -> None:
    tree = planned(capsys, folder(global_batch_size=2048))
    assert "149 updates an epoch" in warned(tree, "sft")
    assert "global_batch_size=1024 would make about 298" in warned(tree, "sft")
    assert "updates an epoch" not in warned(planned(capsys, folder(global_batch_size=1024)), "sft")


def test_a_batch_that_does_not_divide_by_the_devices_is_warned_of(
    capsys: pytest.CaptureFixture[str], folder: Callable[..., Path]
) -> None:
    text = warned(planned(capsys, folder(global_batch_size=36), "--devices", "8"), "sft")
    assert "36 does not divide by 8 processes, so training refuses; take 32 or 40" in text
    assert "divide" not in warned(planned(capsys, folder(), "--devices", "8"), "sft")


def test_what_does_not_fit_is_told_what_would_and_that_fits(
    capsys: pytest.CaptureFixture[str], folder: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--devices", "8", "--device-memory-gib", "40"]
    text = warned(planned(capsys, folder(), *words), "sft")
    assert "does not fit" in text
    assert "FSDP2 on 8 devices" in text
    fsdp = launch_file(tmp_path, distributed_type="FSDP", fsdp_config={"fsdp_version": 2})
    tree = planned(capsys, folder(), *words, "--launch", fsdp)
    assert "does not fit" not in warned(tree, "sft")
    assert by_name(tree)["sft"]["memory_gib"]["total"] < 40


def test_sizes_that_nobody_states_are_asked_for(
    capsys: pytest.CaptureFixture[str], folder: Callable[..., Path]
) -> None:
    tree = planned(capsys, folder(tokens=None))
    run = by_name(tree)["sft"]
    assert (run["tokens"], run["packs"], run["steps"], run["device_hours"]) == (None, None, None, None)
    assert "type smol-post prepare" in warned(tree, "sft")
    assert not tree["totals"]["complete"]
    assert by_name(planned(capsys, folder(tokens=None, num_epochs=None, num_steps=7)))["sft"]["steps"] == 7


def test_saves_are_held_against_a_resume_and_against_the_disk(
    capsys: pytest.CaptureFixture[str], folder: Callable[..., Path]
) -> None:
    assert "no checkpoint on the way" in warned(planned(capsys, folder()), "sft")
    saving = {"save_strategy": "steps", "save_steps": 0.1}
    tree = planned(capsys, folder(trainer=saving))
    assert "keeps 10 checkpoints of 34.4 GiB" in warned(tree, "sft")
    limited = planned(capsys, folder(trainer={**saving, "save_total_limit": 2}))
    assert warned(limited, "sft") == ""
    assert by_name(limited)["sft"]["disk_gib"] == pytest.approx(11.456 + 2 * 34.367, abs=0.01)


def test_an_optimiser_that_is_not_known_is_counted_as_adamw_and_said(
    capsys: pytest.CaptureFixture[str], folder: Callable[..., Path]
) -> None:
    assert "counted as AdamW" in warned(planned(capsys, folder(trainer={"optim": "ademamix"})), "sft")
    eight = by_name(planned(capsys, folder(trainer={"optim": "adamw_8bit"})))["sft"]["memory_gib"]
    assert eight["optimizer"] == pytest.approx(2 * 3_075_098_624 / GIB, abs=0.01)


def test_stated_sizes_are_no_part_of_a_fingerprint(folder: Callable[..., Path], tmp_path: Path) -> None:
    prints = []
    for changes in ({}, {"tokens": None}, {"stated_tokens": 5}):
        path = folder(**changes) / "sft.yaml"
        recipe = loading.load_recipe(path)
        prints.append(runner.fingerprint(Job("sft", recipe, path, tmp_path / "run", []), []))
    assert len(set(prints)) == 1


def test_stated_sizes_are_no_part_of_the_addresses_of_data(tokenizer: Any, tmp_path: Path) -> None:
    from smol_post import data, vocabulary

    def found(**size: Any) -> tuple[Any, ...]:
        source = config.Source(name="s", generator="dual_mode_chats", num_rows=30, **size)
        recipe = config.SftRecipe(
            stage="sft", max_tokens=512, global_batch_size=1, num_epochs=1.0, sources=[source]
        )
        words = vocabulary.of_run(recipe, copy.deepcopy(tokenizer), folder=tmp_path)
        before = data.find(recipe, words, folder=tmp_path, cache_dir=tmp_path / "cache")
        made = data.prepare(recipe, words, folder=tmp_path, cache_dir=tmp_path / "cache")
        return before, data.find(recipe, words, folder=tmp_path, cache_dir=tmp_path / "cache"), made

    nothing, first, made = found()
    assert nothing is None
    again, _, same = found(size=config.Size(rows=30, tokens=9))
    assert again == first
    assert same.path == made.path
    lengths = [one for row in made.index["length"] for one in row]
    assert first.num_packs == len(made.index)
    assert first.document_tokens == pytest.approx(sum(one**2 for one in lengths) / sum(lengths))
    assert first.longest == max(map(sum, made.index["length"]))


def test_the_ledger_of_what_is_prepared_beats_what_is_stated(
    capsys: pytest.CaptureFixture[str], recipe_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    from smol_post import preparation

    tokenizer.save_pretrained(tmp_path / "parent")
    sizes = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}  # fmt: skip
    (tmp_path / "parent" / "config.json").write_text(json.dumps(sizes))
    runs = [{"name": "sft", "stage": "sft", "recipe": "sft.yaml", "parents": [str(tmp_path / "parent")]}]
    (recipe_folder / "pipeline.yaml").write_text(yaml.safe_dump({"runs": runs}))
    words = [recipe_folder, "--run-dir", tmp_path / "runs"]
    assert by_name(planned(capsys, *words))["sft"]["data"] == "unknown"
    assert preparation.prepare([*map(str, words), "--json"]) == 0
    ledger = json.loads(capsys.readouterr().out)
    run = by_name(planned(capsys, *words))["sft"]
    assert (run["data"], run["packs"], run["tokens"]) == ("ledger", ledger["num_packs"], ledger["num_tokens"])
    assert run["steps_per_epoch"] == ledger["updates_per_epoch"]


def test_a_stated_architecture_that_is_not_the_family_is_refused() -> None:
    with pytest.raises(Refusal, match="model_type: found"):
        Shape.of({"model_type": "gpt2"}, where="config.json")
    with pytest.raises(Refusal, match="hidden_size: this key is missing"):
        Shape.of({"model_type": "llama"}, where="config.json")
    with pytest.raises(Refusal, match="hidden_size: found"):
        Shape.of({"hidden_size": "big"}, where="config.json")


def test_a_plan_imports_no_torch() -> None:
    code = (
        "import sys\nfrom smol_post import budget\n"
        f"assert budget.plan([{str(RECIPES / 'smollm3')!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_inference_takes_weights_and_the_keys_and_values_of_grouped_heads() -> None:
    weights, cache = costs.inference_bytes(SMOLLM3, dtype="bfloat16", context=131072)
    assert weights == 2 * 3_075_098_624
    assert cache == 2 * 36 * 4 * 128 * 2 * 131072


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_an_adapter_is_counted_as_peft_counts_it(build: Callable[..., Any], targets: list[str] | str) -> None:
    from smol_post import adapters

    lm = build()
    shape = Shape.of(lm.config.to_dict(), where="here")
    block = config.Peft(r=3, lora_alpha=6, target_modules=targets)
    trained, _ = adapters.add_adapters(lm, block, new_ids=[], seed=0).get_nb_trainable_parameters()  # type: ignore[operator]
    assert shape.adapter(3, targets) == trained


def test_only_an_adapter_has_gradients_and_moments(
    folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    full = by_name(planned(capsys, folder(), "--devices", "1"))["sft"]
    lora = by_name(planned(capsys, folder(peft={"r": 16, "lora_alpha": 32}), "--devices", "1"))["sft"]
    trained = SMOLLM3.adapter(16, "all-linear")
    assert lora["memory_gib"]["optimizer"] == pytest.approx(8 * trained / GIB, abs=1e-3)
    assert lora["memory_gib"]["gradients"] == pytest.approx(4 * trained / GIB, abs=1e-3)
    assert lora["memory_gib"]["total"] < full["memory_gib"]["total"] / 2
    assert lora["device_hours"] < full["device_hours"]
