"""Rotary position embedding of the attention layers: angles in float64, rounded once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm_export.spec import RopeSpec


class Rope(Protocol):
    """Gives cosine and sine, (B, 1, T, head_dim/2) each, for positions (B, T) of rows that end at `ends` (B,) tokens."""

    def __call__(self, positions: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]: ...


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, T, head_dim) in the rotate-half convention: element i pairs with i + head_dim/2."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each pair, (head_dim/2,) float64."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = spec.theta**-exponents
    return frequencies / spec.factor if spec.scaling == "linear" else frequencies


def rope_table(spec: RopeSpec, head_dim: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position below `max_tokens`, (max_tokens, head_dim/2) float32 each. Not for dynamic scaling."""
    angles = torch.arange(max_tokens, dtype=torch.float64)[:, None] * inverse_frequencies(spec, head_dim)
    return angles.cos().float(), angles.sin().float()


class ComputedRope(nn.Module):
    """Computes the angles anew in each call, in the type of `frequencies` (float64 unless replaced).

    Dynamic scaling raises the base once a row grows past spec.max_tokens: base' = base * s^(d/(d-2)) with
    s = factor*end/max_tokens - (factor-1). That multiplies frequency i by s^(-2i/(d-2)).
    """

    frequencies: Tensor
    powers: Tensor

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("frequencies", inverse_frequencies(spec, head_dim), persistent=False)
        powers = torch.arange(0, head_dim, 2, dtype=torch.float64) / max(head_dim - 2, 1)
        self.register_buffer("powers", powers, persistent=False)

    def forward(self, positions: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.to(self.frequencies.dtype)[..., None] * self.frequencies
        if self.spec.scaling == "dynamic":
            ratio = ends.to(self.frequencies.dtype) / self.spec.max_tokens
            stretch = (self.spec.factor * ratio - (self.spec.factor - 1)).clamp(min=1)
            angles = angles * torch.exp(-stretch.log()[:, None, None] * self.powers)
        return angles.cos()[:, None], angles.sin()[:, None]


class TabledRope(nn.Module):
    """Looks the angles up in a table of `max_tokens` positions: what an exported graph does, exact at any position."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_tokens: int) -> None:
        super().__init__()
        self.register_buffer("cos", torch.empty(max_tokens, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(max_tokens, head_dim // 2), persistent=False)

    def forward(self, positions: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        # Padding may point past the table; what it reads there is never used.
        rows = positions.clamp(max=self.cos.shape[0] - 1)
        return F.embedding(rows, self.cos)[:, None], F.embedding(rows, self.sin)[:, None]
