"""What is measured on a checkpoint: needles, arithmetic and obedience in both modes, preferences, perplexity.

Every score is strict: the right answer, well formed, then stop. A metric is {"value", "stderr", "num"} with
the binomial standard error sqrt(p (1 - p) / n), but for perplexity.

    think     "<think>\\n3+4=7\\n</think>\\n7<|im_end|>"   well formed; right if 7 is asked
    no_think  "7<|im_end|>"                              well formed: no think tag at all
"""

import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smol_post import chat, sources, synthetic
from smol_post.config import Source
from smol_post.messages import END_THINK, THINK, well_formed
from smol_post.refusal import Refusal, describe
from smol_post.strict import FILES

Metric = dict[str, float]
TEMPLATE_ERRORS = (TemplateError, TypeError, AttributeError, LookupError)  # of a chat template being rendered
_OPENED = re.compile(r"<think>\s*(</think>\s*)?\Z")  # what a template may write before the model speaks
_EMPTY = re.compile(r"\s*<think>\s*</think>")


def share(hits: Sequence[bool]) -> Metric:
    """A share with its standard error.

    >>> share([True, True, False, True])
    {'value': 0.75, 'stderr': 0.2165, 'num': 4}
    """
    value = sum(hits) / len(hits)
    return {
        "value": round(value, 4),
        "stderr": round(math.sqrt(value * (1 - value) / len(hits)), 4),
        "num": len(hits),
    }


def obeys(prompt: str, text: str, mode: str, *, ended: bool) -> bool:
    """Whether a turn is well formed in its mode, taken with the think block that its prompt may have begun.

    Of no_think, a turn may begin with one empty block, be it the template's or the model's own.

    >>> obeys("...assistant\\n<think>\\n\\n</think>\\n", "<think>\\n\\n</think>\\n7", "no_think", ended=True)
    False
    >>> obeys("...assistant\\n", "<think>\\n\\n</think>\\n7", "no_think", ended=True)
    True
    """
    begun = _OPENED.search(prompt)
    turn = (begun[0] if begun else "") + text
    empty = _EMPTY.match(turn) if mode == "no_think" else None
    return well_formed(turn[empty.end() :] if empty else turn, mode, ended=ended) is not None


def answer(text: str, *, opened: bool = False) -> str:
    r"""What follows the thought; "" where a thought never ends. `opened`: by the prompt, not by the text.

    >>> answer("<think>\n1+1=2\n</think>\n2"), answer("<think>\n1+1=2"), answer(" 2")
    ('2', '', ' 2')
    """
    _, ended, after = text.rpartition(END_THINK)
    if ended or THINK in text:
        return after.partition(THINK)[0].lstrip() if ended else ""
    return "" if opened else text


@torch.no_grad()
def needles(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    num_questions: int,
    seed: int,
    batch_size: int,
    options: dict[str, Any],
) -> Metric:
    """Share of questions about documents of `num_tokens` that greedy decoding answers right.

    Greedy decoding gives the wanted tokens exactly if each is the most likely one after those before it, so
    one forward pass a batch suffices.
    """
    rows = synthetic.generate(
        "needle_questions", num_rows=num_questions, seed=seed, num_tokens=num_tokens, **options
    )
    hits: list[bool] = []
    questions = [
        (
            tokenizer(row["prompt"], add_special_tokens=False)["input_ids"],
            tokenizer(row["answer"], add_special_tokens=False)["input_ids"],
        )
        for row in rows
    ]
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        rows_ids = [prompt + answer + [0] * (longest - len(prompt) - len(answer)) for prompt, answer in batch]
        ids_BT = torch.tensor(rows_ids, device=lm.device)
        earliest = min(len(prompt) for prompt, _ in batch) - 1  # no logits before it: a document is long
        logits_BTV = lm(input_ids=ids_BT, use_cache=False, logits_to_keep=longest - earliest).logits
        guessed_BT = logits_BTV.argmax(-1)
        for row, (prompt, answer) in enumerate(batch):
            first = len(prompt) - 1 - earliest
            hits.append(guessed_BT[row, first : first + len(answer)].tolist() == answer)
    return share(hits)


