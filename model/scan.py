"""Everything between the two projections of a Mamba-2 layer: short convolution, delta, recurrence, gated norm.

This is the PyTorch meaning of the operator MmmSelectiveScan. Two forms compute the same: `sequential` walks token by token
and is the reference; `chunked` (state-space duality) turns most of the work into matrix products. Arithmetic runs in float32,
or float64 when the input is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_TOKENS = 64  # 64 and 128 run equally fast on a CPU; 64 rounds less


@dataclass(frozen=True)
class ScanSizes:
    """Attributes of the operator. `heads` is a multiple of `kv_heads`."""

    heads: int
    kv_heads: int
    head_dim: int
    state_dim: int
    eps: float


@dataclass(frozen=True)
class ScanWeights:
    """Weights of the operator.

    Shapes: conv_weight (C, K); conv_bias (C,); dt_bias (H,); A_log (H,), A = -exp(A_log); norm_weight (P,), shared by all heads.
    """

    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    norm_weight: Tensor


Scan = Callable[[Tensor, Tensor, Tensor, Tensor, ScanWeights, ScanSizes], "tuple[Tensor, Tensor, Tensor]"]


def chunked(
    projected: Tensor,
    lengths: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    sizes: ScanSizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator, fast form.

    Shapes: projected (B, T, (2*kv_heads + 2*heads)*head_dim + heads), rows [v | k | q | gate | dt]; lengths (B,), in 0..T;
    conv_state (B, C, K-1), raw inputs before this call; ssm_state (B, H, P, N).
    Returns: y (B, T, H*P) in the type of `projected` (rows past a length are meaningless but finite), and both states after each
    row's last valid token; what lies past a length never reaches them.
    """
    return _run(projected, lengths, conv_state, ssm_state, weights, sizes, "chunked")


def sequential(
    projected: Tensor,
    lengths: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    sizes: ScanSizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator, reference form. Same contract as `chunked`."""
    return _run(projected, lengths, conv_state, ssm_state, weights, sizes, "sequential")


def _run(
    projected: Tensor,
    lengths: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    sizes: ScanSizes,
    form: Literal["chunked", "sequential"],
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _ = projected.shape
    H, P, N, kv = sizes.heads, sizes.head_dim, sizes.state_dim, sizes.kv_heads
    compute = torch.promote_types(projected.dtype, torch.float32)
    valid = (torch.arange(T, device=projected.device) < lengths[:, None])[..., None]
    # Zeroed before any arithmetic, so that even NaN in the padding stays out of the states.
    rows = torch.where(valid, projected, 0).to(compute)
    raw, gate, dt = torch.split(rows, [conv_state.shape[1], H * P, H], dim=-1)

    mixed, conv_out = _convolve(raw, lengths, conv_state, weights)
    v, k, q = torch.split(mixed, [kv * P, kv * N, H * N], dim=-1)
    group = H // kv
    v = v.view(B, T, kv, P).repeat_interleave(group, dim=2)
    k = k.view(B, T, kv, N).repeat_interleave(group, dim=2)
    q = q.view(B, T, H, N)
    delta = torch.where(valid, F.softplus(dt + weights.dt_bias.to(compute)), 0)
    log_decay = -weights.A_log.to(compute).exp() * delta

    recurrence = _recur_chunked if form == "chunked" and T > 1 else _recur_sequential
    y, ssm_out = recurrence(v * delta[..., None], log_decay, k, q, ssm_state.to(compute))

    y = y * (y.square().mean(-1, keepdim=True) + sizes.eps).rsqrt() * weights.norm_weight.to(compute)
    y = y.reshape(B, T, H * P) * F.silu(gate)
    return y.to(projected.dtype), conv_out.to(conv_state.dtype), ssm_out.to(ssm_state.dtype)


def _convolve(raw: Tensor, lengths: Tensor, state: Tensor, weights: ScanWeights) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU of raw (B, T, C); the second result is the new state (B, C, K-1)."""
    width = weights.conv_weight.shape[1]
    T = raw.shape[1]
    window = torch.cat([state.to(raw.dtype).transpose(1, 2), raw], dim=1)  # (B, K-1+T, C)
    taps = weights.conv_weight.to(raw.dtype)
    mixed = weights.conv_bias.to(raw.dtype) + sum(window[:, i : i + T] * taps[:, i] for i in range(width))
    last = lengths[:, None].long() + torch.arange(width - 1, device=raw.device)  # (B, K-1), positions in the window
    tail = window.gather(1, last[..., None].expand(-1, -1, raw.shape[2]))
    return F.silu(mixed), tail.transpose(1, 2)


def _recur_sequential(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h = exp(log_decay) h + x b^T; y = h c. Shapes: x (B, T, H, P); log_decay (B, T, H); b, c (B, T, H, N); state (B, H, P, N)."""
    outputs = []
    for t in range(x.shape[1]):
        state = log_decay[:, t].exp()[..., None, None] * state + x[:, t, :, :, None] * b[:, t, :, None, :]
        outputs.append((state @ c[:, t, :, :, None]).squeeze(-1))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)), state


def _recur_chunked(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`_recur_sequential` by chunks: inside a chunk a masked matrix product, between chunks the carried state."""
    outputs = []
    for start in range(0, x.shape[1], CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        xs, bs, cs = (z[:, part].transpose(1, 2) for z in (x, b, c))  # (B, H, L, ...)
        cum = log_decay[:, part].transpose(1, 2).cumsum(-1)  # (B, H, L)
        mask = torch.ones(cum.shape[-1], cum.shape[-1], dtype=torch.bool, device=x.device).tril()
        # Masked before exp: above the diagonal the exponent is positive and could overflow.
        within = torch.where(mask, cum[..., :, None] - cum[..., None, :], -torch.inf).exp()
        y = (cs @ bs.mT * within) @ xs + cum.exp()[..., None] * (cs @ state.mT)
        carry = (cum[..., -1:] - cum).exp()[..., None]
        state = cum[..., -1].exp()[..., None, None] * state + (xs * carry).mT @ bs
        outputs.append(y.transpose(1, 2))
    return torch.cat(outputs, dim=1), state
