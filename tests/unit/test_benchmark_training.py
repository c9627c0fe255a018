"""The benchmarks of training run at tiny sizes and compare like with like; speed, no test asks."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smol_post
from smol_post.trainers import PackTrainer

sys.path.append(str(Path(smol_post.__file__).parents[1]))

from benchmarks import measure, preference, run, training

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2}
PACKS = training.Size(max_tokens=256, number=12, batch=2, vocab_size=768, **SMALL)
PAIRS = training.Size(max_tokens=256, number=16, vocab_size=768, **SMALL)


@pytest.mark.parametrize(
    ("benchmark", "size"),
    [(training.sft_step, PACKS), (preference.apo, PAIRS)],
)
def test_all_sides_have_the_same_losses(
    benchmark: Callable[..., measure.Result], size: training.Size, tmp_path: Path
) -> None:
    sizes = {"size": size, "large": size} | ({"small": size} if size.batch > 1 else {})
    result = benchmark(tmp_path, call=measure.here, repetitions=1, **sizes)
    assert result.promises["same losses"]
    assert set(result.peer) == set(result.ours)
    assert run.BENCHMARKS[benchmark.__name__] is benchmark
    report = {"name": benchmark.__name__, **vars(result)}
    assert benchmark.__name__ in run.table([report])
    if benchmark is preference.apo:
        assert result.ours["num_tokens"] < result.extra["grouped"]["num_tokens"] < result.peer["num_tokens"]


def test_a_trainer_with_another_loss_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = PackTrainer.compute_loss

    def unsound(*given: Any, **options: Any) -> Any:
        return 1.001 * sound(*given, **options)

    training.write_tokenizer(tmp_path)
    monkeypatch.setattr(PackTrainer, "compute_loss", unsound)
    found = training._steps(tmp_path, training._fit_ours, PACKS)
    assert found["loss_difference"] > training.CLOSE


def test_trl_gets_the_very_tokens_of_a_pair() -> None:
    import numpy as np

    row = {
        "input_ids": np.array([5, 6, 7, 5, 6, 8, 9]),
        "labels": np.array([-100, -100, 7, -100, -100, 8, 9]),
        "seq_lengths": [3, 4],
    }
    assert preference._padded(row) == {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
