"""What one pass through the network reads."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

NO_TARGET = -100  # target of a position whose next token is not trained


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with their images.

    Shapes: ids (B, T) int64; targets (B, T) int64, the next token where it belongs to an answer, else NO_TARGET; valid (B, T)
    bool, false in the padding; positions (B, T) int64 from 0 in each sample; segments (B, T) int32, a number for each sample
    of a row, or None when every row is one sample; pixels (tiles, 3, S, S), in the order of the image tokens.
    `samples` is the number of samples, which a loss may be divided by.
    """

    ids: Tensor
    targets: Tensor
    valid: Tensor
    positions: Tensor
    segments: Tensor | None
    pixels: Tensor
    samples: int

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy to memory from which a GPU can fetch by itself."""
        return self._map(lambda value: value.pin_memory())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def _map(self, change: Any) -> Batch:
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})
