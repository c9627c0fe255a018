"""Cross-entropy and log-probabilities without the logits of a whole batch, and losses of preference pairs.

The logits of N positions over V tokens are the largest tensor of a training step: 4 GiB in float32 at 8,192 x
128,256, and autograd keeps three of that size. Here a few positions at a time go through the head:

    hidden_ND  h1 h2 | h3 h4 | h5        logits of two positions exist at a time
    labels_N    7  2 |  9  4 |  1        log p of 7 and 2, then of 9 and 4, then of 1

The gradients of a sum of cross-entropies need no more than that: they are taken in the same sweep, so that no
logit is computed twice (the idea is Liger's, arXiv:2410.10989).

Shape suffixes: N positions, C positions of one chunk, V vocabulary, D hidden, P pairs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Logits of one chunk, in elements. Our choice, measured on one CPU thread at 1,024 x 128,256 x 576: a quarter
# takes 1.4 times as long, for it reads the head's weight more often, four times 0.9 and twice the memory.
CHUNK_ELEMENTS = 2**24


def summed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over n of -log softmax(hidden_n weight^T)[label_n], a scalar in float32 (float64 of float64).

    Every label is a token id: leave positions without loss out. Gradients are computed in the forward pass,
    only for inputs that want one. Under autocast the matrix products are of its type; softmax, loss and the
    sum over chunks that is the weight's gradient stay in float32. ValueError where there are more or fewer
    labels than positions, torch's own error for a label outside the vocabulary.
    """
    wanted = [torch.is_grad_enabled() and one.requires_grad for one in (hidden_ND, weight_VD)]
    return _SummedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, _autocast_dtype(hidden_ND), wanted)


