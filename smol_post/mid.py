"""Reasoning mid-training: long reasoning traces as plain ChatML, wrapped packing, loss on all tokens.

Source: SmolLM3 launch post. `packing: wrapped` isolates documents; with `wrapped_cross_document` attention
and positions run across them, as in TRL's own `wrapped`.

    make mid
    accelerate launch --config_file recipes/accelerate/cpu.yaml smol_post/mid.py \\
        --config recipes/tiny/mid.yaml
"""

from typing import Any

from smol_post import runner
from smol_post.config import MidRecipe


def run(recipe: MidRecipe, parents: list[runner.Parent], job: runner.Job) -> dict[str, Any]:
    """Train the parent on traces, save the ChatML template with it; returns the data ledger and metrics."""
    from smol_post import model, training, vocabulary

    (parent,) = parents
    trusted = recipe.trust_remote_code
    tokenizer = vocabulary.load_tokenizer(parent.folder, trust_remote_code=trusted)
    words = vocabulary.of_run(recipe, tokenizer, folder=job.recipe_file.parent)
    lm = model.load_model(parent.folder, attn_implementation=recipe.attention, trust_remote_code=trusted)
    training.check_length(recipe, lm)
    model.embed_new(lm, words.new_ids)
    model.set_chat(lm, words.tokenizer)
    return training.train_on_packs(recipe, lm, words, **job.place())


if __name__ == "__main__":
    runner.main("mid")
