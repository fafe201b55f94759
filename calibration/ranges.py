"""From a histogram of magnitudes to the magnitude at which a quantizer saturates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mmm_export.calibration.rounding import FLOAT_RATIOS, Grid, round_to_grid
from mmm_export.calibration.statistics import BINS, Histogram

Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)
PERCENTILE = 99.99
_CANDIDATES = 96  # saturation points tried, evenly over the histogram's used part: finer than a hundredth of the range
_LEVELS = 128  # of an int8 magnitude, which the entropy method merges bins into

Array = NDArray[Any]


def clip_from_histogram(histogram: Histogram, largest: float, method: Method, grid: Grid) -> float:
    """Magnitude at which to saturate, at most `largest`, which is the largest that occurred.

    On a grid of floats nothing saturates whatever the method: the magnitude, at least `largest`, is that which rounds best.

    Methods: "minmax" never saturates; "percentile" lets one value in ten thousand; "entropy" minimises the divergence of the
    distribution as int8 levels from what it was, as TensorRT's calibrator did; "mse" minimises the squared error on `grid`.
    """
    used = int(np.flatnonzero(histogram.counts).max(initial=0)) + 1
    if grid.is_float:
        clips = [largest * ratio for ratio in FLOAT_RATIOS]
        return min(clips, key=lambda clip: _squared_error(histogram, used, clip, grid))
    if method == "minmax" or used < 2 or histogram.width == 0.0:
        return largest
    if method == "percentile":
        share = np.cumsum(histogram.counts) / histogram.counts.sum()
        edge = int(np.searchsorted(share, PERCENTILE / 100)) + 1
        return min(largest, edge * histogram.width)
    edges = np.unique(np.linspace(max(1, used // 8), used, _CANDIDATES).astype(int))
    loss: Callable[[int], float] = (
        (lambda edge: _divergence(histogram.counts[:used], edge))
        if method == "entropy"
        else (lambda edge: _squared_error(histogram, used, edge * histogram.width, grid))
    )
    losses = [loss(int(edge)) for edge in edges]
    best = int(edges[int(np.argmin(losses))])
    return min(largest, best * histogram.width)


def clip_from_values(values: Array, largest: float, method: Method, grid: Grid) -> float:
    """Like `clip_from_histogram`, of values themselves."""
    if method == "minmax":
        return largest
    histogram = Histogram()
    histogram.add(np.abs(values))
    return clip_from_histogram(histogram, largest, method, grid)


def _squared_error(histogram: Histogram, used: int, clip: float, grid: Grid) -> float:
    centres = histogram.centres[:used]
    error = centres - round_to_grid(centres, clip / grid.largest, grid)
    return float((histogram.counts[:used] * error**2).sum())


def _divergence(counts: NDArray[np.int64], edge: int) -> float:
    """KL of the distribution clipped at `edge` bins from its coarse copy of _LEVELS levels."""
    wanted = counts[:edge].astype(np.float64)
    wanted[-1] += counts[edge:].sum()
    level = np.minimum(np.arange(edge) * _LEVELS // edge, _LEVELS - 1)
    kept = counts[:edge] > 0
    sums = np.bincount(level, weights=counts[:edge], minlength=_LEVELS)
    filled = np.bincount(level, weights=kept, minlength=_LEVELS)
    coarse = np.where(kept, (sums / np.maximum(filled, 1))[level], 0.0)
    p, q = wanted / wanted.sum(), coarse / max(coarse.sum(), 1.0)
    both = (p > 0) & (q > 0)
    missed = p[(p > 0) & (q <= 0)].sum()
    return float((p[both] * np.log(p[both] / q[both])).sum() + missed * np.log(BINS))
