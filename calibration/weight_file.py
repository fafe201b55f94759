"""The data file of a quantized decoder: one tensor in memory at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mmm_export.manifest import FileInfo
from mmm_export.progress import Advance

ALIGNMENT = 4096  # whole pages, so that a reader may map a tensor by itself
INLINE_BYTES = 1024  # smaller ones stay in the graph
_BLOCK = 32 << 20


def stored_bytes(model: ir.Model) -> int:
    """Size of what `write_weights` will write, without alignment."""
    return sum(_bytes(value) for value in model.graph.initializers.values())


def write_weights(model: ir.Model, path: Path, advance: Advance) -> FileInfo:
    """Update `model`: every large initializer is written to the new file `path`, beside which the model must be saved.

    Initializers that nothing reads are dropped. Returns size and hash of the file.
    """
    digest = hashlib.sha256()
    position = 0
    for value in [v for v in model.graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        del model.graph.initializers[str(value.name)]
    with path.open("wb") as stream:

        def put(data: bytes | memoryview) -> None:
            nonlocal position
            stream.write(data)
            digest.update(data)
            position += len(data)

        for name, value in model.graph.initializers.items():
            tensor: Any = value.const_value
            size = _bytes(value)
            if size <= INLINE_BYTES:
                if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
                    value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
                continue
            put(bytes(-position % ALIGNMENT))
            offset = position
            data = memoryview(tensor.tobytes())
            for begin in range(0, len(data), _BLOCK):
                part = data[begin : begin + _BLOCK]
                put(part)
                advance(len(part))
            value.const_value = ir.ExternalTensor(
                path.name, offset, position - offset, tensor.dtype, shape=tensor.shape, name=name, base_dir=path.parent
            )
    return FileInfo(position, digest.hexdigest())


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.nbytes)
