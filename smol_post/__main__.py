"""The command line: `smol-post <command>`, or `python -m smol_post`. --help imports nothing heavy."""

import os
import sys

STAGES = {
    "base": "train a tiny base model from nothing",
    "long-context": "extend the context: RoPE theta and sequence length",
    "mid": "reasoning mid-training",
    "sft": "dual-mode supervised fine-tuning",
    "apo": "anchored preference optimisation",
    "merge": "soup of APO checkpoints, then a linear merge with the long-context checkpoint",
}
COMMANDS = {
    "run": "make every run of a recipe folder in order, then evaluate and report",
    **STAGES,
    "evals": "evaluate every whole checkpoint of a run folder",
    "eval": "measure one model, ours or any other, by a suite: probes, perplexity, modes",
    "chat": "talk with a checkpoint in the terminal: both modes, tools",
    "report": "write report.html, report.md and metrics.json of a run folder",
    "status": "where every run stands: absent, running, interrupted, whole, stale, and why; writes nothing",
    "lineage": "what a run was made from, down to the base; --verify reads every file again",
    "compare": "print two runs side by side",
    "export": "write a variant of a checkpoint for inference at a longer context, by YaRN",
    "release": "write a run as a model to publish: weights, card, recipe, report; push it to the Hub",
    "plan": "what a pipeline will cost: updates, hours, memory, disk; no torch, nothing is run",
    "prepare": "tokenise and pack the data of a recipe's runs, and count it; no weights needed",
    "generate": "make data by a teacher: reasoning traces, preference pairs, conversations",
    "inspect": "show rows as the trainer gets them, token by token; no weights needed",
    "verify": "prove a run before step 1: masks, isolation, losses, precision, on its model and data",
    "check": "validate a recipe file or folder, without torch",
    "schema": "print the JSON Schema of recipes, for editors",
}


def usage() -> str:
    """The text of `smol-post --help`."""
    lines = [f"  {name:<14}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: smol-post COMMAND RECIPE [--run-dir DIR]   stages take also --run NAME and key=value ...",
            "",
            "From a base checkpoint to a dual-mode reasoner. RECIPE: a recipe file or folder (recipes/tiny).",
            "",
            *lines,
            "",
            "smol-post COMMAND --help tells more. Exit codes: 0 done, 1 failed, 2 refused,",
            "75 stopped by a signal, what was under way saved, 130 interrupted by Ctrl-C.",
        ]
    )


def main() -> None:
    """Dispatch to the command; the process's exit code tells how it went."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    if command == "--version":
        from smol_post import __version__

        print(__version__)
        sys.exit(0)
    if command not in COMMANDS:
        from smol_post.refusal import Refusal, did_you_mean

        unknown = Refusal(f"{command}: no such command{did_you_mean(command, list(COMMANDS))}")
        print(f"refused: {unknown}", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(dispatch(command, rest))
    except KeyboardInterrupt as stop:
        from smol_post.runner import interrupted

        print("interrupted", file=sys.stderr)
        sys.exit(interrupted(stop))
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  so that closing it does not fail again


def dispatch(command: str, rest: list[str]) -> int:
    """Run a known command; its exit code."""
    if command in STAGES:
        from smol_post import runner

        stage = command.replace("-", "_")
        return runner.stage_command(stage, rest, program=f"smol-post {command}", separate=True)
    if command == "verify":
        from smol_post.verify import verify

        return verify(rest, program="smol-post verify", separate=True)
    if command == "export":
        from smol_post import export

        return export.export(rest)
    if command == "schema":
        from smol_post import schema

        return schema.command(rest)
    if command == "release":
        from smol_post import release

        return release.release(rest)
    if command == "status":
        from smol_post import status

        return status.status(rest)
    if command == "lineage":
        from smol_post import lineage

        return lineage.lineage(rest)
    if command == "chat":
        from smol_post import talk

        return talk.main(rest)
    if command == "generate":
        from smol_post import generate

        return generate.generate(rest)
    if command == "plan":
        from smol_post import budget

        return budget.plan(rest)
    if command in ("prepare", "inspect"):
        from smol_post import preparation, runner

        runner.interrupt_on_sigterm()
        return getattr(preparation, command)(rest)
    from smol_post import commands

    return getattr(commands, "evaluate" if command == "eval" else command)(rest)


if __name__ == "__main__":
    main()
