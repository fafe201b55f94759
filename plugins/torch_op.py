"""The selective scan as PyTorch operators on CPU and CUDA tensors, for running the PyTorch model over the kernels.

    torch.ops.mmm.selective_scan    returns y and both new states
    torch.ops.mmm.selective_scan_   updates ssm_state, returns y and the new conv state

`scan` gives the first the signature that the model takes: `load_model(checkpoint, scan=torch_op.scan)`. There is no backward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmm_export.errors import KernelError
from mmm_export.model.scan import ScanSizes, ScanWeights
from mmm_export.plugin_files import find_library
from mmm_export.plugins.library import Device, DType, KernelLibrary, Method, ScanArguments, load_library
from mmm_export.plugins.operands import WEIGHTS, scan_shape_from_operands

_DTYPES = {
    torch.float32: DType.FLOAT32,
    torch.float16: DType.FLOAT16,
    torch.bfloat16: DType.BFLOAT16,
    torch.float64: DType.FLOAT64,
}
_DEVICES = {"cpu": Device.CPU, "cuda": Device.CUDA}
_ALIGNMENT = 16  # bytes, of projected and the SSM states

_chosen: KernelLibrary | None = None
_found: dict[str, KernelLibrary] = {}  # by device type


def use_library(library: KernelLibrary | None) -> None:
    """Let the operators call this library from now on; None: the newest one that `mmm-export plugins build` made."""
    global _chosen
    _chosen = library
    _found.clear()


def scan(
    projected: Tensor,
    lengths: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    sizes: ScanSizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator by the kernels. Same contract as `mmm_export.model.scan.sequential`, but y is zero past a length.

    Weights are cast to float32 in every call, which costs a launch for each that is stored in another type.

    Raises:
        KernelError: no library, operands that do not fit together or that it refuses, or a gradient is asked for.
    """
    _, H, P, N = ssm_state.shape
    if (sizes.heads, sizes.head_dim, sizes.state_dim) != (H, P, N):
        raise KernelError(
            "ssm_state has other sizes than the layer",
            found=f"{tuple(ssm_state.shape)}",
            wanted=f"(B, {sizes.heads}, {sizes.head_dim}, {sizes.state_dim})",
        )
    operands = {name: getattr(weights, name) for name in WEIGHTS}
    doubles = [name for name, weight in operands.items() if weight.dtype == torch.float64]
    if doubles:
        raise KernelError(f"{', '.join(doubles)}: the kernels would round this to float32", found="float64")
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.mmm.selective_scan(
        projected,
        lengths.to(torch.int32),
        conv_state,
        ssm_state,
        *(weight.to(torch.float32) for weight in operands.values()),
        sizes.kv_heads,
        sizes.eps,
    )
    return result


