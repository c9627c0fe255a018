"""What training costs, by arithmetic: parameters, updates, operations, bytes. No torch; nothing is measured.

Letters: P parameters, L layers, h hidden size, q = heads x head_dim, k = KV heads x head_dim, f FFN size, T
tokens of a micro-batch on one device, n devices, o bytes of optimiser state a parameter, c bytes of a number
in the products (2 in bf16, 4 in float32).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from smol_post.launch_files import Launch
from smol_post.refusal import Refusal, describe

GIB = 2**30
# Dense bf16 of an H100 SXM in TFLOP/s (NVIDIA's data sheet: 1,979 with sparsity), and our choice of the share
# of it that training reaches, recomputation counted as work.
PEAK_TFLOPS, MFU = 989.0, 0.40
# Bytes a parameter of what the optimisers keep, by the names of `trainer.optim`: float32 moments, two of
# AdamW (arXiv:1711.05101), one of Lion (arXiv:2302.06675), none of SGD without momentum; quantised ones a
# byte each, without scales and what they leave in float32. AdaFactor keeps a row and a column of a matrix.
OPTIMIZER_BYTES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "stable_adamw", "paged_adamw_32bit"), 8),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop"), 4),
    **{"adamw_torch_4bit": 1, "lion_8bit": 1, "paged_lion_8bit": 1, "sgd": 0, "adafactor": 0},
}
ADAMW = "adamw_torch_fused"  # TRL's default
# `losses.CHUNK_ELEMENTS` and `trainers.FEW_LOGITS`, which need torch to be imported; a test compares.
CHUNK_ELEMENTS, FEW_LOGITS = 2**24, 2**20
# DeepSpeed's defaults: elements of its buffer of gradients; parameters that ZeRO-3 keeps whole at a time.
BUCKET, LIVE = 500_000_000, 1_000_000_000
# The keys of SmolLM3Config that decide sizes, with its defaults; those of Llama and its kin are alike.
_SMOLLM3 = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
# By model_type: whether queries, keys and values have a bias though the config is silent.
_FAMILIES = {"smollm3": False, "llama": False, "mistral": False, "qwen2": True}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder such as Llama or SmolLM3."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], *, where: str) -> "Shape":
        """From keys of a config.json; where it is silent about sizes, SmolLM3Config's defaults.

        Raises Refusal for another family of models, and for what is no size.
        """
        family = config.get("model_type", "smollm3")
        if family not in _FAMILIES:
            known = ", ".join(_FAMILIES)
            raise Refusal(f"{where}: model_type: found {describe(family)}, wanted one of {known}")
        if family != "smollm3":
            missing = [key for key in _SMOLLM3 if key not in config and key not in _OPTIONAL]
            if missing:
                raise Refusal(f"{where}: {missing[0]}: this key is missing; add it")
            given: dict[str, Any] = {
                "num_key_value_heads": config.get("num_attention_heads"),
                "tie_word_embeddings": False,
            }
        else:
            given = dict(_SMOLLM3)
        given |= {key: config[key] for key in (*_SMOLLM3, "head_dim") if config.get(key) is not None}
        for key, value in given.items():
            if key != "tie_word_embeddings" and (not isinstance(value, int) or value < 1):
                raise Refusal(f"{where}: {key}: found {describe(value)}, wanted a whole number above 0")
        given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
        biased = bool(config.get("attention_bias", False))
        return cls(
            **given,
            qkv_bias=biased or _FAMILIES[family],
            output_bias=biased,
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    @property
    def q(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def k(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def matrices(self) -> list[int]:
        """Parameters of each matrix of a layer: q, k, v, o, gate, up, down."""
        h, q, k, f = self.hidden_size, self.q, self.k, self.intermediate_size
        return [h * q, h * k, h * k, q * h, h * f, h * f, f * h]

    def adapter(self, r: int, names: list[str] | str) -> int:
        """Parameters of LoRA's two matrices of rank r at the named matrices of every layer, or at all."""
        h, q, k, f = self.hidden_size, self.q, self.k, self.intermediate_size
        ends = {"q_proj": h + q, "k_proj": h + k, "v_proj": h + k, "o_proj": q + h}
        ends |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), h + f)
        every = isinstance(names, str)
        return self.num_hidden_layers * r * sum(ends[one] for one in ends if every or one in names)

    @property
    def layer(self) -> int:
        """Parameters of a layer: matrices, two norms, biases."""
        h, q, k, f = self.hidden_size, self.q, self.k, self.intermediate_size
        biases = self.qkv_bias * (q + 2 * k) + self.output_bias * h + self.mlp_bias * (2 * f + h)
        return sum(self.matrices) + 2 * h + biases

    @property
    def num_parameters(self) -> int:
        """All, a tied head counted once: 3,075,098,624 of SmolLM3-3B."""
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.embedding + self.num_hidden_layers * self.layer + self.hidden_size

    @property
    def matmul_parameters(self) -> int:
        """Those that every token is multiplied by: matrices and the head, not the embedding's lookup."""
        return self.num_hidden_layers * sum(self.matrices) + self.embedding