@torch.no_grad()
def generate(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[tuple[str, bool]]:
    """Continuations as (text, whether it ended with the end of turn), greedy without `temperature`.

    Prompts are left-padded in batches of similar length; the order of the answers is that of the prompts.
    """
    torch.manual_seed(seed)
    end = tokenizer.get_vocab().get(chat.END_OF_TURN, tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    how = (
        {"do_sample": False}
        if temperature is None
        else {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    )
    found: dict[int, tuple[str, bool]] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in batch)
        padded = [[pad] * (longest - len(prompts[index])) + prompts[index] for index in batch]
        mask = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in batch]
        output = lm.generate(  # pyright: ignore[reportCallIssue]
            input_ids=torch.tensor(padded, device=lm.device),
            attention_mask=torch.tensor(mask, device=lm.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
            **how,
        )
        for index, row in zip(batch, output[:, longest:].tolist(), strict=True):
            ended = end in row
            found[index] = (str(tokenizer.decode(row[: row.index(end)] if ended else row)), ended)
    return [found[index] for index in range(len(prompts))]


_LEAVE_OUT = (
    "leave such chats out: arithmetic_options: {flag_share: 0}, num_turn_questions: 0, "
    "num_preference_pairs: 0"
)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], remedy: str = _LEAVE_OUT, **how: Any
) -> Any:
    """A chat, as its template writes it, up to where the model speaks; Refusal where the template refuses."""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **how)
    except TEMPLATE_ERRORS as error:
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(
            f"{tokenizer.name_or_path}: its chat template refuses a chat of {roles} ({reason}); {remedy}"
        ) from None


