"""A merge is refused where its parents are not checkpoints of one model, and checked where they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smol_post import config, disk, manifest, merge, points
from smol_post.plan import Job, Parent
from smol_post.refusal import Refusal

Build = Callable[..., Any]


@pytest.fixture
def save(build: Build, tokenizer: Any, tmp_path: Path) -> Callable[..., Parent]:
    """A checkpoint of a stage as a parent; the keywords change its model."""

    def made(name: str, *, stage: str | None = "apo", **changes: Any) -> Parent:
        folder = tmp_path / name
        build(**{"seed": len(name), **changes}).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return Parent(f"../{name}", folder, manifest.content_digest(manifest.content_files(folder)), stage)

    return made


def run(parents: list[Parent], tmp_path: Path) -> dict[str, Any]:
    recipe = config.MergeRecipe(stage="merge")
    job = Job("merge", recipe, tmp_path / "merge.yaml", tmp_path / "run", [one.path for one in parents])
    return merge.run(recipe, parents, job)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
            "rope_parameters: ../a has .*5000000",
        ),
        ({"intermediate_size": 32}, "intermediate_size: ../a has 64, ../bb has 32"),
        ({"tied": False}, "tie_word_embeddings: ../a has True, ../bb has False"),
        ({"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers: "),
    ],
    ids=["theta", "width", "tied", "nope"],
)
def test_parents_of_another_shape_are_refused_with_the_key(
    save: Callable[..., Parent], tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(Refusal, match=key):
        run([save("a"), save("bb", stage="long_context", **changes)], tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_merge_without_room_on_the_disk_is_refused_before_it_writes(
    save: Callable[..., Parent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = [save("a"), save("bb", stage="long_context")]
    size = (parents[0].folder / "model.safetensors").stat().st_size  # with some kilobytes of names
    monkeypatch.setattr(disk, "free", lambda folder: int(1.9 * size))
    with pytest.raises(Refusal, match=r"run: the merge takes 0\.\d+ GiB of disk, found .* make room"):
        run(parents, tmp_path)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(disk, "free", lambda folder: 2 * size)
    run(parents, tmp_path)


def test_parents_with_other_vocabularies_are_refused(save: Callable[..., Parent], tmp_path: Path) -> None:
    parents = [save("a"), save("bb", stage="long_context")]
    path = parents[1].folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<think>", "<reason>"))
    with pytest.raises(Refusal, match=r"\.\./a and \.\./bb have different tokenizers; .*first run"):
        run(parents, tmp_path)


def test_a_parent_with_more_tokens_is_refused_by_vocab_size(
    save: Callable[..., Parent], build: Build, tokenizer: Any, tmp_path: Path
) -> None:
    first, second = save("a"), save("bb", stage="long_context")
    wider = build()
    wider.resize_token_embeddings(len(tokenizer) + 8)
    wider.save_pretrained(second.folder)
    tokenizer.save_pretrained(second.folder)
    with pytest.raises(
        Refusal, match=rf"vocab_size: ../a has {len(tokenizer)}, ../bb has {len(tokenizer) + 8}"
    ):
        run([first, second], tmp_path)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["long_context", "apo"], r"\.\./a is a long-context checkpoint; it wants the last place"),
        (["apo", "long_context", "long_context"], r"\.\./bb is a long-context checkpoint"),
        (["apo", "apo"], r"\.\./bb is of stage apo; the last parent is long_context"),
    ],
)
def test_parents_in_the_wrong_order_are_refused(tmp_path: Path, stages: list[str], message: str) -> None:
    names = ["a", "bb", "ccc"][: len(stages)]
    parents = [Parent(f"../{name}", tmp_path, "", stage) for name, stage in zip(names, stages, strict=True)]
    with pytest.raises(Refusal, match=message):
        run(parents, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["value", "lost", "dtype"])
def test_a_merge_that_is_not_the_weighted_sum_is_an_error(
    save: Callable[..., Parent], tmp_path: Path, fault: str
) -> None:
    """The check after MergeKit sees one number that is off by a thousandth, in any tensor."""
    folders = [save("a").folder, save("bb").folder]
    weights = [0.9, 0.1]
    tensors = [load_file(folder / "model.safetensors") for folder in folders]
    total = {name: 0.9 * tensors[0][name] + 0.1 * tensors[1][name] for name in tensors[0]}
    out = tmp_path / "out"
    out.mkdir()
    save_file(total, out / "model.safetensors")
    assert merge.check_sum(folders, weights, out, dtype=torch.float32) <= 1e-6
    name = "model.layers.3.self_attn.k_proj.weight"
    if fault == "value":
        total[name][3, 3] += 1e-3
    elif fault == "dtype":
        total[name] = total[name].bfloat16()
    else:
        del total[name]
    save_file(total, out / "model.safetensors")
    with pytest.raises(RuntimeError, match=name):
        merge.check_sum(folders, weights, out, dtype=torch.float32)


@pytest.mark.parametrize(("weights", "right"), [([0.9, 0.1], True), ([1.0, 0.0], False), ([0.5, 0.5], False)])
def test_a_bf16_merge_is_held_to_one_rounding_step(
    build: Any, tmp_path: Path, weights: list[float], right: bool
) -> None:
    """Two parents 2 % apart: a merge of other weights is within bf16's coarsest step, and is found."""
    torch.manual_seed(0)
    first = {name: tensor.detach().clone() for name, tensor in build().named_parameters()}
    second = {name: tensor * (1 + 0.02 * torch.randn_like(tensor)) for name, tensor in first.items()}
    mixed = {name: weights[0] * first[name] + weights[1] * second[name] for name in first}
    total = {name: tensor.bfloat16() for name, tensor in mixed.items()}
    for folder, tensors in (("a", first), ("b", second), ("out", total)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    folders = [tmp_path / "a", tmp_path / "b"]
    if right:
        assert merge.check_sum(folders, [0.9, 0.1], tmp_path / "out", dtype=torch.bfloat16) < 0.01
    else:
        with pytest.raises(RuntimeError, match="off the weighted sum"):
            merge.check_sum(folders, [0.9, 0.1], tmp_path / "out", dtype=torch.bfloat16)


def test_a_merge_that_carries_another_parent_s_template_is_an_error(
    save: Callable[..., Parent], tmp_path: Path
) -> None:
    """MergeKit takes them from whichever model of a set comes first, unless told; what came out counts."""
    donor, out = save("a").folder, save("bb").folder
    (donor / "chat_template.jinja").write_text("the soup's")
    (out / "chat_template.jinja").write_text("the long-context checkpoint's")
    with pytest.raises(RuntimeError, match=r"chat_template\.jinja: is not the soup's"):
        merge._check_donor(donor, out)
    (out / "chat_template.jinja").write_text("the soup's")
    merge._check_donor(donor, out)


@pytest.mark.parametrize(
    ("table", "keep", "chosen", "keeps"),
    [
        ({0.0: (0.2, 0.9), 0.1: (0.4, 0.89), 0.2: (0.6, 0.7)}, {"think": 1}, 0.1, [True, True, False]),
        ({0.0: (0.2, 0.9), 0.1: (0.4, 0.89), 0.2: (0.6, 0.7)}, {}, 0.2, [True, True, True]),
        ({0.0: (0.2, 0.9), 0.1: (0.4, 0.8), 0.2: (0.6, 0.7)}, {"think": 5}, 0.0, [True, False, False]),
        (
            {0.0: (0.2, 0.9), 0.1: (0.4, 0.9), 0.2: (0.4, 0.95)},
            {"think": 0},
            0.1,
            [True, True, True],
        ),  # a tie
        ({0.0: (0.5, 0.9), 0.1: (0.4, 0.95)}, {"think": 1}, 0.0, [True, True]),  # nothing to recover
    ],
)
def test_the_candidate_is_chosen_that_recovers_most_and_keeps_enough(
    table: dict[float, tuple[float, float]], keep: dict[str, float], chosen: float, keeps: list[bool]
) -> None:
    candidates = [
        {"weight": weight, "metrics": {"needle": {"value": needle}, "think": {"value": think}}}
        for weight, (needle, think) in table.items()
    ]
    gate = config.MergeGate(suite="s.yaml", recover="needle", keep=keep)
    assert merge.choose(candidates, gate)["weight"] == chosen
    assert [one["keeps"] for one in candidates] == keeps
    assert [one["weight"] for one in candidates if one["chosen"]] == [chosen]


NAN = float("nan")


@pytest.mark.parametrize(
    ("table", "chosen", "keeps"),
    [
        ({0.0: (9.0, 3.0), 0.1: (8.0, 3.009), 0.2: (7.0, 3.02)}, 0.1, [True, True, False]),
        ({0.0: (9.0, 3.0), 0.1: (NAN, 3.0), 0.2: (8.5, 2.0)}, 0.2, [True, False, True]),
        ({0.0: (9.0, 3.0), 0.1: (8.0, NAN), 0.2: (8.5, float("inf"))}, 0.0, [True, False, False]),
    ],
)
def test_of_a_perplexity_less_is_recovered_and_more_is_lost_and_nan_is_neither(
    table: dict[float, tuple[float, float]], chosen: float, keeps: list[bool]
) -> None:
    names = ("perplexity_long", "task_nll_base")
    candidates = [
        {"weight": weight, "metrics": {n: {"value": v} for n, v in zip(names, values, strict=True)}}
        for weight, values in table.items()
    ]
    gate = config.MergeGate(suite="s.yaml", recover=names[0], keep={names[1]: 1})
    assert merge.choose(candidates, gate)["weight"] == chosen
    assert [one["keeps"] for one in candidates] == keeps


@pytest.mark.parametrize(("values", "said"), [((NAN, 1.0), "needle .* nan"), ((1.0, NAN), "think .* nan")])
def test_a_soup_without_a_number_to_hold_others_to_is_refused(values: tuple[float, float], said: str) -> None:
    metrics = {"needle": {"value": values[0]}, "think": {"value": values[1]}}
    gate = config.MergeGate(suite="s.yaml", recover="needle", keep={"think": 1})
    with pytest.raises(Refusal, match=f"gate: {said}, wanted a finite number"):
        merge.choose([{"weight": 0.0, "metrics": metrics}], gate)


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        ("perplexity", True),
        ("wikitext_bits_per_byte_base", True),
        ("mmlu_brier_score_base", True),
        ("openllm_acc_base", False),
        ("glosses_exact_match_base", False),
    ],
)
def test_whole_words_of_a_name_say_that_lower_is_better(name: str, lower: bool) -> None:
    assert points.lower_is_better(name) is lower
