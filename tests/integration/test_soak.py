"""The soak, on the smallest chain: killed in each phase of a training run, of the merge and after them."""

from pathlib import Path

import pytest

from benchmarks import soak

pytestmark = pytest.mark.slow


def test_a_chain_killed_in_each_phase_ends_as_one_that_never_was(
    chain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name in environment.keys() - {"PATH"}:
        monkeypatch.setenv(name, environment[name])
    recipe, root = chain
    found = soak.soak(recipe, tmp_path / "soak", reference=root, seed=0, short=True, few=True)
    assert found["different"] == []
    assert found["whole_things_hashed"] > 50
    hits = {(phase, how) for _, phase, how, _ in found["hits"]}
    assert sum(number for *_, how, number in found["hits"] if how == "SIGKILL") >= 10
    assert {("training", "SIGTERM"), ("checkpoint", "SIGKILL"), ("merge", "SIGKILL")} <= hits


def test_a_chain_that_ended_otherwise_is_told(chain: tuple[Path, Path], tmp_path: Path) -> None:
    one = soak.Chain(*chain)
    before = one.outcome()
    log = chain[1] / "sft" / "train_log.jsonl"
    kept = log.read_text()
    try:
        log.write_text(kept.replace('"loss": ', '"loss": 1', 1))
        assert [name for name, found in one.outcome().items() if found != before[name]] == ["sft"]
        log.write_text(kept + kept.splitlines(keepends=True)[-1])
        with pytest.raises(soak.Refusal, match="steps are missing or repeated"):
            one.outcome()
    finally:
        log.write_text(kept)
