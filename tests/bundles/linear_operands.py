"""Random operands of a matrix product in every weight format, and what float64 makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from oracle.activations import silu

from mmm_export.plugins.library import INT4_GROUP
from mmm_export.plugins.numpy_linear import LinearWeight, pack_int4

TYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
FORMATS = ("plain", "int8", "int4")
EPS = 1e-5

# The sums are float32 and rounded once: half a unit in the last place is the most that one output can be off, and so the whole
# vector. A normalised input that lies next to a tie is rounded the other way now and then, which one unit covers. float32 sums up to
# some thousand products instead: 1e-6 is 16 units.
BOUND = {"fp32": 1e-6, "fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class Operands:
    """Of one product. `wide` is the float64 value of `weight`."""

    x: Any
    weight: LinearWeight
    wide: Any
    norm_weight: Any = None
    residual: Any = None
    silu: bool = False

    def oracle(self) -> Any:
        """The result in float64; only the normalised x is rounded, twice, as the operator says."""
        x = self.x.astype(np.float64)
        if self.norm_weight is not None:
            scale = 1 / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPS)
            x = (x * scale).astype(self.x.dtype).astype(np.float64) * self.norm_weight.astype(np.float64)
            x = x.astype(self.x.dtype).astype(np.float64)
        y = x @ self.wide.T
        if self.silu:
            gate, up = np.split(y, 2, -1)
            y = silu(gate) * up
        return y if self.residual is None else y + self.residual.astype(np.float64)

    def only(self, epilogue: str) -> Operands:
        """The same with no epilogue but "none", "residual" or "silu"."""
        kept = replace(self, silu=epilogue == "silu")
        return kept if epilogue == "residual" else replace(kept, residual=None)


def quantized(wide: Any, weight_format: str, dtype: str, scale_dtype: str = "fp16") -> tuple[LinearWeight, Any]:
    """Return float64 (N, K) in a format, and the float64 values that this stands for. Uses the format's whole range."""
    if weight_format == "plain":
        plain = wide.astype(TYPES[dtype])
        return LinearWeight(plain), plain.astype(np.float64)
    if weight_format == "int8":
        scales = (np.abs(wide).max(1) / 127).astype(np.float32)
        q = np.clip(np.round(wide / scales[:, None]), -128, 127).astype(np.int8)
        q[0, 0] = -128
        return LinearWeight(q, scales), q.astype(np.float64) * scales[:, None].astype(np.float64)
    groups = wide.reshape(wide.shape[0], -1, INT4_GROUP)
    scales = (np.abs(groups).max(2) / 7).astype(TYPES[scale_dtype])
    q = np.clip(np.round(groups / scales.astype(np.float64)[..., None]), -8, 7)
    q[0, 0, 0] = -8
    values = (q * scales.astype(np.float64)[..., None]).reshape(wide.shape)
    return LinearWeight(pack_int4(q.reshape(wide.shape)), scales), values


def draw(
    tokens: int,
    outputs: int,
    inputs: int,
    weight_format: str = "plain",
    dtype: str = "fp32",
    *,
    scale_dtype: str = "fp16",
    norm: bool = True,
    kept: int = 0,
    seed: int = 0,
) -> Operands:
    """Draw operands with a residual, with a norm unless told otherwise, and without SiLU; the last `kept` rows are not quantized."""
    random = np.random.default_rng(seed)
    to = TYPES[dtype]
    rows = random.standard_normal((outputs, inputs)) / np.sqrt(inputs)
    weight, wide = quantized(rows[: outputs - kept], weight_format, dtype, scale_dtype)
    if kept:
        weight = weight._replace(kept=rows[outputs - kept :].astype(to))
        wide = np.concatenate([wide, weight.kept.astype(np.float64)])
    return Operands(
        x=(random.standard_normal((tokens, inputs)) + 0.25).astype(to),
        weight=weight,
        wide=wide,
        norm_weight=random.uniform(0.5, 1.5, inputs).astype(to) if norm else None,
        residual=random.standard_normal((tokens, outputs)).astype(to),
    )