def token_log_probs(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Log softmax(hidden_n weight^T)[label_n] of every position, shape (N,), float32 (float64 of float64).

    Labels, types and errors as in `summed_cross_entropy`. Where the logits are more than one chunk they are
    computed again in the backward pass, so that nothing of the size N x V is kept for it.
    """
    if len(hidden_ND) == len(labels_N) and len(labels_N) * len(weight_VD) <= CHUNK_ELEMENTS:
        logits_NV = functional.linear(hidden_ND, weight_VD)
        return logits_NV.log_softmax(-1, dtype=_wide(logits_NV)).gather(1, labels_N[:, None])[:, 0]
    return _TokenLogProbs.apply(hidden_ND, weight_VD, labels_N, _autocast_dtype(hidden_ND))


def preference_losses(
    loss_type: str,
    *,
    beta: float,
    chosen_P: Tensor,
    rejected_P: Tensor,
    chosen_tokens_P: Tensor | None = None,
    rejected_tokens_P: Tensor | None = None,
    chosen_log_probs_P: Tensor | None = None,
    num_chosen_tokens: Tensor | float | None = None,
    num_pairs: Tensor | float | None = None,
) -> Tensor:
    """Loss of every pair, shape (P,), from log(pi / pi_ref) of its chosen and of its rejected answer.

    What is minimised is their sum over a global batch divided by its number of pairs, however it is cut.
    "ipo" also wants how many tokens the answers have. "sft" wants log pi of the chosen answers, and how many
    chosen tokens and pairs the global batch has: the quotient is then minus the mean over all chosen tokens.
    ValueError for an unknown loss or where one of these is missing.

    Sources: APO (arXiv:2408.06266, equations 7 and 8); sigmoid: DPO (arXiv:2305.18290, equation 7); hinge:
    SLiC as in arXiv:2309.06657; IPO (arXiv:2310.12036, equation 17), of log ratios per token as in TRL.
    """
    margin_P = beta * (chosen_P - rejected_P)
    match loss_type:
        case "apo_zero":
            return torch.sigmoid(-beta * chosen_P) + torch.sigmoid(beta * rejected_P)
        case "apo_down":
            return torch.sigmoid(beta * chosen_P) + torch.sigmoid(-margin_P)
        case "sigmoid":
            return -functional.logsigmoid(margin_P)
        case "hinge":
            return torch.relu(1 - margin_P)
        case "ipo":
            if chosen_tokens_P is None or rejected_tokens_P is None:
                raise ValueError("loss ipo: wants chosen_tokens_P and rejected_tokens_P")
            chosen_P, rejected_P = chosen_P / chosen_tokens_P, rejected_P / rejected_tokens_P
            return (chosen_P - rejected_P - 1 / (2 * beta)) ** 2
        case "sft":
            if chosen_log_probs_P is None or num_chosen_tokens is None or num_pairs is None:
                raise ValueError("loss sft: wants chosen_log_probs_P, num_chosen_tokens and num_pairs")
            return -chosen_log_probs_P * (num_pairs / num_chosen_tokens)
    raise ValueError(f"loss {loss_type}: there is no such preference loss here")


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, dtype: Any, wanted: Any
    ) -> Tensor:
        log_probs_N, *gradients = _sweep(hidden_ND, weight_VD, labels_N, dtype=dtype, wanted=wanted)
        ctx.save_for_backward(*gradients)
        return -log_probs_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # In place, for one is as large as the weight; unless another backward pass is to find them unscaled.
        autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
        scaled = torch.mul if autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        return *(None if one is None else scaled(one, outer) for one in ctx.saved_tensors), None, None, None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, dtype: Any) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N)
        ctx.dtype = dtype
        return _sweep(hidden_ND, weight_VD, labels_N, dtype=dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer_N: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:2]
        return *_sweep(*saved, dtype=ctx.dtype, wanted=wanted, scale_N=-outer_N)[1:], None, None


def _sweep(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    dtype: torch.dtype | None,
    wanted: tuple[bool, bool] = (False, False),
    scale_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities of the labels; gradients of the sum over n of scale_n (1) times -log p(label_n).

    `dtype` is that of the matrix products (None: as the inputs), `wanted` whose gradient: hidden's, weight's.
    """
    if len(hidden_ND) != len(labels_N):
        raise ValueError(f"found {len(hidden_ND)} hidden states and {len(labels_N)} labels, wanted as many")
    wide = _wide(hidden_ND)
    log_probs_N = hidden_ND.new_empty(len(labels_N), dtype=wide)
    d_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
    d_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
    hidden, weight = (one if dtype is None else one.to(dtype) for one in (hidden_ND, weight_VD))
    num_rows = min(max(1, CHUNK_ELEMENTS // len(weight)), len(hidden))
    # Filled anew by every chunk: on a CPU, page faults of fresh memory would take a sixth of the time.
    logits = hidden.new_empty(num_rows, len(weight))
    softmax = torch.empty_like(logits, dtype=wide)
    for start in range(0, len(hidden), num_rows or 1):
        chunk = slice(start, start + num_rows)
        hidden_CD, labels_C1 = hidden[chunk], labels_N[chunk, None]
        logits_CV = torch.mm(hidden_CD, weight.t(), out=logits[: len(hidden_CD)])
        log_probs_CV = torch.log_softmax(logits_CV, -1, dtype=wide, out=softmax[: len(hidden_CD)])
        picked_C1 = log_probs_CV.gather(1, labels_C1)
        log_probs_N[chunk] = picked_C1[:, 0]
        if any(wanted):  # d -log p / d logits = softmax - onehot, at the label p - 1 = expm1(log p)
            d_logits_CV = torch.exp(log_probs_CV, out=logits_CV)
            d_logits_CV.scatter_(1, labels_C1, picked_C1.expm1().to(logits_CV.dtype))
        scale_C1 = 1 if scale_N is None else scale_N[chunk, None]
        if d_hidden_ND is not None:
            d_hidden_ND[chunk] = (logits_CV @ weight) * scale_C1
        if d_weight_VD is not None and hidden.dtype == wide:
            d_weight_VD.addmm_(logits_CV.t(), hidden_CD * scale_C1)
        elif d_weight_VD is not None:
            d_weight_VD += logits_CV.t() @ (hidden_CD * scale_C1).to(hidden.dtype)
    return log_probs_N, d_hidden_ND, d_weight_VD


def _wide(like: Tensor) -> torch.dtype:
    """The type of softmax and sums: at least float32."""
    return torch.promote_types(like.dtype, torch.float32)


def _autocast_dtype(like: Tensor) -> torch.dtype | None:
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
