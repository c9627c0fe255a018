"""What a launcher says, and how a row of documents is split over processes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from smol_post import attention, batches, launch, sequence
from smol_post.refusal import Refusal


def parts(size: int, index: int) -> Any:
    made = sequence.Parts(1)
    made.size, made.index = size, index
    return made


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_up(processes: int, **sizes: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv("SMOL_POST_NUM_PARTS", "1")
        for key in ("DP_REPLICATE", "DP_SHARD", "SP", "CP", "TP"):
            monkeypatch.setenv(f"PARALLELISM_CONFIG_{key}_SIZE", str(sizes.get(key, 1)))

    return set_up


def test_the_split_of_sequences_is_taken_over_and_accelerate_is_told_nothing_of_it(launched: Any) -> None:
    import os

    launched(8, SP=4)
    launch.take_over()
    assert launch.num_parts() == 4
    assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "false"


def test_replicas_of_shards_stay_accelerate_s_and_its_mesh_has_all_processes(launched: Any) -> None:
    import os

    launched(16, SP=2, DP_REPLICATE=2, DP_SHARD=4)
    launch.take_over()
    assert launch.num_parts() == 2
    assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert os.environ["PARALLELISM_CONFIG_SP_SIZE"] == "1"
    assert os.environ["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"


@pytest.mark.parametrize(
    ("processes", "sizes", "said"),
    [
        (4, {"CP": 2}, "cp_size: found 2, but its ring drops the borders of documents; set"),
        (4, {"TP": 2}, "tp_size: found 2, which no stage can do"),
        (6, {"SP": 4}, "do not come to the 6 processes"),
        (8, {"SP": 2, "DP_SHARD": 2}, "1 x dp_shard_size 2 x sp_size 2 do not come to the 8 processes"),
    ],
)
def test_a_launch_that_would_lose_documents_or_processes_is_refused(
    launched: Any, processes: int, sizes: dict[str, int], said: str
) -> None:
    launched(processes, **sizes)
    with pytest.raises(Refusal, match=said):
        launch.take_over()


def test_several_processes_of_which_accelerate_starts_one_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(Refusal, match="asks for several processes, and accelerate starts one"):
        launch.take_over()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "fits"),
    [
        (16, 4, 4, True),
        (16, 4, 8, True),
        (16, 4, 2, True),
        (9, 3, 2, False),
        (16, 6, 4, False),
        (16, 4, 16, True),
    ],
)
def test_heads_are_dealt_out_evenly_or_refused(heads: int, kv_heads: int, size: int, fits: bool) -> None:
    config = SimpleNamespace(
        num_attention_heads=heads, num_key_value_heads=kv_heads, _attn_implementation="varlen"
    )
    if fits:
        sequence.check_heads(config, size)
        return
    with pytest.raises(Refusal, match=f"sp_size: found {size}, wanted a number that divides"):
        sequence.check_heads(config, size)


def test_another_attention_is_refused_where_sequences_are_split() -> None:
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, _attn_implementation="sdpa")
    with pytest.raises(Refusal, match="attention: found sdpa, wanted varlen"):
        sequence.check_heads(config, 2)


ROW = {
    "input_ids": np.array([5, 6, 7, 8, 9]),
    "labels": np.array([-100, 6, 7, -100, 9]),
    "seq_lengths": [3, 2],
    "address": [0, 3],
}


def test_parts_of_a_row_have_every_id_once_and_every_label_with_the_token_that_predicts_it() -> None:
    batch = batches.collate([ROW])
    first, second = (batches.part_inputs(batch, parts(2, index)) for index in (0, 1))
    assert (first["input_ids"].tolist(), second["input_ids"].tolist()) == ([[5, 6]], [[7, 8, 9]])
    assert (first["position_ids"].tolist(), second["position_ids"].tolist()) == ([[0, 1]], [[2, 0, 1]])
    # token 6 predicts 7, the first of the second part
    assert first["scored_labels"].tolist() == [[-100, 6, 7]]
    assert second["scored_labels"].tolist() == [[7, -100, 9]]
    for one in (first, second):
        assert one["cu_seq_lens_q"].tolist() == [0, 3, 5]
        assert one["split"].num_tokens == [2, 3]


def test_off_the_cpu_queries_keys_and_values_come_to_one_type_before_any_kernel() -> None:
    """RoPE in float32 leaves two of them wider than the third; meta stands for a device without a kernel."""
    query = torch.zeros(1, 4, 5, 8, device="meta")
    key, value = torch.zeros(2, 1, 2, 5, 8, device="meta")
    output, _ = attention.varlen_attention_forward(
        torch.nn.Module(), query, key, value.bfloat16(), None, cu_seq_lens_q=torch.tensor([0, 3, 5])
    )
    assert (output.dtype, tuple(output.shape)) == (torch.bfloat16, (1, 5, 4, 8))


def test_a_row_in_one_part_is_the_row() -> None:
    batch = batches.collate([ROW])
    made = batches.part_inputs(batch, parts(1, 0))
    assert torch.equal(made["scored_labels"], batch["labels"])
    assert "split" not in made
