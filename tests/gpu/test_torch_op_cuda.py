"""The PyTorch operators on CUDA tensors: float64's numbers, streams, CUDA graphs, and tensors that lie apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpu.bounds import BOUND, relative_l2
from gpu.inputs import EPS, Inputs, Sizes, draw
from gpu.kernels import DEVICE
from gpu.reference import mixer
from mmm_export.errors import KernelError
from mmm_export.plugins import torch_op
from mmm_export.plugins.library import load_library

pytestmark = pytest.mark.gpu

TYPES = pytest.mark.parametrize("io", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
WEIGHTS = ("conv_weight", "conv_bias", "dt_bias", "A_log", "norm_weight")


@pytest.fixture(autouse=True)
def _library(kernels: Any) -> Iterator[None]:
    torch_op.use_library(load_library(kernels.path))
    yield
    torch_op.use_library(None)


def operands(inputs: Inputs) -> list[Any]:
    weights = [getattr(inputs, name) for name in WEIGHTS]
    return [inputs.projected, inputs.lengths, inputs.conv_state, inputs.ssm_state, *weights, inputs.sizes.kv_heads, EPS]


@TYPES
@pytest.mark.parametrize("tokens", [0, 1, 65, 1025])
def test_the_operator_agrees_with_float64(io: torch.dtype, tokens: int) -> None:
    inputs = draw(Sizes(2, tokens), io, lengths=[tokens, tokens // 2])
    y, conv_state, ssm_state = torch.ops.mmm.selective_scan(*operands(inputs))
    exact, rounded = mixer(inputs), mixer(inputs, operands=io)
    assert y.device == inputs.projected.device
    if tokens:
        assert min(relative_l2(y, right.y) for right in (exact, rounded)) <= BOUND[io]
    assert min(relative_l2(ssm_state, right.ssm_state) for right in (exact, rounded)) <= BOUND[io]
    assert torch.equal(conv_state, exact.conv_state)


@pytest.mark.parametrize("name", ["selective_scan", "selective_scan_"])
def test_the_operators_pass_pytorchs_own_checks(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mmm, name).default, tuple(operands(draw(Sizes(1, 65), torch.bfloat16))))


@pytest.mark.skipif(DEVICE == "cpu", reason="streams and graphs are CUDA's")
def test_steps_captured_in_a_graph_give_the_bits_of_steps_that_were_not() -> None:
    inputs = draw(Sizes(2, 1), torch.bfloat16)
    wanted, held = operands(inputs), operands(inputs)
    wanted[3], held[3] = inputs.ssm_state.clone(), inputs.ssm_state.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.ops.mmm.selective_scan_(*held)  # what is done once is not captured
    torch.cuda.current_stream().wait_stream(stream)
    held[3].copy_(inputs.ssm_state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = torch.ops.mmm.selective_scan_(*held)
    for _ in range(3):
        graph.replay()
        right, _ = torch.ops.mmm.selective_scan_(*wanted)
        assert torch.equal(y, right)
        assert torch.equal(held[3], wanted[3])


@pytest.mark.skipif(DEVICE == "cpu", reason="the CPU computes where it is called")
def test_calls_on_another_stream_wait_for_what_is_enqueued_there() -> None:
    inputs = draw(Sizes(1, 1025), torch.bfloat16)
    wanted = torch.ops.mmm.selective_scan(*operands(inputs))[0]
    stream = torch.cuda.Stream()
    late = torch.zeros_like(inputs.projected)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # so that a call on any other stream would read zeros
        late.copy_(inputs.projected)
        found = torch.ops.mmm.selective_scan(late, *operands(inputs)[1:])[0]
    stream.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no other device")
def test_a_weight_on_another_device_is_refused() -> None:
    given = operands(draw(Sizes(1, 3), torch.bfloat16))
    given[4] = given[4].cpu()
    with pytest.raises(KernelError, match="conv_weight is not where projected is"):
        torch.ops.mmm.selective_scan(*given)
