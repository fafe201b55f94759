"""How far two arrays are apart, as one number."""

from __future__ import annotations

from typing import Any

import numpy as np

from oracle.array import Array


def relative_error(found: Any, wanted: Any) -> float:
    """Largest absolute difference divided by the largest absolute wanted value.

    0.0 when both are all zeros (or empty), inf when only `wanted` is. NaN stays NaN, and so is less than no tolerance.

    Raises:
        ValueError: the shapes differ (nothing is broadcast).
    """
    difference, reference = _difference(found, wanted)
    return _quotient(np.abs(difference).max(initial=0.0), np.abs(reference).max(initial=0.0))


def relative_l2(found: Any, wanted: Any) -> float:
    """Like `relative_error` with the Euclidean norm of the whole array in place of the maximum."""
    difference, reference = _difference(found, wanted)
    return _quotient(np.linalg.norm(difference.ravel()), np.linalg.norm(reference.ravel()))


def _difference(found: Any, wanted: Any) -> tuple[Array, Array]:
    a = np.asarray(found, dtype=np.float64)
    b = np.asarray(wanted, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: found {a.shape}, wanted {b.shape}")
    return a - b, b


def _quotient(difference: Any, reference: Any) -> float:
    if difference == 0:
        return 0.0
    return float(difference / reference) if reference != 0 else float("inf")
