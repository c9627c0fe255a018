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
    from smol_post import chat, model, training

    (parent,) = parents
    tokenizer = model.load_tokenizer(parent.folder)
    lm = model.load_model(
        parent.folder,
        attn_implementation=recipe.attention,
        rope_theta=recipe.rope_theta,
        max_position_embeddings=recipe.max_tokens,
    )
    model.add_tokens(lm, tokenizer, recipe.add_tokens)
    template = (
        chat.load_template(recipe.chat_template, folder=job.recipe_file.parent)
        if recipe.chat_template
        else None
    )
    text_end = recipe.text_end or str(tokenizer.eos_token)
    return training.train_on_packs(recipe, lm, tokenizer, template=template, text_end=text_end, **job.place())


if __name__ == "__main__":
    runner.main("long_context")
