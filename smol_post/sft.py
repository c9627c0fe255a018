"""Dual-mode SFT: /think, /no_think and tools in our template, BFD packing, loss on assistant turns.

Source: SmolLM3 launch post.

    make sft
    accelerate launch --config_file recipes/accelerate/cpu.yaml smol_post/sft.py \\
        --config recipes/tiny/sft.yaml
"""

from typing import Any

from smol_post import runner
from smol_post.config import SftRecipe


def run(recipe: SftRecipe, parents: list[runner.Parent], job: runner.Job) -> dict[str, Any]:
    """Train the parent on chats in both modes; returns the data ledger (by mode) and metrics."""
    from smol_post import adapters, model, training, vocabulary

    (parent,) = parents
    trusted = recipe.trust_remote_code
    tokenizer = vocabulary.load_tokenizer(parent.folder, trust_remote_code=trusted)
    words = vocabulary.of_run(recipe, tokenizer, folder=job.recipe_file.parent)

    def load(**quantized: Any) -> Any:
        how: dict[str, Any] = {"attn_implementation": recipe.attention, "trust_remote_code": trusted}
        lm = model.load_model(parent.folder, **how, **quantized)
        training.check_length(recipe, lm)
        model.embed_new(lm, words.new_ids)
        model.set_chat(lm, words.tokenizer)
        return lm

    lm = adapters.start(load, recipe, new_ids=words.new_ids)
    return training.train_on_packs(recipe, lm, words, load=load, **job.place())


if __name__ == "__main__":
    runner.main("sft")
