"""docs/reproduction.json -> docs/reproduction.md, its pictures, and the table between the marks of README.md.

    numbers[seed][checkpoint][metric]["value"]     over 400 questions or more, the same within a seed
      | mean and standard error over seeds         every number of the tables
      v verdicts                                   of an effect: every seed has it, and Student's t bears it

`python -m benchmarks.findings` writes them again from the numbers that are there.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
MARKS = ("<!-- written by make reproduce -->", "<!-- end of what make reproduce writes -->")
COLUMNS = {
    "needle_4x": "4x",
    "needle_8x": "8x",
    "needle_4x_clean": "4x clean",
    "needle_8x_clean": "8x clean",
    "think_greedy": "think",
    "think_sampled": "think, T=1",
    "no_think_greedy": "no_think",
    "mode_think_sampled": "think obeyed, T=1",
    "mode_no_think_sampled": "no_think obeyed, T=1",
    "tool_calls_calc_no_think": "tool",
}
CHAIN = {
    "base": "base",
    "long_context_1": "long context 1",
    "long_context_2": "long context 2",
    "mid": "mid",
    "sft": "SFT",
    "merge_soup": "APO soup",
    "merge": "merged, 0.9 / 0.1",
}
ABLATIONS = {
    "theta_50k_1": "long context 1, theta kept at 50k",
    "theta_50k_2": "long context 2, theta kept at 50k",
    "mid_no_replay": "mid, no needle documents",
    "sft_no_replay": "SFT, none in mid and SFT",
    "merge_no_replay": "merged, none in mid and SFT",
    "mid_cross_document": "mid, documents of a pack see each other",
    "sft_cross_document": "SFT after that",
    "sft_without_mid": "SFT without mid-training",
    "sft_unmasked": "SFT with loss on all tokens of the chats",
    "merge_dpo_soup": "DPO soup instead of APO",
    "merge_nll_soup": "NLL on the chosen answers instead of APO, soup",
}
WEIGHTS = {
    0.0: "merge_soup",
    0.05: "merge_weight_0.05",
    0.1: "merge",
    0.2: "merge_weight_0.2",
    0.3: "merge_weight_0.3",
    1.0: "long_context_2",
}
SOUPS = {
    "merge_of_1_soup": "soup of 1",
    "merge_soup": "soup of 2",
    "merge_of_4_soup": "soup of 4",
    "merge_of_1": "merged, soup of 1",
    "merge": "merged, soup of 2",
    "merge_of_4": "merged, soup of 4",
}


class Claim(NamedTuple):
    """An effect: `more` has a higher `metric` than `less`; `whose` claim it is."""

    text: str
    more: str
    less: str
    metric: str
    whose: str
    less_metric: str = ""


STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # two-sided 5 %, by degrees of freedom
LAUNCH, PLAYBOOK, PAPER, HABIT, OURS = "launch post", "playbook", "APO paper", "recipe's habit", "ours"
_T1 = "think_sampled"
CLAIMS = [
    Claim(
        "Training at length with a higher theta extends the context",
        "long_context_2",
        "base",
        "needle_8x",
        LAUNCH,
    ),
    Claim("Training at length alone does", "theta_50k_2", "base", "needle_8x", OURS),
    Claim("A higher theta helps, training being equal", "long_context_2", "theta_50k_2", "needle_8x", HABIT),
    Claim("Mid-training costs long context", "long_context_2", "mid", "needle_8x", LAUNCH),
    Claim("Mid-training helps thinking (T=1)", "sft", "sft_without_mid", _T1, PLAYBOOK),
    Claim("Thinking beats not thinking", "sft", "sft", "think_greedy", LAUNCH, "no_think_greedy"),
    Claim("APO improves thinking (one seed, T=1)", "merge_of_1_soup", "sft", _T1, LAUNCH),
    Claim(
        "APO improves obedience to /think (one seed, T=1)",
        "merge_of_1_soup",
        "sft",
        "mode_think_sampled",
        LAUNCH,
    ),
    Claim("APO costs long context (one seed)", "sft", "merge_of_1_soup", "needle_8x", LAUNCH),
    Claim("APO beats DPO at APO's beta and rate (soups, T=1)", "merge_soup", "merge_dpo_soup", _T1, PAPER),
    Claim("APO beats NLL on the chosen at its rate (soups, T=1)", "merge_soup", "merge_nll_soup", _T1, OURS),
    Claim("The merge gives long context back", "merge", "merge_soup", "needle_8x", LAUNCH),
    Claim("The merged model stays below long context 2", "long_context_2", "merge", "needle_8x", OURS),
    Claim("The merge costs greedy thinking", "merge_soup", "merge", "think_greedy", OURS),
    Claim("A soup of four beats one (thinking, T=1)", "merge_of_4_soup", "merge_of_1_soup", _T1, HABIT),
    Claim("Loss on assistant turns beats loss on all (T=1)", "sft", "sft_unmasked", _T1, PLAYBOOK),
    Claim("Isolation in mid keeps long context", "mid", "mid_cross_document", "needle_8x", HABIT),
    Claim("Isolation in mid helps thinking after SFT (T=1)", "sft", "sft_cross_document", _T1, HABIT),
    Claim("Replayed needle documents keep long context", "sft", "sft_no_replay", "needle_8x", OURS),
]


class Numbers:
    """What was measured, by seed; a metric that a checkpoint lacks is an empty list."""

    def __init__(self, tree: dict[str, Any]) -> None:
        """`tree`: docs/reproduction.json."""
        self.about, self.seeds = tree["about"], tree["seeds"]

    def of(self, checkpoint: str, metric: str) -> list[float]:
        """One value a seed, in their order; none where no seed has it. ValueError where only some have."""
        found = [seed.get(checkpoint, {}).get(metric) for seed in self.seeds.values()]
        if None in found and any(found):
            raise ValueError(f"{checkpoint}: {metric} was measured on some seeds only")
        return [one["value"] for one in found if one]

    def differences(self, claim: Claim) -> list[float]:
        """`more` minus `less`, of each seed."""
        less = self.of(claim.less, claim.less_metric or claim.metric)
        return [a - b for a, b in zip(self.of(claim.more, claim.metric), less, strict=True)]


def error(values: Sequence[float]) -> float:
    """Standard error of the mean over seeds."""
    return stdev(values) / math.sqrt(len(values))


def said(values: Sequence[float]) -> str:
    """Mean and standard error: `0.951 ± 0.004`; a dash where nothing was measured."""
    return f"{fmean(values):.3f} ± {error(values):.3f}" if values else "-"


def verdict(differences: Sequence[float]) -> str:
    """Whether an effect is there: every seed has it, and its mean differs from zero by Student's t at 5 %."""
    mean, spread = fmean(differences), error(differences)
    bound = STUDENT[len(differences) - 1] * spread
    if abs(mean) > bound and min(differences) * max(differences) > 0:
        return "appears" if mean > 0 else "the opposite appears"
    return "not shown"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column set left."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def checkpoints(numbers: Numbers, names: dict[str, str], columns: dict[str, str] = COLUMNS) -> str:
    """Checkpoints by metrics."""
    rows = [[text, *(said(numbers.of(name, metric)) for metric in columns)] for name, text in names.items()]
    return table(["checkpoint", *columns.values()], rows)


