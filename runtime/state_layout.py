"""Which state tensors one sequence of a model has: the same list serves buffers, graphs and files."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from mmm_export import names
from mmm_export.manifest import Dtype
from mmm_export.spec import ModelSpec

# numpy has no bfloat16; its bits travel as uint16, since a runtime only moves states and never computes with them.
STORAGE: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "uint8": np.uint8}
GRAPH_DTYPE: dict[Dtype, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

TOKEN_AXIS = 2  # of a KV cache, (1, kv_heads, max_tokens, head_dim)


class ModelFolder(Protocol):
    """What the manifests of a bundle and of an engine have in common."""

    @property
    def model(self) -> ModelSpec: ...
    @property
    def source(self) -> str: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def model_sha256(self) -> str: ...


@dataclass(frozen=True)
class StateTensor:
    """One state of one sequence.

    `name` is the graph input's; `shape` begins with the batch of 1; `dtype` is numpy's name or "bfloat16"; of a
    `per_token` tensor (KV cache) only the rows of tokens in the context are used.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    per_token: bool = False

    @property
    def storage(self) -> Any:
        """The numpy dtype that holds it."""
        return STORAGE[self.dtype]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * int(np.dtype(self.storage).itemsize)

    def used_shape(self, tokens: int) -> tuple[int, ...]:
        """Shape of the part that `tokens` tokens use."""
        if not self.per_token:
            return self.shape
        return (*self.shape[:TOKEN_AXIS], tokens, *self.shape[TOKEN_AXIS + 1 :])


def state_layout(manifest: ModelFolder) -> tuple[StateTensor, ...]:
    """List the state tensors of one sequence in layer order: conv and SSM states, or keys and values."""
    spec = manifest.model
    dtype = GRAPH_DTYPE[manifest.dtype]
    conv = (1, spec.conv_channels, spec.conv_width - 1)
    recurrent = (1, spec.heads, spec.head_dim, spec.state_dim)
    cache = (1, spec.kv_heads, manifest.max_tokens, spec.head_dim)
    tensors: list[StateTensor] = []
    for layer, kind in enumerate(spec.kinds):
        if kind == "mamba2":
            tensors.append(StateTensor(names.past_conv(layer), conv, dtype))
            tensors.append(StateTensor(names.past_recurrent(layer), recurrent, "float32"))
        else:
            tensors.append(StateTensor(names.past_key(layer), cache, dtype, per_token=True))
            tensors.append(StateTensor(names.past_value(layer), cache, dtype, per_token=True))
    return tuple(tensors)
