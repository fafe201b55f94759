"""Host memory that a GPU writes itself, through the CUDA driver alone: what a kernel leaves there needs no copy back."""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.runtime.device_values import CUDA, ELEMENT_TYPES, DeviceTensor

_DRIVER = "libcuda.so.1"
_PORTABLE, _MAPPED = 1, 2  # of cuMemHostAlloc: for every context, and at an address that kernels take
_DEVICE = 0


class PinnedMemoryError(Exception):
    """The driver gives no such memory. What it could hold must lie on the GPU then."""


class PinnedTensor:
    """One tensor in pinned host memory, at an address that the GPU and the host share. Serves as a `DeviceTensor` that is an output.

    Kernels write it over the bus: right for what is written once, in whole lines, and read on the host, such as logits. What they
    wrote is there once their stream was waited for.

    Args:
        shape: of the tensor, which is not empty.
        dtype: numpy's name.

    Raises:
        PinnedMemoryError: no driver, or it refuses.
    """

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self.shape = tuple(shape)
        self._dtype = dtype
        driver = _driver()
        bytes_ = math.prod(self.shape) * np.dtype(dtype).itemsize
        address = ctypes.c_void_p()
        with _context(driver):
            _check(driver.cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(bytes_), _PORTABLE | _MAPPED))
        self._address = int(address.value or 0)
        self._free = weakref.finalize(self, _free, driver, self._address)
        memory = (ctypes.c_uint8 * bytes_).from_address(self._address)
        self._array: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(self.shape)

    def read(self) -> NDArray[Any]:
        """Copy what is there; the memory itself is overwritten by the next run."""
        copy: NDArray[Any] = self._array.copy()
        return copy

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a run write the output `name` here; updates `binding`."""
        binding.bind_output(name, CUDA, _DEVICE, ELEMENT_TYPES[self._dtype], list(self.shape), self._address)

    def close(self) -> None:
        """Free the memory; no run may write it, and nobody read a view of it, afterwards."""
        self._free()


def tensor_for_host(shape: Sequence[int], device: str) -> DeviceTensor | PinnedTensor:
    """Memory for float32 numbers that a run computes and the host reads: pinned, unless the driver gives none."""
    if device == CUDA:
        try:
            return PinnedTensor(shape, "float32")
        except PinnedMemoryError:
            pass
    return DeviceTensor(shape, "float32", device)


@functools.cache
def _driver() -> Any:
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise PinnedMemoryError(str(error)) from error
    _check(driver.cuInit(0))
    return driver


@contextmanager
def _context(driver: Any) -> Iterator[None]:
    """The context that ONNX Runtime uses, the device's primary one, is current inside."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuDeviceGet(ctypes.byref(device), _DEVICE))
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    try:
        _check(driver.cuCtxPushCurrent_v2(context))
        try:
            yield
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _free(driver: Any, address: int) -> None:
    with _context(driver):
        driver.cuMemFreeHost(ctypes.c_void_p(address))


def _check(code: int) -> None:
    if code != 0:
        raise PinnedMemoryError(f"the CUDA driver answered {code}")
