"""CUDA's driver interface on host memory: each call that `runtime/tensorrt/cuda.py` makes, with the names of its real parameters.

Work on a stream is done when the stream is waited for, and recorded while it is captured, so that whoever forgets to wait, or frees
too early, fails. Every address is checked against what was allocated.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from enum import IntEnum
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np

# ruff: noqa: N802 - the names are CUDA's

ALIGNMENT = 256


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class CUdevice_attribute(IntEnum):  # noqa: N801
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUstream_flags(IntEnum):  # noqa: N801
    CU_STREAM_NON_BLOCKING = 1


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class Handle:
    """What the bindings return for pointers and handles: an object that is an integer only when it is asked."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value


class StickyError(Exception):
    """An error in a kernel: the context is lost."""


class FakeDriver:
    """One GPU: its memory, its stream, and what tests want to happen.

    Attributes:
        fails: function name: result that its next call gives instead of working.
        calls: names of all functions called.
    """

    def __init__(
        self, *, capability: int = 87, free_bytes: int = 1 << 40, integrated: bool = False, count: int = 1
    ) -> None:
        self.capability = capability
        self.free_bytes = free_bytes
        self.integrated = integrated
        self.count = count
        self.fails: dict[str, CUresult] = {}
        self.calls: list[str] = []
        self.device_memory: dict[int, Any] = {}
        self.host_memory: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launches = 0
        self.retained = 0
        self.is_current = False
        self.is_dead = False
        self.has_driver = True

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def view(self, address: Any, size: int) -> Any:
        """Bytes at a device address; StickyError for memory that is not ours."""
        return self._inside(self.device_memory, address, size)

    def _inside(self, memory: dict[int, Any], address: Any, size: int) -> Any:
        start = int(address)
        for begin, block in memory.items():
            if begin <= start and start + size <= begin + len(block):
                return block[start - begin : start - begin + size]
        raise StickyError(f"{size} bytes at {start:#x} were not allocated")

    def host(self, address: Any, size: int) -> Any:
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))

    def module(self) -> types.ModuleType:
        """The module `cuda.bindings.driver`."""
        made = types.ModuleType("cuda.bindings.driver")
        made.__spec__ = ModuleSpec(made.__name__, None)
        for name, function in FUNCTIONS.items():
            setattr(made, name, self._bound(name, function))
        for kind in ENUMS:
            setattr(made, kind.__name__, kind)
        return made

    def _bound(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name in self.fails:
                return (self.fails.pop(name), *NOTHING.get(name, ()))
            if self.is_dead and name not in ("cuGetErrorName", "cuGetErrorString"):
                return (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, *NOTHING.get(name, ()))
            if not self.is_current and name in NEED_CONTEXT:
                raise AssertionError(f"{name} without a current context")
            try:
                values = function(self, *arguments)
            except StickyError:
                return (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
            return (CUresult.CUDA_SUCCESS, *(() if values is None else values))

        call.__name__ = name
        return call


def cuInit(driver: FakeDriver, Flags: int) -> Any:
    if not driver.has_driver:
        raise RuntimeError("Failed to dlopen libcuda.so.1")


def cuDriverGetVersion(driver: FakeDriver) -> Any:
    return (12060,)


def cuDeviceGetCount(driver: FakeDriver) -> Any:
    return (driver.count,)


def cuDeviceGet(driver: FakeDriver, ordinal: int) -> Any:
    return (Handle(ordinal),)


def cuDeviceGetName(driver: FakeDriver, length: int, dev: Any) -> Any:
    return (b"Fake GPU".ljust(length, b"\0"),)


def cuDeviceGetAttribute(driver: FakeDriver, attrib: Any, dev: Any) -> Any:
    kinds = CUdevice_attribute
    return (
        {
            kinds.CU_DEVICE_ATTRIBUTE_INTEGRATED: int(driver.integrated),
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: driver.capability // 10,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: driver.capability % 10,
        }[attrib],
    )


def cuDevicePrimaryCtxRetain(driver: FakeDriver, dev: Any) -> Any:
    driver.retained += 1
    return (Handle(1),)


def cuDevicePrimaryCtxRelease(driver: FakeDriver, dev: Any) -> Any:
    driver.retained -= 1


def cuCtxSetCurrent(driver: FakeDriver, ctx: Any) -> Any:
    driver.is_current = True


def cuMemGetInfo(driver: FakeDriver) -> Any:
    return driver.free_bytes, 1 << 41


def cuMemAlloc(driver: FakeDriver, bytesize: int) -> Any:
    return (Handle(_allocate(driver.device_memory, bytesize)),)


def cuMemFree(driver: FakeDriver, dptr: Any) -> Any:
    del driver.device_memory[int(dptr)]


def cuMemAllocHost(driver: FakeDriver, bytesize: int) -> Any:
    return (_allocate(driver.host_memory, bytesize),)


def cuMemFreeHost(driver: FakeDriver, p: Any) -> Any:
    del driver.host_memory[int(p)]


def cuMemsetD8Async(driver: FakeDriver, dstDevice: Any, uc: int, N: int, hStream: Any) -> Any:
    driver.enqueue(lambda: driver.view(dstDevice, N).fill(uc))


def cuMemcpyHtoDAsync(driver: FakeDriver, dstDevice: Any, srcHost: Any, ByteCount: int, hStream: Any) -> Any:
    driver.enqueue(lambda: np.copyto(driver.view(dstDevice, ByteCount), driver.host(srcHost, ByteCount)))


def cuMemcpyDtoHAsync(driver: FakeDriver, dstHost: Any, srcDevice: Any, ByteCount: int, hStream: Any) -> Any:
    driver.enqueue(lambda: np.copyto(driver.host(dstHost, ByteCount), driver.view(srcDevice, ByteCount)))


def cuMemcpyDtoDAsync(driver: FakeDriver, dstDevice: Any, srcDevice: Any, ByteCount: int, hStream: Any) -> Any:
    driver.enqueue(lambda: np.copyto(driver.view(dstDevice, ByteCount), driver.view(srcDevice, ByteCount)))


def cuStreamCreate(driver: FakeDriver, Flags: int) -> Any:
    assert isinstance(Flags, int)
    return (Handle(77),)


def cuStreamDestroy(driver: FakeDriver, hStream: Any) -> Any:
    pass


def cuStreamSynchronize(driver: FakeDriver, hStream: Any) -> Any:
    assert driver.recording is None, "a wait while recording"
    work, driver.queue = driver.queue, []
    for each in work:
        try:
            each()
        except StickyError:
            driver.is_dead = True
            raise


def cuStreamBeginCapture(driver: FakeDriver, hStream: Any, mode: Any) -> Any:
    assert driver.recording is None
    driver.recording = []


def cuStreamEndCapture(driver: FakeDriver, hStream: Any) -> Any:
    recorded, driver.recording = driver.recording, None
    assert recorded is not None
    driver.graphs[len(driver.graphs) + 1] = recorded
    return (Handle(len(driver.graphs)),)


def cuGraphInstantiate(driver: FakeDriver, hGraph: Any, flags: int) -> Any:
    return (Handle(int(hGraph)),)


def cuGraphLaunch(driver: FakeDriver, hGraphExec: Any, hStream: Any) -> Any:
    driver.launches += 1
    driver.queue.extend(driver.graphs[int(hGraphExec)])


def cuGraphExecDestroy(driver: FakeDriver, hGraphExec: Any) -> Any:
    pass


def cuGraphDestroy(driver: FakeDriver, hGraph: Any) -> Any:
    pass


def cuGetErrorName(driver: FakeDriver, error: Any) -> Any:
    assert isinstance(error, CUresult)
    return (error.name.encode(),)


def cuGetErrorString(driver: FakeDriver, error: Any) -> Any:
    return (error.name.lower().replace("_", " ").encode(),)


def _allocate(memory: dict[int, Any], size: int) -> int:
    """Memory full of what was there before: nobody may rely on zeros."""
    block = np.full(size + ALIGNMENT, 0xEE, np.uint8)
    offset = -block.ctypes.data % ALIGNMENT
    view = block[offset : offset + size]
    memory[view.ctypes.data] = view
    return int(view.ctypes.data)


ENUMS = (CUresult, CUdevice_attribute, CUstream_flags, CUstreamCaptureMode)
FUNCTIONS = {name: value for name, value in list(globals().items()) if name.startswith("cu") and callable(value)}
NEED_CONTEXT = {name for name in FUNCTIONS if name.startswith(("cuMem", "cuStream", "cuGraph"))}
# What comes after the error when a call fails: nothing, or as many values as it returns.
NOTHING: dict[str, tuple[Any, ...]] = {
    "cuMemGetInfo": (None, None),
    "cuMemAlloc": (None,),
    "cuMemAllocHost": (None,),
    "cuDeviceGetCount": (None,),
    "cuDeviceGet": (None,),
    "cuDeviceGetAttribute": (None,),
    "cuDevicePrimaryCtxRetain": (None,),
    "cuStreamCreate": (None,),
    "cuStreamEndCapture": (None,),
    "cuGraphInstantiate": (None,),
}
