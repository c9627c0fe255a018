"""The report shows what is on disk: nothing guessed, nothing loaded, nothing run in the reader's browser."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from smol_post import commands as cli
from smol_post.manifest import content_digest, content_files
from smol_post.plots import draw_loss
from smol_post.points import Point
from smol_post.refusal import Refusal
from smol_post.report import commands, duration, number, read_points, write_report

RUNS = ["base", "sft", "apo_seed0", "merge"]
PARENTS = {"base": [], "sft": ["base"], "apo_seed0": ["sft"], "merge": ["apo_seed0", "base"]}
METRICS: dict[str, dict[str, float]] = {
    "base": {"needle_8x": 0.8125},
    "sft": {"needle_8x": 0.25, "needle_16x": 0.125, "think_greedy": 0.953, "no_think_greedy": 0.2,
            "perplexity": 3.5},
    "apo_seed0": {"needle_8x": 0.25, "think_greedy": 0.953, "no_think_greedy": 0.0, "perplexity": 2.5},
    "merge_soup": {"needle_8x": 0.2},
    "merge": {"needle_8x": 0.5, "think_greedy": 0.9},
}  # fmt: skip


def digest(run: str) -> str:
    return "sha256:" + run.encode().hex().ljust(64, "0")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_run(root: Path, run: str, **changes: Any) -> None:
    counts = {"num_documents": 12, "num_tokens": 12345, "num_trained_tokens": 6789}
    data = counts | {"num_documents": 12, "num_packs": 7, "utilisation": 0.987, "fingerprint": "f00d"}
    data |= {"by_source": {"pairs": counts}, "by_mode": {"think": counts}}
    parents = [{"path": f"../{name}", "digest": digest(name), "stage": name} for name in PARENTS[run]]
    manifest = {
        "schema": 1, "run": run, "stage": run.split("_")[0], "recipe": {"max_tokens": 64}, "parents": parents,
        "recipe_file": f"recipes/tiny/{run}.yaml", "data": None if run == "merge" else data, "seed": 0,
        "versions": {"torch": "2.13.0"}, "seconds": 62.0,
        "metrics": {"num_tokens_seen": 12345, "train_loss": 0.31, "num_steps": 40},
        "digest": digest(run),
    }  # fmt: skip
    write_json(root / run / "manifest.json", manifest | changes)
    if run != "merge":
        lines = [json.dumps({"step": step, "loss": 3 / step}) for step in (10, 20, 30)]
        (root / run / "train_log.jsonl").write_text("\n".join([*lines, '{"train_runtime": 3.5}']))


def write_evals(root: Path, name: str, **changes: Any) -> None:
    metrics = {metric: {"value": v, "stderr": 0.005, "num": 200} for metric, v in METRICS[name].items()}
    samples = [{"mode": "think", "prompt": f"hello {name}", "output": "<think>1</think>2", "right": True}]
    evals = {
        "stage": name.split("_")[0],
        "checkpoint_digest": digest(name),
        "metrics": metrics,
        "samples": samples,
    }
    write_json(root / "evals" / f"{name}.json", evals | changes)


def soup_digest(root: Path) -> str:
    return content_digest(content_files(root / "merge" / "soup"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for run in RUNS:
        write_run(tmp_path, run)
    for name in METRICS:
        write_evals(tmp_path, name)
    write_json(tmp_path / "merge" / "soup" / "config.json", {})
    write_evals(tmp_path, "merge_soup", checkpoint_digest=soup_digest(tmp_path))
    return tmp_path


class Page(HTMLParser):
    """Tables as rows of texts with classes and styles of their cells, all text, every tag with attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.classes: list[list[str]] = []
        self.styles: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
            self.classes.append([])
            self.styles.append([])
        elif tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")
            self.classes[-1].append(dict(attrs).get("class") or "")
            self.styles[-1].append(dict(attrs).get("style") or "")
        elif tag == "small":
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def metric(self, checkpoint: str, name: str) -> tuple[str, bool]:
        """The text of one entry of the metric matrix, and whether it is marked as the best."""
        head = next(n for n, row in enumerate(self.rows) if row[0].startswith("checkpoint") and name in row)
        row = next(n for n in range(head, len(self.rows)) if self.rows[n][0].split(" ")[0] == checkpoint)
        column = self.rows[head].index(name)
        return self.rows[row][column], "best" in self.classes[row][column].split()


