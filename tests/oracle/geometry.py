"""Sizes that all mixers of a model share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """`heads` is a multiple of `kv_heads`; `head_dim` is P and N of the scan."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads
