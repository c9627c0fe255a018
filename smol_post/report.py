"""Manifests, training logs and evals of one run root -> report.html (self-contained) and report.md.

    runs/tiny/<run>/manifest.json, train_log.jsonl     what was done (and verify.json, what was proved)
    runs/tiny/evals/<checkpoint>.json                  what it can do
      | read_points    a Point for each run, in the order given; merge_soup stands before merge
      | ..._table      every number becomes a Cell once, and both files print the same cells
      | draw_...       matplotlib -> inline SVG whose colours are CSS variables (dark mode)
      v report.html, report.md, metrics.json

Nothing is guessed: a run without manifest is "not run", a metric that was not measured is a dash, and evals
of a checkpoint that is no longer there are marked and never called best.
"""

import html
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smol_post.manifest import write_text
from smol_post.plots import draw_loss, draw_modes, draw_sweep, plot
from smol_post.points import GROUPS, Point, lower_is_better, metric_names, rank_metric, read_points
from smol_post.refusal import Refusal

PURPOSE = {
    "base": "Trains the tokenizer and a small model from nothing, at short length.",
    "long_context": "Raises the RoPE base and the sequence length, to find things further back.",
    "mid": "Teaches chat form and step-by-step reasoning on long traces, with loss on all tokens.",
    "sft": "Teaches both modes, with and without thinking, and tools, with loss on assistant turns only.",
    "apo": "Moves probability from rejected to chosen answers (APO-zero), in both modes.",
    "merge": "Averages the APO checkpoints, then mixes in a little of the long-context checkpoint.",
}
SAMPLES_PER_MODE = 2
NEEDLE = re.compile(r"(needle|single|multi_key|multi_value)_([\d.]+x?)((?:_chat|_yarn)*)")  # length: 2
LIMITS = {"min": "at least", "max": "at most"}
DASH, PLUS_MINUS = "\u2013", "\u00b1"


@dataclass(frozen=True)
class Cell:
    """One entry of a table: `small` stands under the text in HTML and after it in Markdown.

    `shade`, from 0 to 1, colours the cell in HTML.
    """

    text: str
    small: str = ""
    best: bool = False
    shade: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first `num_text_columns` are set left, numbers right; `groups` span the columns."""

    columns: list[str]
    rows: list[list[Cell]]
    num_text_columns: int = 1
    groups: tuple[tuple[str, int], ...] = ()


def number(value: Any) -> str:
    """12345 -> 12,345; 0.98312 -> 0.983; 0.00002 -> 2e-05; 2048.71 -> 2,048.7; None -> a dash."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return DASH if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2g}" if 0 < abs(value) < 0.001 else f"{value:,.{1 if abs(value) >= 100 else 3}f}"


def duration(seconds: float | None) -> str:
    """41.2 -> 41 s; 62 -> 1 min 2 s; 3700 -> 1 h 1 min."""
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def short(digest: str | None) -> str:
    """The first eight digits of a digest, enough to compare by eye."""
    return (digest or "").removeprefix("sha256:")[:8] or DASH


def metric_table(points: list[Point]) -> Table:
    """Checkpoints by metrics, value and standard error, the best of each column marked."""
    names = metric_names(points)
    rows = [[Cell(point.name, point.note)] for point in points]
    for name in names:
        best = _best(points, name)
        for point, row in zip(points, rows, strict=True):
            value, error = point.metric(name), point.metric(name, "stderr")
            is_best = None not in (value, best) and not point.note and number(value) == best
            row.append(_measured(value, error, best=is_best))
    groups = [(title, sum(rank_metric(n)[0] == index for n in names)) for index, title in enumerate(GROUPS)]
    return Table(["checkpoint", *names], rows, groups=(("", 1), *(g for g in groups if g[1])))


def _measured(value: float | None, error: float | None, *, best: bool = False) -> Cell:
    return Cell(number(value), "" if error is None else f"{PLUS_MINUS} {number(error)}", best)


