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


def seeded_mixer(wqkv: Tensor, spec: ModelSpec, layer: int, *, init: Init, seed: int) -> dict[str, Tensor]:
    """Make the parameters of one student mixer.

    Args:
        wqkv: the teacher's packed projection as stored, (C, hidden).
        spec: dimensions.
        layer: global index.
        init: how much comes from the teacher, see above.
        seed: of the drawn values.

    Returns:
        Tensors by their name in a checkpoint, without the layer's prefix and `attention.`, in float32: all but o_proj.
    """
    C, H, width = spec.conv_channels, spec.heads, spec.conv_width
    inner = H * spec.head_dim

    def uniform(name: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{layer}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(shape, generator=generator) * (high - low) + low

    def xavier(name: str, rows: int) -> Tensor:
        bound = XAVIER_GAIN * math.sqrt(6 / (rows + spec.hidden_size))
        return uniform(name, (rows, spec.hidden_size), -bound, bound)

    vkq = xavier("vkq", C) if init == "scratch" else rows_from_blocks(wqkv, spec).float()
    if init == "inherit+mimic":
        conv_weight = torch.zeros(C, 1, width)
        conv_weight[..., -1] = 1
        conv_bias = torch.zeros(C)
        dt = torch.zeros(H, spec.hidden_size)
        low, high = (math.log(bound) for bound in DELTA_RANGE)
        delta = uniform("delta", (H,), low, high).double().exp()
        dt_bias = torch.log(torch.expm1(delta)).float()  # the inverse of softplus
        A_log = torch.ones(H)
    else:
        bound = width**-0.5
        conv_weight = uniform("conv1d.weight", (C, 1, width), -bound, bound)
        conv_bias = uniform("conv1d.bias", (C,), -bound, bound)
        dt = xavier("dt", H)
        dt_bias = torch.zeros(H)
        A_log = uniform("A_log_bias", (H,), *DECAY_RANGE).log()
    return {
        "wvkqgdt.weight": torch.cat([vkq, xavier("gate", inner), dt]),
        "conv1d.weight": conv_weight,
        "conv1d.bias": conv_bias,
        "dt_bias": dt_bias,
        "A_log_bias": A_log,
        "g_norm_swish_gate.weight": torch.ones(spec.head_dim),
    }
