"""Long-context extension: RoPE theta and the sequence length grow together, documents stay isolated.

Run it twice, each time with a fresh schedule: theta 1.5M at 32k tokens, then 5M at 64k (SmolLM3 launch post).

    make long-context
    accelerate launch --config_file recipes/accelerate/cpu.yaml smol_post/long_context.py \\
        --config recipes/tiny/long_context_1.yaml
"""

from typing import Any

from smol_post import runner
from smol_post.config import LongContextRecipe


def run(recipe: LongContextRecipe, parents: list[runner.Parent], job: runner.Job) -> dict[str, Any]:
    """Train the parent at `max_tokens` with `rope_theta`; returns the data ledger and metrics.

    The checkpoint's max_position_embeddings becomes `max_tokens`; live RoPE frequencies are held against
    theta.
    """
    from smol_post import model, training, vocabulary

    (parent,) = parents
    trusted = recipe.trust_remote_code
    tokenizer = vocabulary.load_tokenizer(parent.folder, trust_remote_code=trusted)
    words = vocabulary.of_run(recipe, tokenizer, folder=job.recipe_file.parent)
    lm = model.load_model(
        parent.folder,
        attn_implementation=recipe.attention,
        rope_theta=recipe.rope_theta,
        max_position_embeddings=recipe.max_tokens,
        trust_remote_code=trusted,
    )
    model.embed_new(lm, words.new_ids)
    return training.train_on_packs(recipe, lm, words, **job.place())


if __name__ == "__main__":
    runner.main("long_context")
