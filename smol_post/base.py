"""A base model from nothing, for the tiny recipe: byte-level BPE, a small SmolLM3, pre-training.

smol-post base recipes/tiny/base.yaml
"""

from typing import Any

from smol_post import runner
from smol_post.config import BaseRecipe


def run(recipe: BaseRecipe, parents: list[runner.Parent], job: runner.Job) -> dict[str, Any]:
    """Train tokenizer and model from nothing; returns the data ledger and metrics."""
    from transformers import set_seed

    from smol_post import model, training, vocabulary

    made = vocabulary.tiny_tokenizer(
        vocab_size=recipe.tokenizer.vocab_size,
        seed=recipe.tokenizer.corpus_seed,
        date_string=recipe.date_string,
    )
    words = vocabulary.of_run(recipe, made, folder=job.recipe_file.parent)
    end = vocabulary.token_id(words.tokenizer, words.text_end)
    set_seed(recipe.seed)
    lm = model.build_model(
        {**recipe.model, "max_position_embeddings": recipe.max_tokens},
        vocab_size=len(words.tokenizer),
        token_ids={"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
        attn_implementation=recipe.attention,
    )
    return training.train_on_packs(recipe, lm, words, **job.place())


if __name__ == "__main__":
    runner.main("base")
