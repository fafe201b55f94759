"""The selective scan on numpy arrays, through the CPU kernels of a library."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import KernelError
from mmm_export.plugins.library import Device, DType, KernelLibrary, Method, ScanArguments
from mmm_export.plugins.operands import WEIGHTS, scan_shape_from_operands

Array = NDArray[Any]


class ScanWeights(NamedTuple):
    """Weights of the operator; used as float32.

    Shapes: conv_weight (C, K); conv_bias (C,); dt_bias (H,); A_log (H,); norm_weight (P,).
    """

    conv_weight: Array
    conv_bias: Array
    dt_bias: Array
    A_log: Array
    norm_weight: Array


class ScanResult(NamedTuple):
    """Shapes: y (B, T, H*P), zero past a row's length; conv_state (B, C, K-1); ssm_state (B, H, P, N)."""

    y: Array
    conv_state: Array
    ssm_state: Array


def scan_numpy(
    library: KernelLibrary,
    projected: Array,
    lengths: Array | None,
    conv_state: Array,
    ssm_state: Array,
    weights: ScanWeights,
    *,
    kv_heads: int,
    eps: float,
    method: Method = Method.AUTO,
    in_place: bool = False,
) -> ScanResult:
    """Run the operator on the CPU.

    Args:
        library: the kernels.
        projected: (B, T, W), rows [v | k | q | gate | dt]; float64, float32, float16, or bfloat16 (ml_dtypes, or its bits as
            uint16). Rows must be contiguous, batch and tokens may have any stride that is no overlap.
        lengths: (B,), valid tokens of each row; None when all are.
        conv_state: (B, C, K-1) in the type of `projected`, raw inputs before this call, oldest first.
        ssm_state: (B, H, P, N), of any of these types. Updated if `in_place`, which needs it contiguous.
        weights: of the operator.
        kv_heads: G; H is a multiple of it.
        eps: of the RMS norm.
        method: how the recurrence is computed.
        in_place: return `ssm_state` itself, updated.

    Raises:
        KernelError: operands that do not fit together, or that the library refuses.
    """
    if conv_state.dtype != projected.dtype:
        raise KernelError("conv_state has another type than projected", found=f"{conv_state.dtype}, {projected.dtype}")
    if projected.size and projected.strides[2] != projected.itemsize:
        raise KernelError("the rows of projected are not contiguous", found=f"strides {projected.strides} bytes")
    if in_place and not ssm_state.flags.c_contiguous:
        raise KernelError("an ssm_state that is not contiguous cannot be updated in place")
    if lengths is not None:
        lengths = np.ascontiguousarray(lengths, np.int32)
    conv_state, ssm_state = np.ascontiguousarray(conv_state), np.ascontiguousarray(ssm_state)
    kept = {name: np.ascontiguousarray(getattr(weights, name), np.float32) for name in WEIGHTS}

    operands = {"projected": projected, "conv_state": conv_state, "ssm_state": ssm_state, **kept}
    if lengths is not None:
        operands["lengths"] = lengths
    shape = scan_shape_from_operands(
        {name: array.shape for name, array in operands.items()},
        kv_heads=kv_heads,
        eps=eps,
        device=Device.CPU,
        io_dtype=_dtype_of("projected", projected),
        state_dtype=_dtype_of("ssm_state", ssm_state),
        method=method,
    )
    y = np.empty((shape.batch, shape.tokens, shape.heads * shape.head_dim), projected.dtype)
    result = ScanResult(y, np.empty_like(conv_state), ssm_state if in_place else np.empty_like(ssm_state))
    library.selective_scan(
        ScanArguments(
            shape=shape,
            projected_batch_stride=projected.strides[0] // projected.itemsize,
            projected_token_stride=projected.strides[1] // projected.itemsize,
            y=result.y.ctypes.data,
            conv_state_out=result.conv_state.ctypes.data,
            ssm_state_out=result.ssm_state.ctypes.data,
            **{name: array.ctypes.data for name, array in operands.items()},
        )
    )
    return result


def _dtype_of(name: str, array: Array) -> DType:
    known = {
        "float32": DType.FLOAT32,
        "float16": DType.FLOAT16,
        "bfloat16": DType.BFLOAT16,
        "uint16": DType.BFLOAT16,
        "float64": DType.FLOAT64,
    }
    if array.dtype.name not in known:
        raise KernelError(f"{name} has a type without kernels", found=array.dtype.name, wanted=", ".join(known))
    return known[array.dtype.name]
