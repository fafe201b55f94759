"""The kernels can be captured, replayed, put on any stream and overlapped with the kernel before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu.bounds import check
from gpu.calls import Call, prepare, run, same_bits
from gpu.inputs import Sizes, draw
from gpu.kernels import DEVICE, Method

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]

BF16 = torch.bfloat16
CASES = pytest.mark.parametrize(
    ("tokens", "io", "options"),
    [
        (1, BF16, {}),
        (1, torch.float32, {}),
        (130, torch.float32, {}),
        (1025, BF16, {}),
        (1025, torch.float16, {"method": Method.CHUNKED, "segments": 4}),
        (0, BF16, {}),
    ],
    ids=["step", "step-fp32", "sequential", "prefill", "4-segments", "no-tokens"],
)


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Record `work` once, on a stream of its own; nothing runs yet."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph


def poison(call: Call) -> None:
    for tensor in call.outputs:
        tensor.fill_(float("nan"))


@CASES
def test_a_replayed_graph_equals_the_call(kernels: Any, tokens: int, io: torch.dtype, options: dict[str, Any]) -> None:
    inputs = draw(Sizes(2, tokens), io)
    wanted = run(kernels, inputs, **options)
    call = prepare(kernels, inputs, **options)
    graph = captured(lambda: call.enqueue(kernels))
    for _ in range(3):
        poison(call)
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(one, other) for one, other in zip(wanted.outputs, call.outputs, strict=True))
    call.assert_guards_intact()


def test_a_replayed_graph_reads_its_inputs_anew(kernels: Any) -> None:
    for tokens in (1, 193):
        inputs = draw(Sizes(2, tokens), BF16)
        call = prepare(kernels, inputs)
        graph = captured(lambda call=call: call.enqueue(kernels))  # type: ignore[misc]
        other = draw(Sizes(2, tokens), BF16, seed=1)
        for name in ("projected", "conv_state", "ssm_state"):
            getattr(inputs, name).copy_(getattr(other, name))
        graph.replay()
        torch.cuda.synchronize()
        check(call, "graph replay")


def test_a_stream_of_ones_own_is_used(kernels: Any) -> None:
    """The call waits for work that only its stream holds: on another stream it would read the old input."""
    stream = torch.cuda.Stream()
    for tokens in (1, 193):
        inputs, other = draw(Sizes(2, tokens), BF16), draw(Sizes(2, tokens), BF16, seed=1)
        call = prepare(kernels, inputs)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms
            inputs.projected.copy_(other.projected)
            call.enqueue(kernels)
        torch.cuda.synchronize()
        check(call, "own stream")


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_overlap_with_the_kernel_before_changes_no_bit(kernels: Any, batch: int) -> None:
    """The kernel before writes projected late; the states are those of two calls ago, as in a decode loop."""
    for tokens in (1, 130):
        inputs = draw(Sizes(batch, tokens), BF16)
        rows = draw(Sizes(batch, tokens), BF16, seed=1).projected.clone()
        wanted = run(kernels, inputs.tokens(0, tokens))
        plain, overlapped = prepare(kernels, inputs), prepare(kernels, inputs, overlap=1)
        for call in (plain, overlapped):
            inputs.projected.copy_(rows)
            call.enqueue(kernels)
        source = torch.empty_like(rows)

        def replayed(
            call: Call = overlapped, source: torch.Tensor = source, target: torch.Tensor = inputs.projected
        ) -> None:
            for _ in range(8):  # each round: garbage, then the true rows, by the kernel right before the call
                target.fill_(9.0)
                torch.mul(source, 1.0, out=target)
                call.enqueue(kernels)

        source.copy_(rows)
        torch.cuda.synchronize()
        expected = [tensor.clone() for tensor in plain.outputs]
        graph = captured(replayed)
        poison(overlapped)
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(one, other) for one, other in zip(expected, overlapped.outputs, strict=True))
        assert not same_bits(wanted.outputs[0], overlapped.outputs[0])  # the rows were indeed others


def test_overlapped_steps_equal_plain_ones_over_a_chain(kernels: Any) -> None:
    """64 steps in place: a step writes the SSM state that the next one reads, with one kernel between them."""
    steps, batch = 64, 2
    inputs = draw(Sizes(batch, steps), BF16, decay="slow")
    results = []
    for overlap in (0, 1):
        one = draw(Sizes(batch, 1), BF16)
        ssm_state = inputs.ssm_state.clone()
        conv = [inputs.conv_state.clone(), inputs.conv_state.clone()]
        calls = []
        for turn in (0, 1):
            call = prepare(kernels, one.starting_from(conv[turn], ssm_state), overlap=overlap)
            call.args.ssm_state_out = ssm_state.data_ptr()
            call.args.conv_state_out = conv[1 - turn].data_ptr()
            calls.append(call)
        outputs = torch.empty(steps, batch, calls[0].y.tensor.shape[-1], dtype=BF16, device=DEVICE)

        def chain(
            calls: list[Call] = calls, outputs: torch.Tensor = outputs, row: torch.Tensor = one.projected
        ) -> None:
            for t in range(steps):
                torch.mul(inputs.projected[:, t : t + 1], 1.0, out=row)
                calls[t % 2].args.y = outputs[t].data_ptr()
                calls[t % 2].enqueue(kernels)

        captured(chain).replay()
        torch.cuda.synchronize()
        results.append((outputs, ssm_state, conv[0]))
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))
