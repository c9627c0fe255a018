"""Points -> inline SVG whose colours are CSS variables, so that a page can be light or dark."""

import html
import io
import re
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean
from typing import Any

from smol_post.points import Point, metric_names

LOSS_POINTS = 60  # as many as the eye can tell apart at that size
INK, GRID = "#01fe02", "#01fe03"  # stand-ins, replaced by CSS variables in the SVG
SERIES = [f"#02fe{number:02x}" for number in range(1, 9)]
CSS_OF = {INK: "var(--ink)", GRID: "var(--grid)"} | {c: f"var(--s{n})" for n, c in enumerate(SERIES, 1)}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "smol_post", "text.parse_math": False, "font.size": 10.5,
    "text.color": INK, "axes.edgecolor": GRID, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": GRID, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip


def draw_loss(axes: Any, runs: list[Point]) -> bool:
    """Training loss by step of one run, means and extremes of a few steps; False where nothing was logged."""
    entries = [entry for entry in runs[0].log if entry.get("loss") is not None]
    number = min(LOSS_POINTS, len(entries))
    bounds = [len(entries) * at // max(number, 1) for at in range(number + 1)]
    groups = [entries[start:stop] for start, stop in pairwise(bounds)]
    steps = [fmean(entry["step"] for entry in group) for group in groups]
    losses = [[entry["loss"] for entry in group] for group in groups]
    axes.fill_between(steps, [*map(min, losses)], [*map(max, losses)], color=SERIES[0], alpha=0.25, lw=0)
    axes.plot(steps, [*map(fmean, losses)], color=SERIES[0], marker="." if len(steps) == 1 else "")
    axes.set_xlabel("step")
    return bool(entries)


def draw_modes(axes: Any, points: list[Point]) -> bool:
    """Accuracy with and without thinking, one group of bars a checkpoint."""
    names = [name for name in metric_names(points) if name.startswith(("think", "no_think"))]
    points = [p for p in points if any(p.metric(name) is not None for name in names)]
    height = 0.84 / max(len(names), 1)
    look = {"error_kw": {"ecolor": INK, "elinewidth": 0.8}, "height": height * 0.9}
    for index, name in enumerate(names):
        rows = [row + (index - (len(names) - 1) / 2) * height for row in range(len(points))]
        values, errors = ([p.metric(name, key) for p in points] for key in ("value", "stderr"))
        widths, spans = ([found or 0 for found in column] for column in (values, errors))
        bars = axes.barh(rows, widths, xerr=spans, label=name, color=SERIES[index % 8], **look)
        axes.bar_label(bars, ["" if v is not None else " not measured" for v in values], fontsize=8)
    axes.set(yticks=range(len(points)), yticklabels=[p.name for p in points])
    axes.set(xlim=(0, 1.03), xlabel="accuracy")
    axes.invert_yaxis()
    return bool(points)


def draw_sweep(axes: Any, runs: list[Point]) -> bool:
    """Metrics of merges by the weight of the long-context checkpoint; a vertical line at the chosen one."""
    sweeps = [sweep for run in runs if (sweep := (run.manifest.get("metrics") or {}).get("sweep"))]
    for sweep in sweeps[:1]:
        weights = [one["weight"] for one in sweep]
        for index, name in enumerate(name for name in sweep[0]["metrics"] if not name.startswith("mode")):
            values, errors = (
                [one["metrics"][name][key] or 0 for one in sweep] for key in ("value", "stderr")
            )
            axes.errorbar(
                weights, values, errors, label=name, color=SERIES[index % 8], marker="osD^vP*X"[index % 8]
            )
        axes.axvline(next(one["weight"] for one in sweep if one["chosen"]), color=INK, lw=0.8, ls=":")
    axes.set(ylim=(0, 1.03), xlabel="weight of the long-context checkpoint", ylabel="accuracy")
    return bool(sweeps)


def plot(draw: Callable[[Any, list[Point]], bool], points: list[Point], name: str) -> str:
    """An SVG to set into a page, in the page's colours and font; "" where there is nothing to draw."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(3.3, 1.9) if draw is draw_loss else (4.7, 4.1), layout="constrained")
        axes, file = figure.subplots(), io.StringIO()
        if not draw(axes, points):
            return ""
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=3, fontsize=9)
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;\"]*;?", "", svg, flags=re.S)
    svg = re.sub(r'xmlns(:\w+)?="[^"]*"|(width|height)="[\d.]+pt"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # ids of several plots must not meet
    for stand_in, variable in CSS_OF.items():
        svg = svg.replace(stand_in, variable)
    label = html.escape(f"{draw.__doc__} {', '.join(p.name for p in points)}")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
