"""Causal grouped-query attention of one layer, with an explicit KV cache that grows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from oracle.activations import softmax
from oracle.array import Array
from oracle.geometry import Geometry
from oracle.rope import Rope, rotate


@dataclass(frozen=True)
class KVState:
    """Keys (after RoPE) and values of all tokens so far: (B, kv_heads, tokens, head_dim) each."""

    key: Array
    value: Array

    @classmethod
    def empty(cls, batch: int, geometry: Geometry) -> KVState:
        nothing = np.zeros((batch, geometry.kv_heads, 0, geometry.head_dim))
        return cls(nothing, nothing)

    @property
    def tokens(self) -> int:
        return int(self.key.shape[2])


def mha(
    u: Array, weights: Mapping[str, Array], geometry: Geometry, rope: Rope, state: KVState
) -> tuple[Array, KVState]:
    """Mix T normalised hidden vectors u (B, T, hidden); `weights` by their checkpoint names after `attention.`.

    Returns: the mixer's output (B, T, hidden), before the residual, and the grown KV cache.
    """
    batch, tokens, _ = u.shape
    heads, kv_heads, group, size = geometry.heads, geometry.kv_heads, geometry.group, geometry.head_dim

    # Rows of wqkv are grouped by KV head: its query heads, then its key, then its value.
    blocks = (u @ weights["wqkv.weight"].T).reshape(batch, tokens, kv_heads, group + 2, size)
    q = blocks[:, :, :, :group].reshape(batch, tokens, heads, size).transpose(0, 2, 1, 3)
    k = blocks[:, :, :, group].transpose(0, 2, 1, 3)
    v = blocks[:, :, :, group + 1].transpose(0, 2, 1, 3)

    total = state.tokens + tokens
    positions = np.arange(state.tokens, total)
    angles = rope.angles(positions, total, size)
    key = np.concatenate([state.key, rotate(k, angles)], axis=2)
    value = np.concatenate([state.value, v], axis=2)
    q = rotate(q, angles)

    future = np.arange(total)[None, :] > positions[:, None]
    mixed = np.zeros((batch, tokens, heads, size))
    for h in range(heads):
        scores = q[:, h] @ key[:, h // group].transpose(0, 2, 1) / math.sqrt(size)
        mixed[:, :, h] = softmax(np.where(future, -np.inf, scores)) @ value[:, h // group]
    return mixed.reshape(batch, tokens, heads * size) @ weights["wo.weight"].T, KVState(key, value)
