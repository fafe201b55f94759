"""What mamba-ssm's Triton operators leave to others, as Triton kernels: the short convolution of width 2, its step, the gated norm.

They are bound by memory and come near its rate, so that the contender that runs on them is held back by nothing of ours.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _conv_kernel(x, w, b, y, last, T, sx, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (t[:, None] < T) & (c[None, :] < C)
    at = t[:, None].to(tl.int64) * sx + c[None, :]
    now = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(x + at - sx, mask=inside & (t[:, None] > 0), other=0.0).to(tl.float32)
    w0 = tl.load(w + c * 2, mask=c < C, other=0.0).to(tl.float32)
    w1 = tl.load(w + c * 2 + 1, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(b + c, mask=c < C, other=0.0).to(tl.float32)
    v = before * w0[None, :] + now * w1[None, :] + bias[None, :]
    v = v * tl.sigmoid(v)
    tl.store(y + t[:, None].to(tl.int64) * C + c[None, :], v.to(y.dtype.element_ty), mask=inside)
    is_last = inside & (t[:, None] == T - 1)
    tl.store(last + c[None, :] + 0 * t[:, None], now.to(last.dtype.element_ty), mask=is_last)


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU of the causal convolution of x (T, C), whose rows may lie apart, and its last row (C,). weight (C, 2), bias (C,)."""
    count, channels = x.shape
    y = torch.empty((count, channels), device=x.device, dtype=x.dtype)
    last = torch.empty((channels,), device=x.device, dtype=x.dtype)
    grid = (triton.cdiv(count, 8), triton.cdiv(channels, 1024))
    _conv_kernel[grid](x, weight, bias, y, last, count, x.stride(0), C=channels, BT=8, BC=1024, num_warps=4)
    return y, last


@triton.jit  # type: ignore[untyped-decorator]
def _conv_step_kernel(x, w, b, state, y, sx, C: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    now = tl.load(x + row * sx + c, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(state + row * C + c, mask=inside, other=0.0).to(tl.float32)
    w0 = tl.load(w + c * 2, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(w + c * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    v = before * w0 + now * w1 + tl.load(b + c, mask=inside, other=0.0).to(tl.float32)
    v = v * tl.sigmoid(v)
    tl.store(state + row * C + c, now.to(state.dtype.element_ty), mask=inside)
    tl.store(y + row * C + c, v.to(y.dtype.element_ty), mask=inside)


def convolve_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """As `convolve` for one row of each sequence: x (B, C) -> (B, C). Updates state (B, C)."""
    batch, channels = x.shape
    y = torch.empty((batch, channels), device=x.device, dtype=x.dtype)
    grid = (batch, triton.cdiv(channels, 256))
    _conv_step_kernel[grid](x, weight, bias, state, y, x.stride(0), C=channels, BC=256, num_warps=2)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _gated_norm_kernel(y, g, w, out, R, eps, sg, H: tl.constexpr, P: tl.constexpr, BR: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = r[:, None] < R
    token, head = (r // H).to(tl.int64), r % H
    p = tl.arange(0, P)
    at = (token * H * P + head * P)[:, None] + p[None, :]
    v = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(g + (token * sg + head * P)[:, None] + p[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(v * v, 1) / P + eps)
    v = v * inverse[:, None] * tl.load(w + p).to(tl.float32)[None, :] * gate * tl.sigmoid(gate)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of y (T, H*P) over each head, times weight (P,), times SiLU of gate (T, H*P), whose rows may lie apart."""
    count, width = y.shape
    dim = weight.shape[0]
    out = torch.empty_like(y)
    rows = count * (width // dim)
    _gated_norm_kernel[(triton.cdiv(rows, 16),)](
        *(y, gate, weight, out, rows, eps, gate.stride(0)), H=width // dim, P=dim, BR=16, num_warps=4
    )
    return out
