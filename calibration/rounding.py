"""The grids that numbers are rounded to, and weights on them: int8 by column, int4 by group, FP8 E4M3 by column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mmm_export.manifest import Dtype

Array = NDArray[Any]

STORED: dict[Dtype, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
# The least normal number: below it float16 scales lose digits. Nothing that small matters beside its neighbours.
_LEAST = {"fp32": 1e-30, "fp16": 6.104e-5, "bf16": 1e-30}


@dataclass(frozen=True)
class Grid:
    """Numbers that a scale multiplies: `least` to `largest`, integers or those of FP8 E4M3."""

    name: str
    least: float
    largest: float
    is_float: bool = False


INT8 = Grid("int8", -127, 127)
INT4 = Grid("int4", -8, 7)
FP8 = Grid("fp8", -448, 448, is_float=True)


def on_grid(values: Array, grid: Grid) -> Array:
    """Nearest numbers of the grid, saturated, as float32; ties go to even."""
    clipped = np.clip(values, grid.least, grid.largest)
    if grid.is_float:
        return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    rounded: Array = np.rint(clipped)
    return rounded


def round_to_grid(values: Array, scale: Array | float, grid: Grid) -> Array:
    """What quantizing and dequantizing makes of values."""
    rounded: Array = on_grid(values / scale, grid) * scale
    return rounded


def stored_scale(scale: Array, dtype: Dtype) -> Array:
    """Scales as the graph stores them, back in float32: integers must be found with the rounded scale."""
    safe = np.maximum(np.asarray(scale, np.float32), _LEAST[dtype])
    return np.asarray(safe.astype(STORED[dtype]).astype(np.float32))


# Where in its power of two a float's scale lies: the numbers of a grid of floats are as many in each, so none of these saturates, and
# one rounds what is there best.
FLOAT_RATIOS = tuple(2 ** (i / 8) for i in range(8))


def column_scales(weight: Array, grid: Grid, dtype: Dtype) -> Array:
    """One scale a column, (N,), of a weight (K, N): the least that saturates nothing; of floats that with the least squared error."""
    least = np.abs(weight).max(0, initial=0.0) / grid.largest
    if not grid.is_float:
        return stored_scale(least, dtype)
    best: Array = least
    smallest = np.full(least.shape, np.inf, np.float32)
    for ratio in FLOAT_RATIOS:
        scale = stored_scale(least * np.float32(ratio), dtype)
        error = np.square(weight - round_to_grid(weight, scale, grid)).sum(0)
        best, smallest = np.where(error < smallest, scale, best), np.minimum(error, smallest)
    return best


def group_size(rows: int, wanted: int) -> int:
    """The largest group of at most `wanted` rows that divides K, a power of two from 16; 0 when there is none."""
    size = wanted
    while size >= 16 and rows % size:
        size //= 2
    return size if size >= 16 else 0


# How far the range of an int4 group is narrowed: saturating its extreme buys finer steps for the rest.
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def group_scales(weight: Array, size: int, importance: Array | None, dtype: Dtype) -> Array:
    """One scale for each group of `size` rows in each column, (K / size, N), of a weight (K, N).

    With `importance` (K,), the mean square of each input channel, every group gets the narrowing of CLIP_RATIOS that costs the
    output least.
    """
    K, N = weight.shape
    groups = weight.reshape(K // size, size, N)
    widest = np.abs(groups).max(1) / INT4.largest
    best = stored_scale(widest, dtype)
    if importance is None:
        return best
    weights = importance.reshape(K // size, size, 1).astype(np.float32)
    least = np.full(best.shape, np.inf, np.float32)
    for ratio in CLIP_RATIOS:
        scale = stored_scale(widest * np.float32(ratio), dtype)
        error = groups - round_to_grid(groups, scale[:, None], INT4)
        loss = (weights * error * error).sum(1)
        better = loss < least
        least = np.where(better, loss, least)
        best = np.where(better, scale, best)
    return best


def on_group_grid(weight: Array, scales: Array, size: int) -> Array:
    """Integers of a weight (K, N) with the scales of its groups, int8 in -8..7."""
    K, N = weight.shape
    integers = on_grid(weight.reshape(K // size, size, N) / scales[:, None], INT4)
    return integers.reshape(K, N).astype(np.int8)
