"""Tensors in the memory of a device, as ONNX Runtime's Python interface gives them, and copies to and from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mmm_export.errors import MmmError
from mmm_export.runtime.row_positions import RowPositions
from mmm_export.runtime.state_layout import TOKEN_AXIS, StateTensor

# onnx.TensorProto's numbers, and how numpy holds the elements on the host: it has no bfloat16, whose bits travel as uint16.
ELEMENT_TYPES = {"float32": 1, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}
_HOST: dict[str, Any] = {
    "float32": np.float32,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": np.uint16,
}
# What the memory is allocated as. ONNX Runtime copies no bfloat16 to numpy, so those tensors call themselves float16 until bound.
_ALLOCATED: dict[str, Any] = {**_HOST, "bfloat16": np.float16}
CPU, CUDA = "cpu", "cuda"


class DeviceRows:
    """Some rows of a tensor in device memory: what a run can be bound to.

    Args:
        value: the whole tensor, kept alive.
        shape: of the part.
        dtype: numpy's name, or "bfloat16".
        device: where it lies.
        offset: bytes before the part.
    """

    def __init__(
        self, value: onnxruntime.OrtValue, shape: Sequence[int], dtype: str, device: str, offset: int = 0
    ) -> None:
        self.shape = tuple(shape)
        self._value = value
        self._dtype = dtype
        self._device = device
        self._offset = offset

    def bind_input(self, binding: Any, name: str) -> None:
        """Let a run read this memory as the input `name`; updates `binding`."""
        binding.bind_input(name, *self._place)

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a run write the output `name` here; updates `binding`."""
        binding.bind_output(name, *self._place)

    @property
    def _place(self) -> tuple[Any, ...]:
        address = self._value.data_ptr() + self._offset
        return (self._device, 0, ELEMENT_TYPES[self._dtype], list(self.shape), address)


class DeviceTensor(DeviceRows):
    """One tensor at a fixed address of a device.

    Args:
        shape: of the tensor.
        dtype: numpy's name, or "bfloat16".
        device: "cuda", or "cpu" to run the same code without a GPU.

    Raises:
        MmmError: no memory for it.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str) -> None:
        try:
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), _ALLOCATED[dtype], device, 0)
        except Exception as error:  # a RuntimeError of whichever kind ONNX Runtime was built with
            size = prod(shape) * int(np.dtype(_HOST[dtype]).itemsize)
            raise MmmError(
                "the device has no memory for what the session keeps there",
                found=str(error).strip().splitlines()[0][:200],
                wanted=f"{size:,} bytes for {dtype} {tuple(shape)}",
                hint="smaller chunks (chunk_tokens), fewer rows, a smaller --max-tokens, or nothing else on that device",
            ) from error
        super().__init__(value, shape, dtype, device)

    def rows(self, begin: int, end: int) -> DeviceRows:
        """Return the rows `begin` to `end` of the first axis, in the same memory."""
        row_bytes = prod(self.shape[1:]) * int(np.dtype(_HOST[self._dtype]).itemsize)
        return DeviceRows(self._value, (end - begin, *self.shape[1:]), self._dtype, self._device, begin * row_bytes)

    def write(self, array: NDArray[Any]) -> None:
        """Copy a host array of the same shape and storage here; updates the device memory."""
        assert array.shape == self.shape, (array.shape, self.shape)
        assert array.dtype == _HOST[self._dtype], (array.dtype, self._dtype)
        self._value.update_inplace(np.ascontiguousarray(array).view(_ALLOCATED[self._dtype]))

    def read(self) -> NDArray[Any]:
        """Copy to the host; bfloat16 as uint16."""
        array: NDArray[Any] = self._value.numpy()
        # In host memory the array is a view of the tensor, which the next run overwrites.
        return (array.copy() if self._device == CPU else array).view(_HOST[self._dtype])


class DeviceStatePool:
    """The state pool in device memory: as `StatePool`, two slots of fixed addresses that runs read and write in turn, and zeros.

    Two slots keep a failed run from touching the state before it, and let a CUDA graph be captured and warmed up on it: running
    twice from the same slot gives the same. KV caches too have two; a linear model has none.
    """

    def __init__(self, layout: tuple[StateTensor, ...], device: str, rows: int = 1) -> None:
        def zeros(tensor: StateTensor, rows: int) -> DeviceTensor:
            made = DeviceTensor((rows, *tensor.shape[1:]), tensor.dtype, device)
            made.write(np.zeros(made.shape, tensor.storage))
            return made

        self.layout = layout
        self.positions = RowPositions(rows)
        # Zeros in the slots too: rows that no sequence has used yet are read, if not heeded, by a step of all rows.
        self.slots = tuple({t.name: zeros(t, rows) for t in layout} for _ in range(2))
        shared = {(t.shape, t.dtype): zeros(t, 1) for t in layout}  # one for all layers
        self.zeros: dict[str, DeviceRows] = {t.name: shared[t.shape, t.dtype] for t in layout}

    def rows(self, slot: int, begin: int, end: int) -> dict[str, DeviceRows]:
        """Return some rows of a slot."""
        return {name: tensor.rows(begin, end) for name, tensor in self.slots[slot].items()}

    def past(self, row: int) -> dict[str, DeviceRows]:
        """Return a row's state: what a run of this row alone reads."""
        slot, tokens = self.positions[row]
        return self.rows(slot, row, row + 1) if tokens else self.zeros

    def place(self, row: int) -> tuple[int | None, int]:
        """Return which slots `past` and `present` of a row are in; None for zeros."""
        slot, tokens = self.positions[row]
        return (slot if tokens else None), self.positions.target(row)

    def present(self, row: int) -> dict[str, DeviceRows]:
        """Return where a run of this row alone writes."""
        return self.rows(self.positions.target(row), row, row + 1)

    def read(self, kv_rows: int, row: int = 0) -> dict[str, NDArray[Any]]:
        """Copy a row's state to the host; of KV caches the first `kv_rows` tokens. The other rows are copied on the way."""
        arrays = {}
        for tensor in self.layout:
            array = self._read(tensor, row)
            arrays[tensor.name] = array[:, :, :kv_rows].copy() if tensor.per_token else array
        return arrays

    def write(self, arrays: Mapping[str, NDArray[Any]], tokens: int, row: int = 0) -> None:
        """Update a row to a state laid out as `read` gives it, as `StatePool.write` does. The other rows are copied on the way."""
        slot = self.positions.target(row)
        for tensor in self.layout:
            given = arrays[tensor.name]
            if tensor.per_token:
                kv_rows = given.shape[TOKEN_AXIS]
                cache = self._read(tensor, row) if kv_rows < tokens else np.zeros(tensor.shape, tensor.storage)
                cache[:, :, :kv_rows] = given
                cache[:, :, tokens:] = 0  # a NaN in an unused row would spread through a masked sum
                given = cache
            target = self.slots[slot][tensor.name]
            if len(self.positions) > 1:
                whole = target.read()
                whole[row : row + 1] = given
                given = whole
            target.write(given)
        self.positions.place(row, slot, tokens)

    def _read(self, tensor: StateTensor, row: int) -> NDArray[Any]:
        """Copy one state of a row to the host."""
        slot, tokens = self.positions[row]
        if not tokens:
            return np.zeros(tensor.shape, tensor.storage)
        return self.slots[slot][tensor.name].read()[row : row + 1]

    def clear(self, row: int = 0) -> None:
        """Update a row to the state of no tokens."""
        self.positions.place(row, 0, 0)
