"""Anchored preference optimisation: `apo_zero` in TRL's DPOTrainer, each row in its own mode.

L = 1 - sigma(beta r_chosen) + sigma(beta r_rejected), r = log pi / pi_ref summed over the answer: exactly 1
at step 0 (APO, D'Oosterlinck et al., 2024, equation 7, plus 1). The reference is the parent as it starts; its
log-probabilities are computed once for all seeds. Nothing is padded: chosen and rejected answers lie in one
row, isolated as documents of a pack are.

    make apo
    accelerate launch --config_file recipes/accelerate/cpu.yaml smol_post/apo.py \\
        --config recipes/tiny/apo.yaml --run apo_seed0
"""

import functools
from typing import Any

from smol_post import runner
from smol_post.config import ApoRecipe


def run(recipe: ApoRecipe, parents: list[runner.Parent], job: runner.Job) -> dict[str, Any]:
    """Train the parent on preference pairs; returns the data ledger and metrics.

    Raises Refusal where the parent has no chat template and the recipe names none.
    """
    from smol_post import adapters, model, training, vocabulary

    (parent,) = parents
    model.use_threads(recipe.num_threads)
    trusted = recipe.trust_remote_code
    tokenizer = vocabulary.load_tokenizer(parent.folder, trust_remote_code=trusted)
    words = vocabulary.of_run(recipe, tokenizer, folder=job.recipe_file.parent)
    how: dict[str, Any] = {"attn_implementation": recipe.attention, "trust_remote_code": trusted}
    load = functools.partial(model.load_model, parent.folder, **how)
    lm = adapters.start(load, recipe, new_ids=[])
    training.check_length(recipe, lm)
    live = load() if recipe.reference == "live" and not recipe.peft else None
    weights = parent.digest + (" in NF4" if recipe.peft and recipe.peft.load_in_4bit else "")
    return training.train_on_pairs(recipe, lm, live, words, load=load, weights=weights, **job.place())


if __name__ == "__main__":
    runner.main("apo")
