"""The C interface of the kernels, plugins/include/mmm/kernels.h, as Python sees it. Fields and numbers are those of the header."""

from __future__ import annotations

import ctypes
import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from mmm_export.errors import KernelError
from mmm_export.library_file import check_library_file
from mmm_export.plugin_files import KERNEL_ABI

ABI_VERSION = KERNEL_ABI
STATUS_TEXT_BYTES = 384
FUNCTIONS = (
    "mmm_abi_version",
    "mmm_build_info",
    "mmm_selective_scan_workspace",
    "mmm_selective_scan",
    "mmm_linear_workspace",
    "mmm_linear",
)


class Code(IntEnum):
    """What a call returns."""

    MMM_OK = 0
    MMM_INVALID_ARGUMENT = 1
    MMM_UNSUPPORTED = 2
    MMM_WORKSPACE_TOO_SMALL = 3
    MMM_WRONG_DEVICE = 4
    MMM_CUDA_ERROR = 5


class DType(IntEnum):
    """Element types; FLOAT64 on the CPU only."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    FLOAT64 = 3


class Device(IntEnum):
    """Where the pointers of a call point to."""

    CPU = 0
    CUDA = 1


class Method(IntEnum):
    """How the recurrence is computed; tests compare them, everyone else takes AUTO."""

    AUTO = 0
    STEP = 1
    CHUNKED = 2
    SEQUENTIAL = 3


class WeightFormat(IntEnum):
    """How the weight of a product lies in memory."""

    PLAIN = 0
    INT8 = 1
    INT4 = 2


class Epilogue(IntEnum):
    """What becomes of the sums of a product."""

    NONE = 0
    RESIDUAL = 1
    SILU = 2


INT4_GROUP = 128


class Status(ctypes.Structure):
    """`mmm_status`."""

    _fields_ = (("code", ctypes.c_int32), ("text", ctypes.c_char * STATUS_TEXT_BYTES))


class ScanShape(ctypes.Structure):
    """`mmm_scan_shape`; sizes and types of a call."""

    _fields_ = (
        ("abi_version", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("io_dtype", ctypes.c_int32),
        ("state_dtype", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("state_dim", ctypes.c_int32),
        ("conv_width", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("method", ctypes.c_int32),
    )


class ScanArguments(ctypes.Structure):
    """`mmm_scan_args`; one call. Pointers are integers or None; what they point to must outlive the call."""

    _fields_ = (
        ("shape", ScanShape),
        ("segments", ctypes.c_int32),
        ("overlap", ctypes.c_int32),
        ("projected", ctypes.c_void_p),
        ("projected_batch_stride", ctypes.c_int64),
        ("projected_token_stride", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("conv_state", ctypes.c_void_p),
        ("ssm_state", ctypes.c_void_p),
        ("conv_weight", ctypes.c_void_p),
        ("conv_bias", ctypes.c_void_p),
        ("dt_bias", ctypes.c_void_p),
        ("A_log", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("conv_state_out", ctypes.c_void_p),
        ("ssm_state_out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
    )


class LinearShape(ctypes.Structure):
    """`mmm_linear_shape`; sizes and types of a product."""

    _fields_ = (
        ("abi_version", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("io_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("weight_format", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("epilogue", ctypes.c_int32),
        ("normalise", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("kept", ctypes.c_int32),
    )


class LinearArguments(ctypes.Structure):
    """`mmm_linear_args`; one product. Pointers are integers or None; what they point to must outlive the call."""

    _fields_ = (
        ("shape", LinearShape),
        ("variant", ctypes.c_int32),
        ("overlap", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("kept_weight", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
    )


class KernelLibrary:
    """A loaded kernel library. Made by `load_library`; stays loaded until the process ends."""

    def __init__(self, path: Path, functions: ctypes.CDLL) -> None:
        self.path = path
        self._workspace = functions.mmm_selective_scan_workspace
        self._workspace.argtypes = (ctypes.POINTER(ScanShape), ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(Status))
        self._scan = functions.mmm_selective_scan
        self._scan.argtypes = (ctypes.POINTER(ScanArguments), ctypes.POINTER(Status))
        self._linear_workspace = functions.mmm_linear_workspace
        self._linear_workspace.argtypes = (
            ctypes.POINTER(LinearShape),
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.POINTER(Status),
        )
        self._linear = functions.mmm_linear
        self._linear.argtypes = (ctypes.POINTER(LinearArguments), ctypes.POINTER(Status))
        functions.mmm_build_info.restype = ctypes.c_char_p
        text: bytes = functions.mmm_build_info()
        self.build_info: dict[str, Any] = json.loads(text)

    def workspace_bytes(self, shape: ScanShape) -> int:
        """Bytes of workspace that a call of this shape needs, on its device.

        Raises:
            KernelError: the library has no kernel for the shape.
        """
        needed, status = ctypes.c_uint64(), Status()
        if self._workspace(ctypes.byref(shape), ctypes.byref(needed), ctypes.byref(status)) != Code.MMM_OK:
            raise self._refusal(status)
        return needed.value

    def selective_scan(self, arguments: ScanArguments) -> None:
        """Run one call (CPU) or enqueue it (CUDA): updates what y, conv_state_out and ssm_state_out point to.

        Raises:
            KernelError: the library refuses the call; nothing was written.
        """
        status = Status()
        if self._scan(ctypes.byref(arguments), ctypes.byref(status)) != Code.MMM_OK:
            raise self._refusal(status)

    def linear_workspace_bytes(self, shape: LinearShape) -> int:
        """Bytes of workspace that a product of this shape needs, on its device.

        Raises:
            KernelError: the library has no kernel for the shape.
        """
        needed, status = ctypes.c_uint64(), Status()
        if self._linear_workspace(ctypes.byref(shape), ctypes.byref(needed), ctypes.byref(status)) != Code.MMM_OK:
            raise self._refusal(status, "matrix product")
        return needed.value

    def linear(self, arguments: LinearArguments) -> None:
        """Run one product (CPU) or enqueue it (CUDA): writes what out points to.

        Raises:
            KernelError: the library refuses the call; nothing was written.
        """
        status = Status()
        if self._linear(ctypes.byref(arguments), ctypes.byref(status)) != Code.MMM_OK:
            raise self._refusal(status, "matrix product")

    def _refusal(self, status: Status, operation: str = "selective scan") -> KernelError:
        text = status.text.decode("utf-8", "replace")
        return KernelError(f"{self.path.name} refused a {operation} ({Code(status.code).name}): {text}")


def load_library(path: Path | str) -> KernelLibrary:
    """Load a kernel library, libmmm_kernels.so.

    Raises:
        KernelError: there is no such file, it is no kernel library or not a whole one, or it was built for another
            processor or version.
    """
    path = Path(path)
    check_library_file(path)
    try:
        functions = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise KernelError(f"{path} cannot be loaded", found=str(error), hint=_REBUILD) from error
    missing = [name for name in FUNCTIONS if not hasattr(functions, name)]
    if missing:
        raise KernelError(
            f"{path} is not a kernel library of mmm-export",
            found=f"a library without {', '.join(missing)}",
            wanted="libmmm_kernels.so",
            hint=_REBUILD,
        )
    version = functions.mmm_abi_version()
    if version != ABI_VERSION:
        raise KernelError(
            f"{path} was built for another version of mmm-export",
            found=f"kernel interface {version}",
            wanted=f"kernel interface {ABI_VERSION}",
            hint=_REBUILD,
        )
    return KernelLibrary(path, functions)


_REBUILD = "build one for this machine: mmm-export plugins build"
