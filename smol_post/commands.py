"""The commands over a whole recipe folder: run, evals, report, check; and eval, of any one model."""

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path

from smol_post import config, disk, hub, loading, manifest, runner
from smol_post.plan import Job, check_metrics, check_names, default_run_root, make_plan, say
from smol_post.refusal import Failure, Refusal, did_you_mean
from smol_post.runner import EXIT_OK, Parser, refuse


def _parser(command: str, text: str) -> argparse.ArgumentParser:
    made = Parser(prog=f"smol-post {command}", description=text, allow_abbrev=False)
    made.add_argument("recipe", help="recipe folder" + (" or file" if command == "check" else ""))
    if command != "check":
        made.add_argument("--run-dir", type=Path, help="where the runs are (default: runs/<recipe folder>)")
    return made


def run(argv: list[str]) -> int:
    """Make every run of a pipeline that is not whole yet, then evaluate all of them and write the report."""
    parser = _parser(
        "run", "Make every run of a recipe folder in order; whole runs whose fingerprint holds are kept."
    )
    parser.add_argument("--until", help="stop after this run; no evaluation")
    parser.add_argument(
        "--explain", action="store_true", help="say what would be done with each run and why; do nothing"
    )
    arguments = parser.parse_args(argv)
    folder = Path(arguments.recipe)
    try:
        plan = make_plan(folder, run_root=arguments.run_dir, arguments=[])
        suite = load_evals(folder)
        jobs = plan.jobs
        if arguments.until is not None:
            names = [job.name for job in jobs]
            if arguments.until not in names:
                raise Refusal(f"--until {arguments.until}: no such run{did_you_mean(arguments.until, names)}")
            jobs = jobs[: names.index(arguments.until) + 1]
        for job in jobs:
            check_gates(job, suite, is_last=job.name == plan.pipeline[-1].name)
    except Refusal as refusal:
        return refuse(refusal)
    if arguments.explain:
        from smol_post.status import explain

        lines, code = explain(jobs, plan.pipeline)
        say("\n".join(lines))
        return code

    def after(job: Job) -> int:
        from smol_post import evals as stage

        try:
            if suite is not None:
                stage.hold(suite, plan.jobs, job)
        except Refusal as refusal:
            return refuse(refusal)
        except Failure as failure:
            code = runner.fail(failure)
            report(rest)
            return code
        except KeyboardInterrupt as stop:
            return runner.interrupted(stop)
        return EXIT_OK

    rest = [arguments.recipe, *(["--run-dir", str(arguments.run_dir)] if arguments.run_dir else [])]
    code = runner.execute_all(jobs, separate=True, after=after)
    if code or arguments.until:
        return code
    if loading.load_pipeline(folder).evals and (code := evals(rest)):
        return code
    code = report(rest)
    say(f"model: {jobs[-1].run_dir}")
    return code


def check_gates(job: Job, suite: config.EvalsRecipe | None, *, is_last: bool) -> None:
    """Refusal where nothing would measure a gate of a run; what a harness measures is known afterwards."""
    gates = job.recipe.gates if isinstance(job.recipe, config.Made) else {}
    if gates and suite is None:
        raise Refusal(
            f"{job.recipe_file}: gates: pipeline.yaml names no evals that would measure them; "
            "add evals: evals.yaml"
        )
    if suite is not None and not suite.harness:
        check_metrics(list(gates), suite, where=f"{job.recipe_file}: gates", yarn=is_last)


def load_evals(folder: Path, pairs: list[str] | None = None) -> config.EvalsRecipe | None:
    """The evals recipe that a pipeline names, checked; None where it names none."""
    name = loading.load_pipeline(folder).evals
    if name is None:
        return None
    return load_suite(folder / name, pairs)


def load_suite(path: Path, pairs: list[str] | None = None) -> config.EvalsRecipe:
    """An evals recipe, checked."""
    recipe = loading.load_recipe(path, arguments=pairs)
    if not isinstance(recipe, config.EvalsRecipe):
        raise Refusal(f"{path}: stage: found {recipe.stage}, wanted evals")
    check_names(recipe, path)
    return recipe


def evals(argv: list[str]) -> int:
    """Evaluate every whole checkpoint of the chain that has no result for its digest yet."""
    parser = _parser("evals", "Evaluate every whole checkpoint of a run folder.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the evals recipe to set")
    arguments = parser.parse_intermixed_args(argv)
    folder, pairs = Path(arguments.recipe), arguments.overrides
    try:
        recipe = load_evals(folder, pairs)
        if recipe is None:
            raise Refusal(f"{folder / 'pipeline.yaml'}: evals: no recipe is named; add evals: evals.yaml")
        plan = make_plan(folder, run_root=arguments.run_dir, arguments=[])
        if not any(manifest.is_whole(job.run_dir) for job in plan.pipeline):
            raise Refusal(f"no run of {folder} is whole yet; make one first: smol-post run {folder}")
        from smol_post import evals as stage

        stage.evaluate_all(recipe, plan.pipeline)
    except Refusal as refusal:
        return refuse(refusal)
    except Failure as failure:
        return runner.fail(failure)
    except KeyboardInterrupt as stop:
        say("evals: interrupted; what is evaluated is kept", error=True)
        return runner.interrupted(stop)
    return EXIT_OK


