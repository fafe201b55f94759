"""Seeded operands of one call and what the oracle says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from oracle.activations import silu, softplus
from oracle.convolution import causal_conv
from oracle.norms import GATE_EPS, gated_rms_norm
from oracle.scan import scan

from mmm_export.plugins.library import KernelLibrary
from mmm_export.plugins.numpy_scan import ScanResult, ScanWeights, scan_numpy

DTYPES: dict[str, Any] = {"fp64": np.float64, "fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call."""

    batch: int = 2
    tokens: int = 9
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    state_dim: int = 32
    conv_width: int = 2

    @property
    def channels(self) -> int:
        return self.kv_heads * (self.head_dim + self.state_dim) + self.heads * self.state_dim


@dataclass
class Operands:
    """What the operator takes, random throughout."""

    sizes: Sizes
    projected: Any
    lengths: Any
    conv_state: Any
    ssm_state: Any
    weights: ScanWeights

    def run(self, library: KernelLibrary, **options: Any) -> ScanResult:
        return scan_numpy(
            library,
            self.projected,
            self.lengths,
            self.conv_state,
            self.ssm_state,
            self.weights,
            kv_heads=self.sizes.kv_heads,
            eps=GATE_EPS,
            **options,
        )

    def oracle(self) -> ScanResult:
        """The same in float64, row by row, from each row's valid tokens alone."""
        rows = [self._oracle_row(b) for b in range(self.sizes.batch)]
        return ScanResult(*(np.stack(parts) for parts in zip(*rows, strict=True)))

    def _oracle_row(self, b: int) -> tuple[Any, Any, Any]:
        s, w = self.sizes, ScanWeights(*(np.asarray(weight, np.float64) for weight in self.weights))
        length = s.tokens if self.lengths is None else int(self.lengths[b])
        row = np.asarray(self.projected[b : b + 1, :length], np.float64)
        raw, gate, dt = np.split(row, [s.channels, s.channels + s.heads * s.head_dim], axis=-1)
        u, conv = causal_conv(raw, np.asarray(self.conv_state[b : b + 1], np.float64), w.conv_weight, w.conv_bias)
        v, k, q = np.split(silu(u), [s.kv_heads * s.head_dim, s.kv_heads * (s.head_dim + s.state_dim)], axis=-1)
        kv_head = [h // (s.heads // s.kv_heads) for h in range(s.heads)]
        y, ssm = scan(
            v.reshape(1, length, s.kv_heads, s.head_dim)[:, :, kv_head],
            k.reshape(1, length, s.kv_heads, s.state_dim)[:, :, kv_head],
            q.reshape(1, length, s.heads, s.state_dim),
            softplus(dt + w.dt_bias),
            -np.exp(w.A_log),
            np.asarray(self.ssm_state[b : b + 1], np.float64),
        )
        gated = gated_rms_norm(y, gate.reshape(1, length, s.heads, s.head_dim), w.norm_weight)
        whole = np.zeros((s.tokens, s.heads * s.head_dim))  # past the length: zero
        whole[:length] = gated.reshape(length, s.heads * s.head_dim)
        return whole, conv[0], ssm[0]


def draw(
    sizes: Sizes, dtype: str = "fp32", state: str | None = None, *, lengths: Any = None, seed: int = 0
) -> Operands:
    """Draw operands; what lies past a length is NaN."""
    rng, s = np.random.default_rng(seed), sizes
    state = state or ("fp64" if dtype == "fp64" else "fp32")
    projected = rng.normal(size=(s.batch, s.tokens, s.channels + s.heads * s.head_dim + s.heads)).astype(DTYPES[dtype])
    if lengths is not None:
        for b, length in enumerate(lengths):
            projected[b, length:] = np.nan
    weights = ScanWeights(
        rng.normal(size=(s.channels, s.conv_width)).astype(np.float32),
        rng.normal(size=s.channels).astype(np.float32),
        rng.uniform(-5, -1, size=s.heads).astype(np.float32),
        rng.uniform(0, 2, size=s.heads).astype(np.float32),
        rng.normal(1, 0.1, size=s.head_dim).astype(np.float32),
    )
    return Operands(
        s,
        projected,
        None if lengths is None else np.asarray(lengths, np.int32),
        rng.normal(size=(s.batch, s.channels, s.conv_width - 1)).astype(DTYPES[dtype]),
        rng.normal(size=(s.batch, s.heads, s.head_dim, s.state_dim)).astype(DTYPES[state]),
        weights,
    )