def page_of(root: Path, runs: list[str] = RUNS) -> Page:
    return Page(write_report(root, runs=runs)[0])


def test_a_metric_is_shown_with_its_standard_error(root: Path) -> None:
    assert page_of(root).metric("base", "needle_8x")[0] == "0.812 \u00b1 0.005"


def test_a_metric_that_was_not_measured_is_a_dash_and_a_measured_zero_is_a_zero(root: Path) -> None:
    page = page_of(root)
    assert page.metric("base", "no_think_greedy") == ("\u2013", False)
    assert page.metric("apo_seed0", "no_think_greedy")[0].startswith("0.000")


def test_the_best_of_a_column_is_marked_and_ties_share_the_mark(root: Path) -> None:
    page = page_of(root)
    assert [page.metric(name, "needle_8x")[1] for name in METRICS] == [True, False, False, False, False]
    assert [page.metric(name, "think_greedy")[1] for name in METRICS] == [False, True, True, False, False]


def test_the_lowest_perplexity_is_the_best(root: Path) -> None:
    page = page_of(root)
    assert [page.metric(name, "perplexity")[1] for name in ("sft", "apo_seed0")] == [False, True]


def test_needles_are_a_map_of_checkpoints_by_lengths_shaded_by_accuracy(root: Path) -> None:
    """Each kind has its own columns, by length; what was not measured has neither number nor shade."""
    values = {
        "needle_16x": 0.5,
        "needle_12.5x": 0.25,
        "single_8192": 1.0,
        "single_4096": 0.75,
        "needle_16x_yarn": 0.0,
    }
    found = {name: {"value": value, "stderr": 0.005} for name, value in values.items()}
    write_evals(root, "sft", metrics=found | {"single_2_tasks": {"value": 0.1, "stderr": 0.0}})
    page = page_of(root)
    at = page.rows.index(["checkpoint", "8x", "12.5x", "16x", "16x", "4096", "8192"])
    assert page.rows[at - 1] == ["", "needle", "needle yarn", "single"]
    assert [row[0] for row in page.rows[at + 1 : at + 6]] == list(METRICS)
    dash = "\u2013"
    assert page.rows[at + 1] == ["base", "0.812", dash, dash, dash, dash, dash]
    assert page.rows[at + 2] == ["sft", dash, "0.250", "0.500", "0.000", "0.750", "1.000"]
    shades = ["", "--at: 25.0%", "--at: 50.0%", "--at: 0.0%", "--at: 75.0%", "--at: 100.0%"]
    assert page.styles[at + 2] == ["", *shades]


def test_the_map_of_needles_is_left_out_where_none_was_looked_for(root: Path) -> None:
    assert "Needle retrieval by length" in page_of(root).text
    for name in METRICS:
        write_evals(root, name, metrics={"perplexity": {"value": 2.0, "stderr": None}})
    assert "Needle retrieval by length" not in page_of(root).text


def test_a_lone_measurement_is_not_called_the_best(root: Path) -> None:
    assert page_of(root).metric("sft", "needle_16x") == ("0.125 \u00b1 0.005", False)


def test_the_soup_stands_before_the_merge_and_needle_columns_are_ordered_by_length(root: Path) -> None:
    names = [point.name for point in read_points(root, RUNS)]
    assert names == ["base", "sft", "apo_seed0", "merge_soup", "merge"]
    head = next(row for row in page_of(root).rows if row[0].startswith("checkpoint"))
    assert head[1:5] == ["needle_8x", "needle_16x", "think_greedy", "no_think_greedy"]


def test_the_soup_of_a_merge_that_is_not_whole_is_not_shown(root: Path) -> None:
    (root / "merge" / "manifest.json").unlink()
    assert "merge_soup" not in page_of(root).text


