"""The tokenizer of a run: its parent's, with the tokens, template and end tokens that the recipe brings.

    parent's tokenizer --of_run(recipe)--> Vocabulary(tokenizer, template, text_end, new_ids)

What rows become depends on this and on nothing else of a checkpoint, so that data can be prepared, and looked
at, before any parent is trained.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smol_post import chat, manifest, synthetic
from smol_post.config import ApoRecipe, MidRecipe, SftRecipe, Training
from smol_post.refusal import Refusal
from smol_post.trust import check_checkpoint

END_OF_TEXT = "<|endoftext|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", chat.END_OF_TURN]
THINK = ["<think>", "</think>"]


@dataclass(frozen=True)
class Vocabulary:
    """How a run writes rows as tokens; `new_ids` are the tokens that its parent did not have."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    text_end: str
    new_ids: list[int]


def of_run(recipe: Training, tokenizer: PreTrainedTokenizerBase, *, folder: Path) -> Vocabulary:
    """The parent's `tokenizer`, changed in place into that of a run; templates count from `folder`.

    Mid-training and SFT make it a chat tokenizer: their template is saved with it and `<|im_end|>` is its
    eos. Raises Refusal where there is no template to train with, or the vocabulary lacks a token that the
    template or a text wants.
    """
    text_end = getattr(recipe, "text_end", None) or str(tokenizer.eos_token)
    new = [token for token in getattr(recipe, "add_tokens", []) if token not in tokenizer.get_vocab()]
    added: list[str | AddedToken] = [
        AddedToken(token, special=token.startswith("<|"), normalized=False) for token in new
    ]
    tokenizer.add_tokens(added)
    name = getattr(recipe, "chat_template", None)
    template = chat.load_template(name, folder=folder) if name else None
    if isinstance(recipe, ApoRecipe):
        template = template or tokenizer.chat_template
        if not isinstance(template, str):
            raise Refusal("chat_template: the parent's tokenizer has none; set chat_template: smol_post")
    if template:
        _require_tokens(tokenizer, template)
        _try_template(tokenizer, template, name=str(name), date_string=recipe.date_string)
    if text_end not in tokenizer.get_vocab():
        raise Refusal(f"text_end: the vocabulary has no token {text_end!r}; name the one that ends a text")
    if isinstance(recipe, MidRecipe | SftRecipe | ApoRecipe):
        tokenizer.chat_template = template
    if isinstance(recipe, MidRecipe | SftRecipe):
        tokenizer.eos_token = chat.END_OF_TURN
    return Vocabulary(tokenizer, template, text_end, [token_id(tokenizer, token) for token in new])


def _require_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    wanted = set(re.findall(r"<\|\w+\|>|</?think>", template))
    if lacking := sorted(wanted - tokenizer.get_vocab().keys()):
        raise Refusal(
            f"the vocabulary lacks {', '.join(lacking)}, which the chat template writes; "
            "add them in the first run of the chain (add_tokens: [...])"
        )


def _try_template(tokenizer: PreTrainedTokenizerBase, template: str, *, name: str, date_string: str) -> None:
    """Refusal where the template cannot write the plainest chat: what is wrong then is no row's fault."""
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    try:
        chat.check_masks(chats, tokenizer, template=template, date_string=date_string, mode="think")
    except ValueError as error:
        raise Refusal(
            f"chat_template {name}: it cannot write a chat of two turns: {error}; mend it"
        ) from None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a checkpoint; Refusal where there is none, or one that cannot be trusted."""
    check_checkpoint(folder, trust_remote_code=trust_remote_code)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            manifest.read_json(folder / name, remedy="save the tokenizer there again")
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001  tokenizers raises no other class for what it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{folder}: no loadable tokenizer ({reason}); save one there") from None
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise Refusal(
            f"{folder}: found a slow tokenizer ({type(loaded).__name__}), wanted a tokenizer.json; convert it"
        )
    _check_size(loaded, folder)
    loaded.backend_tokenizer.no_truncation()  # rows are cut by the recipe, not by a file of the parent
    loaded.backend_tokenizer.no_padding()
    return loaded


def _check_size(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refusal where a token has no row in the embedding of its checkpoint; rows without a token may be."""
    path = folder / "config.json"
    tree = manifest.read_json(path, remedy="mend the checkpoint") if path.is_file() else {}
    size = (tree.get("text_config") or tree).get("vocab_size")
    token, last = max(tokenizer.get_vocab().items(), key=lambda one: one[1])
    if isinstance(size, int) and last >= size:
        raise Refusal(
            f"{folder}: tokenizer.json: found the token {token!r} with id {last}, wanted ids below the "
            f"vocab_size {size} of config.json; take the tokenizer of this checkpoint"
        )


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token of the vocabulary."""
    return tokenizer.get_vocab()[token]


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits and the tokens of ChatML; think tags stay visible when decoded.

    `vocab_size` is an upper bound: training stops early where the text has no more pairs to merge.
    """
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


def tiny_tokenizer(*, vocab_size: int, seed: int, date_string: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny base: trained in seconds on texts of each kind that its recipe trains on."""
    return train_tokenizer(_corpus(seed, date_string=date_string), vocab_size=vocab_size)


def _corpus(seed: int, *, date_string: str, num_rows: int = 2000) -> Iterator[str]:
    """Texts of the generators, chats as the dual-mode template writes them."""
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
