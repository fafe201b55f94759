"""The SSM state does not drift over 100,000 decode steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu.bounds import BOUND, relative_l2
from gpu.calls import prepare, synchronize
from gpu.inputs import Inputs, Sizes, draw
from gpu.kernels import DEVICE
from gpu.reference import Result, mixer

pytestmark = pytest.mark.gpu

PERIOD = 100  # the rows come again after so many steps; even, so that the two conv states end where they began
STEPS = (1_000, 10_000, 100_000) if DEVICE == "cuda" else (PERIOD, 4 * PERIOD)

# The state after n steps carries the rounding of its 1 / (1 - decay) latest ones: 300 with the slowest decay of an
# initialised model. Each decay and product is wrong by up to 2e-7 (an approximate exponential), and since the same
# hundred rows return, so do their errors: 300 * 2e-7 / sqrt(100) at worst. That is within the bound of fp32.
STATE_BOUND = BOUND[torch.float32]


def after(inputs: Inputs, periods: int) -> Result:
    """What is computed in float64 after so many periods, in closed form.

    One period maps the state S to D S + U, elementwise; so m periods give D^m S + U (1 - D^m) / (1 - D).
    """
    start = inputs.ssm_state.double()
    zeros, ones = torch.zeros_like(start), torch.ones_like(start)
    added = mixer(inputs.starting_from(inputs.conv_state, zeros)).ssm_state
    decay = mixer(inputs.starting_from(inputs.conv_state, ones)).ssm_state - added
    power = decay ** (periods - 1)
    before_last = power * start + added * (1 - power) / (1 - decay)
    return mixer(inputs.starting_from(inputs.conv_state, before_last))


@pytest.mark.parametrize("io", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_a_hundred_thousand_steps_do_not_drift(kernels: Any, io: torch.dtype) -> None:
    ring = draw(Sizes(1, PERIOD), io)
    # The convolution before the first row meets the last one, as in every later period.
    ring = ring.starting_from(
        ring.projected[:, -1:, : ring.sizes.channels].transpose(1, 2).contiguous(), ring.ssm_state
    )

    ssm_state = ring.ssm_state.clone()
    conv_states = [ring.conv_state.clone(), torch.empty_like(ring.conv_state)]
    y = torch.full((1, PERIOD, 2048), float("nan"), dtype=io, device=DEVICE)
    calls = []
    for t in range(PERIOD):
        row = ring.tokens(t, t + 1).starting_from(conv_states[t % 2], ssm_state)
        call = prepare(kernels, row)
        call.args.ssm_state_out = ssm_state.data_ptr()
        call.args.conv_state_out = conv_states[1 - t % 2].data_ptr()
        call.args.y = y[:, t].data_ptr()
        calls.append(call)

    def period() -> None:
        for call in calls:
            call.enqueue(kernels)

    replay = period
    if DEVICE == "cuda":
        synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            period()
        replay = graph.replay

    errors = {}
    done = 0
    for steps in STEPS:
        while done < steps:
            replay()
            done += PERIOD
        synchronize()
        wanted = after(ring, steps // PERIOD)
        errors[steps] = relative_l2(ssm_state, wanted.ssm_state)
        assert relative_l2(y, wanted.y) <= BOUND[io], f"y after {steps} steps"
        assert torch.equal(conv_states[0], wanted.conv_state)
    print("state error after steps:", {steps: f"{error:.1e}" for steps, error in errors.items()})  # noqa: T201
    assert max(errors.values()) <= STATE_BOUND, errors
    assert errors[STEPS[-1]] <= 2 * errors[STEPS[0]] + 1e-7, f"the error grows with the steps: {errors}"
