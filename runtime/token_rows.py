"""Embeddings of single tokens, read from the bundle's mapped file: a look-up of one row needs no run of a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TokenRows:
    """The table of an embedding graph whose data file holds that table and nothing else; only rows that are looked up are read."""

    def __init__(self, rows: NDArray[Any]) -> None:
        self._rows = rows

    @classmethod
    def open(cls, path: Path, width: int, storage: Any, least_rows: int) -> TokenRows | None:
        """Map a data file; None where its size is not that of a table.

        Args:
            path: `embedding.onnx.data`.
            width: of a row.
            storage: numpy's dtype of an element.
            least_rows: as many as the vocabulary has ids.
        """
        row_bytes = width * np.dtype(storage).itemsize
        size = path.stat().st_size
        if size % row_bytes or size // row_bytes < least_rows:
            return None
        return cls(np.memmap(path, storage, "r", shape=(size // row_bytes, width)))

    def look_up(self, input_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Copy the rows of T ids, (T, width)."""
        return np.take(self._rows, input_ids, axis=0)
