"""Rows of documents -> one flat row a batch, and pairs cut by a budget of tokens.

    rows   {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2], ...}
      | collate         every document of every row, end to end; nothing is padded; num_trained 2 1
      | cut             pairs (documents two by two) into micro-batches of at most so many tokens
      v model_inputs    position_ids 0 1 2 0 1, cu_seq_lens 0 3 5

Shape suffixes: T tokens of the batch (its first dimension is always 1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from smol_post.data import IGNORED
from smol_post.packing import best_fit_decreasing
from smol_post.sequence import Parts, Split

Batch = dict[str, Any]


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """The rows end to end: input_ids_1T and labels_1T as tensors, seq_lengths and other columns as lists.

    `num_trained` says how many tokens of each document carry loss. Lists stay what they are on the way to a
    device, so what is known of documents is known without asking it.
    """
    batch: Batch = {}
    for key, value in rows[0].items():
        if key in ("input_ids", "labels"):
            batch[key] = torch.from_numpy(np.concatenate([np.asarray(row[key]) for row in rows]))[None]
        elif isinstance(value, list):
            batch[key] = [one for row in rows for one in row[key]]
    trained_T = batch["labels"][0].numpy() != IGNORED
    batch["num_trained"] = np.add.reduceat(trained_T, _edges(batch)[:-1], dtype=np.int64).tolist()
    return batch


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What the model's forward takes: ids, positions that restart with every document, and their borders.

    No attention mask: with one, transformers would let documents see each other. Lengths 3 and 2:
        position_ids 0 1 2 0 1   cu_seq_lens_q 0 3 5   max_length_q 3
    """
    device, edges = batch["input_ids"].device, _edges(batch)
    positions = np.arange(edges[-1]) - np.repeat(edges[:-1], batch["seq_lengths"])
    borders = torch.from_numpy(edges).to(device, torch.int32)
    return {
        "input_ids": batch["input_ids"],
        "position_ids": torch.from_numpy(positions)[None].to(device),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(batch["seq_lengths"]),
        "max_length_k": max(batch["seq_lengths"]),
        "use_cache": False,
    }


def part_inputs(batch: Batch, parts: Parts) -> dict[str, Any]:
    """`model_inputs` with `scored_labels`, of this process's part of the row; borders are those of the whole.

    Labels reach one token further than ids: the last token of a part predicts the first of the next.
        ids 5 6 7 | 8 9   position_ids 0 1 2 | 0 1   scored_labels 5 6 7 8 | 8 9
    """
    inputs = {**model_inputs(batch), "scored_labels": batch["labels"]}
    if parts.size > 1:
        num_tokens = batch["input_ids"].shape[1]
        start, stop = parts.bounds(num_tokens)[parts.index : parts.index + 2]
        inputs |= {key: inputs[key][:, start:stop] for key in ("input_ids", "position_ids")}
        inputs |= {"scored_labels": batch["labels"][:, start : stop + 1], "split": Split(parts, num_tokens)}
    return inputs


def _edges(batch: Batch) -> np.ndarray:
    """Where each document begins, and where the last one ends: 0 3 5."""
    return np.cumsum([0, *batch["seq_lengths"]])


def cut(batch: Batch, *, max_tokens: int, at_least: int = 1) -> list[Batch]:
    """Micro-batches of at most `max_tokens` tokens that hold every pair once, as few as there may be.

    `at_least` so many come out (one pair each at most), so that processes can agree on a number. A pair
    longer than `max_tokens` raises ValueError.

    Pairs of 900, 200 and 100 tokens, max_tokens 1,000: [900 100], [200].
    """
    lengths = batch["seq_lengths"]
    tokens = np.asarray(lengths).reshape(-1, 2).sum(1)
    if tokens.max() > max_tokens:
        raise ValueError(f"a pair has {tokens.max()} tokens, a micro-batch at most {max_tokens}")
    packs = best_fit_decreasing(tokens, max_tokens)
    parts = np.split(packs.document, packs.bounds[1:-1])
    while len(parts) < at_least:
        largest = parts.pop(int(np.argmax([len(part) for part in parts])))
        parts += [largest[::2], largest[1::2]]
    return [take_pairs(batch, sorted(part.tolist())) for part in parts]


def take_pairs(batch: Batch, pairs: Sequence[int]) -> Batch:
    """The batch of these pairs alone."""
    sides = [side for pair in pairs for side in (2 * pair, 2 * pair + 1)]
    made: Batch = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            documents = value[0].split(batch["seq_lengths"])
            made[key] = torch.cat([documents[side] for side in sides])[None]
        else:
            made[key] = [value[side] for side in sides]
    return made
