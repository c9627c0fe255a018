"""`smol-post verify`: the proofs of a run, on its very model, data and launch, without making a step.

    smol-post verify recipes/tiny/sft.yaml --level full
    accelerate launch --config_file recipes/accelerate/cpu.yaml smol_post/verify.py \\
        --config recipes/tiny/sft.yaml

Claims the run directory as a run does and goes through the stage's own code as far as step 1; the run can be
made afterwards. What was found is in the run's verify.json, of a whole run in evals/verify_<run>.json.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from smol_post import config, runner
from smol_post.plan import Job, make_plan, order
from smol_post.refusal import Refusal


def verify(argv: list[str], *, program: str, separate: bool) -> int:
    """`[--config] RECIPE [--run NAME] [--run-dir DIR] [--level LEVEL] [key=value ...]`; the exit code."""
    parser = runner.parser(program, stage="any")
    parser.add_argument("--level", choices=("quick", "full"), help="default: as the recipe says, else quick")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            arguments, pairs = runner.parse(parser, argv)
            if arguments.recipe is None:
                raise Refusal(f"no recipe given; type: {program} recipes/tiny/sft.yaml")
            where, root = Path(arguments.recipe), Path(arguments.run_dir) if arguments.run_dir else None
            plan = make_plan(where, run_root=root, run=arguments.run, arguments=pairs)
            jobs: list[Job] = []
            for job in plan.jobs:
                if isinstance(job.recipe, config.Training):
                    level = arguments.level or ("quick" if job.recipe.verify == "off" else job.recipe.verify)
                    recipe = job.recipe.model_copy(update={"verify": level})
                    *parents, _ = order(replace(plan, jobs=[job]))
                    jobs += [one for one in parents if one not in jobs]
                    jobs.append(replace(job, recipe=recipe, scratch=Path(scratch) / job.name))
            if not jobs:
                raise Refusal(f"{where}: nothing to train, so nothing to verify; give a stage that trains")
        except Refusal as refusal:
            return runner.refuse(refusal)
        return runner.execute_all(jobs, separate=separate)


if __name__ == "__main__":
    runner.interrupt_on_sigterm()
    runner.leave(verify(sys.argv[1:], program="smol_post/verify.py", separate=False))