def closed(numbers: Numbers, metrics: Sequence[str], merged: str = "merge") -> tuple[list[float], float]:
    """Share of the gap from soup to long-context checkpoint that a merge closes: (by seed, of the means)."""
    soup, merge, whole = (
        [fmean(values) for values in zip(*(numbers.of(name, metric) for metric in metrics), strict=True)]
        for name in ("merge_soup", merged, "long_context_2")
    )

    def share(s: float, m: float, w: float) -> float:
        return (m - s) / (w - s) if w != s else math.nan

    return [*map(share, soup, merge, whole)], share(fmean(soup), fmean(merge), fmean(whole))


class Bar(NamedTuple):
    """A demand on the defaults: the values by seed and of their mean, against `bound`."""

    text: str
    values: list[float]
    mean: float
    bound: float
    wanted: str = "at least"

    def holds(self, value: float) -> bool:
        """Whether a value keeps it; nan does not."""
        kept = {
            "at least": value >= self.bound,
            "at most": value <= self.bound,
            "more than": value > self.bound,
        }
        return kept[self.wanted]


def bars(numbers: Numbers) -> list[Bar]:
    """What the defaults are held against."""
    found: list[Bar] = []

    def add(text: str, values: list[float], bound: float, wanted: str = "at least") -> None:
        found.append(Bar(text, values, fmean(values), bound, wanted))

    def gain(more: str, less: str, metric: str) -> list[float]:
        return numbers.differences(Claim("", more, less, metric, OURS))

    for metric in ("needle_4x", "needle_8x", "needle_4x_clean", "needle_8x_clean"):
        pairs = zip(numbers.of("merge", metric), numbers.of("long_context_2", metric), strict=True)
        text = f"merged keeps of long context 2's accuracy, {COLUMNS[metric]}"
        add(text, [merged / whole for merged, whole in pairs], 0.85)
    for metrics, text in (
        (["needle_8x", "needle_8x_clean"], "both kinds of documents"),
        (["needle_8x"], "with overwrites"),
        (["needle_8x_clean"], "without"),
    ):
        shares, of_means = closed(numbers, metrics)
        found.append(Bar(f"share of the gap at 8x that the merge closes, {text}", shares, of_means, 0.5))
    add("greedy thinking lost from SFT to merged", gain("sft", "merge", "think_greedy"), 0.015, "at most")
    add("APO's gain in thinking, T=1", gain("merge_soup", "sft", _T1), 0.15)
    for mode in ("think", "no_think"):
        add(f"{mode} obeyed after APO, T=1", numbers.of("merge_soup", f"mode_{mode}_sampled"), 0.96)
    add(
        "APO over NLL on the chosen, thinking, T=1",
        gain("merge_soup", "merge_nll_soup", _T1),
        0.0,
        "more than",
    )
    return found


