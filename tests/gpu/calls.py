"""One call into the library, with poisoned and guarded outputs, and what its outputs must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from gpu.inputs import EPS, Inputs
from gpu.kernels import ABI_VERSION, DEVICE, DTYPES, Code, Kernels, Method, RefusedError, ScanArguments, ScanShape

POISON = 0xFF  # as every byte: NaN in fp32, fp16 and bf16
GUARD = 0xA5
GUARD_BYTES = 4096
ALIGNMENT = 256


class Guarded:
    """A tensor of poison between two guards."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = DEVICE) -> None:
        count = 1
        for size in shape:
            count *= size
        self.end = GUARD_BYTES + count * dtype.itemsize
        self.memory = torch.full((self.end + GUARD_BYTES,), GUARD, dtype=torch.uint8, device=device)
        self.memory[GUARD_BYTES : self.end] = POISON
        self.tensor = self.memory[GUARD_BYTES : self.end].view(dtype).view(shape)
        assert self.tensor.data_ptr() % ALIGNMENT == 0 or count == 0 or str(device) == "cpu"

    def intact(self) -> bool:
        """Whether nothing was written before or behind the tensor."""
        return bool((self.memory[:GUARD_BYTES] == GUARD).all() and (self.memory[self.end :] == GUARD).all())


@dataclass
class Call:
    """A prepared call: `args` can be enqueued any number of times; the tensors it points at live as long as it does."""

    args: ScanArguments
    inputs: Inputs
    y: Guarded
    conv_state: Guarded
    ssm_state: Guarded
    workspace: Guarded
    method: Method
    kept: list[Any] = field(default_factory=list)

    @property
    def outputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.y.tensor, self.conv_state.tensor, self.ssm_state.tensor

    def enqueue(self, kernels: Kernels) -> None:
        """Enqueue on the current stream.

        Raises:
            RefusedError: the library returned another code than MMM_OK.
        """
        self.args.stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None
        kernels.scan(self.args)

    def assert_guards_intact(self) -> None:
        for name in ("y", "conv_state", "ssm_state", "workspace"):
            assert getattr(self, name).intact(), f"something was written outside {name}"


def prepare(
    kernels: Kernels,
    inputs: Inputs,
    *,
    method: Method = Method.AUTO,
    segments: int = 0,
    overlap: int = 0,
    in_place: bool = False,
) -> Call:
    """Make a call on `inputs`, with exactly the workspace that the library asks for; `in_place` updates the SSM state."""
    s, io, state = inputs.sizes, inputs.projected.dtype, inputs.ssm_state.dtype
    shape = ScanShape(
        ABI_VERSION,
        int(DEVICE == "cuda"),
        DTYPES[io],
        DTYPES[state],
        *(s.batch, s.tokens, s.heads, s.kv_heads, s.head_dim, s.state_dim, s.conv_width),
        EPS,
        method,
    )
    y = Guarded((s.batch, s.tokens, s.heads * s.head_dim), io)
    conv_state = Guarded(tuple(inputs.conv_state.shape), io)
    ssm_state = Guarded(tuple(inputs.ssm_state.shape), state)
    ssm_in = inputs.ssm_state
    if in_place:
        ssm_in = ssm_state.tensor.copy_(inputs.ssm_state)
    workspace = Guarded((kernels.workspace_bytes(shape),), torch.uint8)
    batch_stride, token_stride, element_stride = inputs.projected.stride()
    assert element_stride == 1
    args = ScanArguments(
        shape=shape,
        segments=segments,
        overlap=overlap,
        projected=inputs.projected.data_ptr(),
        projected_batch_stride=batch_stride,
        projected_token_stride=token_stride,
        lengths=None if inputs.lengths is None else inputs.lengths.data_ptr(),
        conv_state=inputs.conv_state.data_ptr(),
        ssm_state=ssm_in.data_ptr(),
        conv_weight=inputs.conv_weight.data_ptr(),
        conv_bias=inputs.conv_bias.data_ptr(),
        dt_bias=inputs.dt_bias.data_ptr(),
        A_log=inputs.A_log.data_ptr(),
        norm_weight=inputs.norm_weight.data_ptr(),
        y=y.tensor.data_ptr(),
        conv_state_out=conv_state.tensor.data_ptr(),
        ssm_state_out=ssm_state.tensor.data_ptr(),
        workspace=workspace.tensor.data_ptr() or None,
        workspace_bytes=workspace.tensor.numel(),
    )
    return Call(args, inputs, y, conv_state, ssm_state, workspace, method, [ssm_in])


def run(kernels: Kernels, inputs: Inputs, **options: Any) -> Call:
    """Prepare, run and wait for one call; nothing may be written outside its outputs and every element must be."""
    try:
        call = prepare(kernels, inputs, **options)
        call.enqueue(kernels)
    except RefusedError as refusal:
        if DEVICE == "cpu" and refusal.code == Code.MMM_UNSUPPORTED:
            pytest.skip(f"on the CPU: {refusal.text}")
        raise
    synchronize()
    call.assert_guards_intact()
    for name, tensor in zip(("y", "conv_state", "ssm_state"), call.outputs, strict=True):
        assert not tensor.isnan().any(), f"{int(tensor.isnan().sum())} elements of {name} are NaN or were not written"
    return call


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes (0.0 and -0.0 differ, NaN equals itself)."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
