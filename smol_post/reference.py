"""Log-probabilities of the reference, computed once: an artefact of (weights, pairs, rounding), on disk.

    cache/reference/<key>/log_probs.npy    float32 (num_pairs, 2): chosen, rejected; pairs by address

The key knows the pairs as a set: the seeds of a soup, which differ in the order of pairs, share one file, and
so does every resume.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from smol_post import adapters, batches, manifest
from smol_post.data import Prepared
from smol_post.documents import folder_of, once
from smol_post.refusal import Refusal
from smol_post.trainers import SHARDED, add_scoring, answer_log_probs

Rounding = Literal["nothing", "products", "parameters"]
FOLDER = "reference"
_WINDOW_PAIRS = 64  # read at once, and cut into micro-batches

_CODE = ("reference.py", "adapters.py", "trainers.py", "losses.py", "batches.py", "attention.py",
         "sequence.py", "data.py",
         "model.py")  # fmt: skip
_FILE = "log_probs.npy"


def with_reference(
    prepared: Prepared,
    lm: PreTrainedModel,
    *,
    weights: str,
    cache_dir: Path,
    micro_batch_tokens: int,
    rounding: Rounding = "nothing",
    announce: Callable[[str], None],
) -> Prepared:
    """The pairs with a column `reference`, [log p of chosen, of rejected] under `lm`, from the cache.

    `weights` is the digest of the checkpoint that `lm` was loaded from. Policy and reference agree at step 0
    where `rounding` is that of training. Adapters are off. Every process computes its part, the first one
    writes. `lm` ends as it was.
    """
    addresses = np.stack(prepared.index.with_format("numpy")["address"][:]).reshape(-1, 2)
    _, first, inverse = np.unique(addresses[:, 0], return_index=True, return_inverse=True)
    key = manifest.digest_tree(
        {
            "weights": weights,
            "documents": [store.folder.name for store in prepared.stores],
            "pairs": manifest.digest_text(str(addresses[first].tolist())),
            "attention": lm.config._attn_implementation,
            "rounding": rounding,
            "device": PartialState().device.type,  # pyright: ignore[reportOptionalMemberAccess]
            "versions": manifest.versions(),
            "code": [resources.files("smol_post").joinpath(name).read_text() for name in _CODE],
        }
    )
    state = PartialState()
    known = all(gather_object([manifest.is_sealed(folder_of(cache_dir / FOLDER, key))]))  # one answer for all
    parts: list[Any] = []
    if not known:
        mine = np.arange(len(first))[state.process_index :: state.num_processes]
        started = time.monotonic()
        rows = prepared.index.with_transform(prepared.reader)
        found = _compute(lm, rows, first[mine], micro_batch_tokens, rounding)
        parts = gather_object([(mine, found)])
        announce(
            f"reference: {len(first):,} pairs in {time.monotonic() - started:.0f} s, kept for every seed"
        )

    def write(target: Path) -> None:
        table = np.full((len(first), 2), np.nan, np.float32)
        for positions, values in parts:
            table[positions] = values
        if not np.isfinite(table).all():
            raise Refusal("reference: log-probabilities that are not finite; mend the parent's weights")
        np.save(target / _FILE, table)

    if state.is_main_process:
        once(cache_dir / FOLDER, key, write)
    state.wait_for_everyone()
    table = np.load(folder_of(cache_dir / FOLDER, key) / _FILE)
    return prepared.with_column("reference", table[inverse.ravel()])


def rounding_of(accelerator: Accelerator) -> Rounding:
    """What training rounds to bfloat16: products under autocast; FSDP and ZeRO have rounded parameters."""
    if accelerator.mixed_precision == "no":
        return "nothing"
    return "parameters" if accelerator.distributed_type in SHARDED else "products"


@contextlib.contextmanager
def _rounded(lm: PreTrainedModel, rounding: Rounding) -> Iterator[None]:
    whole = {one: one.data for one in lm.parameters()} if rounding == "parameters" else {}
    for parameter in whole:
        parameter.data = parameter.data.bfloat16()
    try:
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=rounding == "products"):
            yield
    finally:
        for parameter, data in whole.items():
            parameter.data = data


@torch.no_grad()
def _compute(
    lm: PreTrainedModel, rows: Any, wanted: np.ndarray, micro_batch_tokens: int, rounding: Rounding
) -> np.ndarray:
    """(len(wanted), 2) log-probabilities of these rows, a window of pairs at a time."""
    add_scoring(lm)
    device = torch.device(PartialState().device or "cpu")
    before, training = lm.device, lm.training
    lm.to(device).eval()  # pyright: ignore[reportArgumentType]
    found = np.zeros((len(wanted), 2), np.float32)
    with _rounded(lm, rounding), adapters.off(lm):
        for start in range(0, len(wanted), _WINDOW_PAIRS):
            window = rows[wanted[start : start + _WINDOW_PAIRS].tolist()]
            each = zip(*window.values(), strict=True)
            batch = batches.collate([dict(zip(window, row, strict=True)) for row in each])
            batch["number"] = [n for n in range(start, start + len(window["address"])) for _ in range(2)]
            for part in batches.cut(batch, max_tokens=micro_batch_tokens):
                part |= {key: part[key].to(device) for key in ("input_ids", "labels")}
                found[part.pop("number")[::2]] = answer_log_probs(lm, part).float().cpu().numpy()
    lm.to(before).train(training)  # pyright: ignore[reportArgumentType]
    return found
