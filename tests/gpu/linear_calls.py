"""Matrix products on torch tensors, random weights in every format, and float64's results."""

from __future__ import annotations

from typing import Any

import torch

from gpu.kernels import DEVICE, DTYPES
from mmm_export.plugins.library import (
    ABI_VERSION,
    INT4_GROUP,
    Device,
    Epilogue,
    KernelLibrary,
    LinearArguments,
    LinearShape,
    WeightFormat,
)

FORMATS = ("plain", "int8", "int4")
EPS = 1e-5
_FORMAT = {"plain": WeightFormat.PLAIN, "int8": WeightFormat.INT8, "int4": WeightFormat.INT4}


class Product:
    """One product, prepared: `out` is written at each call, on the current stream. Keeps its tensors alive."""

    def __init__(
        self,
        kernels: KernelLibrary,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        out: torch.Tensor,
        *,
        norm_weight: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        silu: bool = False,
        variant: int = 0,
        overlap: bool = False,
        kept: torch.Tensor | None = None,
    ) -> None:
        kind = _FORMAT[format_of(weight, scales)]
        shape = LinearShape(
            abi_version=ABI_VERSION,
            device=Device.CUDA if x.is_cuda else Device.CPU,
            io_dtype=DTYPES[x.dtype],
            out_dtype=DTYPES[out.dtype],
            weight_format=kind,
            scale_dtype=0 if scales is None else DTYPES[scales.dtype],
            epilogue=Epilogue.SILU if silu else Epilogue.NONE if residual is None else Epilogue.RESIDUAL,
            normalise=int(norm_weight is not None),
            tokens=x.shape[0],
            outputs=weight.shape[0] + (0 if kept is None else len(kept)),
            inputs=x.shape[1],
            eps=EPS,
            kept=0 if kept is None else len(kept),
        )
        self.kernels = kernels
        workspace_bytes = kernels.linear_workspace_bytes(shape)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=x.device)
        self.held = (x, weight, scales, out, norm_weight, residual, workspace, kept)
        pointers = {
            "x": x,
            "weight": weight,
            "scales": scales,
            "norm_weight": norm_weight,
            "residual": residual,
            "kept_weight": kept,
            "out": out,
        }
        self.arguments = LinearArguments(
            shape=shape,
            variant=variant,
            overlap=int(overlap),
            x_stride=x.stride(0),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace_bytes,
            **{name: tensor.data_ptr() for name, tensor in pointers.items() if tensor is not None},
        )

    def __call__(self) -> None:
        if DEVICE == "cuda":
            self.arguments.stream = torch.cuda.current_stream().cuda_stream
        self.kernels.linear(self.arguments)


def format_of(weight: torch.Tensor, scales: torch.Tensor | None) -> str:
    if scales is None:
        return "plain"
    return "int8" if scales.ndim == 1 else "int4"


def weight_bytes(weight_format: str, outputs: int, inputs: int) -> int:
    """Bytes that a product has to read of its weight and scales; plain ones are bf16."""
    if weight_format == "plain":
        return 2 * outputs * inputs
    return outputs * inputs + 4 * outputs if weight_format == "int8" else outputs * inputs // 2 + outputs * inputs // 64


def random_weight(weight_format: str, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight to time with: every bit random, results of order one."""
    if weight_format == "plain":
        plain = torch.empty(outputs, inputs, device=DEVICE, dtype=torch.bfloat16)
        return plain.normal_(0, inputs**-0.5), None
    columns = inputs if weight_format == "int8" else inputs // 2
    integers = torch.randint(-128, 128, (outputs, columns), device=DEVICE, dtype=torch.int8)
    if weight_format == "int8":
        return integers, torch.full((outputs,), inputs**-0.5 / 74, device=DEVICE)
    return integers, torch.full((outputs, inputs // INT4_GROUP), inputs**-0.5 / 4.6, device=DEVICE).half()


def quantize(wide: torch.Tensor, weight_format: str, dtype: torch.dtype) -> tuple[Any, Any, torch.Tensor]:
    """Return weight and scales of a float (N, K), and what they stand for in float64. Uses the format's whole range."""
    if weight_format == "plain":
        plain = wide.to(dtype)
        return plain, None, plain.double()
    if weight_format == "int8":
        scales = wide.abs().amax(1) / 127
        q = (wide / scales[:, None]).round().clamp(-128, 127)
        q[0, 0] = -128
        return q.to(torch.int8), scales, q.double() * scales.double()[:, None]
    groups = wide.view(wide.shape[0], -1, INT4_GROUP)
    scales = (groups.abs().amax(2) / 7).half()
    q = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    q[0, 0, 0] = -8
    nibbles = (q + 8).to(torch.uint8).view(wide.shape)
    packed = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous()
    return packed, scales, (q.double() * scales.double()[..., None]).view(wide.shape)


def oracle(
    x: torch.Tensor,
    wide: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    silu: bool = False,
) -> torch.Tensor:
    """The result in float64; only the normalised x is rounded, twice, as the operator says."""
    rows = x.double()
    if norm_weight is not None:
        scaled = (rows * (rows.square().mean(1, keepdim=True) + EPS).rsqrt()).to(x.dtype).double()
        rows = (scaled * norm_weight.double()).to(x.dtype).double()
    y = rows @ wide.T
    if silu:
        gate, up = y.chunk(2, 1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual.double()


def relative_l2(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def error_of(kernels: KernelLibrary, weight_format: str, tokens: int, outputs: int, inputs: int) -> float:
    """The relative error of one product in bf16, with fresh random operands."""
    x = torch.randn(tokens, inputs, device=DEVICE).bfloat16()
    weight, scales, wide = quantize(torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5, weight_format, x.dtype)
    out = torch.full((tokens, outputs), float("nan"), device=DEVICE, dtype=x.dtype)
    Product(kernels, x, weight, scales, out)()
    return relative_l2(out, oracle(x, wide))
