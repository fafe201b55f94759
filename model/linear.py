"""The two plain building blocks of every layer. Weights keep the type they are stored in and are cast where they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projection(nn.Module):
    """A linear map without bias. `weight` is (in, out): in that order it exports under its own name, untransposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype)


class BiasedProjection(Projection):
    """A linear map with bias (out,)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias.to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) over the last dimension in float32 or better, rounded to the type of x, then times `weight` (size,)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)
