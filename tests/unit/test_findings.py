"""What `make reproduce` writes follows from its numbers; planted ones have known effects."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import findings, reproduction
from smol_post import loading

NAMES = {**findings.CHAIN, **findings.ABLATIONS, **findings.SOUPS, **dict.fromkeys(findings.WEIGHTS.values())}


def metric(value: float) -> dict[str, Any]:
    return {"value": value, "stderr": 0.01, "num": 400}


@pytest.fixture
def tree() -> dict[str, Any]:
    """Every checkpoint the same, 0.5, but for what is planted."""
    seeds = {}
    for seed, noise in (("1", 0.0), ("2", 0.01), ("3", -0.01)):
        here = {name: {key: metric(0.5) for key in findings.COLUMNS} for name in NAMES}
        for key in ("needle_8x", "needle_8x_clean"):
            here["long_context_2"][key] = metric(0.9 + noise)
            here["merge"][key] = metric(0.7 + noise / 2)
        here["merge_soup"]["think_sampled"] = metric(0.7 + noise)
        here["merge_nll_soup"]["think_sampled"] = metric(0.8)
        seeds[seed] = here
    about = {"command": "c", "core_minutes": 1, "hardware": "h"}
    return {"about": about, "seeds": seeds}


def test_bars_are_what_the_numbers_say(tree: dict[str, Any]) -> None:
    found = {bar.text: bar for bar in findings.bars(findings.Numbers(tree))}
    closed = found["share of the gap at 8x that the merge closes, both kinds of documents"]
    assert closed.values == pytest.approx([0.5, 0.205 / 0.41, 0.195 / 0.39])
    assert closed.mean == pytest.approx(0.5)
    assert found["APO's gain in thinking, T=1"].values == pytest.approx([0.2, 0.21, 0.19])
    over_nll = found["APO over NLL on the chosen, thinking, T=1"]
    assert over_nll.values == pytest.approx([-0.1, -0.09, -0.11])
    assert not over_nll.holds(0.0)
    assert over_nll.holds(0.01)
    lines = findings.bars_table(findings.Numbers(tree)).splitlines()
    assert next(line for line in lines if "over NLL" in line).endswith("| 0 of 3 seeds; mean falls short |")
    assert next(line for line in lines if "APO's gain" in line).endswith("| 3 of 3 seeds; mean holds |")
    assert next(line for line in lines if "lost from SFT" in line).endswith("| 3 of 3 seeds; mean holds |")


def test_one_seed_without_a_gap_does_not_decide_what_the_merge_closes(tree: dict[str, Any]) -> None:
    for key in ("needle_8x", "needle_8x_clean"):
        tree["seeds"]["1"]["long_context_2"][key] = metric(0.5)  # as the soup
        tree["seeds"]["2"]["long_context_2"][key] = metric(0.501)  # nearly so
    values, mean = findings.closed(findings.Numbers(tree), ["needle_8x", "needle_8x_clean"])
    assert math.isnan(values[0])
    assert values[1] == pytest.approx(0.205 / 0.001)
    assert mean == pytest.approx((0.2 + 0.205 + 0.195) / (0.0 + 0.001 + 0.39))


def test_a_metric_of_some_seeds_only_is_an_error(tree: dict[str, Any]) -> None:
    del tree["seeds"]["2"]["sft"]["think_sampled"]
    with pytest.raises(ValueError, match="sft: think_sampled was measured on some seeds only"):
        findings.page(findings.Numbers(tree))


@pytest.mark.parametrize(
    ("differences", "wanted"),
    [
        ([0.2, 0.21, 0.19], "appears"),
        ([-0.2, -0.21, -0.19], "the opposite appears"),
        ([0.2, 0.1, 0.3], "not shown"),  # 0.2, standard error 0.058: two seeds of three could be luck
        ([0.2, 0.15, 0.25], "appears"),
        ([0.1, 0.12, -0.01], "not shown"),  # one seed on the other side
        ([0.0, 0.0, 0.0], "not shown"),
    ],
)
def test_an_effect_wants_every_seed_and_students_t(differences: list[float], wanted: str) -> None:
    assert findings.verdict(differences) == wanted


def test_the_page_says_plainly_what_appears(tree: dict[str, Any]) -> None:
    page = findings.page(findings.Numbers(tree))
    appears = next(line for line in page.splitlines() if "appear at this scale" in line)
    assert "The merge gives long context back" in appears
    assert "Thinking beats not thinking" not in appears
    row = next(line for line in page.splitlines() if line.startswith("| APO beats NLL"))
    assert row.endswith(" | ours | -0.100 ± 0.006 | the opposite appears |")
    assert "| 0.1 | 0.500 ± 0.000 | 0.700 ± 0.003 |" in page


def test_the_readme_gets_its_table_between_the_marks(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{findings.MARKS[0]}\nold\n{findings.MARKS[1]}\nafter\n", encoding="utf-8")
    (tmp_path / "reproduction.json").write_text(json.dumps(tree), encoding="utf-8")
    monkeypatch.setattr(findings, "DOCS", tmp_path)
    monkeypatch.setattr(findings, "README", readme)
    findings.write()
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| merged, 0.9 / 0.1 | 0.700 ± 0.003 |" in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["reproduction-needle.png", "reproduction-thinking.png", "reproduction-weights.png"]
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="found 0 pairs of marks"):
        findings.write()


def test_readme_and_page_are_of_the_numbers_in_the_repository() -> None:
    numbers = findings.Numbers(json.loads((findings.DOCS / "reproduction.json").read_text(encoding="utf-8")))
    assert findings.readme_table(numbers) in findings.README.read_text(encoding="utf-8")
    assert findings.page(numbers) == (findings.DOCS / "reproduction.md").read_text(encoding="utf-8")
    assert len(numbers.seeds) >= 3
    assert numbers.about["recipes"] == reproduction.digest_of_recipes(), "run make reproduce again"


def test_every_checkpoint_of_a_table_is_a_run_and_is_measured() -> None:
    entries = loading.load_pipeline(reproduction.RECIPE).runs
    known = {f"{entry.name}_soup" for entry in entries if entry.stage == "merge"} | {e.name for e in entries}
    used = {name for claim in findings.CLAIMS for name in (claim.more, claim.less)}
    assert not set(NAMES) - known
    assert not used - set(NAMES)


def test_a_seed_changes_every_seed_of_its_chain_and_nothing_else(tmp_path: Path) -> None:
    first, third = (loading.load_pipeline(reproduction.folder_of(seed, tmp_path)).runs for seed in (1, 3))
    for one, other in zip(first, third, strict=True):
        a, b = (loading.load_entry(tmp_path, entry).model_dump() for entry in (one, other))
        if one.stage == "merge":
            assert a == b
            continue
        assert b.pop("seed") - a.pop("seed") == (20 if one.stage == "apo" else 2)
        for source, again in zip(a["sources"], b["sources"], strict=True):
            assert again.pop("seed") - source.pop("seed") == 2 * reproduction.ROWS_OF_A_SEED
        assert a == b


def test_seed_1_is_the_tiny_recipe(tmp_path: Path) -> None:
    tiny = loading.load_pipeline(config_folder := reproduction.TOP / "recipes" / "tiny").runs
    ours = {entry.name: entry for entry in loading.load_pipeline(reproduction.folder_of(1, tmp_path)).runs}
    for entry in tiny:
        assert loading.load_entry(tmp_path, ours[entry.name]) == loading.load_entry(config_folder, entry)
        assert ours[entry.name].parents == entry.parents
