"""Write the weights of a traced graph as one external data file, streamed: one block of one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mmm_export.data_file import BLOCK_BYTES, DataFile
from mmm_export.errors import CheckpointError
from mmm_export.exporter.trace import TORCH_DTYPES
from mmm_export.manifest import FileInfo

_TORCH_FROM_ONNX = {
    ir.DataType.FLOAT: TORCH_DTYPES["fp32"],
    ir.DataType.FLOAT16: TORCH_DTYPES["fp16"],
    ir.DataType.BFLOAT16: TORCH_DTYPES["bf16"],
}


def weight_bytes(model: ir.Model) -> int:
    """Size of all initializers, without alignment."""
    return sum(_value_bytes(value) for value in model.graph.initializers.values())


def bind_weights(
    model: ir.Model, path: Path, parameter: Callable[[str], Tensor], advance: Callable[[int], None]
) -> FileInfo:
    """Update `model`: give every initializer its value, stored in the new file `path`, beside which the model must be saved.

    Args:
        model: a traced model whose initializers lack values; keeps references into `path`.
        path: the data file to write.
        parameter: value of an initializer by name, in the graph's shape and any floating type.
        advance: called with the number of bytes written.

    Returns:
        Size and hash of the file.

    Raises:
        CheckpointError: a weight is NaN, infinite, or too large for the type of the bundle.
    """
    with path.open("wb") as stream:
        data_file = DataFile(path, stream)
        for name, value in model.graph.initializers.items():
            offset, dtype = data_file.align(), _TORCH_FROM_ONNX[_dtype(value)]
            tensor = parameter(name)
            if tuple(tensor.shape) != _shape(value):
                raise ValueError(f"{name}: the module is {_shape(value)}, its value {tuple(tensor.shape)}")
            for block in _blocks(tensor):
                data = block.to(dtype).contiguous()
                if not bool(torch.isfinite(data).all()):
                    raise _not_finite(name, block, dtype)
                # Through int16: numpy has no bfloat16.
                raw = data.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
                data_file.put(raw.tobytes())
                advance(raw.nbytes)
            value.const_value = data_file.tensor(name, offset, _dtype(value), _shape(value))
    return data_file.info()


def write_weights(model: ir.Model, path: Path, advance: Callable[[int], None]) -> FileInfo:
    """Update `model`: write the value of every initializer to the new file `path`, and let it refer to that.

    Args:
        model: whose initializers have values, in files or as views of files.
        path: the data file to write, beside which the model must be saved.
        advance: called with the number of bytes written.

    Returns: size and hash of the file.
    """
    with path.open("wb") as stream:
        data_file = DataFile(path, stream)
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if not isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
                continue  # a small constant, which stays in the graph: shape inference reads it there
            offset = data_file.align()
            for block in _row_blocks(tensor.numpy()):
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                data_file.put(data)
                advance(len(data))
            value.const_value = data_file.tensor(name, offset, tensor.dtype, tuple(tensor.shape.numpy()))
    return data_file.info()


def _row_blocks(array: Any) -> list[Any]:
    if array.ndim < 2:
        return [array]
    step = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
    return [array[begin : begin + step] for begin in range(0, len(array), step)]


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Slices along the first axis of about BLOCK_BYTES each."""
    if tensor.dim() == 0:
        yield tensor
        return
    row_bytes = tensor[:1].numel() * 4
    yield from torch.split(tensor, max(1, BLOCK_BYTES // max(row_bytes, 1)))


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ValueError(f"initializer {value.name} has no type")
    return value.dtype


def _shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None:
        raise ValueError(f"initializer {value.name} has no shape")
    return value.shape.numpy()


def _value_bytes(value: ir.Value) -> int:
    count = 1
    for size in _shape(value):
        count *= size
    return count * int(_dtype(value).itemsize)


def _not_finite(name: str, block: Tensor, dtype: torch.dtype) -> CheckpointError:
    if bool(torch.isfinite(block).all()):
        return CheckpointError(
            f"weight {name} does not fit the type of the bundle",
            found=f"a magnitude of {float(block.float().abs().max()):g}",
            wanted=f"at most {torch.finfo(dtype).max:g}",
            hint="export with --dtype bf16 or fp32",
        )
    return CheckpointError(f"weight {name} is damaged", found="NaN or infinity", wanted="finite numbers")