def arithmetic(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mode: str,
    num_questions: int,
    seed: int,
    date_string: str,
    options: dict[str, Any],
    num_samples: int,
    **generation: Any,
) -> tuple[Metric, Metric, list[dict[str, Any]]]:
    """Strict accuracy on chained arithmetic in one mode, compliance with that mode, and a few transcripts.

    Right means well formed and the answer exactly the expected text. The mode is asked for by
    `enable_thinking` or by a flag in the system message (`flag_share` of `options`).
    """
    rows = list(
        synthetic.generate(
            "arithmetic_questions",
            num_rows=num_questions,
            seed=seed,
            enable_thinking=mode == "think",
            **options,
        )
    )
    prompts: list[Any] = [
        render(tokenizer, row["messages"], date_string=date_string, **row["chat_template_kwargs"])
        for row in rows
    ]
    outputs = generate(lm, tokenizer, prompts, seed=seed, **generation)
    answers = [well_formed(text, mode, ended=ended) for text, ended in outputs]
    right = [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    samples = [
        {"mode": mode, "prompt": row["messages"][-1]["content"], "output": output[0], "right": hit}
        for row, output, hit in zip(rows[:num_samples], outputs, right, strict=False)
    ]
    return share(right), share([answer is not None for answer in answers]), samples


def questions(path: str | None, number: int, seed: int, options: dict[str, Any]) -> list[list[str]]:
    """Conversations of three questions: three prompts of the file drawn at random, without one arithmetic."""
    if path is None:
        rows = synthetic.generate("arithmetic_questions", num_rows=3 * number, seed=seed, **options)
        contents = [row["messages"][-1]["content"] for row in rows]
        return [contents[start : start + 3] for start in range(0, len(contents), 3)]
    prompts = column(path, "prompt")
    if len(prompts) < 3:
        raise Refusal(f"{path}: found {len(prompts)} prompts, wanted three at least; add some")
    return [random.Random(f"turns {seed} {index}").sample(prompts, 3) for index in range(number)]


def column(path: str, name: str) -> list[str]:
    """One column of the rows of a file, in order; of any other file its text as one row."""
    if not path.endswith(FILES):
        try:
            return [Path(path).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"{path}: not readable as text ({error}); give a UTF-8 file") from None
    found = []
    for raw in sources.read_rows(Source(name=path, path=path), folder=Path()):
        try:
            found.append(sources.parse_row(raw.content, columns={})[name])
            if not isinstance(found[-1], str):
                raise ValueError(f"{name}: found {describe(found[-1])}, wanted text")
        except (ValueError, KeyError) as error:
            reason = f"no column {name}" if isinstance(error, KeyError) else error
            raise Refusal(f"{path}: row {raw.number}: {reason}; mend the row") from None
    return found


def turns(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mode: str,
    conversations: Sequence[Sequence[str]],
    date_string: str,
    **generation: Any,
) -> list[Metric]:
    """Compliance with a mode in each turn of conversations, given as the user's words turn by turn.

    The mode is asked for by a flag in the system message and by nothing else. The answers of earlier turns
    are the model's own, greedily generated.
    """
    chats = [[{"role": "system", "content": f"/{mode}"}] for _ in conversations]
    found: list[Metric] = []
    for questions in zip(*conversations, strict=True):
        for messages, content in zip(chats, questions, strict=True):
            messages.append({"role": "user", "content": content})
        prompts = [
            str(render(tokenizer, messages, tokenize=False, date_string=date_string)) for messages in chats
        ]
        encoded: Any = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        said = generate(lm, tokenizer, encoded, **generation)
        found.append(
            share(
                [
                    obeys(prompt, text, mode, ended=ended)
                    for prompt, (text, ended) in zip(prompts, said, strict=True)
                ]
            )
        )
        for messages, (text, _) in zip(chats, said, strict=True):
            messages.append({"role": "assistant", "content": text})
    return found


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before a text, if it puts one there."""
    return [first for first in tokenizer("")["input_ids"][:1] if first == tokenizer.bos_token_id]  # pyright: ignore


@torch.no_grad()
def perplexity(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, max_tokens: int
) -> Metric:
    """exp of the mean negative log-likelihood a token, over windows of `max_tokens` that do not overlap.

    No window spans two texts; its first token is not predicted, unless the tokenizer puts one before it.
    `num` is the number W of windows, each of n predicted tokens and summed loss s. With m = sum s / sum n the
    standard error of m is that of a ratio, sqrt(W / (W - 1) sum (s - m n)^2) / sum n, and that of the
    perplexity exp(m) times as much (delta method). The logits of one window are in memory at once.

    Raises ValueError where there are fewer than two windows.
    """
    first = beginning(tokenizer)
    size = max_tokens - len(first)
    losses, counts = [], []
    for text in texts:
        ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), size):
            window_T = torch.tensor(first + ids[start : start + size], device=lm.device)
            if len(window_T) > 1:
                logits_TV = lm(input_ids=window_T[None], use_cache=False).logits[0, :-1].float()
                loss_T = torch.nn.functional.cross_entropy(logits_TV, window_T[1:], reduction="none")
                losses.append(loss_T.double().sum().item())
                counts.append(len(loss_T))
    if len(counts) < 2:
        raise ValueError(f"found {len(counts)} windows of {max_tokens} tokens, wanted two at least")
    total = sum(counts)
    mean = sum(losses) / total
    squares = sum((loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True))
    error = math.sqrt(len(counts) / (len(counts) - 1) * squares) / total
    value = math.exp(mean)
    return {"value": round(value, 4), "stderr": round(value * error, 4), "num": len(counts)}


@torch.no_grad()
def preferences(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_pairs: int,
    seed: int,
    batch_size: int,
    date_string: str,
    options: dict[str, Any],
) -> Metric:
    """Share of held-out pairs whose chosen answer has the higher log-probability (summed over its tokens)."""
    rows = synthetic.generate("preference_pairs", num_rows=num_pairs, seed=seed, **options)
    try:
        pairs = [chat.encode_pair(row, tokenizer, date_string=date_string) for row in rows]
    except ValueError as error:
        raise Refusal(
            f"{tokenizer.name_or_path}: preference pairs: {error}; leave them out: num_preference_pairs: 0"
        ) from None
    sides = [(pair.prompt_ids, answer) for pair in pairs for answer in (pair.chosen_ids, pair.rejected_ids)]
    scores: list[float] = []
    for start in range(0, len(sides), batch_size):
        batch = sides[start : start + batch_size]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        rows_ids = [prompt + answer + [0] * (longest - len(prompt) - len(answer)) for prompt, answer in batch]
        ids_BT = torch.tensor(rows_ids, device=lm.device)
        logits_BTV = lm(input_ids=ids_BT, use_cache=False).logits.float()
        logp_BT = logits_BTV[:, :-1].log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
        for row, (prompt, answer) in enumerate(batch):
            first = len(prompt) - 1
            scores.append(logp_BT[row, first : first + len(answer)].double().sum().item())
    return share([chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)])
