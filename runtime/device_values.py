"""Tensors in the memory of a device, as ONNX Runtime's Python interface gives them, and copies to and from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

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


class DeviceTensor:
    """One tensor at a fixed address of a device.

    Args:
        shape: of the tensor.
        dtype: numpy's name, or "bfloat16".
        device: "cuda", or "cpu" to run the same code without a GPU.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str) -> None:
        self.shape = tuple(shape)
        self._dtype = dtype
        self._device = device
        self._value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), _ALLOCATED[dtype], device, 0)

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

    def bind_input(self, binding: Any, name: str) -> None:
        """Let a run read this memory as the input `name`; updates `binding`."""
        binding.bind_input(name, *self._place)

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a run write the output `name` here; updates `binding`."""
        binding.bind_output(name, *self._place)

    @property
    def _place(self) -> tuple[Any, ...]:
        return (self._device, 0, ELEMENT_TYPES[self._dtype], list(self.shape), self._value.data_ptr())


class DeviceStatePool:
    """The state pool in device memory: as `StatePool`, two slots of fixed addresses that a run reads and writes in turn.

    Two slots keep a failed run from touching the state before it, and let a CUDA graph be captured and warmed up on it: running
    twice from the same slot gives the same. KV caches too have two; a linear model has none.
    """

    def __init__(self, layout: tuple[StateTensor, ...], device: str) -> None:
        self.layout = layout
        self.slots = tuple({t.name: DeviceTensor(t.shape, t.dtype, device) for t in layout} for _ in range(2))
        self._position = (0, 0)  # current slot, tokens; changed in one assignment, which no Ctrl-C can split
        self.clear()

    @property
    def tokens(self) -> int:
        """Tokens that the current slot stands for."""
        return self._position[1]

    @property
    def current(self) -> int:
        """Index of the slot that a run reads; it writes the other."""
        return self._position[0]

    def commit(self, added: int) -> None:
        """Make the slot just written current; it stands for `added` tokens more."""
        slot, tokens = self._position
        self._position = (1 - slot, tokens + added)

    def read(self, rows: int) -> dict[str, NDArray[Any]]:
        """Copy the current state to the host; of KV caches the first `rows` tokens."""
        slot = self.slots[self.current]
        arrays = {}
        for tensor in self.layout:
            array = slot[tensor.name].read()
            arrays[tensor.name] = array[:, :, :rows].copy() if tensor.per_token else array
        return arrays

    def write(self, arrays: Mapping[str, NDArray[Any]], tokens: int) -> None:
        """Update the pool to a state laid out as `read` gives it, as `StatePool.write` does."""
        old, new = self.slots[self.current], self.slots[1 - self.current]
        for tensor in self.layout:
            given = arrays[tensor.name]
            if tensor.per_token:
                rows = given.shape[TOKEN_AXIS]
                cache = old[tensor.name].read() if rows < tokens else np.zeros(tensor.shape, tensor.storage)
                cache[:, :, :rows] = given
                cache[:, :, tokens:] = 0  # a NaN in an unused row would spread through a masked sum
                given = cache
            new[tensor.name].write(given)
        self._position = (1 - self.current, tokens)

    def clear(self) -> None:
        """Update the pool to the state of no tokens."""
        slot = self.slots[1 - self.current]
        for tensor in self.layout:
            slot[tensor.name].write(np.zeros(tensor.shape, tensor.storage))
        self._position = (1 - self.current, 0)
