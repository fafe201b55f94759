"""Input embeddings on the host: rows of the mapped table, and image features in the places of image tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.engine_manifest import EmbeddingTable
from mmm_export.errors import EngineError
from mmm_export.runtime.state_layout import STORAGE


class EmbeddingRows:
    """The table of an engine folder, mapped: only rows that are looked up are ever read.

    Raises:
        EngineError: the file does not have the size of the table.
    """

    def __init__(self, folder: Path, table: EmbeddingTable, image_token_id: int) -> None:
        path = folder / table.file
        if table.dtype not in STORAGE:
            raise EngineError(f"{path} is of an unknown type", found=table.dtype, wanted=", ".join(STORAGE))
        kind = np.dtype(STORAGE[table.dtype])
        wanted = table.rows * table.width * kind.itemsize
        found = path.stat().st_size
        if found != wanted:
            raise EngineError(
                f"{path} is not the table of its manifest",
                found=f"{found} bytes",
                wanted=f"{wanted} bytes: {table.rows} rows of {table.width} {table.dtype}",
                hint="build the engine again: mmm-export trt",
            )
        self._rows: NDArray[Any] = np.memmap(path, kind, "r", shape=(table.rows, table.width))
        self._image_token_id = image_token_id

    @property
    def width(self) -> int:
        return int(self._rows.shape[1])

    @property
    def storage(self) -> Any:
        """The numpy dtype of a row."""
        return self._rows.dtype

    def write(self, target: NDArray[Any], input_ids: NDArray[np.int64], features: NDArray[Any] | None) -> None:
        """Update `target` (T, width) to the embeddings of T ids; the k-th image token takes row k of `features`."""
        np.take(
            self._rows, input_ids, axis=0, out=target, mode="clip"
        )  # clip: without it numpy copies through a buffer
        if features is not None:
            target[input_ids == self._image_token_id] = features
