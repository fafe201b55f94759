"""Rotary positions: rotate-half convention, whole head, with the scaling policies of the hybrid and of its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from oracle.array import Array


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one stack.

    `scaling` "none" is the released hybrid; "linear" and "dynamic" are what its teacher does when its config says so.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "dynamic"] = "none"
    factor: float = 1.0
    max_positions: int = 0

    @classmethod
    def from_config(cls, part: dict[str, Any], policy: Literal["ignore", "teacher"]) -> Rope:
        """Read one part of config.json (embedding_config or llm_config)."""
        theta = float(part.get("rope_theta", 10000.0))
        scaling = part.get("rope_scaling")
        if policy == "ignore" or scaling is None:
            return cls(theta)
        return cls(theta, scaling["type"], float(scaling["factor"]), int(part.get("max_position_embeddings", 0)))

    def angles(self, positions: NDArray[np.int64], total_tokens: int, head_dim: int) -> Array:
        """Angle of every pair of dimensions: (T, head_dim / 2), in radians.

        Args:
            positions: (T,), 0-based.
            total_tokens: tokens in the layer's sequence once this call is done. Dynamic scaling depends on it: beyond
                `max_positions` the answer depends on how the sequence was split into calls, as the teacher's does.
            head_dim: width of a head.
        """
        base = self.theta
        places = positions.astype(np.float64)
        if self.scaling == "linear":
            places = places / self.factor
        if self.scaling == "dynamic" and total_tokens > self.max_positions:
            stretch = self.factor * total_tokens / self.max_positions - (self.factor - 1)
            base = base * stretch ** (head_dim / (head_dim - 2))
        frequencies = np.array([base ** (-2.0 * i / head_dim) for i in range(head_dim // 2)])
        return np.outer(places, frequencies)


def rotate(x: Array, angles: Array) -> Array:
    """Turn dimension i against dimension i + D/2 of every head. Shapes: x (..., T, D), angles (T, D/2)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
