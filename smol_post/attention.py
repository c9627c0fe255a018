"""Attention on packs, one document at a time: no L x L mask exists at any length.

A pack is one row of tokens, documents side by side; `cu_seq_lens_q` (or position ids that restart) say where
each begins:

    tokens        a b c | d e          queries of d, e see keys d, e only
    position_ids  0 1 2   0 1          cu_seq_lens_q  0 3 5

Each document is one causal scaled-dot-product call; on CUDA in half precision the whole pack is one call of
`torch.nn.attention.varlen.varlen_attn` (not exercised by the tests, which have no GPU).
Batches that carry no packing information (generation) take transformers' ordinary SDPA path.
Where a row is split over processes (`sequence`), each attends with some heads over the whole row.
Registered as "varlen".

Shape suffixes: B batch (1 for packs), H query heads, K key-value heads, L tokens, D head dimension.
"""

import itertools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from smol_post import sequence

NAME = "varlen"


def document_lengths(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the documents of one pack from its position ids, shape (1, L) or (L,).

    >>> document_lengths(torch.tensor([[0, 1, 2, 0, 1]]))
    [3, 2]
    """
    positions = position_ids.flatten()
    starts = torch.nonzero(positions[1:] != positions[:-1] + 1).flatten() + 1
    edges = [0, *starts.tolist(), positions.numel()]
    return [stop - start for start, stop in itertools.pairwise(edges)]


def varlen_attention_forward(
    module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    split: sequence.Split | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a pack; output of shape (B, L, H, D).

    `cu_seq_lens_q` and `max_length_q` are of the whole row, also where this process has a part (`split`).
    Raises ValueError where packing information meets a batch above 1 or a mask: either would let documents
    see each other.
    """
    device = query_BHLD.device.type
    if device != "cpu":
        # RoPE in float32 leaves queries and keys wider than values under autocast, and no kernel takes both
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else value_BKLD.dtype
        query_BHLD, key_BKLD, value_BKLD = (one.to(dtype) for one in (query_BHLD, key_BKLD, value_BKLD))
    if split is not None:
        query, key, value = (sequence.to_heads(one, split) for one in (query_BHLD, key_BKLD, value_BKLD))
        output, _ = varlen_attention_forward(
            module, query, key, value, attention_mask, scaling, dropout, cu_seq_lens_q, max_length_q
        )
        return sequence.to_tokens(output, split), None
    length = query_BHLD.shape[2]
    if cu_seq_lens_q is None:
        lengths = []
        if position_ids is not None and position_ids.shape[0] == 1 and attention_mask is None:
            lengths = document_lengths(position_ids) if key_BKLD.shape[2] == length else []
        if len(lengths) < 2:
            return sdpa_attention_forward(
                module,
                query_BHLD,
                key_BKLD,
                value_BKLD,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                **kwargs,
            )
        max_length_q = max(lengths)
    else:
        lengths = cu_seq_lens_q.diff().tolist() if not _has_kernel(query_BHLD) else []
    if query_BHLD.shape[0] != 1 or attention_mask is not None:
        raise ValueError("packed documents want one row a batch and no attention mask; flatten the batch")
    if _has_kernel(query_BHLD):
        if cu_seq_lens_q is None:
            edges = torch.tensor([0, *lengths], device=query_BHLD.device)
            cu_seq_lens_q = edges.cumsum(0, dtype=torch.int32)
        return _varlen_cuda(
            query_BHLD, key_BKLD, value_BKLD, cu_seq_lens_q, max_length_q, scaling, dropout
        ), None
    parts = [part.split(lengths, dim=2) for part in (query_BHLD, key_BKLD, value_BKLD)]
    outputs = [
        scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _has_kernel(query: torch.Tensor) -> bool:
    """Whether `varlen_attn` takes it: on CUDA, in half precision; else documents are attended one by one."""
    return query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)


def _varlen_cuda(
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(
            "attention dropout is not supported by varlen attention on CUDA; set attention: sdpa"
        )
    query_LHD, key_LKD, value_LKD = (part[0].transpose(0, 1) for part in (query_BHLD, key_BKLD, value_BKLD))
    longest = int(max_length) if max_length is not None else int(cu_seq_lens.diff().max())
    output = varlen_attn(
        query_LHD,
        key_LKD,
        value_LKD,
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask for packs and unpadded batches; transformers' SDPA mask where padding or a cache wants one."""
    if (
        attention_mask is None
        and q_length == kv_length
        and not isinstance(q_offset, torch.Tensor)
        and q_offset == 0
    ):
        return None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset=q_offset, attention_mask=attention_mask, **kwargs
    )


def register() -> None:
    """Make `attn_implementation="varlen"` known to transformers; both seams, or padding would be ignored."""
    AttentionInterface.register(NAME, varlen_attention_forward)
    AttentionMaskInterface.register(NAME, varlen_mask)