def _selective_scan(
    projected: Tensor, lengths: Tensor | None, conv_state: Tensor, ssm_state: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    ssm_state = _packed(ssm_state)
    ssm_state_out = torch.empty_like(ssm_state)
    y, conv_state_out = _call(projected, lengths, conv_state, ssm_state, ssm_state_out, *rest)
    return y, conv_state_out, ssm_state_out


def _selective_scan_in_place(
    projected: Tensor, lengths: Tensor | None, conv_state: Tensor, ssm_state: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    if not ssm_state.is_contiguous():
        raise KernelError("an ssm_state that is not contiguous cannot be updated in place")
    return _call(projected, lengths, conv_state, ssm_state, ssm_state, *rest)


def _call(
    projected: Tensor,
    lengths: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    ssm_state_out: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    norm_weight: Tensor,
    kv_heads: int,
    eps: float,
    method: int = 0,
) -> tuple[Tensor, Tensor]:
    """Check what the library cannot see, allocate, and run or enqueue; updates ssm_state_out."""
    weights = dict(zip(WEIGHTS, (conv_weight, conv_bias, dt_bias, A_log, norm_weight), strict=True))
    operands = {"projected": projected, "conv_state": conv_state, "ssm_state": ssm_state, **weights}
    if lengths is not None:
        operands["lengths"] = lengths
    wanted = dict.fromkeys(WEIGHTS, torch.float32) | {"lengths": torch.int32, "conv_state": projected.dtype}
    _check_types(operands, wanted)
    device = projected.device
    shape = scan_shape_from_operands(
        {name: tuple(tensor.shape) for name, tensor in operands.items()},
        kv_heads=kv_heads,
        eps=eps,
        device=_DEVICES[device.type],
        io_dtype=_DTYPES[projected.dtype],
        state_dtype=_DTYPES[ssm_state.dtype],
        method=Method(method),
    )
    operands["projected"] = rows = _usable_rows(projected)
    operands = {name: tensor if name == "projected" else tensor.contiguous() for name, tensor in operands.items()}
    y = projected.new_empty(shape.batch, shape.tokens, shape.heads * shape.head_dim)
    conv_state_out = torch.empty_like(operands["conv_state"])
    library = _library_for(device)
    workspace_bytes = library.workspace_bytes(shape)
    # The caching allocator gives memory back in the order of this stream, so nothing here must outlive the launch.
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
    arguments = ScanArguments(
        shape=shape,
        projected_batch_stride=rows.stride(0),
        projected_token_stride=rows.stride(1),
        y=y.data_ptr(),
        conv_state_out=conv_state_out.data_ptr(),
        ssm_state_out=ssm_state_out.data_ptr(),
        workspace=workspace.data_ptr(),
        workspace_bytes=workspace_bytes,
        **{name: tensor.data_ptr() for name, tensor in operands.items()},
    )
    if device.type == "cuda":
        with torch.cuda.device(device):
            arguments.stream = torch.cuda.current_stream().cuda_stream
            library.selective_scan(arguments)
    else:
        library.selective_scan(arguments)
    return y, conv_state_out


def _check_types(operands: dict[str, Tensor], wanted: dict[str, torch.dtype]) -> None:
    """Raise KernelError for an element type that is not as wanted or has no kernels, and for a tensor on another device."""
    device = operands["projected"].device
    for name, tensor in operands.items():
        if tensor.device != device:
            raise KernelError(f"{name} is not where projected is", found=str(tensor.device), wanted=str(device))
        if name in wanted and tensor.dtype != wanted[name]:
            raise KernelError(f"{name} has the wrong type", found=str(tensor.dtype), wanted=str(wanted[name]))
        if name not in wanted and tensor.dtype not in _DTYPES:
            known = ", ".join(map(str, _DTYPES))
            raise KernelError(f"{name} has a type without kernels", found=str(tensor.dtype), wanted=known)


def _packed(tensor: Tensor) -> Tensor:
    """Return the tensor if it is contiguous and aligned, else a copy that is."""
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _usable_rows(projected: Tensor) -> Tensor:
    """Return projected (B, T, W) if the kernels can read it where it lies, else a copy."""
    batch, tokens, width = projected.shape
    batch_stride, token_stride, element_stride = projected.stride()
    usable = element_stride == 1 and (tokens == 1 or token_stride >= width) and (batch == 1 or batch_stride >= 0)
    return projected if usable and projected.data_ptr() % _ALIGNMENT == 0 else _packed(projected)


def _library_for(device: torch.device) -> KernelLibrary:
    if _chosen is not None:
        return _chosen
    if device.type not in _found:
        cuda = device.type == "cuda"
        path: Path | None = find_library("kernels", cuda=cuda)
        if path is None:
            raise KernelError(
                "no kernel library was built for this machine" + (" and CUDA" if cuda else ""),
                hint="mmm-export plugins build --cuda-arch 87,90" if cuda else "mmm-export plugins build",
            )
        _found[device.type] = load_library(path)
    return _found[device.type]


def _fake(
    projected: Tensor, lengths: Tensor | None, conv_state: Tensor, ssm_state: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_in_place(projected, lengths, conv_state, ssm_state), ssm_state.new_empty(ssm_state.shape)


def _fake_in_place(
    projected: Tensor, lengths: Tensor | None, conv_state: Tensor, ssm_state: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    B, T, _ = projected.shape
    _, H, P, _ = ssm_state.shape
    return projected.new_empty(B, T, H * P), conv_state.new_empty(conv_state.shape)


def _without_backward(name: str) -> Any:
    """The operator's kernel for the Autograd key: refuses gradients when they are asked for, not in a later backward()."""

    def run(projected: Tensor, lengths: Tensor | None, conv_state: Tensor, ssm_state: Tensor, *rest: Any) -> Any:
        tensors = (projected, conv_state, ssm_state, *rest)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            raise KernelError(
                f"mmm::{name} has no backward",
                found="an operand that requires a gradient",
                hint="train with mmm_export.model.scan, or run under torch.no_grad()",
            )
        with torch._C._AutoDispatchBelowAutograd():
            result = getattr(torch.ops.mmm, name)(projected, lengths, conv_state, ssm_state, *rest)
        if name.endswith("_") and not ssm_state.is_inference():
            torch.autograd.graph.increment_version(ssm_state)
        return result

    return run


_INPUTS = (
    "(Tensor projected, Tensor? lengths, Tensor conv_state, Tensor{mark} ssm_state, Tensor conv_weight, Tensor conv_bias, "
    "Tensor dt_bias, Tensor A_log, Tensor norm_weight, int kv_heads, float eps, int method=0) -> "
)
_operators = torch.library.Library("mmm", "FRAGMENT")  # kept: its registrations end with it
_operators.define("selective_scan" + _INPUTS.format(mark="") + "(Tensor, Tensor, Tensor)")
_operators.define("selective_scan_" + _INPUTS.format(mark="(a!)") + "(Tensor, Tensor)")
for _name, _kernel, _shapes in (
    ("selective_scan", _selective_scan, _fake),
    ("selective_scan_", _selective_scan_in_place, _fake_in_place),
):
    _operators.impl(_name, _kernel, "CPU")
    _operators.impl(_name, _kernel, "CUDA")
    _operators.impl(_name, _without_backward(_name), "Autograd")
    torch.library.register_fake(f"mmm::{_name}", _shapes, lib=_operators)
