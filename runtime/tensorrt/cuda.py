"""The CUDA driver calls that a session needs: memory, copies, one stream, graphs. The only module that touches cuda-python.

The driver interface, and not the runtime's: one cuda-bindings then serves every driver of its major version. TensorRT works in the
primary context of a device, and so does this.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import MissingPackageError, MmmError
from mmm_export.tensorrt_packages import import_cuda_driver

_NAME_BYTES = 128
_MEMINFO = Path("/proc/meminfo")


class CudaError(MmmError):
    """A CUDA call failed."""


@dataclass(frozen=True)
class PinnedBuffer:
    """Host memory that copies reach directly: its address, and its bytes as an array."""

    address: int
    bytes: NDArray[np.uint8]


class CudaDevice:
    """One GPU, its primary context and one stream; frees what it gave when it is closed.

    Args:
        ordinal: which of the GPUs that CUDA shows.

    Raises:
        MissingPackageError: no Python bindings of CUDA, or no driver.
        CudaError: no such GPU, or the driver fails.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._cuda = import_cuda_driver()
        self._allocations: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []
        self._stream: Any = None
        self._context: Any = None
        self.is_dead = False  # an error in a kernel ends the context: nothing in it can be used or saved
        try:
            self._call(self._cuda.cuInit, 0)
        except RuntimeError as error:  # the bindings found no libcuda.so.1
            raise MissingPackageError(
                "an engine needs an NVIDIA GPU and its driver",
                found=(str(error).splitlines() or [type(error).__name__])[0],
                hint="install the driver of the GPU; without one, run the bundle: mmm-export run BUNDLE",
            ) from error
        count = self._call(self._cuda.cuDeviceGetCount)
        if not 0 <= ordinal < count:
            raise CudaError(
                f"there is no GPU {ordinal}", found=f"{count} GPUs", hint="see CUDA_VISIBLE_DEVICES and nvidia-smi"
            )
        self._device = self._call(self._cuda.cuDeviceGet, ordinal)
        self._context = self._call(self._cuda.cuDevicePrimaryCtxRetain, self._device)
        try:
            self.activate()
            self._stream = self._call(self._cuda.cuStreamCreate, int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
        except BaseException:
            self.close()
            raise

    @property
    def stream(self) -> int:
        """Handle of the stream, as TensorRT takes it."""
        return int(self._stream)

    @property
    def name(self) -> str:
        text: bytes = self._call(self._cuda.cuDeviceGetName, _NAME_BYTES, self._device)
        return text.split(b"\0")[0].decode("utf-8", "replace")

    @property
    def compute_capability(self) -> int:
        """87 for SM 8.7."""
        kinds = self._cuda.CUdevice_attribute
        major = self._attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        return major * 10 + self._attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)

    @property
    def driver_version(self) -> str:
        """The CUDA release that the driver speaks, "12.6"."""
        number = int(self._call(self._cuda.cuDriverGetVersion))
        return f"{number // 1000}.{number % 1000 // 10}"

    def free_bytes(self) -> int:
        """Device memory that can be had now.

        On a Jetson the GPU takes the memory of the system, and CUDA does not count what the page cache would give back.
        """
        free, _ = self._call(self._cuda.cuMemGetInfo)
        if self._attribute(self._cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED):
            free = max(int(free), _available_bytes())
        return int(free)

    def activate(self) -> None:
        """Make the context current in the calling thread; every public call of a backend begins so."""
        self._call(self._cuda.cuCtxSetCurrent, self._context)

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes of device memory, aligned to 256. Raises CudaError when there are not so many."""
        address = int(self._call(self._cuda.cuMemAlloc, size))
        self._allocations.append(address)
        return address

    def allocate_pinned(self, size: int) -> PinnedBuffer:
        """Return `size` bytes of pinned host memory, zeroed."""
        address = int(self._call(self._cuda.cuMemAllocHost, size))
        self._pinned.append(address)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        array[:] = 0
        return PinnedBuffer(address, array)

    def zero(self, address: int, size: int) -> None:
        """Enqueue the zeroing of device memory."""
        self._call(self._cuda.cuMemsetD8Async, address, 0, size, self._stream)

    def upload(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy from host to device memory; the source must live until `synchronize`."""
        self._call(self._cuda.cuMemcpyHtoDAsync, target, source, size, self._stream)

    def download(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy from device to host memory, which `synchronize` completes."""
        self._call(self._cuda.cuMemcpyDtoHAsync, target, source, size, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy within device memory."""
        self._call(self._cuda.cuMemcpyDtoDAsync, target, source, size, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream. Raises CudaError when a kernel failed; nothing works on this GPU context afterwards."""
        try:
            self._call(self._cuda.cuStreamSynchronize, self._stream)
        except CudaError:
            self.is_dead = True
            raise

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Record what `enqueue` does into a graph, without doing it, and return the graph for `launch`.

        Raises what `enqueue` raises, and CudaError when something in it cannot be recorded; the stream is usable afterwards.
        """
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(self._cuda.cuStreamBeginCapture, self._stream, mode)
        try:
            enqueue()
        except BaseException:
            with suppress(CudaError):  # a failed recording ends with an error; it must be ended all the same
                self._destroy_graph(self._call(self._cuda.cuStreamEndCapture, self._stream))
            raise
        graph = self._call(self._cuda.cuStreamEndCapture, self._stream)
        try:
            executable = self._call(self._cuda.cuGraphInstantiate, graph, 0)
        finally:
            self._destroy_graph(graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Enqueue a recorded graph."""
        self._call(self._cuda.cuGraphLaunch, graph, self._stream)

    def close(self) -> None:
        """Free everything, whatever state the GPU is in. Closing again is fine."""
        if self._context is None:
            return
        cuda = self._cuda
        with suppress(CudaError):
            self.activate()
        for free, items in (
            (cuda.cuGraphExecDestroy, self._graphs),
            (cuda.cuMemFree, self._allocations),
            (cuda.cuMemFreeHost, self._pinned),
        ):
            while items:
                with suppress(CudaError):
                    self._call(free, items.pop())
        with suppress(CudaError):
            if self._stream is not None:
                self._call(cuda.cuStreamDestroy, self._stream)
        with suppress(CudaError):
            self._call(cuda.cuDevicePrimaryCtxRelease, self._device)
        self._stream = self._context = None

    def _destroy_graph(self, graph: Any) -> None:
        self._call(self._cuda.cuGraphDestroy, graph)

    def _attribute(self, kind: Any) -> int:
        return int(self._call(self._cuda.cuDeviceGetAttribute, kind, self._device))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the driver: every function returns its error first. Returns the rest: nothing, one value, or a tuple."""
        error, *values = function(*arguments)
        if int(error) != 0:
            raise CudaError(
                f"{function.__name__} failed",
                found=f"{self._told(self._cuda.cuGetErrorName, error)}: {self._told(self._cuda.cuGetErrorString, error)}",
                hint="is there enough memory, and does nvidia-smi show the GPU?",
            )
        return values[0] if len(values) == 1 else tuple(values)

    def _told(self, ask: Callable[..., Any], error: Any) -> str:
        failed, text = ask(error)
        return f"error {int(error)}" if int(failed) != 0 or text is None else bytes(text).decode("utf-8", "replace")


def _available_bytes() -> int:
    """Memory that the system could give, page cache included; 0 where it does not say."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration, IndexError):
        return 0