def _best(points: list[Point], name: str) -> str | None:
    """The best value as printed, so that ties are all marked; None where nothing differs."""
    known = [value for p in points if not p.note and (value := p.metric(name)) is not None]
    values = [value for value in known if math.isfinite(value)]
    best = min if lower_is_better(name) else max
    return number(best(values)) if len({number(value) for value in values}) > 1 else None


def needle_table(points: list[Point]) -> Table:
    """Checkpoints by lengths, a group of columns for each kind of needle; accuracy is the shade of a cell."""
    found = [one for name in metric_names(points) if (one := NEEDLE.fullmatch(name))]
    kinds = list(dict.fromkeys(one[1] + one[3] for one in found))
    columns = [one for kind in kinds for one in found if one[1] + one[3] == kind]
    rows = [[Cell(p.name, p.note), *(_shaded(p.metric(one[0])) for one in columns)] for p in points]
    groups = [(kind.replace("_", " "), sum(one[1] + one[3] == kind for one in found)) for kind in kinds]
    return Table(["checkpoint", *(one[2] for one in columns)], rows, groups=(("", 1), *groups))


def _shaded(value: float | None) -> Cell:
    return Cell(number(value), shade=value)


def chain_table(runs: list[Point]) -> Table:
    """The runs in order, with what each was made from."""
    rows, now = [], {run.name: run.manifest["digest"] for run in runs if run.manifest.get("digest")}
    for run in runs:
        changed = [name for name, digest in run.parents.items() if now.get(name, digest) != digest]
        note = f"built from another {', '.join(changed)}" if changed else ""
        texts = [run.stage or DASH, ", ".join(run.parents) or DASH, short(run.manifest.get("digest")),
                 number(run.manifest.get("seed")), duration(run.manifest.get("seconds"))]  # fmt: skip
        rows.append([Cell(run.name, note if run.manifest else "not run"), *map(Cell, texts)])
    return Table(["run", "stage", "from", "digest", "seed", "time"], rows, num_text_columns=4)


def levels(runs: list[Point]) -> list[list[Point]]:
    """The chain as columns: runs equally far from the start stand in one column (the seeds of APO)."""
    depth: dict[str, int] = {}
    for run in runs:
        unknown = 0 if run.manifest else 1 + max(depth.values(), default=-1)  # not run: parents not known
        depth[run.name] = max((1 + depth[name] for name in run.parents if name in depth), default=unknown)
    return [[run for run in runs if depth[run.name] == d] for d in sorted(set(depth.values()))]


def work_table(runs: list[Point]) -> Table:
    """What was prepared for each run, and how often it was gone through."""
    of_data = {"documents": "num_documents", "tokens": "num_tokens", "trained tokens": "num_trained_tokens",
               "packs": "num_packs", "pack use": "utilisation", "truncated": "num_truncated_rows",
               "dropped": "num_dropped_rows"}  # fmt: skip
    of_metrics = {"steps": "num_steps", "epochs": "num_epochs", "train loss": "train_loss"}
    rows = []
    for run in runs:
        metrics, counts = run.manifest.get("metrics") or {}, run.counts()
        values = [*map(counts.get, of_data.values()), *map(metrics.get, of_metrics.values())]
        cells = [*map(Cell, map(number, values)), Cell(duration(run.manifest.get("seconds")))]
        rows.append([Cell(run.name, "" if run.manifest else "not run"), *cells])
    return Table(["run", *of_data, *of_metrics, "time"], rows)


def proof_table(runs: list[Point]) -> Table:
    """How many proofs held before step 1 of each run, were not run, or failed; the latter by name."""
    rows = []
    for run in runs:
        proofs, step = run.verified.get("proofs") or [], run.verified.get("step")
        failed = [proof["name"] for proof in proofs if proof["status"] == "failed"]
        counts = Counter(proof["status"] for proof in proofs)
        level = Cell(run.verified.get("level") or "no proofs", f"from step {step}" if step else "")
        numbers = [counts[status] if proofs else None for status in ("passed", "not run", "failed")]
        note = f"failed: {', '.join(failed)}" if failed else ""
        rows.append([Cell(run.name, note), level, *map(Cell, map(number, numbers))])
    return Table(["run", "level", "passed", "not run", "failed"], rows, num_text_columns=2)


