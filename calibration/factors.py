"""Search, for each activation, the factor by channel that costs the output least: SmoothQuant for int8, AWQ for int4.

The activation is divided by the factor and the rows of the weights that read it are multiplied by it, so the model computes the
same; but what is hard to round moves to where it rounds more easily. The cost is measured on tokens that calibration kept:
the relative squared error of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmm_export.calibration.calibration_file import Observed
from mmm_export.calibration.linears import Linear, Source
from mmm_export.calibration.ranges import Method, clip_from_values
from mmm_export.calibration.rounding import (
    INT4,
    INT8,
    column_scales,
    group_scales,
    group_size,
    round_to_grid,
    stored_scale,
)
from mmm_export.calibration.weights import Weights
from mmm_export.manifest import Dtype

Array = NDArray[Any]

# For SmoothQuant the ends are left out: at 1 a channel that was quiet in the samples would have no range left for louder prompts.
ALPHAS = {"int8": tuple(i / 10 for i in range(2, 9)), "int4": tuple(i / 10 for i in range(1, 11))}
QUIET = 0.25  # of the median: a channel's magnitude counts as at least that, for the same reason
# The cost of a factor is an average over columns and tokens, so that a sample of both tells it.
SEARCH_COLUMNS = 256
SEARCH_ROWS = 128
GROUP = 128
# Factors beyond do not help, and would bring 16-bit norms to their limits.
_LEAST, _MOST = 1e-3, 1e3


@dataclass(frozen=True)
class Candidate:
    """A factor (K,), None for no change; the exponent it came from; where the activation saturates; what it costs."""

    alpha: float | None
    factor: Array | None
    clip: float
    cost: float


def choose_factor(
    source: Source,
    members: Sequence[Linear],
    weights: Weights,
    observed: Observed,
    form: Literal["int8", "int4"],
    method: Method,
    smooth: float | str,
    dtype: Dtype,
) -> Candidate:
    """The best candidate, or the one of a given exponent."""
    parts = [weights.some_columns(linear, SEARCH_COLUMNS) for linear in members]
    magnitude = _repeated(_activation_magnitude(observed, form), source, np.maximum)
    weight = np.max([weights.row_maxima(linear) for linear in members], axis=0)
    weight = _repeated(weight, source, np.maximum)
    alphas = ALPHAS[form] if isinstance(smooth, str) else (smooth,)
    rows = observed.rows[:: -(-len(observed.rows) // SEARCH_ROWS)]
    search = _Search(rows, observed.maxima, tuple((part, rows @ part) for part in parts), form, method, dtype)
    candidates = [search.measure(None, None)] if isinstance(smooth, str) else []
    for alpha in alphas:
        factor = _smoothing(magnitude, weight, alpha) if form == "int8" else _awq(magnitude, alpha)
        candidates.append(search.measure(alpha, factor))
    return min(candidates, key=lambda candidate: candidate.cost)


def _activation_magnitude(observed: Observed, form: str) -> Array:
    return observed.maxima if form == "int8" else np.sqrt(observed.mean_square)


def _repeated(values: Array, source: Source, reduce: np.ufunc) -> Array:
    """Make values the same for all channels whose factor is shared."""
    period = source.fold.period if source.fold is not None else source.channels
    shared: Array = np.tile(reduce.reduce(values.reshape(-1, period), axis=0), source.channels // period)
    return shared


def _smoothing(magnitude: Array, weight: Array, alpha: float) -> Array:
    """SmoothQuant: magnitude^alpha / weight^(1 - alpha). A channel that is always 0 keeps its place."""
    used = (magnitude > 0) & (weight > 0)
    factor = np.ones_like(magnitude)
    magnitude = np.maximum(magnitude, QUIET * np.median(magnitude))
    factor[used] = magnitude[used] ** alpha / weight[used] ** (1 - alpha)
    return _centred(factor, used)


def _awq(magnitude: Array, alpha: float) -> Array:
    used = magnitude > 0
    factor = np.ones_like(magnitude)
    factor[used] = magnitude[used] ** alpha
    # AWQ scales important rows up, so that the group's step is small beside them: the factor itself, not its inverse.
    return _centred(factor, used)


def _centred(factor: Array, used: Array) -> Array:
    """Scale to a geometric mean of 1: only the differences between channels matter."""
    if used.any():
        factor[used] /= np.exp(np.log(factor[used]).mean())
    return np.clip(factor, _LEAST, _MOST).astype(np.float32)


@dataclass(frozen=True)
class _Search:
    """Measures candidates on `rows` (R, K); `parts` are columns of each weight, (K, n), and what they make of the rows."""

    rows: Array
    maxima: Array
    parts: tuple[tuple[Array, Array], ...]
    form: str
    method: Method
    dtype: Dtype

    def measure(self, alpha: float | None, factor: Array | None) -> Candidate:
        scale = np.ones(len(self.maxima), np.float32) if factor is None else factor
        rows = self.rows / scale
        largest = float((self.maxima / scale).max())
        clip = largest if self.form == "int4" else clip_from_values(rows, largest, self.method, INT8)
        step = float(stored_scale(np.float32(clip / INT8.largest), self.dtype))
        given = rows if self.form == "int4" else round_to_grid(rows, step, INT8)
        cost = 0.0
        for part, wanted in self.parts:
            error = given @ self._rounded(part * scale[:, None]) - wanted
            cost += float(np.square(error).sum()) / max(float(np.square(wanted).sum()), 1e-30)
        return Candidate(alpha, factor, clip, cost)

    def _rounded(self, part: Array) -> Array:
        if self.form == "int8":
            return round_to_grid(part, column_scales(part, INT8, self.dtype), INT8)
        size = group_size(len(part), GROUP)
        scales = group_scales(part, size, None, self.dtype)
        groups = part.reshape(-1, size, part.shape[1])
        return round_to_grid(groups, scales[:, None], INT4).reshape(part.shape)
