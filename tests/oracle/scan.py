"""The Mamba-2 recurrence, one token after the other."""

from __future__ import annotations

import numpy as np

from oracle.array import Array


def scan(v: Array, k: Array, q: Array, delta: Array, a: Array, state: Array) -> tuple[Array, Array]:
    """Run h_t = exp(delta_t a) h_{t-1} + (delta_t v_t) k_t^T and y_t = h_t q_t over T tokens.

    Shapes: v (B, T, H, P); k and q (B, T, H, N); delta (B, T, H), positive; a (H,), negative; state (B, H, P, N), not
    modified.
    Returns: y (B, T, H, P) and the state after the last token.
    """
    h = state.copy()
    y = np.zeros_like(v)
    for t in range(v.shape[1]):
        decay = np.exp(delta[:, t] * a)
        update = (delta[:, t, :, None] * v[:, t])[..., :, None] * k[:, t][..., None, :]
        h = decay[..., None, None] * h + update
        y[:, t] = (h * q[:, t][..., None, :]).sum(axis=-1)
    return y, h
