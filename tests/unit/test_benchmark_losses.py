"""The benchmarks of loss and attention run at tiny sizes and compare like with like; speed, no test asks."""

import doctest
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smol_post
import smol_post.losses

sys.path.append(str(Path(smol_post.__file__).parents[1]))

from benchmarks import attention, loss, measure, run

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[Callable[..., measure.Result], dict[str, Any]] = {
    loss.loss: {"num_positions": 7, "vocab_size": 40, "hidden_size": 8},
    attention.attention: {"bars": {64: 1.0, 96: 1.0}, "mean_document_tokens": 16, "hidden_size": 32},
}


@pytest.mark.parametrize("benchmark", list(TINY), ids=lambda one: one.__name__)
def test_both_sides_compute_the_same(benchmark: Callable[..., measure.Result], tmp_path: Path) -> None:
    result = benchmark(tmp_path, call=measure.here, repetitions=2, **TINY[benchmark])
    assert [kept for what, kept in result.promises.items() if what.startswith("same")] == [True]
    assert set(result.peer) == set(result.ours)
    assert all(key.endswith(("_seconds", "_bytes")) for key in result.ours)
    assert result.repetitions == 2
    report = {"name": benchmark.__name__, **vars(result)}
    assert benchmark.__name__ in run.table([report])


def test_a_loss_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TINY[loss.loss]
    assert loss._equal(**shape)
    monkeypatch.setattr(smol_post.losses, "summed_cross_entropy", lambda h, w, y: (h @ w.t()).square().sum())
    assert not loss._equal(**shape)


def test_outputs_that_differ_are_seen(tmp_path: Path) -> None:
    one = torch.tensor([1.0, -8.0])
    torch.save((one, one), tmp_path / "sdpa_2.pt")
    torch.save((one, one + torch.tensor([2.0, 0.0])), tmp_path / "varlen_2.pt")
    assert attention._furthest(tmp_path, [2]) == {2: 0.25}


def test_every_kernel_of_the_loss_benchmark_has_the_same_loss() -> None:
    given = loss._inputs(**TINY[loss.loss])
    full, ours, trl = (loss._mean_loss(name, *given).item() for name in ("full", "ours", "trl"))
    assert ours == pytest.approx(full, rel=1e-6)
    assert trl == pytest.approx(full, rel=1e-6)


def test_documents_of_a_pack_are_about_as_long_as_said() -> None:
    positions = attention.position_ids(100_000, mean=500)
    lengths = positions[:-1][positions[1:] == 0] + 1
    assert len(positions) == 100_000
    assert 250 <= lengths.min() < 260
    assert 740 < lengths.max() <= 750
    assert 480 < lengths.mean() < 520


def test_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(attention)
    assert (found.failed, found.attempted) == (0, 1)
