"""External data of an ONNX model while it is written: tensors on whole pages, hashed on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from mmm_export.manifest import FileInfo

ALIGNMENT = 4096  # whole pages, so that a reader may map a tensor by itself
BLOCK_BYTES = 32 << 20  # what a writer puts at once


class DataFile:
    """A file of tensors. For each: `align`, `put` its bytes in any number of parts, then `tensor`."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._stream = stream
        self._digest = hashlib.sha256()
        self._position = 0

    def align(self) -> int:
        """Fill up to where the next tensor may begin, and return that offset."""
        self.put(bytes(-self._position % ALIGNMENT))
        return self._position

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._stream.write(data)
        self._digest.update(data)
        self._position += len(data)

    def tensor(self, name: str, offset: int, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """Refer to what was put since `offset`."""
        length = self._position - offset
        return ir.ExternalTensor(
            self._path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=self._path.parent
        )

    def info(self) -> FileInfo:
        """Size and hash so far."""
        return FileInfo(self._position, self._digest.hexdigest())
