"""From samples to a batch: several short ones share a row, and nothing passes between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmm_export.distillation.batch import NO_TARGET, Batch
from mmm_export.distillation.conversation import Sample
from mmm_export.spec import ModelSpec

ROW_MULTIPLE = 64  # row lengths are rounded up to it: whole chunks for the scan, and fewer different shapes


def rows_of(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Assign samples to rows of at most `max_tokens`: the first row with room, in order. Returns the samples of each row."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        row = next((r for r, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].append(i)
        room[row] -= length
    return rows


def batch_from_samples(
    samples: Sequence[Sample], spec: ModelSpec, *, max_tokens: int, packing: bool, dtype: torch.dtype
) -> Batch:
    """Put samples into rows.

    Args:
        samples: none of them longer than `max_tokens`; none at all gives a batch of padding, which trains nothing.
        spec: the model.
        max_tokens: longest row.
        packing: whether samples share rows.
        dtype: of the pixels.
    """
    lengths = [len(sample.ids) for sample in samples]
    rows = rows_of(lengths, max_tokens) if packing else [[i] for i in range(len(samples))]
    longest = max((sum(lengths[i] for i in row) for row in rows), default=1)
    T = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    B = max(1, len(rows))
    ids = np.zeros((B, T), np.int64)
    targets = np.full((B, T), NO_TARGET, np.int64)
    positions = np.tile(np.arange(T), (B, 1))
    segments = np.full((B, T), -1, np.int32)
    for r, row in enumerate(rows):
        start = 0
        for number, i in enumerate(row):
            sample, end = samples[i], start + lengths[i]
            ids[r, start:end] = sample.ids
            targets[r, start : end - 1] = np.where(sample.answers[1:], sample.ids[1:], NO_TARGET)
            positions[r, start:end] = np.arange(lengths[i])
            segments[r, start:end] = number
            start = end
        positions[r, start:] = 0
    side = spec.vision.tile_size
    tiles = [samples[i].pixels for row in rows for i in row]
    pixels = np.concatenate(tiles) if tiles else np.zeros((0, 3, side, side), np.float32)
    return Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        valid=torch.from_numpy(segments >= 0),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments) if any(len(row) > 1 for row in rows) else None,
        pixels=torch.from_numpy(pixels).to(dtype),
        samples=len(samples),
    )
