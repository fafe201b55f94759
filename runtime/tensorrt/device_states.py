"""All states of one sequence in device memory, at addresses that never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import MmmError
from mmm_export.runtime.state_layout import TOKEN_AXIS, StateTensor
from mmm_export.runtime.tensorrt.binding_table import StateBinding
from mmm_export.runtime.tensorrt.cuda import CudaDevice

Addresses = tuple[int, int]  # of the two buffers of a state; equal for one that is updated in place


class DeviceStates:
    """The counterpart of `StatePool` on a GPU: a run reads side `side` of every state, writes the other, and `commit` swaps them.

    A state in place has one buffer for both sides. A run that fails may therefore leave it half written: `lose` says so, and only
    `write` and `clear` make the states whole again. Side and tokens change in one assignment, which no Ctrl-C can split.
    """

    def __init__(
        self,
        device: CudaDevice,
        layout: Sequence[StateTensor],
        bindings: Sequence[StateBinding],
        addresses: Mapping[str, Addresses],
    ) -> None:
        self._device = device
        self._layout = tuple(layout)
        self._bindings = tuple(bindings)
        self._addresses = dict(addresses)
        self._position = (0, 0)  # side, tokens
        self._is_lost = True  # memory as it was allocated; `clear` comes next

    @property
    def tokens(self) -> int:
        return self._position[1]

    @property
    def side(self) -> int:
        """The side that a run reads: 0 or 1."""
        return self._position[0]

    def bound(self, side: int) -> dict[str, int]:
        """Addresses by tensor name, inputs and outputs, for a run that reads `side`."""
        rows: dict[str, int] = {}
        for binding in self._bindings:
            pair = self._addresses[binding.past]
            rows[binding.past], rows[binding.present] = pair[side], pair[1 - side]
        return rows

    def commit(self, added: int) -> None:
        """Take the side just written; it stands for `added` tokens more."""
        side, tokens = self._position
        self._position = (1 - side, tokens + added)

    def lose(self) -> None:
        """Note that a run failed in the middle: states in place are no longer whole, if there are any."""
        self._is_lost = any(binding.in_place for binding in self._bindings)

    def check_whole(self) -> None:
        """Raises MmmError when the states were lost."""
        if self._is_lost:
            raise MmmError(
                "the state of this session was lost when the engine failed",
                wanted="a session with a whole state",
                hint="call reset(), or load_state() of a saved one",
            )

    def read(self, rows: int) -> dict[str, NDArray[Any]]:
        """Copy the states to the host; of KV caches the first `rows` tokens. Waits for the stream."""
        self.check_whole()
        arrays: dict[str, NDArray[Any]] = {}
        for tensor in self._layout:
            array = np.empty(tensor.used_shape(rows), tensor.storage)
            for target, source, size in _pieces(tensor, array, self._addresses[tensor.name][self.side]):
                self._device.download(target, source, size)
            arrays[tensor.name] = array
        self._device.synchronize()
        return arrays

    def write(self, arrays: Mapping[str, NDArray[Any]], tokens: int) -> None:
        """Update the states to those of `tokens` tokens, laid out as `read` gives them; KV rows that are not given are kept."""
        self._is_lost = True  # until all are there
        side = 1 - self.side
        held = []
        for tensor in self._layout:
            given = np.ascontiguousarray(arrays[tensor.name], tensor.storage)
            target, source = self._addresses[tensor.name][side], self._addresses[tensor.name][1 - side]
            held.append(given)
            if tensor.per_token:
                if target != source:
                    self._device.copy(target, source, tensor.bytes)
                self._zero_rows(tensor, target, tokens)
            for host, device, size in _pieces(tensor, given, target):
                self._device.upload(device, host, size)
        self._device.synchronize()
        del held
        self._position = (side, tokens)
        self._is_lost = False

    def clear(self) -> None:
        """Update the states to those of no tokens."""
        self._is_lost = True
        side = 1 - self.side
        for tensor in self._layout:
            self._device.zero(self._addresses[tensor.name][side], tensor.bytes)
        self._device.synchronize()
        self._position = (side, 0)
        self._is_lost = False

    def _zero_rows(self, tensor: StateTensor, address: int, first: int) -> None:
        """Zero the rows of a cache from `first` on: a NaN in an unused row would spread through a masked sum."""
        heads, capacity = tensor.shape[1], tensor.shape[TOKEN_AXIS]
        head_bytes = tensor.bytes // heads
        row_bytes = head_bytes // capacity
        if first < capacity:
            for head in range(heads):
                self._device.zero(address + head * head_bytes + first * row_bytes, (capacity - first) * row_bytes)


def _pieces(tensor: StateTensor, array: NDArray[Any], device: int) -> list[tuple[int, int, int]]:
    """Contiguous pieces of a state, as (host address, device address, bytes): one, or one a head of a cache that is not full."""
    host = array.ctypes.data
    if not array.nbytes:
        return []
    if not tensor.per_token or array.shape[TOKEN_AXIS] == tensor.shape[TOKEN_AXIS]:
        return [(host, device, array.nbytes)]
    heads = tensor.shape[1]
    used, whole = array.nbytes // heads, tensor.bytes // heads
    return [(host + head * used, device + head * whole, used) for head in range(heads)]
