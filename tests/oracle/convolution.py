"""The short depthwise causal convolution with an explicit state."""

from __future__ import annotations

import numpy as np

from oracle.array import Array


def causal_conv(x: Array, state: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """Convolve T tokens that follow the K-1 tokens in `state`; no activation.

    Shapes: x (B, T, C); state (B, C, K-1), oldest first, not modified; weight (C, K), its last column meets the current
    token; bias (C,).
    Returns: y (B, T, C) and the state after the last token: the last K-1 inputs, as they came in.
    """
    tokens, width = x.shape[1], weight.shape[1]
    line = np.concatenate([state.transpose(0, 2, 1), x], axis=1)
    y = np.zeros_like(x) + bias
    for t in range(tokens):
        for j in range(width):
            y[:, t] += weight[:, j] * line[:, t + j]
    return y, line[:, tokens:].transpose(0, 2, 1).copy()
