"""Tensors in the memory of a device, as ONNX Runtime's Python interface gives them, and copies to and from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mmm_export.runtime.state_layout import TOKEN_AXIS, StateTensor

# onnx.TensorProto's numbers; numpy's bfloat16 does not exist, so its bits travel as uint16.
ELEMENT_TYPES = {"float32": 1, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}
_STORAGE: dict[str, Any] = {
    "float32": np.float32,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": np.uint16,
}
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
        self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), ELEMENT_TYPES[dtype], device, 0)

    def write(self, array: NDArray[Any]) -> None:
        """Copy a host array of the same shape and storage here; updates the device memory."""
        assert array.shape == self.shape, (array.shape, self.shape)
        self.value.update_inplace(np.ascontiguousarray(array))

    def read(self) -> NDArray[Any]:
        """Copy to the host; bfloat16 as uint16."""
        array: NDArray[Any] = np.empty(self.shape, _STORAGE[self._dtype])
        copy(self.value, host_value(array, self._dtype))
        return array


def host_value(array: NDArray[Any], dtype: str) -> onnxruntime.OrtValue:
    """Wrap host memory without a copy; the array must outlive the value."""
    if dtype == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ELEMENT_TYPES[dtype])
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def copy(source: onnxruntime.OrtValue, target: onnxruntime.OrtValue) -> None:
    """Copy a tensor into another of its size, wherever each lies; updates `target`."""
    if source.device_name() == CPU and target.device_name() == CPU:
        target.update_inplace(source)
    else:
        onnxruntime.copy_tensors([source], [target])


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
