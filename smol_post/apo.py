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
from smol_post.refusal import Refusal


def run(recipe: ApoRecipe, parents: list[runner.Parent], job: runner.Job) -> dict[str, Any]:
    """Train the parent on preference pairs; returns the data ledger and metrics.

    Raises Refusal where the parent has no chat template and the recipe names none.
    """
    from smol_post import chat, data, model, training

    (parent,) = parents
    model.use_threads(recipe.num_threads)
    arguments = training.trainer_arguments(recipe, run_dir=job.run_dir, num_processes=runner.num_processes())
    tokenizer = model.load_tokenizer(parent.folder)
    if recipe.chat_template:
        tokenizer.chat_template = chat.load_template(recipe.chat_template, folder=job.recipe_file.parent)
    if not isinstance(tokenizer.chat_template, str):
        raise Refusal(f"{parent.folder}: its tokenizer has no chat template; set chat_template: smol_post")
    pairs = data.prepare_pairs(
        recipe.sources,
        tokenizer,
        folder=job.recipe_file.parent,
        cache_dir=job.run_dir.parent / "cache",
        max_tokens=recipe.max_tokens,
        template=tokenizer.chat_template,
        date_string=recipe.date_string,
        seed=recipe.seed,
    )
    dataset, ledger = training.whole_batches(pairs, recipe.global_batch_size)
    job.announce(training.describe(ledger))
    lm = model.load_model(parent.folder, attn_implementation=recipe.attention)
    training.check_length(recipe, lm)
    reference = None
    if not recipe.trainer.get("precompute_ref_log_probs"):
        reference = model.load_model(parent.folder, attn_implementation=recipe.attention)
    trainer = training.pair_trainer(
        lm, reference, tokenizer, dataset, arguments=arguments, announce=job.announce
    )
    return {"data": ledger, "metrics": training.fit(trainer, tokenizer, run_dir=job.run_dir, ledger=ledger)}


if __name__ == "__main__":
    runner.main("apo")
