"""The final model is the weighted sum of its parents, and the soup's in everything else."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from smol_post import synthetic

pytestmark = pytest.mark.slow
Chain = tuple[Path, Path]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_every_tensor_is_nine_parts_soup_and_one_part_long_context(chain: Chain) -> None:
    root = chain[1]
    first, second, long = (weights(root / run) for run in ("apo_seed0", "apo_seed1", "long_context_1"))
    merged = weights(root / "merge")
    assert merged.keys() == first.keys() == second.keys() == long.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        wanted = 0.9 * (first[name] + second[name]) / 2 + 0.1 * long[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)


def test_the_soup_is_kept_as_a_checkpoint_of_its_own(chain: Chain) -> None:
    root = chain[1]
    first, second, soup = (weights(root / run) for run in ("apo_seed0", "apo_seed1", "merge/soup"))
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer.json"])
def test_template_tokenizer_and_generation_settings_are_the_soup_s(chain: Chain, name: str) -> None:
    root = chain[1]
    assert (root / "merge" / name).read_bytes() == (root / "apo_seed0" / name).read_bytes()


def test_the_configuration_is_the_soup_s(chain: Chain) -> None:
    root = chain[1]
    merged, soup, long = (
        json.loads((root / run / "config.json").read_text())
        for run in ("merge", "apo_seed0", "long_context_1")
    )
    for key in ("eos_token_id", "pad_token_id", "rope_parameters", "max_position_embeddings", "vocab_size"):
        assert merged[key] == soup[key]
    assert merged["eos_token_id"] != long["eos_token_id"]


SUITE = {"stage": "evals", "num_threads": 1, "needle_tokens": [40, 60], "num_needle_questions": 8,
         "num_arithmetic_questions": 0, "num_preference_pairs": 0}  # fmt: skip
GATE = {"suite": "suite.yaml", "seed": 7, "recover": "needle_1x", "keep": {"needle_1.5x": 75}}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, build: Callable[..., Any]) -> Path:
    """A recipe whose soup knows the gate's long needles by heart, and whose last parent the short ones."""
    folder = tmp_path_factory.mktemp("planted")

    def questions(num_tokens: int) -> list[list[list[int]]]:
        rows = synthetic.generate("needle_questions", num_rows=8, seed=7, num_tokens=num_tokens)
        return [
            [tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "answer")]
            for row in rows
        ]

    soup = taught(build(initializer_range=0.08), questions(60), num_steps=60)
    long = taught(soup, questions(40), num_steps=30)
    for name, lm in (("first", soup), ("second", soup), ("long", long)):
        lm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    parents = [str(folder / name) for name in ("first", "second", "long")]
    merge = {"stage": "merge", "weights": [0.2, 0.65, 0.95], "gate": GATE}
    run = {"name": "merge", "stage": "merge", "recipe": "merge.yaml", "parents": parents}
    for name, tree in (
        ("merge", merge),
        ("suite", SUITE),
        ("pipeline", {"runs": [run], "evals": "suite.yaml"}),
    ):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


def taught(lm: Any, rows: list[list[list[int]]], *, num_steps: int) -> Any:
    """A copy of a model that has learned (prompt, answer) by heart."""
    lm = copy.deepcopy(lm).train()
    optimizer = torch.optim.Adam(lm.parameters(), lr=3e-3)
    for _ in range(num_steps):
        for prompt, answer in rows:
            logits_TV = lm(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
            torch.nn.functional.cross_entropy(
                logits_TV[len(prompt) - 1 : -1], torch.tensor(answer)
            ).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm.eval()


def test_the_sweep_recovers_the_planted_skill_as_far_as_the_gate_allows(
    planted: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    done = command("smol-post", "merge", planted / "merge.yaml", "--run-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "merge" / "manifest.json").read_text())["metrics"]
    table = {
        one["weight"]: tuple(one["metrics"][name]["value"] for name in ("needle_1x", "needle_1.5x"))
        for one in metrics["sweep"]
    }
    assert list(table) == [0.0, 0.2, 0.65, 0.95]
    assert table[0.0] == (0.0, 1.0)
    assert table[0.95][0] > 0.9
    assert table[0.95][1] < 0.25 <= table[0.65][1]  # without the gate it would be this one
    assert table[0.65][0] > max(table[0.0][0], table[0.2][0])
    assert [one["weight"] for one in metrics["sweep"] if one["chosen"]] == [0.65]
    assert [one["keeps"] for one in metrics["sweep"]] == [True, True, True, False]
    first, long, merged = (
        weights(folder) for folder in (planted / "first", planted / "long", tmp_path / "merge")
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.35 * first[name] + 0.65 * long[name], rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "merge" / "candidate.part").exists()
    shown = command("smol-post", "report", planted, "--run-dir", tmp_path)
    assert shown.returncode == 0, shown.stderr
    page = (tmp_path / "report.md").read_text()
    assert "| merge 0.65 chosen |" in page
    assert "| merge 0.95 loses too much |" in page
    assert "Metrics of merges by the weight" in (tmp_path / "report.html").read_text()


def test_a_sweep_over_a_metric_that_its_suite_lacks_is_refused(
    planted: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    given = ["gate.recover=needle_8x", "weights=[0.3, 0.5]"]
    done = command("smol-post", "merge", planted / "merge.yaml", "--run-dir", tmp_path, *given)
    assert done.returncode == 2
    assert "gate: its suite measures no 'needle_8x'; did you mean 'needle_1x'?" in done.stderr
    assert not (tmp_path / "merge" / "manifest.json").exists()