def finding_table(runs: list[Point]) -> Table:
    """What each proof found, or why it was not run, and what it wanted where that is not the same."""
    rows = []
    for run in runs:
        for position, proof in enumerate(run.verified.get("proofs") or []):
            found = _told(proof.get("found", proof.get("reason")))
            wanted = _told(proof.get("wanted", ""))
            texts = [proof["name"], proof["status"], found, "" if wanted == found else wanted]
            rows.append([Cell("" if position else run.name), *map(Cell, texts)])
    return Table(["run", "proof", "result", "found", "wanted"], rows, num_text_columns=5)


def _told(found: Any) -> str:
    """{"losses": [0.5, 1.0], "wrong": []} -> losses 0.500 1.000, wrong none."""
    if isinstance(found, dict):
        return ", ".join(f"{key} {_told(value)}" for key, value in found.items())
    return (" ".join(map(_told, found)) or "none") if isinstance(found, list) else number(found)


def gates_table(runs: list[Point]) -> Table:
    """What recipes demand of their checkpoints, and what these showed."""
    rows = []
    for run in runs:
        gates = run.gated.get("gates") or (run.manifest.get("recipe") or {}).get("gates") or {}
        for position, (name, gate) in enumerate(gates.items()):
            limits = [f"{word} {number(gate[key])}" for key, word in LIMITS.items() if gate[key] is not None]
            measured = gate.get("value") is not None
            verdict = ("passed" if gate["passed"] else "failed") if measured else "not measured"
            texts = ["" if position else run.name, name, verdict, " and ".join(limits)]
            rows.append([*map(Cell, texts), _measured(gate.get("value"), gate.get("stderr"))])
    return Table(["run", "metric", "gate", "wanted", "found"], rows, num_text_columns=4)


def sweep_table(runs: list[Point]) -> Table:
    """The candidates of merges, by the weight of the long-context checkpoint; the chosen one is marked."""
    sweeps = [(run, one) for run in runs for one in (run.manifest.get("metrics") or {}).get("sweep") or []]
    names = list(dict.fromkeys(name for _, one in sweeps for name in one["metrics"]))
    rows = []
    for run, one in sweeps:
        verdict = "chosen" if one["chosen"] else "" if one["keeps"] else "loses too much"
        found = [one["metrics"].get(name) or {} for name in names]
        cells = [_measured(metric.get("value"), metric.get("stderr")) for metric in found]
        rows.append([Cell(f"{run.name} {one['weight']:g}", verdict), *cells])
    return Table(["long-context weight", *names], rows)


def ledger_table(runs: list[Point], kind: str) -> Table:
    """Documents and tokens of each run by source or by mode."""
    rows = []
    for run in runs:
        for position, (name, counts) in enumerate((run.counts().get(f"by_{kind}") or {}).items()):
            values = map(counts.get, ("num_documents", "num_tokens", "num_trained_tokens"))
            rows.append([Cell("" if position else run.name), Cell(name), *map(Cell, map(number, values))])
    return Table(["run", kind, "documents", "tokens", "trained tokens"], rows, num_text_columns=2)


def origin_tables(runs: list[Point]) -> dict[str, Table]:
    """Versions of the libraries (all of them where runs differ) and the full digests."""
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for package, version in (run.manifest.get("versions") or {}).items():
            versions.setdefault(package, {})[str(version)] = None
    packages = [[Cell(package), Cell(", ".join(found))] for package, found in versions.items()]
    digests = [[Cell(r.name), Cell(r.manifest.get("digest") or "not run"),
                Cell(r.counts().get("fingerprint") or DASH)] for r in runs]  # fmt: skip
    names = ["run", "checkpoint digest", "data fingerprint"]
    return {"Versions": Table(["package", "version"], packages, 2), "Digests": Table(names, digests, 3)}


