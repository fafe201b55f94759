"""The kernels compute the mixer: every size, type and method against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu.bounds import check
from gpu.calls import run, same_bits
from gpu.inputs import DECAYS, Sizes, draw
from gpu.kernels import DEVICE, Method
from gpu.reference import mixer

pytestmark = pytest.mark.gpu

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = pytest.mark.parametrize("io", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
HALF_TYPES = pytest.mark.parametrize("io", [FP16, BF16], ids=["fp16", "bf16"])

# Around one chunk of 64 or 128, between and well past them, one token over a thousand; and a long prompt.
TOKENS = (1, 2, 63, 64, 65, 127, 128, 129, 200, 1025)
LONG = 8192 if DEVICE == "cuda" else 300


@TYPES
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens_agrees_with_float64(kernels: Any, tokens: int, io: torch.dtype) -> None:
    check(run(kernels, draw(Sizes(2, tokens), io, seed=tokens)), "tokens 1..1025")


@TYPES
def test_a_long_prompt_agrees_with_float64(kernels: Any, io: torch.dtype) -> None:
    check(run(kernels, draw(Sizes(1, LONG), io)), "tokens 8192")


@HALF_TYPES
@pytest.mark.parametrize("decay", DECAYS)
def test_a_short_prompt_of_one_sequence_agrees_with_float64(kernels: Any, decay: str, io: torch.dtype) -> None:
    for tokens, length in ((256, 256), (257, 257), (640, 512), (1024, 1024), (1024, 700)):  # around segments of 256
        inputs = draw(Sizes(1, tokens), io, decay=decay, lengths=[length])
        check(run(kernels, inputs), "short prompt", extreme=decay == "fast")


@TYPES
@pytest.mark.parametrize("decay", DECAYS)
def test_slow_and_fast_decays_agree_with_float64(kernels: Any, decay: str, io: torch.dtype) -> None:
    for tokens in (1, 385):
        inputs = draw(Sizes(1, tokens), io, decay=decay)
        check(
            run(kernels, inputs), f"decay {decay}", extreme=decay == "fast"
        )  # few terms: the norm scales cancelled ones up


@TYPES
@pytest.mark.parametrize("tokens", [1, 129])
def test_batches_of_1_to_8_agree_with_float64(kernels: Any, tokens: int, io: torch.dtype) -> None:
    for batch in range(1, 9):
        check(run(kernels, draw(Sizes(batch, tokens), io, seed=batch)), "batch 1..8")


@TYPES
@pytest.mark.parametrize("tokens", [1, 200, 1025])
def test_padding_is_never_read_and_gives_zeros(kernels: Any, tokens: int, io: torch.dtype) -> None:
    lengths = [0, 1, 2, 63, 64, 65, tokens - 1, tokens]
    inputs = draw(Sizes(8, tokens), io, lengths=[min(length, tokens) for length in lengths])
    call = run(kernels, inputs)  # the padding is NaN
    check(call, "padding")
    assert same_bits(call.conv_state.tensor[0], inputs.conv_state[0]), "length 0 changed the conv state"
    assert same_bits(call.ssm_state.tensor[0], inputs.ssm_state[0]), "length 0 changed the SSM state"


@TYPES
@pytest.mark.parametrize("tokens", [1, 65])
def test_lengths_outside_the_call_count_as_its_ends(kernels: Any, tokens: int, io: torch.dtype) -> None:
    check(run(kernels, draw(Sizes(3, tokens), io, lengths=[-7, tokens + 9, 1])), "padding")


@TYPES
@pytest.mark.parametrize("state", [FP16, BF16], ids=["state_fp16", "state_bf16"])
def test_a_half_size_state_is_rounded_once(kernels: Any, state: torch.dtype, io: torch.dtype) -> None:
    for tokens in (1, 2, 200):
        check(run(kernels, draw(Sizes(2, tokens), io, state, seed=tokens)), f"state {str(state)[6:]}")


@TYPES
@pytest.mark.parametrize("tokens", [1, 2, 64, 129, 513])
def test_methods_agree_with_float64_and_so_with_each_other(kernels: Any, tokens: int, io: torch.dtype) -> None:
    inputs = draw(Sizes(2, tokens), io, seed=7)
    exact = mixer(inputs)
    methods = [Method.SEQUENTIAL, *([Method.STEP] if tokens == 1 else []), *([Method.CHUNKED] if io != FP32 else [])]
    for method in methods:
        check(run(kernels, inputs, method=method), "each method", exact=exact)


@HALF_TYPES
@pytest.mark.parametrize("size", [64, 128])
def test_any_number_of_segments_agrees_with_float64(kernels: Any, size: int, io: torch.dtype) -> None:
    for batch, tokens in ((1, 2049), (2, 321)):
        inputs = draw(Sizes(batch, tokens, head_dim=size, state_dim=size), io)
        exact, rounded = mixer(inputs), mixer(inputs, operands=io)
        for segments in (1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 32):
            call = run(kernels, inputs, method=Method.CHUNKED, segments=segments)
            check(call, "segments 1..32", exact=exact, rounded=rounded)


@HALF_TYPES
def test_segments_and_padding_go_together(kernels: Any, io: torch.dtype) -> None:
    inputs = draw(Sizes(4, 700), io, lengths=[0, 130, 641, 700])  # segments that are empty, cut and full
    exact, rounded = mixer(inputs), mixer(inputs, operands=io)
    for segments in (1, 3, 8, 32):
        check(run(kernels, inputs, method=Method.CHUNKED, segments=segments), "padding", exact=exact, rounded=rounded)


@TYPES
@pytest.mark.parametrize("dims", [(16, 16), (48, 96), (32, 128), (64, 64), (128, 128), (128, 16), (112, 80)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 1)], ids=str)
def test_head_sizes_and_ratios_agree_with_float64(
    kernels: Any, heads: tuple[int, int], dims: tuple[int, int], io: torch.dtype
) -> None:
    for conv_width, tokens in ((2, 1), (2, 130), (3, 1), (3, 67), (4, 1), (4, 2), (4, 130)):
        sizes = Sizes(2, tokens, heads[0], heads[1], dims[0], dims[1], conv_width)
        check(run(kernels, draw(sizes, io, seed=tokens)), f"sizes, conv width {conv_width}")


@TYPES
@pytest.mark.parametrize("conv_width", [2, 3, 4])
def test_padding_shorter_than_the_convolution_is_shifted_in(kernels: Any, conv_width: int, io: torch.dtype) -> None:
    inputs = draw(Sizes(4, 70, conv_width=conv_width), io, lengths=[0, 1, 2, 69])
    check(run(kernels, inputs), "padding")


@TYPES
@pytest.mark.parametrize("tokens", [1, 2, 130])
def test_rows_may_lie_apart(kernels: Any, tokens: int, io: torch.dtype) -> None:
    for gap in (8, 72):  # elements of NaN behind each row: 16 bytes in fp16, and more
        packed, apart = draw(Sizes(2, tokens), io), draw(Sizes(2, tokens), io, gap=gap)
        call = run(kernels, apart)
        check(call, "strided rows")
        for one, other in zip(run(kernels, packed).outputs, call.outputs, strict=True):
            assert same_bits(one, other), "strides changed the result"


@TYPES
@pytest.mark.parametrize("method", [Method.AUTO, Method.SEQUENTIAL], ids=["auto", "sequential"])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (0, 65), (2, 0), (0, 0)])
def test_nothing_to_do_copies_the_states(
    kernels: Any, batch: int, tokens: int, method: Method, io: torch.dtype
) -> None:
    inputs = draw(Sizes(batch, tokens), io)
    call = run(kernels, inputs, method=method)
    assert same_bits(call.conv_state.tensor, inputs.conv_state)
    assert same_bits(call.ssm_state.tensor, inputs.ssm_state)


def test_large_step_sizes_and_gates_do_not_overflow(kernels: Any) -> None:
    for io in (FP32, FP16, BF16):
        for tokens in (1, 130):
            inputs = draw(Sizes(1, tokens), io)
            inputs.projected[..., -16:] = torch.linspace(-40, 60, 16, device=DEVICE).to(io)  # delta from 0 to 60
            inputs.projected[..., inputs.sizes.channels : -16] *= (
                12  # gates of either sign, silu of which is 0 or the gate
            )
            check(run(kernels, inputs), "extreme delta and gate", extreme=True)