def evaluate(argv: list[str]) -> int:
    """Measure one model by a suite and print the metrics; nothing is written."""
    parser = Parser(prog="smol-post eval", description=evaluate.__doc__, allow_abbrev=False)
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, a whole run, or a Hub id[@revision]"
    )
    parser.add_argument("--suite", type=Path, required=True, metavar="FILE", help="an evals recipe")
    parser.add_argument("--mode", choices=["think", "no_think", "both"], default="both", help="of chats")
    parser.add_argument("--json", action="store_true", help="JSON for programs instead of a table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the suite to set")
    arguments = parser.parse_intermixed_args(argv)
    try:
        recipe = load_suite(arguments.suite, arguments.overrides)
        folder = find_model(arguments.model)
        if not recipe.metric_names() and not recipe.harness:
            raise Refusal(
                f"{arguments.suite}: it asks nothing: every number of questions is 0, or no length is given; "
                "give some, or probes, perplexity or harness"
            )
        from smol_post import evals as stage

        stage.check_lengths(folder, recipe)
        modes = stage.MODES if arguments.mode == "both" else [arguments.mode]
        metrics, _ = stage.evaluate(folder, recipe, modes)
        if not metrics:
            raise Refusal(
                f"{arguments.suite}: nothing of it can be asked of {arguments.model}: no chat template, or "
                "no such mode; give perplexity or probes as text"
            )
    except Refusal as refusal:
        return refuse(refusal)
    if arguments.json:
        about = {"model": arguments.model, "suite": str(arguments.suite), "mode": arguments.mode}
        print(json.dumps(about | {"metrics": metrics}, indent=2))
        return EXIT_OK
    width = max(map(len, metrics))
    say(f"{'metric':<{width}} {'value':>10} {'error':>9} {'number':>7}")
    for name, one in metrics.items():
        error = "" if one["stderr"] is None else f"{one['stderr']:.4f}"
        say(f"{name:<{width}} {one['value']:>10.4f} {error:>9} {one['num']:>7,}")
    return EXIT_OK


def find_model(name: str) -> Path:
    """The folder of a checkpoint: a whole run, held against its manifest, any folder, or a Hub id."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if manifest.is_whole(folder):
            manifest.verify(folder)
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            inside = sorted(str(one.parent) for one in folder.glob("*/config.json"))
            hint = f"; give {' or '.join(inside[:4])}" if inside else "; give a checkpoint or a whole run"
            raise Refusal(f"{name}: no config.json, so no checkpoint{hint}")
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        raise Refusal(
            f"{name}: no such folder and no Hub id; give a checkpoint, a whole run or org/name@revision"
        )
    return hub.checkpoint(name, what=f"no folder {name}, and as a model")


def report(argv: list[str]) -> int:
    """Write report.html and report.md of a run folder."""
    arguments = _parser("report", "Write report.html and report.md of a run folder.").parse_args(argv)
    folder = Path(arguments.recipe)
    try:
        pipeline = loading.load_pipeline(folder)
        root = arguments.run_dir or default_run_root(folder)
        from smol_post.report import write_report

        with disk.watched(root):
            page, _ = write_report(root, runs=[entry.name for entry in pipeline.runs])
    except Refusal as refusal:
        return refuse(refusal)
    except Failure as failure:
        return runner.fail(failure)
    say(f"report: {page}")
    return EXIT_OK


def compare(argv: list[str]) -> int:
    """Print two runs side by side: recipe, training, evals."""
    parser = Parser(prog="smol-post compare", description="Two runs side by side.", allow_abbrev=False)
    parser.add_argument(
        "runs", nargs=2, type=Path, metavar="RUN", help="a run directory, such as runs/tiny/sft"
    )
    try:
        from smol_post.points import mark_others, read_points
        from smol_post.report import compare_table, to_text

        points = []
        for folder in parser.parse_args(argv).runs:
            if not manifest.is_whole(folder):
                raise Refusal(f"{folder}: no whole run; give a run directory such as runs/tiny/sft")
            whole = folder.resolve()
            *_, point = read_points(whole.parent, [whole.name])
            points.append(replace(point, name=str(folder)))
        say(to_text(compare_table(*mark_others(points))))
    except Refusal as refusal:
        return refuse(refusal)
    return EXIT_OK


def check(argv: list[str]) -> int:
    """Validate a recipe file, or a folder: its pipeline and every recipe in it."""
    arguments = _parser("check", "Validate a recipe file or folder, without torch.").parse_args(argv)
    where = Path(arguments.recipe)
    try:
        if where.is_dir():
            make_plan(where, run_root=None, arguments=[])
            load_evals(where)
            checked = sorted(where.glob("*.yaml"))
            for path in checked:
                if path.name != "pipeline.yaml":
                    loading.load_recipe(path)
        else:
            check_names(loading.load_recipe(where), where)
            checked = [where]
    except Refusal as refusal:
        return refuse(refusal)
    for path in checked:
        say(f"ok: {path}")
    return EXIT_OK