def summary(points: list[Point]) -> str:
    """A paragraph made from the numbers: each key metric where it starts, is best and ends."""
    runs = [p for p in points if p.is_run]
    missing = [p.name for p in runs if not p.manifest]
    tokens = sum(p.manifest["metrics"].get("num_tokens_seen") or 0 for p in runs if p.counts())
    text = f"{len(runs) - len(missing)} of {len(runs)} runs are whole: {number(tokens)} tokens"
    text += f" in {duration(sum(p.manifest.get('seconds') or 0 for p in runs))}."
    text += f" Not run: {', '.join(missing)}." if missing else ""
    needles = [n for n in metric_names(points) if rank_metric(n)[0] == 0 and _number_measured(points, n) > 1]
    for name in [*needles[-1:], "think_greedy", "no_think_greedy", "preference_accuracy"]:
        known = {p.name: value for p in points if not p.note and (value := p.metric(name)) is not None}
        ends = {*list(known)[:1], *list(known)[-1:], max(known, key=known.__getitem__, default="")}
        said = [f"{number(value)} ({where})" for where, value in known.items() if where in ends]
        text += f" {name.replace('_', ' ').capitalize()}: {', '.join(said)}." if said else ""
    return text


def _number_measured(points: list[Point], name: str) -> int:
    return sum(point.metric(name) is not None for point in points)


