"""Anchored preference optimisation: `apo_zero` in TRL's DPOTrainer, each row in its own mode.

L = 1 - sigma(beta r_chosen) + sigma(beta r_rejected), r = log pi / pi_ref summed over the answer: exactly 1
at step 0 (APO, D'Oosterlinck et al., 2024, equation 7, plus 1). The reference is the parent as it starts.

    make apo
    accelerate launch --config_file recipes/accelerate/cpu.yaml smol_post/apo.py \\
        --config recipes/tiny/apo.yaml --run apo_seed0
"""

from typing import Any

from smol_post import runner
from smol_post.config import ApoRecipe


def run(recipe: ApoRecipe, parents: list[runner.Parent], job: runner.Job) -> dict[str, Any]:
    """Train the parent on preference pairs; returns the data ledger and metrics.

    Raises Refusal where the parent has no chat template and the recipe names none.
    """
    from smol_post import data, model, training, vocabulary

    (parent,) = parents
    model.use_threads(recipe.num_threads)
    place = job.place()
    arguments = training.trainer_arguments(
        recipe, run_dir=place["run_dir"], num_processes=place["num_processes"]
    )
    words = vocabulary.of_run(recipe, vocabulary.load_tokenizer(parent.folder), folder=place["folder"])
    pairs = data.prepare(recipe, words, folder=place["folder"], cache_dir=place["cache_dir"])
    job.announce(training.describe(pairs.ledger))
    lm = model.load_model(parent.folder, attn_implementation=recipe.attention)
    training.check_length(recipe, lm)
    reference = None
    if not recipe.trainer.get("precompute_ref_log_probs"):
        reference = model.load_model(parent.folder, attn_implementation=recipe.attention)
    trainer = training.pair_trainer(
        lm, reference, words.tokenizer, pairs.dataset, arguments=arguments, announce=job.announce
    )
    metrics = training.fit(trainer, words.tokenizer, run_dir=job.run_dir, ledger=pairs.ledger)
    return {"data": pairs.ledger, "metrics": metrics}


if __name__ == "__main__":
    runner.main("apo")
