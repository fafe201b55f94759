"""Normalisations over the last axis."""

from __future__ import annotations

import numpy as np

from oracle.activations import silu
from oracle.array import Array

GATE_EPS = 1e-5  # hard coded in the architecture, whatever config.json says of the other norms


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    mean_square: Array = (x * x).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def gated_rms_norm(y: Array, gate: Array, weight: Array) -> Array:
    """Normalise first, gate after. Shapes: y and gate (..., H, P), weight (P,), shared by all heads."""
    return rms_norm(y, weight, GATE_EPS) * silu(gate)


def l2_normalize(x: Array) -> Array:
    """Divide each vector by its length; no epsilon."""
    square: Array = (x * x).sum(axis=-1, keepdims=True)
    return x / np.sqrt(square)
