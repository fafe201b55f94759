"""What the kernels cannot do is refused in one sentence, before anything is launched or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu.calls import POISON, Call, prepare, run, synchronize
from gpu.inputs import Sizes, draw
from gpu.kernels import ABI_VERSION, DEVICE, Code, Method, RefusedError

pytestmark = pytest.mark.gpu

Change = Callable[[Call], None]


def setting(**values: Any) -> Change:
    """Overwrite fields of the arguments, or of their shape."""

    def change(call: Call) -> None:
        for name, value in values.items():
            setattr(call.args if hasattr(call.args, name) else call.args.shape, name, value)

    return change


def moving(name: str, nbytes: int) -> Change:
    """Move a pointer by so many bytes."""

    def change(call: Call) -> None:
        setattr(call.args, name, getattr(call.args, name) + nbytes)

    return change


def conv_state_in_place(call: Call) -> None:
    call.args.conv_state_out = call.args.conv_state


def overlapping_ssm_state(call: Call) -> None:
    call.args.ssm_state = call.args.ssm_state_out + 256


BAD: dict[str, tuple[Change, set[Code], str]] = {
    "another ABI version": (setting(abi_version=99), {Code.MMM_INVALID_ARGUMENT}, "99"),
    "an unknown method": (setting(method=17), {Code.MMM_INVALID_ARGUMENT}, "17"),
    "an unknown type": (setting(io_dtype=9), {Code.MMM_INVALID_ARGUMENT, Code.MMM_UNSUPPORTED}, "9"),
    "float64 on CUDA": (setting(io_dtype=3), {Code.MMM_INVALID_ARGUMENT, Code.MMM_UNSUPPORTED}, "float64"),
    "a negative batch": (setting(batch=-1), {Code.MMM_INVALID_ARGUMENT}, "-1"),
    "negative tokens": (setting(tokens=-5), {Code.MMM_INVALID_ARGUMENT}, "-5"),
    "heads that do not divide": (setting(heads=15), {Code.MMM_INVALID_ARGUMENT}, "15"),
    "no kv heads": (setting(kv_heads=0), {Code.MMM_INVALID_ARGUMENT}, "0"),
    "an odd head size": (setting(head_dim=100), {Code.MMM_INVALID_ARGUMENT, Code.MMM_UNSUPPORTED}, "100"),
    "a large state size": (setting(state_dim=256), {Code.MMM_INVALID_ARGUMENT, Code.MMM_UNSUPPORTED}, "256"),
    "a wide convolution": (setting(conv_width=9), {Code.MMM_INVALID_ARGUMENT, Code.MMM_UNSUPPORTED}, "9"),
    "an epsilon of 0": (setting(eps=0.0), {Code.MMM_INVALID_ARGUMENT}, "eps"),
    "a step over many tokens": (setting(method=Method.STEP), {Code.MMM_INVALID_ARGUMENT, Code.MMM_UNSUPPORTED}, "65"),
    "negative segments": (setting(segments=-2), {Code.MMM_INVALID_ARGUMENT}, "-2"),
    "rows that overlap": (setting(projected_token_stride=6152), {Code.MMM_INVALID_ARGUMENT}, "6152"),
    "projected misaligned": (moving("projected", 2), {Code.MMM_INVALID_ARGUMENT}, "projected"),
    "the SSM state misaligned": (moving("ssm_state", 4), {Code.MMM_INVALID_ARGUMENT}, "ssm_state"),
    "y misaligned": (moving("y", 2), {Code.MMM_INVALID_ARGUMENT}, "y"),
    "the conv state in place": (conv_state_in_place, {Code.MMM_INVALID_ARGUMENT}, "conv_state"),
    "SSM states that overlap in part": (overlapping_ssm_state, {Code.MMM_INVALID_ARGUMENT}, "ssm_state"),
    **{
        f"{name} missing": (setting(**{name: None}), {Code.MMM_INVALID_ARGUMENT}, name)
        for name in ("projected", "conv_state", "ssm_state", "conv_weight", "conv_bias", "dt_bias", "A_log")
    },
    **{
        f"{name} missing": (setting(**{name: None}), {Code.MMM_INVALID_ARGUMENT}, name) for name in ("norm_weight", "y")
    },
    "conv_state_out missing": (setting(conv_state_out=None), {Code.MMM_INVALID_ARGUMENT}, "conv_state_out"),
    "ssm_state_out missing": (setting(ssm_state_out=None), {Code.MMM_INVALID_ARGUMENT}, "ssm_state_out"),
}


def assert_refused(kernels: Any, call: Call, codes: set[Code], text: str) -> None:
    with pytest.raises(RefusedError) as caught:
        call.enqueue(kernels)
    synchronize()
    assert caught.value.code in codes, caught.value
    assert text in caught.value.text, caught.value
    for part in (call.y, call.conv_state, call.ssm_state):
        assert bool((part.memory[4096 : part.end] == POISON).all()), "an output was written"


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_and_nothing_is_written(kernels: Any, name: str) -> None:
    change, codes, text = BAD[name]
    if name == "float64 on CUDA" and DEVICE == "cpu":
        pytest.skip("the CPU takes float64")
    call = prepare(kernels, draw(Sizes(2, 65), torch.bfloat16))
    change(call)
    assert_refused(kernels, call, codes, text)


def test_a_small_workspace_is_refused_and_nothing_is_written(kernels: Any) -> None:
    call = prepare(kernels, draw(Sizes(1, 4096), torch.bfloat16))
    if call.workspace.tensor.numel() == 0:
        pytest.skip("this device needs no workspace")
    for size in (0, call.args.workspace_bytes - 1):
        call.args.workspace_bytes = size
        assert_refused(kernels, call, {Code.MMM_WORKSPACE_TOO_SMALL}, str(size))


def test_the_chunked_method_refuses_fp32_and_other_sizes(kernels: Any) -> None:
    for io, size in ((torch.float32, 128), (torch.bfloat16, 48)):
        inputs = draw(Sizes(1, 65, head_dim=size, state_dim=size), io)
        with pytest.raises(RefusedError) as caught:
            prepare(kernels, inputs, method=Method.CHUNKED).enqueue(kernels)
        assert caught.value.code == Code.MMM_UNSUPPORTED


def test_the_workspace_never_shrinks_when_a_call_grows(kernels: Any) -> None:
    shape = prepare(kernels, draw(Sizes(1, 1), torch.bfloat16)).args.shape
    sizes = {}
    for shape.batch in (0, 1, 2, 3, 5, 8, 64):
        for shape.tokens in (0, 1, 2, 64, 65, 1024, 4096, 8192, 103_000, 1_000_000):
            sizes[shape.batch, shape.tokens] = kernels.workspace_bytes(shape)
    for (batch, tokens), size in sizes.items():
        for (other_batch, other_tokens), other in sizes.items():
            if other_batch >= batch and other_tokens >= tokens:
                assert other >= size


def test_a_refusal_leaves_the_library_usable(kernels: Any) -> None:
    call = prepare(kernels, draw(Sizes(1, 65), torch.bfloat16))
    call.args.y = None
    with pytest.raises(RefusedError):
        call.enqueue(kernels)
    run(kernels, call.inputs)


def test_the_library_names_its_version_and_architectures(kernels: Any) -> None:
    info = kernels.build_info
    assert info["abi"] == ABI_VERSION
    assert info["version"]
    if DEVICE == "cuda":
        major, minor = torch.cuda.get_device_capability()
        assert 10 * major + minor in info["architectures"], "not built for this device"
