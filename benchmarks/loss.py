"""Head and cross-entropy of one training step, forward and backward (`loss`): beside the full logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import Call, Numbers, Result, cpu_seconds, in_turn, medians, peak_bytes


def loss(
    work: Path,
    *,
    call: Call,
    num_positions: int = 1_024,
    vocab_size: int = 128_256,
    hidden_size: int = 576,
    repetitions: int = 5,
) -> Result:
    """The mean cross-entropy of `num_positions` and its gradients, of hidden states and head, in float32."""
    shape = {"num_positions": num_positions, "vocab_size": vocab_size, "hidden_size": hidden_size}
    samples = in_turn(
        repetitions,
        peer=partial(call, _measured, name="full", **shape),
        ours=partial(call, _measured, name="ours", **shape),
    )
    samples["trl"] = [call(_measured, name="trl", **shape)]
    equal = call(_equal, **shape)
    peer, ours = medians(samples["peer"]), medians(samples["ours"])
    ratio, bar = peer["cpu_seconds"] / ours["cpu_seconds"], 0.87
    memory = peer["growth_bytes"] / ours["growth_bytes"]
    return Result(
        peer=peer,
        ours=ours,
        ratio=ratio,
        bar=bar,
        promises={
            "CPU time": ratio >= bar,
            "memory at most a third": memory >= 3,
            "same loss and gradients": equal,
        },
        repetitions=repetitions,
        compared=(
            f"Mean cross-entropy of {num_positions:,} positions over {vocab_size:,} tokens, of hidden states "
            f"of size {hidden_size} and the head, forward and backward, float32, one thread. Peer: "
            "functional.linear and functional.cross_entropy. Ours: losses.summed_cross_entropy. The bar is "
            "1 / 1.15. growth_bytes: the most resident memory (ru_maxrss) less the resident memory before, "
            "inputs included and touched; a first run over a few positions and imports are left out. trl: "
            "the kernel of its fused head, which falls back to torch on a CPU, with what SFTTrainer asks "
            "of it (entropy and accuracy, too), measured once."
        ),
        samples=samples,
        extra={"memory_ratio": memory, "trl": samples["trl"][0]},
    )


@contextmanager
def cpu_and_growth(numbers: Numbers) -> Iterator[None]:
    """Write CPU seconds, and by how many bytes the peak of resident memory passes what is resident now."""
    before = psutil.Process().memory_info().rss
    with cpu_seconds(numbers):
        yield
    numbers["growth_bytes"] = peak_bytes() - before


def _inputs(num_positions: int, vocab_size: int, hidden_size: int) -> tuple[Any, Any, Any]:
    """Hidden states, head and labels; filled in place, so that nothing larger was ever resident."""
    import torch

    draw = torch.Generator().manual_seed(0)
    hidden = torch.empty(num_positions, hidden_size).normal_(generator=draw)
    weight = torch.empty(vocab_size, hidden_size).normal_(std=0.05, generator=draw)
    labels = torch.randint(0, vocab_size, (num_positions,), generator=draw)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def _mean_loss(name: str, hidden: Any, weight: Any, labels: Any) -> Any:
    from torch.nn import functional

    if name == "full":
        total = functional.cross_entropy(functional.linear(hidden, weight), labels, reduction="sum")
    elif name == "ours":
        from smol_post.losses import summed_cross_entropy

        total = summed_cross_entropy(hidden, weight, labels)
    else:
        from trl.kernels import ChunkedLogProbFunction

        wanted = ("log_probs", "entropy", "is_top1")
        made: Any = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32_768, None, 1.0, wanted)
        total = -made[0].sum()
    return total / len(labels)


def _measured(name: str, num_positions: int, vocab_size: int, hidden_size: int) -> Numbers:
    _mean_loss(name, *_inputs(4, 100, hidden_size)).backward()
    given = _inputs(num_positions, vocab_size, hidden_size)
    numbers: Numbers = {}
    with cpu_and_growth(numbers):
        _mean_loss(name, *given).backward()
    return numbers


def _equal(num_positions: int, vocab_size: int, hidden_size: int) -> bool:
    """Whether full and ours agree to 1e-5 of the largest element, in the loss and both gradients."""
    found: list[list[Any]] = []
    for name in ("full", "ours"):
        hidden, weight, labels = _inputs(num_positions, vocab_size, hidden_size)
        made = _mean_loss(name, hidden, weight, labels)
        made.backward()
        found.append([made.detach(), hidden.grad, weight.grad])
    return all(bool((a - b).abs().max() <= 1e-5 * a.abs().max()) for a, b in zip(*found, strict=True))
