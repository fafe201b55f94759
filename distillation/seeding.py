"""What a student's Mamba-2 mixers start from: the teacher's queries, keys and values, the rest set so that they mimic attention.

| parameter | scratch | inherit | inherit+mimic |
|---|---|---|---|
| q, k, v rows | Xavier | the teacher's | the teacher's |
| convolution | uniform in +-1/sqrt(width) | as scratch | identity: tap of the current token 1, the others 0, bias 0 |
| dt projection | Xavier | as scratch | 0 |
| dt_bias | 0 | as scratch | inverse softplus of delta, log-uniform in [0.001, 0.1] |
| A_log_bias | log of U(1, 16) | as scratch | 1, so A = -e |
| gate projection | Xavier | Xavier | Xavier |
| gated norm | 1 | 1 | 1 |

Xavier is uniform with gain 2^-2.5. Each tensor depends on the seed, its layer and its name alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mmm_export.spec import ModelSpec

Init = Literal["scratch", "inherit", "inherit+mimic"]
INITS: tuple[Init, ...] = ("scratch", "inherit", "inherit+mimic")
XAVIER_GAIN = 2**-2.5
DELTA_RANGE = (0.001, 0.1)
DECAY_RANGE = (1.0, 16.0)


def rows_from_blocks(wqkv: Tensor, spec: ModelSpec) -> Tensor:
    """Reorder the rows of the teacher's packed projection for a Mamba-2 mixer.

    Shapes: wqkv (C, hidden), for each KV head the rows [its queries | key | value] -> (C, hidden), rows [v | k | q].
    """
    group = spec.heads // spec.kv_heads
    blocks = wqkv.reshape(spec.kv_heads, group + 2, spec.head_dim, -1)
    parts = (blocks[:, group + 1], blocks[:, group], blocks[:, :group])
    return torch.cat([part.reshape(-1, wqkv.shape[1]) for part in parts])


MIXER_TENSORS = (
    "wvkqgdt.weight",
    "conv1d.weight",
    "conv1d.bias",
    "dt_bias",
    "A_log_bias",
    "g_norm_swish_gate.weight",
)


def seeded_mixer(wqkv: Tensor, spec: ModelSpec, layer: int, *, init: Init, seed: int) -> dict[str, Tensor]:
    """Make the parameters of one student mixer.

    Args:
        wqkv: the teacher's packed projection as stored, (C, hidden).
        spec: dimensions.
        layer: global index.
        init: how much comes from the teacher, see above.
        seed: of the drawn values.

    Returns:
        Tensors by their name in a checkpoint, without the layer's prefix and `attention.`, in float32 on the CPU: MIXER_TENSORS.
    """
    return {name: seeded_tensor(name, lambda: wqkv, spec, layer, init=init, seed=seed) for name in MIXER_TENSORS}


def seeded_tensor(
    name: str, wqkv: Callable[[], Tensor], spec: ModelSpec, layer: int, *, init: Init, seed: int
) -> Tensor:
    """Make one of MIXER_TENSORS; `wqkv` is asked only when it is needed. The rest as `seeded_mixer`."""
    C, H, width = spec.conv_channels, spec.heads, spec.conv_width
    mimics = init == "inherit+mimic"
    draw = _Draw(spec, layer, seed)
    if name == "wvkqgdt.weight":
        vkq = draw.xavier("vkq", C) if init == "scratch" else rows_from_blocks(wqkv().cpu(), spec).float()
        dt = torch.zeros(H, spec.hidden_size) if mimics else draw.xavier("dt", H)
        return torch.cat([vkq, draw.xavier("gate", H * spec.head_dim), dt])
    if name == "conv1d.weight":
        if not mimics:
            return draw.uniform(name, (C, 1, width), -(width**-0.5), width**-0.5)
        weight = torch.zeros(C, 1, width)
        weight[..., -1] = 1
        return weight
    if name == "conv1d.bias":
        return torch.zeros(C) if mimics else draw.uniform(name, (C,), -(width**-0.5), width**-0.5)
    if name == "dt_bias":
        if not mimics:
            return torch.zeros(H)
        low, high = (math.log(bound) for bound in DELTA_RANGE)
        delta = draw.uniform("delta", (H,), low, high).double().exp()
        return torch.log(torch.expm1(delta)).float()  # the inverse of softplus
    if name == "A_log_bias":
        return torch.ones(H) if mimics else draw.uniform(name, (H,), *DECAY_RANGE).log()
    if name == "g_norm_swish_gate.weight":
        return torch.ones(spec.head_dim)
    raise KeyError(name)


class _Draw:
    """Random values that depend on seed, layer and name alone."""

    def __init__(self, spec: ModelSpec, layer: int, seed: int) -> None:
        self._spec, self._layer, self._seed = spec, layer, seed

    def uniform(self, name: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        digest = hashlib.sha256(f"{self._seed}/{self._layer}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(shape, generator=generator) * (high - low) + low

    def xavier(self, name: str, rows: int) -> Tensor:
        bound = XAVIER_GAIN * math.sqrt(6 / (rows + self._spec.hidden_size))
        return self.uniform(name, (rows, self._spec.hidden_size), -bound, bound)
