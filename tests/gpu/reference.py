"""The whole mixer in float64 torch, on any device: token by token, or in chunks where that would take minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gpu.inputs import EPS, Inputs

Scan = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Result:
    """y (B, T, H*P); conv_state (B, C, K-1), in the type it came in; ssm_state (B, H, P, N)."""

    y: torch.Tensor
    conv_state: torch.Tensor
    ssm_state: torch.Tensor


def scan_by_token(
    v: torch.Tensor, k: torch.Tensor, q: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run S_t = exp(delta_t a) S_{t-1} + delta_t v_t k_t^T and y_t = S_t q_t.

    Shapes: v (B, T, H, P); k and q (B, T, H, N); delta (B, T, H); a (H,); state (B, H, P, N), not modified.
    Returns: y (B, T, H, P) and the state after the last token.
    """
    y = torch.empty_like(v)
    for t in range(v.shape[1]):
        decay = torch.exp(delta[:, t] * a)[..., None, None]
        state = decay * state + (delta[:, t, :, None] * v[:, t])[..., None] * k[:, t][..., None, :]
        y[:, t] = (state @ q[:, t][..., None])[..., 0]
    return y, state


def scan_in_chunks(
    v: torch.Tensor,
    k: torch.Tensor,
    q: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor,
    chunk: int = 96,  # no kernel cuts where this does
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `scan_by_token` does, with matrix products over `chunk` tokens at a time."""
    pieces = []
    for t in range(0, v.shape[1], chunk):
        vc, kc, qc = (x[:, t : t + chunk].transpose(1, 2) for x in (v, k, q))
        d = delta[:, t : t + chunk].transpose(1, 2)
        log_decay = torch.cumsum(d * a[:, None], -1)  # (B, H, L), from the chunk's start to each token
        between = (log_decay[..., :, None] - log_decay[..., None, :]).tril()
        weight = (torch.exp(between) * d[..., None, :]).tril()
        y = (qc @ kc.transpose(-1, -2) * weight) @ vc
        y = y + torch.exp(log_decay)[..., None] * (qc @ state.transpose(-1, -2))
        to_end = torch.exp(log_decay[..., -1:] - log_decay) * d
        state = torch.exp(log_decay[..., -1])[..., None, None] * state + (vc * to_end[..., None]).transpose(-1, -2) @ kc
        pieces.append(y.transpose(1, 2))
    return (torch.cat(pieces, 1) if pieces else torch.empty_like(v)), state


def mixer(inputs: Inputs, *, operands: torch.dtype | None = None, scan: Scan = scan_in_chunks) -> Result:
    """Compute one call in float64.

    Args:
        inputs: what lies past a row's length is not read.
        operands: round v, k and q to this type after the convolution, as whoever feeds them to matrix units must;
            None keeps them as they are.
        scan: one of the two above.
    """
    s = inputs.sizes
    valid = torch.arange(s.tokens, device=inputs.projected.device) < inputs.valid()[:, None]
    row = torch.where(valid[..., None], inputs.projected, torch.zeros_like(inputs.projected))
    raw, gate, dt = row.split([s.channels, s.heads * s.head_dim, s.heads], -1)

    line = torch.cat([inputs.conv_state.transpose(1, 2), raw], 1)
    taps = range(s.conv_width)
    weight = inputs.conv_weight.double()
    u = inputs.conv_bias.double() + sum(line[:, i : i + s.tokens].double() * weight[:, i] for i in taps)
    u = F.silu(u)
    if operands is not None:
        u = u.to(operands).double()
    v, k, q = u.split([s.kv_heads * s.head_dim, s.kv_heads * s.state_dim, s.heads * s.state_dim], -1)
    share = s.heads // s.kv_heads
    v = v.unflatten(-1, (s.kv_heads, s.head_dim)).repeat_interleave(share, 2)
    k = k.unflatten(-1, (s.kv_heads, s.state_dim)).repeat_interleave(share, 2)
    q = q.unflatten(-1, (s.heads, s.state_dim))

    x = dt.double() + inputs.dt_bias.double()
    delta = torch.logaddexp(x, torch.zeros_like(x)) * valid[..., None]  # 0 leaves the state as it is
    y, state = scan(v, k, q, delta, -torch.exp(inputs.A_log.double()), inputs.ssm_state.double())

    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * inputs.norm_weight.double()
    y = y * F.silu(gate.double()).unflatten(-1, (s.heads, s.head_dim)) * valid[..., None, None]
    last = inputs.valid()[:, None] + torch.arange(s.conv_width - 1, device=line.device)
    conv_state = torch.take_along_dim(line, last[..., None], 1).transpose(1, 2)
    return Result(y.flatten(2), conv_state.contiguous(), state)
