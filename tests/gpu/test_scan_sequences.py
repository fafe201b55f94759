"""Calls after calls: what is cut in pieces, repeated, done in place or left running for long gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu.bounds import check, relative_l2
from gpu.calls import run, same_bits
from gpu.inputs import Inputs, Sizes, draw
from gpu.kernels import Method
from gpu.reference import Result, mixer

pytestmark = pytest.mark.gpu

TYPES = pytest.mark.parametrize("io", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


def check_pieces(kernels: Any, inputs: Inputs, cuts: list[int], group: str) -> None:
    """Run `inputs` in pieces that end at `cuts`, each from the states of the one before, against float64 in one go."""
    pieces: list[torch.Tensor] = []
    begin, conv_state, ssm_state = 0, inputs.conv_state, inputs.ssm_state
    for end in cuts:
        call = run(kernels, inputs.tokens(begin, end).starting_from(conv_state, ssm_state))
        y, conv_state, ssm_state = call.outputs
        begin, pieces = end, [*pieces, y]
    # The last call stands for the whole: its outputs are those of one long call.
    exact, rounded = mixer(inputs), mixer(inputs, operands=inputs.projected.dtype)
    length = cuts[-1] - (cuts[-2] if len(cuts) > 1 else 0)
    tails = [Result(r.y[:, -length:], r.conv_state, r.ssm_state) for r in (exact, rounded)]
    check(call, group, exact=tails[0], rounded=tails[1])
    y = torch.cat(pieces, 1)
    assert (
        min(relative_l2(y, exact.y), relative_l2(y, rounded.y)) < 2.4e-3
    )  # the bf16 bound; each piece is checked closer


@TYPES
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 200])
def test_a_prefill_and_a_step_equal_a_longer_prefill(kernels: Any, tokens: int, io: torch.dtype) -> None:
    check_pieces(kernels, draw(Sizes(2, tokens + 1), io, seed=tokens), [tokens, tokens + 1], "prefill, step")


@TYPES
@pytest.mark.parametrize("cuts", [[512, 1025], [1, 2, 3, 1025], [65, 193, 194, 705], [64, 64, 128, 257]], ids=str)
def test_split_prefills_equal_one(kernels: Any, cuts: list[int], io: torch.dtype) -> None:
    check_pieces(kernels, draw(Sizes(1, cuts[-1]), io), cuts, "split prefill")


@TYPES
@pytest.mark.parametrize("conv_width", [3, 4])
def test_a_wider_convolution_carries_over_short_pieces(kernels: Any, conv_width: int, io: torch.dtype) -> None:
    inputs = draw(Sizes(2, 71, conv_width=conv_width), io)
    check_pieces(kernels, inputs, [1, 2, 4, 70, 71], "split prefill")


@TYPES
@pytest.mark.parametrize("tokens", [1, 2, 65, 1025])
def test_in_place_equals_out_of_place_bit_for_bit(kernels: Any, tokens: int, io: torch.dtype) -> None:
    for state in (torch.float32, torch.bfloat16):
        inputs = draw(Sizes(2, tokens), io, state)
        apart, in_place = run(kernels, inputs), run(kernels, inputs, in_place=True)
        for one, other in zip(apart.outputs, in_place.outputs, strict=True):
            assert same_bits(one, other)


@TYPES
@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (1, {}),
        (1025, {}),
        (130, {"method": Method.SEQUENTIAL}),
        (1025, {"method": Method.CHUNKED, "segments": 8}),
        (1025, {"method": Method.CHUNKED, "segments": 1}),
    ],
    ids=["step", "prefill", "sequential", "8 segments", "1 segment"],
)
def test_ten_runs_give_the_same_bits(kernels: Any, tokens: int, options: dict[str, Any], io: torch.dtype) -> None:
    if options.get("method") == Method.CHUNKED and io == torch.float32:
        pytest.skip("the chunked method takes fp16 and bf16")
    inputs = draw(Sizes(2, tokens), io)
    first = run(kernels, inputs, **options)
    for _ in range(9):
        again = run(kernels, inputs, **options)
        assert all(same_bits(one, other) for one, other in zip(first.outputs, again.outputs, strict=True))


@TYPES
def test_inputs_are_left_as_they_are(kernels: Any, io: torch.dtype) -> None:
    for tokens in (1, 130):
        inputs = draw(Sizes(2, tokens), io, lengths=[tokens, max(tokens - 3, 0)])
        before = {name: value.clone() for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
        run(kernels, inputs)
        for name, value in before.items():
            assert same_bits(value, getattr(inputs, name)), f"{name} was written"


@TYPES
def test_rows_of_a_batch_do_not_meet(kernels: Any, io: torch.dtype) -> None:
    for tokens in (1, 193):
        inputs = draw(Sizes(4, tokens), io)
        before = run(kernels, inputs)
        inputs.projected[1] = float("nan")
        call = run_with_a_broken_row(kernels, inputs)
        for row in (0, 2, 3):
            for one, other in zip(before.outputs, call, strict=True):
                assert same_bits(one[row], other[row]), f"row 1 changed row {row}"


def run_with_a_broken_row(kernels: Any, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    from gpu.calls import prepare, synchronize

    call = prepare(kernels, inputs)
    call.enqueue(kernels)
    synchronize()
    call.assert_guards_intact()
    return call.outputs