def bars_table(numbers: Numbers) -> str:
    """Each bar with the value of every seed and of their mean."""
    rows = []
    for bar in bars(numbers):
        seeds = f"{sum(map(bar.holds, bar.values))} of {len(bar.values)} seeds"
        verdicts = f"{seeds}; mean {'holds' if bar.holds(bar.mean) else 'falls short'}"
        by_seed = ", ".join(f"{value:.3f}" for value in bar.values)
        rows.append([bar.text, f"{bar.wanted} {bar.bound:g}", by_seed, f"{bar.mean:.3f}", verdicts])
    return table(["what", "wanted", "by seed", "mean", "held in"], rows)


def claims_table(numbers: Numbers) -> str:
    """Each effect with its difference and verdict."""
    rows = []
    for claim in CLAIMS:
        values = numbers.differences(claim)
        rows.append([claim.text, claim.whose, said(values), verdict(values)])
    return table(["effect", "whose claim", "difference", "at this scale"], rows)


def weights_table(numbers: Numbers) -> str:
    """Metrics by the weight of the long-context checkpoint."""
    rows = []
    for weight, name in WEIGHTS.items():
        _, share = closed(numbers, ["needle_8x", "needle_8x_clean"], name)
        rows.append([f"{weight:g}", *(said(numbers.of(name, metric)) for metric in COLUMNS), f"{share:.2f}"])
    return table(["weight", *COLUMNS.values(), "gap closed, 8x"], rows)


def draw(numbers: Numbers) -> None:
    """Three pictures beside the page; a dot is a seed, a bar the standard error over seeds."""
    import matplotlib.style
    from matplotlib.figure import Figure

    def dots(axes: Any, x: float, values: Sequence[float], color: str, label: str | None = None) -> None:
        axes.plot([x] * len(values), values, "o", color=color, ms=3, alpha=0.45)
        axes.errorbar(
            [x], [fmean(values)], [error(values)], fmt="_", color=color, ms=13, capsize=3, label=label
        )

    def grouped(axes: Any, names: dict[str, str], metrics: dict[str, str]) -> None:
        for index, (metric, label) in enumerate(metrics.items()):
            here = [(x, values) for x, name in enumerate(names) if (values := numbers.of(name, metric))]
            for number, (x, values) in enumerate(here):
                at = x + 0.16 * (index - (len(metrics) - 1) / 2)
                dots(axes, at, values, f"C{index}", None if number else label)
        axes.set_xticks(range(len(names)), names.values(), rotation=20, ha="right")

    def sheet(ylabel: str) -> tuple[Any, Any]:
        figure = Figure(figsize=(8, 3.8), layout="constrained", dpi=130)
        axes = figure.subplots()
        axes.set(ylabel=ylabel)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        return figure, axes

    with matplotlib.style.context("default"):
        figure, axes = sheet("needle accuracy")
        grouped(axes, CHAIN, {"needle_4x": "4x", "needle_8x": "8x", "needle_8x_clean": "8x, no overwrites"})
        axes.legend(frameon=False, ncols=3)
        figure.savefig(DOCS / "reproduction-needle.png")

        figure, axes = sheet("accuracy")
        weights = [weight for weight in WEIGHTS if weight < 1]
        shown = ("needle_8x", "needle_8x_clean", "think_greedy", "think_sampled", "no_think_greedy")
        for index, metric in enumerate(shown):
            found = [numbers.of(WEIGHTS[weight], metric) for weight in weights]
            means, errors = [*map(fmean, found)], [*map(error, found)]
            axes.errorbar(
                weights, means, errors, marker="osD^v"[index], ms=4, capsize=3, label=COLUMNS[metric]
            )
        axes.set(xlabel="weight of the long-context checkpoint", ylim=(0, 1.03))
        figure.legend(loc="outside lower center", frameon=False, ncols=5)
        figure.savefig(DOCS / "reproduction-weights.png")

        figure, axes = sheet("strict accuracy, T=1; modes obeyed")
        names = {
            "sft": "SFT",
            "merge_soup": "APO soup",
            "merge_dpo_soup": "DPO soup",
            "merge_nll_soup": "NLL soup",
            "sft_without_mid": "SFT without mid",
            "sft_unmasked": "SFT, loss on all",
        }
        grouped(axes, names, {"think_sampled": "thinking", "mode_think_sampled": "think obeyed",
                              "mode_no_think_sampled": "no_think obeyed"})  # fmt: skip
        figure.legend(loc="outside lower center", frameon=False, ncols=3)
        figure.savefig(DOCS / "reproduction-thinking.png")


