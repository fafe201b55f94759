"""The scan in the form that is trained: whole sequences from a zero state, differentiable, several samples to a row.

The same mathematics as `scan.chunked`, without states and lengths, in a handful of large matrix products over all chunks at
once: inside a chunk a masked product, between chunks a small triangular one. Heads of a group share keys and values, so
these are never repeated. Arithmetic runs in float32 (float64 for float64 input), under autocast too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmm_export.model.scan import ScanSizes, ScanWeights

WIDE_HEAD = 128  # from this width on, chunks of 128 tokens: each leaves a state, which is then larger than its products


def scan_sequences(
    projected: Tensor,
    segments: Tensor | None,
    weights: ScanWeights,
    sizes: ScanSizes,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Run everything between the two projections over whole sequences.

    Shapes: projected (B, T, (2*kv_heads + 2*heads)*head_dim + heads), rows [v | k | q | gate | dt]; segments (B, T), a number
    for each sample of a row, tokens of a sample side by side, or None when a row is one sample. Nothing passes from one
    sample to another. Padding stands behind the samples and changes nothing in front of it.

    `chunk_tokens` does not change the result but by rounding; None chooses.

    Returns: y (B, T, H*P), gated and normalised, in the type of `projected`.
    """
    if chunk_tokens is None:
        chunk_tokens = 128 if sizes.head_dim >= WIDE_HEAD else 64
    with torch.autocast(projected.device.type, enabled=False):
        return _scan(projected, segments, weights, sizes, chunk_tokens)


def _scan(
    projected: Tensor, segments: Tensor | None, weights: ScanWeights, sizes: ScanSizes, chunk_tokens: int
) -> Tensor:
    B, T, _ = projected.shape
    H, P, N, kv = sizes.heads, sizes.head_dim, sizes.state_dim, sizes.kv_heads
    compute = torch.promote_types(projected.dtype, torch.float32)
    raw, gate, dt = torch.split(projected, [kv * P + kv * N + H * N, H * P, H], dim=-1)
    mixed = _convolve(raw.to(compute), segments, weights)
    v, k, q = torch.split(mixed, [kv * P, kv * N, H * N], dim=-1)
    delta = F.softplus(dt.to(compute) + weights.dt_bias.to(compute))
    log_decay = -weights.A_log.to(compute).exp() * delta
    y = recur_chunks(
        v.view(B, T, kv, P),
        k.view(B, T, kv, N),
        q.view(B, T, H, N),
        delta,
        log_decay,
        segments,
        min(chunk_tokens, T),
    )
    y = y * (y.square().mean(-1, keepdim=True) + sizes.eps).rsqrt() * weights.norm_weight.to(compute)
    y = y.reshape(B, T, H * P) * F.silu(gate.to(compute))
    return y.to(projected.dtype)


def _convolve(raw: Tensor, segments: Tensor | None, weights: ScanWeights) -> Tensor:
    """Depthwise causal convolution and SiLU of raw (B, T, C); a tap that reaches into another sample reads zero."""
    taps = weights.conv_weight.to(raw.dtype)
    width = taps.shape[1]
    T = raw.shape[1]
    mixed = raw * taps[:, -1] + weights.conv_bias.to(raw.dtype)
    for back in range(1, min(width, T)):
        earlier = raw[:, : T - back]
        if segments is not None:
            same = segments[:, back:] == segments[:, : T - back]
            earlier = earlier * same[..., None]
        mixed = mixed + F.pad(earlier * taps[:, -1 - back], (0, 0, back, 0))
    return F.silu(mixed)


def recur_chunks(
    v: Tensor, k: Tensor, q: Tensor, delta: Tensor, log_decay: Tensor, segments: Tensor | None, chunk: int
) -> Tensor:
    """h_t = exp(log_decay_t) h_{t-1} + delta_t v_t k_t^T, zero before each sample; y_t = h_t q_t.

    Shapes: v (B, T, kv, P); k (B, T, kv, N); q (B, T, H, N); delta, log_decay (B, T, H); segments (B, T) or None.
    Returns y (B, T, H, P).
    """
    B, T, kv, P = v.shape
    N, H = k.shape[-1], q.shape[2]
    G = H // kv
    L = chunk
    missing = -T % L
    if missing:
        v, k, q = (F.pad(z, (0, 0, 0, 0, 0, missing)) for z in (v, k, q))
        delta, log_decay = (F.pad(z, (0, 0, 0, missing)) for z in (delta, log_decay))
        if segments is not None:
            segments = F.pad(segments, (0, missing), value=-1)
    C = (T + missing) // L

    v = v.view(B, C, L, kv, P).permute(0, 1, 3, 2, 4)  # (B, C, kv, L, P)
    k = k.view(B, C, L, kv, N).permute(0, 1, 3, 2, 4)
    q = q.view(B, C, L, kv, G, N).permute(0, 1, 3, 4, 2, 5)  # (B, C, kv, G, L, N)
    delta = delta.view(B, C, L, kv, G).permute(0, 1, 3, 4, 2)  # (B, C, kv, G, L)
    cum = log_decay.view(B, C, L, kv, G).permute(0, 1, 3, 4, 2).cumsum(-1)

    # Inside a chunk. Masked before exp: above the diagonal the exponent is positive and could overflow.
    seen = torch.ones(L, L, dtype=torch.bool, device=v.device).tril()
    if segments is not None:
        parts = segments.reshape(B, C, L)
        seen = seen & (parts[..., :, None] == parts[..., None, :])
        seen = seen[:, :, None, None]
    within = torch.where(seen, cum[..., :, None] - cum[..., None, :], -torch.inf).exp() * delta[..., None, :]
    scores = (q.reshape(B, C, kv, G * L, N) @ k.mT).view(B, C, kv, G, L, L) * within
    y = (scores.view(B, C, kv, G * L, L) @ v).view(B, C, kv, G, L, P)

    if C > 1:
        # What each chunk leaves behind for those after it: (B, C, H, P, N).
        carry = (cum[..., -1:] - cum).exp() * delta
        if segments is not None:
            last = parts[..., -1]  # sample at the end of each chunk
            carry = carry * (parts == last[..., None])[:, :, None, None]
        weighted = (v[:, :, :, None] * carry[..., None]).transpose(3, 4).reshape(B, C, kv, L, G * P)
        left = (weighted.mT @ k).view(B, C, kv * G, P * N)
        # Between chunks: state before chunk c = sum over earlier chunks e of their decay until c times what e left.
        total = cum[..., -1].reshape(B, C, H).cumsum(1).permute(0, 2, 1)  # (B, H, C)
        before = F.pad(total, (1, 0))[..., :-1]  # decay of all chunks before c
        earlier = torch.ones(C, C, dtype=torch.bool, device=v.device).tril(-1)
        if segments is not None:
            # A state outlives chunk e only as long as the sample at its end goes on: up to the last token before c.
            previous = F.pad(last, (1, 0), value=-2)[:, :-1]
            earlier = earlier & (previous[:, :, None] == last[:, None, :])
            earlier = earlier[:, None]
        across = torch.where(earlier, before[..., :, None] - total[..., None, :], -torch.inf).exp()  # (B, H, C, C)
        states = (across @ left.transpose(1, 2)).view(B, H, C, P, N).transpose(1, 2).view(B, C, kv, G, P, N)
        reach = cum.exp()
        if segments is not None:
            reach = reach * (parts == previous[..., None])[:, :, None, None]
        y = y + (q @ states.mT) * reach[..., None]
    return y.permute(0, 1, 4, 2, 3, 5).reshape(B, C * L, H, P)[:, :T]