def test_evals_of_an_earlier_checkpoint_are_marked_and_never_the_best(root: Path) -> None:
    write_evals(root, "base", checkpoint_digest=digest("an earlier base"))
    page = page_of(root)
    assert page.metric("base", "needle_8x") == ("0.812 \u00b1 0.005", False)
    assert page.metric("merge", "needle_8x")[1]
    write_evals(root, "sft", checkpoint_digest=digest("an earlier sft"))
    page = page_of(root)
    assert [page.metric(name, "think_greedy")[1] for name in ("sft", "apo_seed0")] == [False, True]
    assert "evals of another checkpoint" in page.text


@pytest.mark.parametrize("fate", ["replaced", "gone"])
def test_evals_of_an_earlier_soup_are_marked(root: Path, fate: str) -> None:
    assert "evals of another checkpoint" not in page_of(root).text
    path = root / "merge" / "soup" / "config.json"
    path.write_text('{"another": 1}')
    if fate == "gone":
        path.unlink()
        path.parent.rmdir()
    notes = {point.name: point.note for point in read_points(root, RUNS)}
    assert notes == dict.fromkeys(METRICS, "") | {"merge_soup": "evals of another checkpoint"}


def test_a_row_that_was_asked_other_questions_is_marked_and_never_the_best(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, asked in {"base": "b", "sft": "a", "apo_seed0": "a"}.items():
        write_evals(root, name, asked_digest=asked)
    notes = {point.name: point.note for point in read_points(root, RUNS)}
    assert notes == dict.fromkeys(METRICS, "") | {"base": "asked other questions"}  # the merge does not say
    page = page_of(root)
    assert [page.metric(name, "needle_8x")[1] for name in METRICS] == [False, False, False, False, True]
    assert cli.compare([str(root / "base"), str(root / "sft")]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["evals", "note", *["asked", "other", "questions"] * 2] in shown
    assert cli.compare([str(root / "sft"), str(root / "merge")]) == 0
    assert " note " not in capsys.readouterr().out


def test_stale_rows_do_not_decide_what_most_were_asked(root: Path) -> None:
    for name in ("base", "sft"):
        write_evals(root, name, asked_digest="old", checkpoint_digest=digest("an earlier one"))
    write_evals(root, "apo_seed0", asked_digest="new")
    notes = [point.note for point in read_points(root, RUNS)]
    assert notes == ["evals of another checkpoint"] * 2 + [""] * 3


def test_a_file_of_evals_that_no_run_of_the_chain_wrote_is_no_checkpoint(root: Path) -> None:
    for name in ("sft_old", "sft_soup", "merge_old", "gates_sft"):
        write_json(root / "evals" / f"{name}.json", {"metrics": {"needle_8x": {"value": 1.0, "stderr": 0.0}}})
    assert [point.name for point in read_points(root, RUNS)] == list(METRICS)


def test_a_soup_stands_before_its_own_merge_only(root: Path) -> None:
    (root / "merge").rename(root / "merge_x")
    for name in ("merge", "merge_soup"):
        (root / "evals" / f"{name}.json").rename(root / "evals" / f"{name.replace('merge', 'merge_x')}.json")
    write_run(root, "merge")
    names = [point.name for point in read_points(root, ["merge", "merge_x"])]
    assert names == ["merge", "merge_x_soup", "merge_x"]


def test_a_run_built_from_a_parent_that_was_replaced_says_so(root: Path) -> None:
    assert "built from another" not in page_of(root).text
    write_run(root, "base", digest=digest("a new base"))
    assert "built from another base" in page_of(root).text


def test_a_missing_run_is_shown_as_not_run_without_numbers(root: Path) -> None:
    (root / "sft" / "manifest.json").unlink()
    html, markdown = write_report(root, runs=RUNS)
    page = Page(html)
    assert page.metric("sft", "think_greedy") == ("\u2013", False)
    assert "3 of 4 runs are whole" in page.text
    assert "Not run: sft." in page.text
    assert "hello sft" not in page.text
    assert "| sft not run |" in markdown.read_text(encoding="utf-8")


def test_a_missing_eval_file_is_said(root: Path) -> None:
    (root / "evals" / "base.json").unlink()
    assert ["base no evals", "\u2013"] in [row[:2] for row in page_of(root).rows]


def test_runs_alone_without_any_evals_make_a_report(root: Path) -> None:
    for path in (root / "evals").iterdir():
        path.unlink()
    assert "4 of 4 runs are whole: 37,035 tokens in 4 min 8 s." in page_of(root).text


def test_nothing_run_at_all_is_refused_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"no whole run.*make pipeline") as refusal:
        write_report(tmp_path, runs=RUNS)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_refused_by_name_and_line(root: Path) -> None:
    (root / "sft" / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with pytest.raises(Refusal, match=r"train_log\.jsonl, line 2: not JSON"):
        write_report(root, runs=RUNS)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("evals/sft.json", b'{"metrics": [1]}', r"metrics: found \[1\] \(list\), wanted an object"),
        ("evals/sft.json", b'{"metrics": {"a": 1}}', r"metrics\.a: found 1 \(int\), wanted a value"),
        ("evals/sft.json", b'{"metrics": {"a": {"value": "x"}}}', r"metrics\.a: found .*wanted a value"),
        ("evals/sft.json", b'{"samples": ["x"]}', "samples: found .*wanted a list of objects"),
        ("evals/sft.json", b"\xff", "not readable as JSON; remove the file and measure again"),
        ("evals/merge_soup.json", b"[1]", "found list, wanted an object; .*measure again"),
        ("evals/gates_sft.json", b"\xff", "not readable as JSON; remove the file"),
        ("sft/train_log.jsonl", b'{"loss": 1.0}', "line 1: found .*wanted a loss and its step"),
        ("sft/train_log.jsonl", b'{"loss": "x", "step": 1}', "line 1: found .*wanted a loss and its step"),
        ("sft/train_log.jsonl", b'{"step": 1}\n[1]', "line 2: found .*wanted a JSON object"),
        ("sft/train_log.jsonl", b"\n\xff", "line 2: not JSON"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_name(root: Path, file: str, content: bytes, said: str) -> None:
    (root / file).write_bytes(content)
    with pytest.raises(Refusal, match=f"{file}.*{said}") as refusal:
        write_report(root, runs=RUNS)
    assert "\n" not in str(refusal.value)


def test_what_a_model_writes_cannot_run_in_the_reader(root: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    write_evals(root, "sft", samples=[{"mode": evil, "prompt": evil, "output": evil, "right": None}])
    write_run(root, "sft", recipe={"note": evil}, versions={"torch": evil}, stage=evil)
    html, markdown = write_report(root, runs=RUNS)
    page = Page(html)
    assert page.text.count(evil) >= 5
    assert not [tag for tag, attributes in page.tags if tag in ("script", "img") or "onerror" in attributes]
    assert "<script" not in markdown.read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_its_links_stay_inside(root: Path) -> None:
    html = write_report(root, runs=RUNS)[0]
    page, text = Page(html), html.read_text(encoding="utf-8")
    targets = [v or "" for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href")]
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert not re.search(r"https?://|@import|@font-face|<link|url\((?!#)", text)


def test_plots_take_the_colours_of_the_page_and_their_ids_do_not_meet(root: Path) -> None:
    page = page_of(root)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [v for _, a in page.tags for k, v in a.items() if k == "xlink:href" and v]
    assert {target.removeprefix("#") for target in used} <= set(ids)
    drawn = [a.get("style") or "" for tag, a in page.tags if tag in ("path", "text", "use")]
    assert [style for style in drawn if "var(--s1)" in style]
    assert [style for style in drawn if "var(--ink)" in style]
    assert not [style for style in drawn if re.search(r"(fill|stroke): #", style)]
    assert sum(tag == "svg" for tag, _ in page.tags) == 4  # modes, and the losses of the three trained runs


def loss_plot(losses: list[float]) -> tuple[list[list[float]], Any]:
    """The points of the line, and the band behind it."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    log = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    drawn = draw_loss(axes, [Point("sft", True, {}, {}, log, "sft", {})])
    assert drawn == bool(losses)
    line, band = axes.lines[0], axes.collections[0]
    return line.get_xydata().tolist(), band.get_paths()[0].vertices if losses else None


def test_the_loss_of_a_long_run_is_drawn_as_means_with_its_extremes_behind() -> None:
    """Of 600 steps ten make a point; a single odd step shows in the band."""
    losses = [2.0 + step % 2 for step in range(600)]
    losses[304] = 11.0
    line, band = loss_plot(losses)
    assert [step for step, _ in line] == [5.5 + 10 * point for point in range(60)]
    assert [loss for _, loss in line] == pytest.approx([2.5] * 30 + [3.4] + [2.5] * 29)
    assert (band[:, 1].min(), band[:, 1].max()) == (2, 11)
    assert band[band[:, 1].argmax(), 0] == 305.5


@pytest.mark.parametrize("number", [1, 3, 60])
def test_the_loss_of_a_short_run_is_drawn_step_by_step(number: int) -> None:
    losses = [3 / step for step in range(1, number + 1)]
    assert loss_plot(losses)[0] == [[step, loss] for step, loss in enumerate(losses, 1)]


def test_no_point_of_the_loss_stands_for_much_less_than_another() -> None:
    """119 steps: the last point is no single step, which would look like a jump."""
    line, _ = loss_plot([1.0] * 118 + [9.0])
    assert len(line) == 60
    assert line[-1] == [118.5, 5.0]
    assert loss_plot([]) == ([], None)


def test_the_same_input_gives_the_same_bytes_and_leaves_no_other_file(root: Path) -> None:
    first = [path.read_bytes() for path in write_report(root, runs=RUNS)]
    assert first == [path.read_bytes() for path in write_report(root, runs=RUNS)]
    assert {path.name for path in root.iterdir()} == {
        *RUNS,
        "evals",
        "report.html",
        "report.md",
        "metrics.json",
    }


def test_the_markdown_has_the_rows_of_the_page(root: Path) -> None:
    html, markdown = write_report(root, runs=RUNS)
    lines = [line for line in markdown.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    told = {tuple(cell.strip(" *") for cell in line.strip("|").split("|")) for line in lines}
    page = Page(html)
    rows = {
        tuple(cell.strip() for cell in row)
        for row, styles in zip(page.rows, page.styles, strict=True)
        if row[0] and not any(styles)  # the heat map repeats the matrix in colour
    }
    assert {row for row in rows if len(row) > 1 and row[0] in METRICS} <= told
    assert "| base | **0.812 \u00b1 0.005** |" in markdown.read_text(encoding="utf-8")
    assert "| sft | pairs | 12 | 12,345 | 6,789 |" in lines


def test_a_bar_in_a_name_does_not_break_the_markdown_table(root: Path) -> None:
    write_run(root, "sft", versions={"a|b": "1"})
    assert "| a\\|b | 1 |" in write_report(root, runs=RUNS)[1].read_text(encoding="utf-8")


def test_the_commands_name_the_recipes_and_the_run_root(root: Path) -> None:
    chain = [point for point in read_points(root, RUNS) if point.is_run]
    assert commands(Path("runs/tiny"), chain) == ["make pipeline", "smol-post run recipes/tiny"]
    chain[0].manifest["recipe_file"] = "recipes/mine/base.yaml"
    assert commands(Path("runs/b"), chain) == [
        "make pipeline RECIPE=recipes/mine RUN=runs/b", "smol-post run recipes/mine --run-dir runs/b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12345, "12,345"),
        (0.98312, "0.983"),
        (2048.71, "2,048.7"),
        (2e-5, "2e-05"),
        (0.0, "0.000"),
        (None, "\u2013"),
    ],
)
def test_numbers_are_for_people(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(41.2, "41 s"), (62, "1 min 2 s"), (3700, "1 h 1 min")])
def test_durations_are_for_people(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def gates(root: Path) -> list[list[str]]:
    rows = [line for line in (root / "report.md").read_text().splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in rows
        if "at least" in row or "at most" in row
    ]


def test_gates_are_passed_failed_or_not_measured(root: Path) -> None:
    demands = {"needle_8x": {"min": 0.5, "max": None}, "think_greedy": {"min": None, "max": 0.9}}
    for run in ("sft", "apo_seed0", "merge"):
        write_run(root, run, recipe={"gates": demands})
    found = {
        "needle_8x": demands["needle_8x"] | {"value": 0.25, "stderr": 0.005, "num": 200, "passed": False},
        "think_greedy": demands["think_greedy"] | {"value": 0.9, "stderr": 0.005, "num": 200, "passed": True},
    }
    write_json(root / "evals" / "gates_sft.json", {"digest": digest("sft"), "passed": False, "gates": found})
    write_json(root / "evals" / "gates_merge.json", {"digest": digest("old"), "passed": True, "gates": found})
    write_report(root, runs=RUNS)
    assert gates(root) == [
        ["sft", "needle_8x", "failed", "at least 0.500", "0.250 \u00b1 0.005"],
        ["", "think_greedy", "passed", "at most 0.900", "0.900 \u00b1 0.005"],
        ["apo_seed0", "needle_8x", "not measured", "at least 0.500", "\u2013"],
        ["", "think_greedy", "not measured", "at most 0.900", "\u2013"],
        ["merge", "needle_8x", "not measured", "at least 0.500", "\u2013"],  # measured on another checkpoint
        ["", "think_greedy", "not measured", "at most 0.900", "\u2013"],
    ]
    assert "Gates" in page_of(root).text


def test_programs_get_what_the_page_says(root: Path) -> None:
    write_report(root, runs=RUNS)
    tree = json.loads((root / "metrics.json").read_text())
    names = [one["name"] for one in tree["checkpoints"]]
    assert names == ["base", "sft", "apo_seed0", "merge_soup", "merge"]
    assert tree["checkpoints"][1]["evals"]["needle_8x"] == {"value": 0.25, "stderr": 0.005, "num": 200}
    assert tree["checkpoints"][1]["parents"] == {"base": digest("base")}
    assert tree["checkpoints"][1]["digest"] == digest("sft")


def write_proofs(root: Path, run: str, **changes: Any) -> None:
    proofs = [
        {"name": "documents do not see each other", "status": "passed",
         "found": {"others by": 2e-7, "documents": 4}, "wanted": {"others by": 0.0}},
        {"name": "head and embedding are tied", "status": "passed",
         "found": {"tied": True}, "wanted": {"tied": True}},
        {"name": "preference training starts at its reference", "status": "not run", "reason": "no pairs"},
    ]  # fmt: skip
    write_json(root / run / "verify.json", {"level": "quick", "step": 0, "proofs": proofs} | changes)


def test_proofs_are_counted_for_each_run_and_their_findings_told(root: Path) -> None:
    write_proofs(root, "base")
    write_proofs(root, "sft", level="full", step=20)
    rows = [[cell.strip() for cell in row] for row in page_of(root).rows]
    at = rows.index(["run", "level", "passed", "not run", "failed"])
    assert rows[at + 1 : at + 5] == [
        ["base", "quick", "2", "1", "0"],
        ["sft", "full from step 20", "2", "1", "0"],
        ["apo_seed0", "no proofs", *["\u2013"] * 3],
        ["merge", "no proofs", *["\u2013"] * 3],
    ]
    at = rows.index(["run", "proof", "result", "found", "wanted"])
    assert rows[at + 1 : at + 4] == [
        [
            "base",
            "documents do not see each other",
            "passed",
            "others by 2e-07, documents 4",
            "others by 0.000",
        ],
        ["", "head and embedding are tied", "passed", "tied True", ""],
        ["", "preference training starts at its reference", "not run", "no pairs", ""],
    ]
    told = (root / "report.md").read_text(encoding="utf-8").splitlines()
    assert "| base | quick | 2 | 1 | 0 |" in told
    assert "|  | head and embedding are tied | passed | tied True |  |" in told
    tree = json.loads((root / "metrics.json").read_text())["checkpoints"]
    assert [one["verified"].get("level") for one in tree] == ["quick", "full", None, None, None]


def test_a_proof_that_failed_is_told_by_name_though_its_run_is_not_whole(root: Path) -> None:
    failed = {"name": "embeddings are not decayed", "status": "failed",
              "found": {"decayed": ["lm_head", "embed"]}, "wanted": {"decayed": []}}  # fmt: skip
    write_proofs(root, "sft", proofs=[failed])
    (root / "sft" / "manifest.json").unlink()
    page = page_of(root)
    assert ["sft failed: embeddings are not decayed", "quick", "0", "0", "1"] in page.rows
    at = page.rows.index(
        ["sft", "embeddings are not decayed", "failed", "decayed lm_head embed", "decayed none"]
    )
    assert [("warn" in classes.split()) for classes in page.classes[at]] == [False, False, True, False, False]


def test_a_chain_without_proofs_says_so(root: Path) -> None:
    assert "No proofs." in page_of(root).text


def test_the_picture_of_the_chain_has_parents_seeds_and_digests(root: Path) -> None:
    write_run(root, "merge", seed=7)
    picture = " ".join(page_of(root).text.split("The chain")[1].split())
    assert picture.startswith("base seed 0 1 min 2 s 62617365 sft from base seed 0 1 min 2 s 736674")
    assert " merge from apo_seed0, base seed 7 1 min 2 s 6d657267 " in picture


def test_two_runs_side_by_side(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(root, "sft", recipe={"stage": "sft", "seed": 1, "trainer": {"beta": 1.0}, "same": 2})
    write_run(
        root,
        "apo_seed0",
        stage="sft",
        recipe={"stage": "sft", "seed": 2, "sources": [{"seed": 3}], "same": 2},
    )
    assert cli.compare([str(root / "sft"), str(root / "apo_seed0")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {line[1]: line[2:] for line in lines[1:]}
    assert lines[0] == [str(root / "sft"), str(root / "apo_seed0"), "difference"]
    assert shown["seed"] == ["1", "2"]
    assert shown["trainer.beta"] == ["1.000", "\u2013"]
    assert shown["sources.0.seed"] == ["\u2013", "3"]
    assert "same" not in shown
    assert shown["no_think_greedy"][-3:] == ["-0.200", "(28.3", "errors)"]
    assert shown["needle_16x"] == ["0.125", "\u00b1", "0.005", "\u2013"]
    assert cli.compare([str(root / "sft"), str(root / "nowhere")]) == 2
    assert capsys.readouterr().err == (
        f"refused: {root / 'nowhere'}: no whole run; give a run directory such as runs/tiny/sft\n"
    )


def test_stale_evals_are_marked_side_by_side_and_have_no_difference(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [str(root / "sft"), str(root / "apo_seed0")]
    assert cli.compare(both) == 0
    assert " note " not in capsys.readouterr().out
    write_evals(root, "apo_seed0", checkpoint_digest=digest("an earlier one"))
    assert cli.compare(both) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["evals", "note", "evals", "of", "another", "checkpoint"] in shown
    lines = [line for line in shown if line[1] == "needle_8x"]
    assert lines == [["evals", "needle_8x", *["0.250", "\u00b1", "0.005"] * 2]]


def test_a_run_is_compared_from_inside_its_folder(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "sft")
    assert cli.compare([".", "../apo_seed0"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [".", "../apo_seed0", "difference"]
    assert ["evals", "needle_8x", *["0.250", "\u00b1", "0.005"] * 2, "+0.000", "(0.0", "errors)"] in lines


def test_importing_the_report_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, smol_post.report; sys.exit(bool({'torch', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
