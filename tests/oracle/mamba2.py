"""The Mamba-2 mixer of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from oracle.activations import silu, softplus
from oracle.array import Array
from oracle.convolution import causal_conv
from oracle.geometry import Geometry
from oracle.norms import gated_rms_norm
from oracle.scan import scan


@dataclass(frozen=True)
class Mamba2State:
    """What a Mamba-2 layer remembers: conv (B, C, K-1), raw inputs, oldest first; ssm (B, H, P, N)."""

    conv: Array
    ssm: Array

    @classmethod
    def zeros(cls, batch: int, geometry: Geometry, conv_width: int) -> Mamba2State:
        size = geometry.head_dim
        channels = (geometry.heads + 2 * geometry.kv_heads) * size
        return cls(np.zeros((batch, channels, conv_width - 1)), np.zeros((batch, geometry.heads, size, size)))


def mamba2(u: Array, weights: Mapping[str, Array], geometry: Geometry, state: Mamba2State) -> tuple[Array, Mamba2State]:
    """Mix T normalised hidden vectors u (B, T, hidden); `weights` by their checkpoint names after `attention.`.

    Returns: the mixer's output (B, T, hidden), before the residual, and the state after the last token.
    """
    batch, tokens, _ = u.shape
    heads, kv_heads, size = geometry.heads, geometry.kv_heads, geometry.head_dim
    channels = (heads + 2 * kv_heads) * size

    projected = u @ weights["wvkqgdt.weight"].T
    vkq, gate, dt = np.split(projected, [channels, channels + heads * size], axis=-1)
    convolved, conv = causal_conv(vkq, state.conv, weights["conv1d.weight"][:, 0, :], weights["conv1d.bias"])
    v, k, q = np.split(silu(convolved), [kv_heads * size, 2 * kv_heads * size], axis=-1)
    v = v.reshape(batch, tokens, kv_heads, size)
    k = k.reshape(batch, tokens, kv_heads, size)
    q = q.reshape(batch, tokens, heads, size)
    # Head h reads KV head h // (heads / kv_heads): neighbours share.
    v = v[:, :, [h // geometry.group for h in range(heads)]]
    k = k[:, :, [h // geometry.group for h in range(heads)]]

    delta = softplus(dt + weights["dt_bias"])
    a = -np.exp(weights["A_log_bias"])
    y, ssm = scan(v, k, q, delta, a, state.ssm)
    normed = gated_rms_norm(y, gate.reshape(batch, tokens, heads, size), weights["g_norm_swish_gate.weight"])
    return normed.reshape(batch, tokens, heads * size) @ weights["o_proj.weight"].T, Mamba2State(conv, ssm)
