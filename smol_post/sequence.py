"""A sequence split over processes: each holds a part of the tokens, in attention some heads of all tokens.

    process 0   tokens a b c     --to_heads-->   heads 0 1 of a b c d e     --to_tokens-->   tokens a b c
    process 1   tokens d e                       heads 2 3 of a b c d e                      tokens d e

Attention sees the whole row, so the documents of a pack stay apart as in one process; everything else is done
a token at a time. Activations and logits take 1 / size of the memory. Source: DeepSpeed-Ulysses (Jacobs et
al., 2023, section 3), here on rows of documents and under any engine.

Shape suffixes: B batch (1), H heads, h heads of one process, L tokens of one process, T tokens of the row, D.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from smol_post.refusal import Refusal


class Parts:
    """The processes that share each sequence: how many, which of them this is, how to talk to them."""

    def __init__(self, size: int) -> None:
        """Neighbours share: of 4 processes and `size` 2, (0, 1) and (2, 3). To be made in every process."""
        self.size, self.index, self.group = size, 0, None
        if size > 1:
            self.index = dist.get_rank() % size
            self.group = dist.new_subgroups(size)[0]

    def bounds(self, num_tokens: int) -> list[int]:
        """Where each part begins, and where the last one ends: of 5 tokens in 2 parts 0 2 5."""
        return [num_tokens * at // self.size for at in range(self.size + 1)]

    def join(self, vector: Tensor) -> Tensor:
        """The vectors of all parts end to end, without gradients."""
        if self.group is None:
            return vector
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, vector.detach().cpu(), group=self.group)
        return torch.cat(found).to(vector.device)

    def total(self, value: float) -> float:
        """The sum of a number over all parts."""
        return float(self.join(torch.tensor([value], dtype=torch.float64)).sum())


class Split:
    """What attention must know of a split row: `num_tokens` of each part, and the parts."""

    def __init__(self, parts: Parts, num_tokens: int) -> None:
        """Of a row of so many tokens."""
        self.parts = parts
        self.num_tokens = [stop - start for start, stop in pairwise(parts.bounds(num_tokens))]


def check_heads(config: Any, size: int) -> None:
    """Refusal where the heads of a model cannot be dealt out to `size` processes."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config._attn_implementation != "varlen":
        raise Refusal(
            f"attention: found {config._attn_implementation}, wanted varlen, where sequences are split "
            f"(parallelism_config_sp_size {size}); change one of them"
        )
    if heads % size or (kv_heads % size and size % kv_heads):
        raise Refusal(
            f"launch file: parallelism_config_sp_size: found {size}, wanted a number that divides the "
            f"model's {heads} heads, and divides its {kv_heads} key-value heads or is a multiple of them"
        )


def to_heads(part_BHLD: Tensor, split: Split) -> Tensor:
    """Some heads of all tokens, (B, h, T, D), from all heads of this part's tokens.

    Where there are fewer heads (of keys and values) than parts, each is sent to several.
    """
    size, (_, num_heads, length, width) = split.parts.size, part_BHLD.shape
    if num_heads < size:
        part_BHLD = part_BHLD.repeat_interleave(size // num_heads, dim=1)
    heads = part_BHLD.shape[1] // size
    received = _exchange(
        part_BHLD.reshape(-1),
        [heads * length * width] * size,
        [heads * one * width for one in split.num_tokens],
        split,
    )
    return torch.cat([one.view(1, heads, -1, width) for one in received], dim=2)


def to_tokens(whole_BThD: Tensor, split: Split) -> Tensor:
    """All heads of this part's tokens, (B, L, H, D), from some heads of all tokens."""
    size, (_, _, heads, width) = split.parts.size, whole_BThD.shape
    length = split.num_tokens[split.parts.index]
    received = _exchange(
        whole_BThD.reshape(-1),
        [one * heads * width for one in split.num_tokens],
        [length * heads * width] * size,
        split,
    )
    return torch.cat([one.view(1, length, heads, width) for one in received], dim=2)


def _exchange(flat: Tensor, sent: list[int], received: list[int], split: Split) -> Sequence[Tensor]:
    """Send the pieces of `flat` to the parts in order; what they sent to this one."""
    return _Exchange.apply(flat, sent, received, split.parts.group).split(received)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.back = received, sent, group
        output = flat.new_empty(sum(received))
        dist.all_to_all_single(output, flat.contiguous(), received, sent, group=group)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        sent, received, group = ctx.back
        output = outer.new_empty(sum(received))
        dist.all_to_all_single(output, outer.contiguous(), received, sent, group=group)
        return output, None, None, None
