"""Attention on packs of documents, through a small SmolLM3 (`attention`): beside SDPA with a block mask."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loss import cpu_and_growth
from benchmarks.measure import Call, Numbers, Result, in_turn, medians

# Tokens of a pack -> how many times the CPU time of ours the peer takes at least.
BARS = {2_048: 1.0, 4_096: 1.0, 8_192: 7.0, 16_384: 12.0}
_VOCAB_SIZE = 1_000


def attention(
    work: Path,
    *,
    call: Call,
    bars: Mapping[int, float] = BARS,
    mean_document_tokens: int = 500,
    hidden_size: int = 128,
    num_layers: int = 4,
    repetitions: int = 3,
) -> Result:
    """The backbone forward and backward over one pack of each of the lengths in `bars`."""
    shape = {"mean": mean_document_tokens, "hidden_size": hidden_size, "num_layers": num_layers}
    of = partial(call, _measured, folder=work, **shape)
    longest = max(bars)
    samples: dict[str, list[Numbers]] = {}
    for length in bars:
        peer_runs = {f"peer_{length}": partial(of, name="sdpa", length=length)}
        our_runs = {f"ours_{length}": partial(of, name="varlen", length=length)}
        if length < longest:
            samples |= in_turn(repetitions, **peer_runs, **our_runs)
        else:
            samples |= in_turn(1, **peer_runs) | in_turn(repetitions, **our_runs)
    peer, ours = (
        {
            f"{'cpu' if key == 'cpu_seconds' else 'growth'}_{length}_{key.rpartition('_')[2]}": value
            for length in bars
            for key, value in medians(samples[f"{side}_{length}"]).items()
        }
        for side in ("peer", "ours")
    )
    ratios = {n: peer[f"cpu_{n}_seconds"] / ours[f"cpu_{n}_seconds"] for n in bars}
    a_token = {n: ours[f"cpu_{n}_seconds"] / n for n in bars}
    furthest = call(_furthest, folder=work, lengths=list(bars))
    return Result(
        peer=peer,
        ours=ours,
        ratio=ratios[longest],
        bar=bars[longest],
        promises={
            **{f"CPU time at {n:,}": ratios[n] >= bar for n, bar in bars.items()},
            "CPU time linear": a_token[longest] <= 1.5 * a_token[min(bars)],
            "same outputs and gradients": max(furthest.values()) <= 1e-5,
        },
        repetitions=repetitions,
        compared=(
            f"Backbone of a SmolLM3 with {num_layers} layers of hidden size {hidden_size}, forward and "
            f"backward over one pack, float32, one thread. Documents of {mean_document_tokens} tokens on "
            "average, uniform from half to one and a half of that. Peer: attn_implementation sdpa, to which "
            "transformers gives a pack x pack mask that it makes from the same position_ids. Ours: varlen. "
            f"The peer at {longest:,} is measured once. growth_bytes: the most resident memory (ru_maxrss) "
            "less the resident memory before, model and inputs included; a first run over a short pack and "
            "imports are left out. furthest: the largest difference of last hidden states and gradients "
            "of the embedding, relative to their largest element."
        ),
        samples=samples,
        extra={"ratios": ratios, "our_seconds_a_token": a_token, "furthest": furthest},
    )


def position_ids(length: int, *, mean: int) -> np.ndarray:
    """Positions of a pack of documents, each drawn from mean/2 to 3 mean/2 tokens, the last one cut.

    >>> position_ids(10, mean=4).tolist()
    [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(mean // 2, mean + mean // 2 + 1, length // (mean // 2) + 1)
    return np.concatenate([np.arange(number) for number in drawn])[:length]


def _measured(folder: Path, name: str, length: int, mean: int, hidden_size: int, num_layers: int) -> Numbers:
    """One forward and backward pass; leaves last hidden states and a gradient in `folder`."""
    import torch

    from smol_post.model import build_model

    torch.manual_seed(0)
    parameters = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 65_536,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    lm = build_model(parameters, vocab_size=_VOCAB_SIZE, token_ids=ends, attn_implementation=name)
    backbone: Any = lm.base_model.train()
    direction = torch.randn(hidden_size)

    def forward_and_backward(num_tokens: int) -> Any:
        ids = torch.arange(num_tokens)[None] * 7_919 % _VOCAB_SIZE
        positions = torch.from_numpy(position_ids(num_tokens, mean=mean))[None]
        backbone.zero_grad()
        made = backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        (made @ direction).square().mean().backward()
        return made.detach()

    forward_and_backward(2 * mean)
    numbers: Numbers = {}
    with cpu_and_growth(numbers):
        hidden = forward_and_backward(length)
    torch.save((hidden, backbone.embed_tokens.weight.grad), folder / f"{name}_{length}.pt")
    return numbers


def _furthest(folder: Path, lengths: list[int]) -> dict[int, float]:
    """By length: the largest difference between what peer and ours left, relative to the largest element."""
    import torch

    found = {}
    for length in lengths:
        both = (torch.load(folder / f"{name}_{length}.pt") for name in ("sdpa", "varlen"))
        found[length] = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*both, strict=True))
    return found