_OPTIONAL = ("num_key_value_heads", "tie_word_embeddings")


def num_steps(*, updates_per_epoch: int, num_steps: int | None, num_epochs: float | None) -> int:
    """Updates of a run, as the Trainer counts them: of 2.5 epochs of 3 updates 8.

    >>> num_steps(updates_per_epoch=3, num_steps=None, num_epochs=2.5)
    8
    """
    return num_steps or math.ceil((num_epochs or 0) * updates_per_epoch)


def flops_per_token(
    shape: Shape, *, document_tokens: float, checkpointing: bool, frozen: bool = False
) -> float:
    """Operations of forward and backward a token, causal attention included.

    6 a parameter of a matrix, 6 L q a token of the document: a query meets half of its document on average,
    keys and then values, 2 operations each, three times with the backward pass (PaLM, arXiv:2204.02311,
    appendix B, halved for causality). Checkpointing makes one forward pass more, 2 a parameter and 2 of the
    attention. `frozen`: no gradients of weights, 2 a parameter less; an adapter's own are not counted.
    """
    attention = shape.num_hidden_layers * shape.q * document_tokens
    again = 2 if checkpointing else 0
    return (6 + again) * (shape.matmul_parameters + attention) - 2 * frozen * shape.matmul_parameters


def forward_flops_per_token(shape: Shape, *, document_tokens: float) -> float:
    """A third of the above without checkpointing: of the reference, which only scores."""
    return flops_per_token(shape, document_tokens=document_tokens, checkpointing=False) / 3


@dataclass(frozen=True)
class Work:
    """What one device does at a time: T tokens, how they are computed, and what is kept from step to step."""

    tokens: float
    bf16: bool
    checkpointing: bool
    accumulates: bool
    optimizer: str
    live_reference: bool = False
    adapter: int | None = None  # parameters of an adapter, which alone is trained
    weight_bytes: float = 4.0


def layer_bytes_per_token(shape: Shape, *, bf16: bool, sharded: bool) -> int:
    """What a layer keeps of a token for its backward pass, in bytes; tensors of width 1 and H are float32.

                    float32     bf16 autocast                bf16 copies (FSDP2, ZeRO)
    norms, twice    x, x^ : 2h  x, x^ in float32             x in float32, x^ in bf16
    their factors   1, twice    the same                     the same
    to the matrices h, twice    a cast each: 5h in bf16      h, twice, in bf16
    attention       q k v out: 2q + 2k; H float32 (log-sum-exp)
    to o            q           out, put together again
    FFN             gate, silu(gate), up, silu x up: 4f

    Read off torch's saved tensors; a test holds the three columns against them.
    """
    h, f, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    inner = 3 * shape.q + 2 * shape.k + 4 * f
    if not bf16:
        return 4 * (6 * h + 2 + heads + inner)
    if sharded:
        return 4 * (2 * h + 2 + heads) + 2 * (4 * h + inner)
    return 4 * (4 * h + 2 + heads) + 2 * (5 * h + inner)