def page(numbers: Numbers) -> str:
    """docs/reproduction.md."""
    about, seeds = numbers.about, ", ".join(numbers.seeds)
    by_verdict: dict[str, list[str]] = {}
    for claim in CLAIMS:
        if claim.whose == LAUNCH:
            by_verdict.setdefault(verdict(numbers.differences(claim)), []).append(claim.text)
    plainly = "".join(
        f"- **{heading}**: {'; '.join(by_verdict.get(key, ['none']))}.\n"
        for key, heading in (
            ("appears", "Of the launch post's effects these appear at this scale"),
            ("not shown", "Not shown, in either direction"),
            ("the opposite appears", "The opposite appears"),
        )
    )
    overwritten = {metric: text for metric, text in COLUMNS.items() if not metric.endswith("_clean")}
    return f"""# The recipe at toy scale, over seeds

Written by `{about["command"]}` ({about["core_minutes"]} minutes of one core, {about["hardware"]}) from
`recipes/tiny-ablations`; all numbers are in `reproduction.json`.

Chains of seeds {seeds}: base, long context, every later stage, all rows and the questions are drawn
anew for each; settings were chosen on other seeds and other questions (the recipe's own seed, 1, is one
of those). Of every checkpoint 600 needle questions a length and 400 of arithmetic are asked, the same
within a chain. A number is the mean over seeds and its standard error over seeds. An effect **appears**
where every seed has it and its mean differs from zero by Student's t at 5 %; **not shown** may mean
that there is none, that it is small or that both sides are at the ceiling: {len(numbers.seeds)} seeds
show large effects only. 4x and 8x are needle accuracy at 248 and 496 tokens, half of the keys
overwritten (the last write wins); "clean" is without overwrites. Thinking is scored strictly: a well-
formed block, the right answer, stop. T=1 is sampling at temperature 1. The tokenizer is the same in all
chains.

{plainly}
## The chain

{checkpoints(numbers, CHAIN)}
![needle accuracy along the chain](reproduction-needle.png)

{beyond(numbers)}
## What the defaults are held against

{bars_table(numbers)}
## Effects

{claims_table(numbers)}
## Without a part

{checkpoints(numbers, ABLATIONS, overwritten)}
![thinking and obedience](reproduction-thinking.png)

## The weight of the long-context checkpoint

{weights_table(numbers)}
![merge weights](reproduction-weights.png)

## Soups

{checkpoints(numbers, SOUPS, overwritten)}"""


def beyond(numbers: Numbers) -> str:
    """A sentence about twice the trained length."""
    plain, scaled = (said(numbers.of("merge", metric)) for metric in ("needle_16x", "needle_16x_yarn"))
    return f"At 992 tokens, twice the trained length, the merged model finds {plain}; with YaRN {scaled}.\n"


def readme_table(numbers: Numbers) -> str:
    """What README.md shows."""
    names = {name: text for name, text in CHAIN.items() if name not in ("long_context_1", "mid")}
    shown = ("needle_8x", "needle_8x_clean", "think_greedy", _T1, "no_think_greedy", "mode_think_sampled",
             "tool_calls_calc_no_think")  # fmt: skip
    return checkpoints(numbers, names, {metric: COLUMNS[metric] for metric in shown}) + "\n" + beyond(numbers)


def write() -> None:
    """Write the page, the pictures and README's table from docs/reproduction.json."""
    numbers = Numbers(json.loads((DOCS / "reproduction.json").read_text(encoding="utf-8")))
    (DOCS / "reproduction.md").write_text(page(numbers), encoding="utf-8")
    draw(numbers)
    start, end = map(re.escape, MARKS)
    between = f"{MARKS[0]}\n{readme_table(numbers)}{MARKS[1]}"
    text, count = re.subn(
        f"{start}.*?{end}", lambda _: between, README.read_text(encoding="utf-8"), flags=re.S
    )
    if count != 1:
        raise ValueError(f"{README}: found {count} pairs of marks, wanted one: {MARKS[0]} ... {MARKS[1]}")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
