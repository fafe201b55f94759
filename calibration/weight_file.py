"""The data file of a quantized decoder: one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from mmm_export.data_file import BLOCK_BYTES, DataFile
from mmm_export.manifest import FileInfo
from mmm_export.progress import Advance

INLINE_BYTES = 1024  # smaller ones stay in the graph


def stored_bytes(model: ir.Model) -> int:
    """Size of what `write_weights` will write, without alignment."""
    return sum(_bytes(value) for value in model.graph.initializers.values())


def write_weights(model: ir.Model, path: Path, advance: Advance) -> FileInfo:
    """Update `model`: every large initializer is written to the new file `path`, beside which the model must be saved.

    Initializers that nothing reads are dropped. Returns size and hash of the file.
    """
    for value in [v for v in model.graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        del model.graph.initializers[str(value.name)]
    with path.open("wb") as stream:
        data_file = DataFile(path, stream)
        for name, value in model.graph.initializers.items():
            tensor: Any = value.const_value
            if _bytes(value) <= INLINE_BYTES:
                if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
                    value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
                continue
            offset = data_file.align()
            data = memoryview(tensor.tobytes())
            for begin in range(0, len(data), BLOCK_BYTES):
                part = data[begin : begin + BLOCK_BYTES]
                data_file.put(part)
                advance(len(part))
            value.const_value = data_file.tensor(name, offset, tensor.dtype, tuple(tensor.shape.numpy()))
    return data_file.info()


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.nbytes)
