"""Seeded random weights of sensible size: activations keep their magnitude, and logits are not flat."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mmm_export.model import tensors
from mmm_export.spec import ModelSpec

Values = NDArray[np.float32]
BLOCK_VALUES = 1 << 18  # 1 MiB of float32: stays in a core's cache from generator to disk

VECTORS = ("A_log_bias", "dt_bias", "conv1d.weight", "norm.weight", "g_norm_swish_gate.weight")
# Logits of standard deviation 3: a few tokens stand out, none takes all of the probability.
HEAD_GAIN = 3.0


def noise(seed: int, name: str, block: int, count: int) -> Values:
    """Draw uniform noise of mean 0 and deviation 1, which depends on seed, tensor name and block alone."""
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    values: Values = generator.random(count, dtype=np.float32)
    values -= np.float32(0.5)
    values *= np.float32(math.sqrt(12.0))
    return values


def tensor_blocks(spec: ModelSpec, name: str, shape: tensors.Shape, seed: int) -> Iterator[Values]:
    """Give the values of a tensor in row-major order, BLOCK_VALUES at a time."""
    count = math.prod(shape)
    if name.endswith(VECTORS):
        yield vector(name, shape, noise(seed, name, 0, count))
        return
    scale = np.float32(gain(spec, name, shape))
    delta_rows = count - spec.heads * shape[-1] if name.endswith(tensors.MAMBA_PROJECTION) else count
    for block, start in enumerate(range(0, count, BLOCK_VALUES)):
        values = noise(seed, name, block, min(BLOCK_VALUES, count - start))
        values *= scale
        values[max(0, delta_rows - start) :] *= np.float32(0.5)  # the input moves delta, but does not drown dt_bias
        yield values


def vector(name: str, shape: tensors.Shape, raw: Values) -> Values:
    """Turn noise into one of the VECTORS: the values they start training from, each varied a little."""
    if name.endswith("A_log_bias"):
        values = 1.0 + 0.2 * raw  # A near -e
    elif name.endswith("dt_bias"):
        share = 0.5 + raw / math.sqrt(12.0)
        delta = np.exp(math.log(0.001) + share * math.log(100.0))  # log-uniform in 0.001 .. 0.1
        values = np.log(np.expm1(delta))  # inverse of softplus
    elif name.endswith("conv1d.weight"):
        taps = 0.2 * raw.reshape(shape)
        taps[..., -1] += 1.0  # near identity: the tap of the current token is 1
        values = taps.reshape(-1)
    else:
        values = 1.0 + 0.1 * raw
    return np.asarray(values, dtype=np.float32)


def gain(spec: ModelSpec, name: str, shape: tensors.Shape) -> float:
    """Give the standard deviation of a matrix, table or bias."""
    if name.endswith(".bias"):
        return 0.1
    if name in (tensors.POSITIONS, tensors.CLASS_POSITION):
        return 0.3
    if name in (tensors.TEXT_TABLE, tensors.SPECIAL_TABLE):
        return 1.0
    fan_in = 1.0 / math.sqrt(math.prod(shape[1:]))
    if name in (tensors.HEAD, tensors.LLM_TABLE):
        return HEAD_GAIN * fan_in
    if name in (tensors.SHUFFLE_IN_WEIGHT, tensors.SHUFFLE_OUT_WEIGHT):
        return 1.5 * fan_in  # GELU between them halves the magnitude
    if name.endswith(("wo.weight", "o_proj.weight", "w2.weight")):
        # What mixer and MLP hand to these has a deviation near 0.6. Each of the 2 * layers branches then adds
        # 1 / (2 * layers) of variance, so the residual stream grows by about sqrt(2) in all.
        return fan_in / 0.6 / math.sqrt(2 * spec.layers)
    return fan_in