def logits_bytes(shape: Shape, tokens: float, *, c: int) -> float:
    """The loss: a chunk of logits and of their softmax, the gradients of hidden states and of the head.

    Every token is taken as trained. The gradient of the head is float32 and a whole embedding large; it waits
    for that of the embedding, with which it is one tensor if tied.
    """
    rows = min(tokens, max(1, CHUNK_ELEMENTS // shape.vocab_size))
    if tokens * shape.vocab_size <= FEW_LOGITS:
        rows *= 2
    hidden = 2 * tokens * shape.hidden_size * c
    copy = 2 * shape.embedding if c == 2 else 0
    return rows * shape.vocab_size * (c + 4) + hidden + 4 * shape.embedding + copy


def memory(shape: Shape, work: Work, launch: Launch) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes by part on each device when most is needed, and in main memory by offloading (of each process).

    Three moments are compared: the end of the forward pass (all activations, the loss), of the backward pass
    (all gradients, one layer, the embedding's gradient beside the head's), and the optimiser's step. What is
    kept from step to step is as the ZeRO paper has it (arXiv:1910.02054, section 3):

                     weights          gradients   optimiser
    one, DDP         4P               4P          oP          DDP has a second set of gradients, its buckets
    FSDP2            4P/n             4P/n        oP/n        layers are gathered in the type of the products
    ZeRO-1           cP               cP          (4+o)P/n    the float32 weights are the optimiser's
    ZeRO-2           cP               cP/n        (4+o)P/n
    ZeRO-3           cP/n             cP/n        (4+o)P/n
    """
    P, n, T = shape.num_parameters, launch.num_processes, work.tokens
    o, c = OPTIMIZER_BYTES.get(work.optimizer, OPTIMIZER_BYTES[ADAMW]), 2 if work.bf16 else 4
    layers, zero, sharded = shape.num_hidden_layers, launch.zero_stage, launch.is_sharded
    if work.adapter is not None:  # counted whole on every device, the frozen weights as float32 or NF4
        A = float(work.adapter)
        held = {
            "weights": (c if zero else work.weight_bytes) * P + 4 * A,
            "gradients": 4 * A,
            "optimizer": o * A,
        }
        held["weights"] /= n if launch.kind == "FSDP2" else 1
        each = layer_bytes_per_token(shape, bf16=work.bf16, sharded=sharded) * T
        kept = (c if sharded else 4) * shape.hidden_size * T if work.checkpointing else each
        gathered = 2.0 * c * shape.layer + c * shape.embedding if launch.kind == "FSDP2" else 0.0
        activations = layers * kept + (each if work.checkpointing else 0) + 12 * shape.hidden_size * T
        logits = logits_bytes(shape, T, c=c) - 4 * shape.embedding  # whose gradient is not wanted
        parts = {"activations": activations, "logits": logits, "working": gathered, "reference": 0.0}
        return held | parts, {}
    held = {"weights": 4.0 * P, "gradients": 4.0 * P, "optimizer": 1.0 * o * P}
    extra = 0.0  # whole layers, buffers
    if launch.kind == "FSDP2":
        held = {key: one / n for key, one in held.items()}
        extra = 2.0 * c * shape.layer + (c + 4) * shape.layer + c * (shape.embedding + shape.hidden_size)
        if not launch.reshard:
            extra += c * (layers - 2) * shape.layer
    elif zero:
        held = {
            "weights": c * P / (n if zero == 3 else 1),
            "gradients": c * P / (n if zero >= 2 else 1),
            "optimizer": (4.0 + o) * P / n,
        }
        extra = min(c * BUCKET, c * P) + (min(c * LIVE, c * P) if zero == 3 else 0)
    elif launch.kind == "DDP":
        extra = 4.0 * P
    copies = 2 * sum(shape.matrices) if work.bf16 and not sharded else 0  # of a layer, by autocast
    embedding = 4.0 * shape.embedding * shape.tie_word_embeddings  # its gradient, beside the head's
    each = layer_bytes_per_token(shape, bf16=work.bf16, sharded=sharded) * T
    stream = (c if sharded else 4) * shape.hidden_size * T  # the residual stream, all that checkpoints keep
    around = 2 * stream + 4 * shape.hidden_size * T  # embedded tokens, the last norm
    ffn = 3 * c * shape.intermediate_size * T  # gradients inside an FFN
    kept_each = stream if work.checkpointing else each
    everything = layers * kept_each + around
    one_layer = (each if work.checkpointing else 0) + ffn
    reference = 0.0
    if work.live_reference:
        reference = (c if zero == 3 or launch.kind == "FSDP2" else 4.0) * P
        reference /= n if zero == 3 or launch.kind == "FSDP2" else 1
    logits = logits_bytes(shape, T, c=c)
    static = {"weights": held["weights"], "optimizer": held["optimizer"], "reference": reference}
    moments = [
        {
            **static,
            "gradients": held["gradients"] if work.accumulates else 0.0,
            "activations": everything + layers * copies,
            "logits": logits,
            "working": extra,
        },
        {
            **static,
            "gradients": held["gradients"],
            "activations": kept_each + one_layer + copies,
            "logits": 0.0,
            "working": extra + embedding * (2 if work.accumulates and not sharded else 1),
        },
        {
            **static,
            "gradients": held["gradients"],
            "activations": 0.0,
            "logits": 0.0,
            "working": (extra if launch.kind in ("DDP", "FSDP2") else 0.0) + (4.0 * P / n if zero else 0),
        },
    ]
    host = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for one in moments:
        if launch.offload_optimizer:
            host |= {"optimizer": one["optimizer"], "gradients": 4.0 * P / n}
            one["optimizer"] = 0.0
        if launch.offload_parameters:
            host |= {"weights": one["weights"]}
            one["weights"] = 0.0
        if launch.kind == "FSDP2" and launch.offload_parameters:
            host |= {"gradients": held["gradients"]}
            one["gradients"] = 0.0
    return max(moments, key=lambda one: sum(one.values())), host


def checkpoint_bytes(shape: Shape, work: Work, launch: Launch) -> float:
    """A checkpoint on the way: what is trained in float32, the optimiser's state; engines add their own."""
    o = OPTIMIZER_BYTES.get(work.optimizer, OPTIMIZER_BYTES[ADAMW])
    trained = shape.num_parameters if work.adapter is None else work.adapter
    return trained * (4.0 + o + (4.0 if launch.is_sharded else 0))


def inference_bytes(shape: Shape, *, dtype: str, context: int) -> tuple[float, float]:
    """(weights, keys and values of one sequence). Quantised weights: their scales are not counted.

    The cache is in float32 with float32 weights, else in bfloat16: 2 L k numbers a token.
    """
    weights = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}[dtype]
    number = 4 if dtype == "float32" else 2
    return shape.num_parameters * weights, 2.0 * shape.num_hidden_layers * shape.k * number * context


def what_fits(
    shape: Shape, work: Work, launch: Launch, *, room: float, splits: bool
) -> list[tuple[str, float]]:
    """Changes, each alone or with those before it, that bring a device below `room` bytes: (what, bytes).

    In this order: checkpointing, sharding, more devices, each sequence over several devices.
    """

    def total(work: Work, launch: Launch) -> float:
        return sum(memory(shape, work, launch)[0].values())

    found: list[tuple[str, float]] = []
    words: list[str] = []
    if not work.checkpointing:
        work = replace(work, checkpointing=True)
        words.append("trainer.activation_checkpointing: true")
        if (need := total(work, launch)) <= room:
            return [(words[0], need)]
    zero3 = Launch(kind="ZeRO-3", zero_stage=3)
    for kind in (
        Launch(kind="FSDP2"),
        zero3,
        replace(zero3, offload_optimizer=True, offload_parameters=True),
    ):
        offload = " with offload" * kind.offload_optimizer
        start = max(launch.num_processes, 1)
        for split in (1, 2, 4, 8) if splits and kind.zero_stage == 0 else (1,):
            for devices in [start * 2**power for power in range(8)]:
                trial = replace(kind, num_processes=devices, sequence_split=split)
                if devices % split or devices < 2:
                    continue
                need = total(replace(work, tokens=work.tokens * launch.sequence_split / split), trial)
                if need <= room:
                    parts = f", each sequence over {split}" if split > 1 else ""
                    text = f"{kind.kind}{offload} on {devices} devices{parts}"
                    found.append((" + ".join([*words, text]), need))
                    break
            else:
                continue
            break
    return found