def compare_table(left: Point, right: Point) -> Table:
    """Two runs side by side: where recipes differ (of two stages: in keys of both), training, evals.

    A difference of metrics is given in standard errors, as if the two were measured on other questions; none
    where a note says that one of them must not be trusted.
    """
    recipes = [_leaves(one.manifest.get("recipe") or {}) for one in (left, right)]
    keys = [one.keys() for one in recipes]
    rows = [
        [Cell("recipe"), Cell(key), *(Cell(number(one.get(key))) for one in recipes), Cell("")]
        for key in sorted(keys[0] | keys[1] if left.stage == right.stage else keys[0] & keys[1])
        if recipes[0].get(key) != recipes[1].get(key)
    ]
    counted = ("num_tokens_seen", "num_trained_tokens_seen", "num_steps", "train_loss", "last_loss")
    for key in counted:
        values = [(one.manifest.get("metrics") or {}).get(key) for one in (left, right)]
        if values != [None, None]:
            rows.append([Cell("training"), Cell(key), *map(Cell, map(number, values)), Cell("")])
    notes = [left.note, right.note]
    rows += [[Cell("evals"), Cell("note"), *map(Cell, notes), Cell("")]] if any(notes) else []
    for name in metric_names([left, right]):
        a, b = ([one.metric(name, key) for key in ("value", "stderr")] for one in (left, right))
        text = ""
        if a[0] is not None and b[0] is not None and not any(notes):
            change, spread = b[0] - a[0], math.hypot(a[1] or 0, b[1] or 0)
            text = f"{change:+.3f}" + (f" ({abs(change) / spread:.1f} errors)" if spread else "")
        rows.append([Cell("evals"), Cell(name), _measured(*a), _measured(*b), Cell(text)])
    return Table(["", "", left.name, right.name, "difference"], rows, num_text_columns=2)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists by position."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found: dict[str, Any] = {}
    for key, value in pairs:
        inner = isinstance(value, dict | list) and value
        found |= _leaves(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def to_text(table: Table) -> str:
    """Columns for a terminal."""
    rows = [table.columns, *([f"{cell.text} {cell.small}".strip() for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if at < table.num_text_columns else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def metrics_tree(points: list[Point]) -> list[dict[str, Any]]:
    """What the page says, for programs: a checkpoint each, in the order of the chain."""
    return [
        {
            "name": point.name,
            "stage": point.stage,
            "note": point.note,
            "digest": point.evals.get("checkpoint_digest") or point.manifest.get("digest"),
            "parents": point.parents,
            "seed": point.manifest.get("seed"),
            "seconds": point.manifest.get("seconds"),
            "data": point.counts(),
            "training": point.manifest.get("metrics") or {},
            "evals": point.evals.get("metrics") or {},
            "gates": point.gated.get("gates") or {},
            "verified": point.verified,
        }
        for point in points
    ]


def samples(point: Point) -> list[dict[str, Any]]:
    """The first few transcripts of each mode."""
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in point.evals.get("samples") or []:
        found.setdefault(str(sample.get("mode")), []).append(sample)
    return [sample for of_mode in found.values() for sample in of_mode[:SAMPLES_PER_MODE]]


def commands(run_root: Path, runs: list[Point]) -> list[str]:
    """What to type to make this run root again."""
    files = [run.manifest["recipe_file"] for run in runs if run.manifest.get("recipe_file")]
    folder = Path(files[0] if files else "recipes/tiny/base.yaml").parent.as_posix()
    folder, place = (shlex.quote(" ".join(one.split())) for one in (folder, run_root.as_posix()))
    make, run = "make pipeline", f"smol-post run {folder}"
    if folder != "recipes/tiny":
        make += f" RECIPE={folder}"
    return [make, run] if place == "runs/tiny" else [f"{make} RUN={place}", f"{run} --run-dir {place}"]


def to_markdown(table: Table) -> str:
    """A GitHub table; the best in bold."""

    def line(row: list[Cell]) -> str:
        texts = [_markdown(f"{cell.text} {cell.small}") for cell in row]
        return " | ".join(f"**{t}**" if cell.best else t for t, cell in zip(texts, row, strict=True))

    rule = " | ".join(":--" if n < table.num_text_columns else "--:" for n in range(len(table.columns)))
    lines = [line([Cell(column) for column in table.columns]), rule, *map(line, table.rows)]
    return "\n".join(f"| {text} |" for text in lines)


def _markdown(text: str) -> str:
    return re.sub(r"([\\|\[`])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def write_report(run_root: Path, *, runs: Sequence[str]) -> tuple[Path, Path]:
    """Write report.html, report.md and metrics.json beside the runs; `runs` in the order of the chain."""
    import jinja2

    points = read_points(run_root, runs)
    chain = [point for point in points if point.is_run]
    if not any(run.manifest for run in chain):
        named = ", ".join(runs) or "no names given"
        raise Refusal(f"{run_root}: no whole run ({named}), wanted at least one; run `make pipeline` first")
    loss = {run.name: plot(draw_loss, [run], f"loss{position}") for position, run in enumerate(chain)}
    measured = [point for point in points if not point.note]
    plots = {
        "Thinking against not thinking": plot(draw_modes, measured, "modes"),
        "Merge sweep": plot(draw_sweep, chain, "sweep"),
    }
    tables = {
        "The chain": chain_table(chain), "What each checkpoint can do": metric_table(points),
        "Gates": gates_table(chain), "Merge sweep": sweep_table(chain),
        "Proofs before step 1": proof_table(chain), "What the proofs found": finding_table(chain),
        "What each run consumed": work_table(chain), "Data by source": ledger_table(chain, "source"),
        "Data by mode": ledger_table(chain, "mode"), **origin_tables(chain),
    }  # fmt: skip
    heat = {"Needle retrieval by length": needle_table(points)}  # the Markdown has its numbers already
    title, said, typed = f"smol_post: {run_root.name}", summary(points), commands(run_root, chain)
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    rules = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    page = jinja2.Environment(loader=folder, autoescape=True, **rules).get_template("report.html.jinja")
    # fmt: off
    values = {"title": title, "summary": said, "commands": typed, "tables": tables | heat, "plots": plots,
              "loss": loss, "chain": chain, "points": points, "levels": levels(chain), "purpose": PURPOSE,
              "dash": DASH, "samples": samples, "duration": duration, "short": short, "dump": json.dumps}
    # fmt: on
    parts = [f"# {_markdown(title)}", _markdown(said)]
    parts += [f"## {name}\n\n{to_markdown(table)}" for name, table in tables.items() if table.rows]
    parts += ["## Make it again\n\n```sh\n" + "\n".join(typed) + "\n```\n"]
    paths = (run_root / "report.html", run_root / "report.md")
    machine = json.dumps({"title": title, "checkpoints": metrics_tree(points)}, indent=2) + "\n"
    texts = (page.render(values), "\n\n".join(parts), machine)
    for path, text in zip((*paths, run_root / "metrics.json"), texts, strict=True):
        write_text(path, text)
    return paths
