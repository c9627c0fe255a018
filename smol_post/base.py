"""A base model from nothing, for the tiny recipe: byte-level BPE, a small SmolLM3, pre-training.

smol-post base recipes/tiny/base.yaml
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from smol_post import runner
from smol_post.config import BaseRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE with single digits and the tokens of ChatML; think tags stay visible when decoded.

    `vocab_size` is an upper bound: training stops early where the text has no more pairs to merge.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_corpus(seed: int, *, date_string: str, num_rows: int = 2000) -> Iterator[str]:
    """Texts of each kind that the tiny recipe trains on, chats as the dual-mode template writes them."""
    from smol_post import chat, synthetic

    template = chat.load_template("smol_post")
    kinds = {
        "needles": {"num_tokens": 200},
        "arithmetic_text": {},
        "reasoning_chats": {},
        "dual_mode_chats": {},
    }
    for name, options in kinds.items():
        for row in synthetic.generate(name, num_rows=num_rows, seed=seed, **options):
            if "messages" in row:
                yield chat.render_chat(row, template=template, date_string=date_string)
            else:
                yield row["prompt"] + row["completion"]


def run(recipe: BaseRecipe, parents: list[runner.Parent], job: runner.Job) -> dict[str, Any]:
    """Train tokenizer and model from nothing; returns the data ledger and metrics."""
    from transformers import set_seed

    from smol_post import chat, model, training

    template = chat.load_template(recipe.chat_template, folder=job.recipe_file.parent)
    corpus = tokenizer_corpus(recipe.tokenizer.corpus_seed, date_string=recipe.date_string)
    tokenizer = train_tokenizer(corpus, vocab_size=recipe.tokenizer.vocab_size)
    end = model.token_id(tokenizer, END_OF_TEXT)
    set_seed(recipe.seed)
    lm = model.build_model(
        {**recipe.model, "max_position_embeddings": recipe.max_tokens},
        vocab_size=len(tokenizer),
        token_ids={"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
        attn_implementation=recipe.attention,
    )
    model.check_rope(lm)
    text_end = END_OF_TEXT
    return training.train_on_packs(recipe, lm, tokenizer, template=template, text_end=text_end, **job.place())


if __name__ == "__main__":
    runner.main("base")
