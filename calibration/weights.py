"""Weights of a decoder as float32, a block of columns at a time, mapped from the bundle's data file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmm_export.calibration.linears import Linear

Array = NDArray[Any]
BLOCK_VALUES = 16 << 20  # 64 MiB of float32


class Weights:
    """Reads initializers of one model; keeps none of them."""

    def __init__(self, model: ir.Model) -> None:
        self._initializers = model.graph.initializers

    def mapped(self, name: str) -> Array:
        """An initializer in its own type; nothing is read until it is used."""
        value = self._initializers[name].const_value
        if value is None:
            raise ValueError(f"initializer {name} has no value")
        return value.numpy()

    def columns(self, linear: Linear, begin: int, end: int) -> Array:
        """Columns of a weight: (K, end - begin) float32."""
        return np.ascontiguousarray(self.mapped(linear.weight)[:, begin:end]).astype(np.float32)

    def some_columns(self, linear: Linear, count: int) -> Array:
        """At most `count` columns that are quantized, evenly spread: (K, count) float32."""
        step = -(-linear.quantized_columns // count)
        return np.ascontiguousarray(self.mapped(linear.weight)[:, : linear.quantized_columns : step]).astype(np.float32)

    def blocks(self, linear: Linear) -> Iterator[tuple[int, int]]:
        """Cut the columns that are quantized into blocks of about BLOCK_VALUES."""
        step = max(128, BLOCK_VALUES // linear.rows)
        for begin in range(0, linear.quantized_columns, step):
            yield begin, min(begin + step, linear.quantized_columns)

    def row_maxima(self, linear: Linear) -> Array:
        """Largest magnitude of each row among the columns that are quantized, (K,)."""
        mapped = self.mapped(linear.weight)[:, : linear.quantized_columns]
        if mapped.dtype.itemsize != 2:
            most: Array = np.abs(mapped).max(1).astype(np.float32)
            return most
        # Bits of 16-bit floats without the sign are ordered as the numbers are, and integers compare many times as fast.
        bits = [
            (part.view(np.uint16) & 0x7FFF).max(1)
            for part in np.array_split(mapped, max(1, mapped.size // BLOCK_VALUES))
        ]
        return np.asarray(np.concatenate(bits).view(mapped.dtype).astype(np.float32))
