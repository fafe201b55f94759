"""Matrix products on numpy arrays, through the CPU kernels of a library; and weights in the kernels' integer formats."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import KernelError
from mmm_export.plugins.library import (
    ABI_VERSION,
    INT4_GROUP,
    Device,
    DType,
    Epilogue,
    KernelLibrary,
    LinearArguments,
    LinearShape,
    WeightFormat,
)

Array = NDArray[Any]

_DTYPES = {
    "float32": DType.FLOAT32,
    "float16": DType.FLOAT16,
    "bfloat16": DType.BFLOAT16,
    "uint16": DType.BFLOAT16,
}


class LinearWeight(NamedTuple):
    """A weight as the kernels take it.

    Shapes: plain: weight (N, K), no scales; INT8: weight (N, K) int8, scales (N,) float32; INT4: weight (N, K/2) uint8, the low nibble
    first, scales (N, K/128) float16 or bfloat16. Integers may be followed by `kept`, rows (kept, K) of the type of x.
    """

    weight: Array
    scales: Array | None = None
    kept: Array | None = None

    @property
    def format(self) -> WeightFormat:
        """Which of the formats it is, by its type."""
        names = {"int8": WeightFormat.INT8, "uint8": WeightFormat.INT4}
        return names.get(self.weight.dtype.name, WeightFormat.PLAIN)

    @property
    def inputs(self) -> int:
        """K."""
        return int(self.weight.shape[1]) * (2 if self.format == WeightFormat.INT4 else 1)


def pack_int4(quantized: Array) -> Array:
    """Pack integers in -8..7, (N, K) with an even K, into bytes, (N, K/2): q + 8 each, the low nibble first."""
    nibbles = (np.asarray(quantized, np.int16) + 8).astype(np.uint8)
    return np.ascontiguousarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4))


def unpack_int4(packed: Array) -> Array:
    """Unpack what `pack_int4` packs, as int8."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    quantized: Array = nibbles.astype(np.int8) - np.int8(8)
    return quantized


def linear_numpy(
    library: KernelLibrary,
    x: Array,
    weight: LinearWeight,
    *,
    norm_weight: Array | None = None,
    eps: float = 1e-5,
    residual: Array | None = None,
    silu: bool = False,
    out_dtype: DType | None = None,
) -> Array:
    """Compute epilogue(norm(x) W^T) on the CPU.

    Args:
        library: the kernels.
        x: (M, K); float32, float16, or bfloat16 (ml_dtypes, or its bits as uint16). Rows must be contiguous.
        weight: N rows of K inputs.
        norm_weight: (K,) of an RMS norm of x first; None: x as it is.
        eps: of the norm.
        residual: (M, N), added to the product.
        silu: the weight is [gate | up]; return silu(gate) * up.
        out_dtype: FLOAT32, or None for that of x.

    Returns: (M, N), or (M, N/2) with `silu`.

    Raises:
        KernelError: operands that do not fit together, or that the library refuses.
    """
    if x.ndim != 2 or weight.weight.ndim != 2:
        raise KernelError("x or the weight is no matrix", found=f"shapes {x.shape}, {weight.weight.shape}")
    M, K = x.shape
    quantized = int(weight.weight.shape[0])
    N = quantized + (0 if weight.kept is None else len(weight.kept))
    if silu and residual is not None:
        raise KernelError("a product has one epilogue", found="silu and a residual")
    wanted: dict[str, tuple[Array | None, tuple[int, ...]]] = {
        "weight": (weight.weight, (quantized, K // 2 if weight.format == WeightFormat.INT4 else K)),
        "norm_weight": (norm_weight, (K,)),
        "residual": (residual, (M, N)),
        "kept_weight": (weight.kept, (N - quantized, K)),
    }
    if weight.format != WeightFormat.PLAIN:
        if weight.scales is None:
            raise KernelError("a weight of integers has no scales")
        wanted["scales"] = (
            weight.scales,
            (quantized,) if weight.format == WeightFormat.INT8 else (quantized, K // INT4_GROUP),
        )
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise KernelError(f"{name} has the wrong shape", found=str(array.shape), wanted=str(shape))
        same = name in ("norm_weight", "residual", "kept_weight") or (
            name == "weight" and weight.format == WeightFormat.PLAIN
        )
        if array is not None and same and array.dtype != x.dtype:
            raise KernelError(f"{name} has another type than x", found=f"{array.dtype}, {x.dtype}")
    if x.size and x.strides[1] != x.itemsize:
        raise KernelError("the rows of x are not contiguous", found=f"strides {x.strides} bytes")
    kept = {name: np.ascontiguousarray(array) for name, (array, _) in wanted.items() if array is not None}
    out = np.empty((M, N // 2 if silu else N), x.dtype if out_dtype is None else np.float32)
    library.linear(
        LinearArguments(
            shape=LinearShape(
                abi_version=ABI_VERSION,
                device=Device.CPU,
                io_dtype=_dtype_of("x", x),
                out_dtype=_dtype_of("x", x) if out_dtype is None else out_dtype,
                weight_format=weight.format,
                scale_dtype=_dtype_of("scales", kept["scales"]) if "scales" in kept else 0,
                epilogue=Epilogue.SILU if silu else Epilogue.NONE if residual is None else Epilogue.RESIDUAL,
                normalise=int(norm_weight is not None),
                tokens=M,
                outputs=N,
                inputs=K,
                eps=eps,
                kept=N - quantized,
            ),
            x=x.ctypes.data,
            x_stride=x.strides[0] // x.itemsize,
            out=out.ctypes.data,
            **{name: array.ctypes.data for name, array in kept.items()},
        )
    )
    return out


def _dtype_of(name: str, array: Array) -> DType:
    if array.dtype.name not in _DTYPES:
        raise KernelError(f"{name} has a type without kernels", found=array.dtype.name, wanted=", ".join(_DTYPES))
    return _DTYPES[array.dtype.name]
