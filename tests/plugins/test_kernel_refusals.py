"""What the C interface refuses, by which code and in which words; and that nothing is written then."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bundles.scan_operands import Sizes

from mmm_export.errors import KernelError
from mmm_export.plugins.library import ABI_VERSION, Code, DType, KernelLibrary, Method, ScanArguments, ScanShape, Status

INVALID, UNSUPPORTED = Code.MMM_INVALID_ARGUMENT, Code.MMM_UNSUPPORTED
SIZES = Sizes()
ROW = SIZES.channels + SIZES.heads * SIZES.head_dim + SIZES.heads
STATE_BYTES = SIZES.batch * SIZES.heads * SIZES.head_dim * SIZES.state_dim * 4
CONV_BYTES = SIZES.batch * SIZES.channels * 4
POISON = 0xA5


class Call:
    """A valid call, each operand somewhere in one arena of memory."""

    def __init__(self) -> None:
        s = SIZES
        lengths: dict[str, int] = {
            "projected": s.batch * s.tokens * ROW * 4,
            "lengths": s.batch * 4,
            "conv_state": CONV_BYTES,
            "ssm_state": STATE_BYTES,
            "conv_weight": s.channels * s.conv_width * 4,
            "conv_bias": s.channels * 4,
            "dt_bias": s.heads * 4,
            "A_log": s.heads * 4,
            "norm_weight": s.head_dim * 4,
            "y": s.batch * s.tokens * s.heads * s.head_dim * 4,
            "conv_state_out": CONV_BYTES,
            "ssm_state_out": STATE_BYTES,
        }
        self.memory = np.full(sum(lengths.values()) + 512 * len(lengths), POISON, np.uint8)
        place = self.memory.ctypes.data // 256 * 256
        pointers = {}
        for name, nbytes in lengths.items():
            place = (place + 255) // 256 * 256 + 256
            pointers[name] = place
            place += nbytes
        shape = ScanShape(
            ABI_VERSION, 0, 0, 0, s.batch, s.tokens, s.heads, s.kv_heads, s.head_dim, s.state_dim, 2, 1e-5, 0
        )
        self.args = ScanArguments(
            shape=shape, projected_batch_stride=s.tokens * ROW, projected_token_stride=ROW, **pointers
        )
        ctypes.memset(pointers["lengths"], 0, s.batch * 4)


Change = Callable[[Call], None]


def setting(**values: Any) -> Change:
    """Overwrite fields of the arguments, or of their shape."""

    def change(call: Call) -> None:
        for name, value in values.items():
            setattr(call.args if hasattr(call.args, name) else call.args.shape, name, value)

    return change


def placing(name: str, at: str, offset: int = 0) -> Change:
    """Move one pointer to another one."""

    def change(call: Call) -> None:
        setattr(call.args, name, getattr(call.args, at) + offset)

    return change


SHAPES: dict[str, tuple[Change, Code, str]] = {
    "an older interface": (setting(abi_version=1), INVALID, "abi_version is 1; this library was built with 3"),
    "a newer interface": (setting(abi_version=4), INVALID, "abi_version is 4; this library was built with 3"),
    "an unknown device": (setting(device=7), INVALID, "device is 7; wanted 0 (CPU) or 1 (CUDA)"),
    "CUDA without CUDA": (setting(device=1), UNSUPPORTED, "built without CUDA; rebuild it"),
    "float64 on CUDA": (setting(device=1, io_dtype=3), UNSUPPORTED, "io_dtype is float64, which runs on the CPU only"),
    "an unknown type": (setting(io_dtype=4), INVALID, "io_dtype is 4, which is no mmm_dtype; wanted 0 (float32)"),
    "an unknown state type": (setting(state_dtype=-1), INVALID, "state_dtype is -1, which is no mmm_dtype"),
    "a negative batch": (setting(batch=-1), INVALID, "batch is -1; wanted 0 or more"),
    "negative tokens": (setting(tokens=-1), INVALID, "tokens is -1; wanted 0 or more"),
    "no kv heads": (setting(kv_heads=0), INVALID, "kv_heads is 0; wanted 1 or more"),
    "no heads": (setting(heads=0), INVALID, "heads is 0; wanted a multiple of kv_heads, 2"),
    "heads that do not divide": (setting(heads=5), INVALID, "heads is 5; wanted a multiple of kv_heads, 2"),
    "an odd head_dim": (setting(head_dim=24), UNSUPPORTED, "head_dim 24 has no kernel; built for 16, 32, 48, 64, 80"),
    "a large head_dim": (setting(head_dim=144), UNSUPPORTED, "head_dim 144 has no kernel"),
    "no head_dim": (setting(head_dim=0), INVALID, "head_dim 0 has no kernel"),
    "an odd state_dim": (setting(state_dim=17), UNSUPPORTED, "state_dim 17 has no kernel; built for 16, 32"),
    "a negative state_dim": (setting(state_dim=-16), INVALID, "state_dim -16 has no kernel"),
    "a convolution of one": (setting(conv_width=1), UNSUPPORTED, "conv_width 1 has no kernel; built for 2, 3, 4"),
    "a wide convolution": (setting(conv_width=5), UNSUPPORTED, "conv_width 5 has no kernel; built for 2, 3, 4"),
    "no convolution": (setting(conv_width=0), INVALID, "conv_width 0"),
    "an eps of 0": (setting(eps=0.0), INVALID, "eps is 0; wanted a finite number above 0"),
    "a negative eps": (setting(eps=-1.0), INVALID, "eps is -1; wanted"),
    "an infinite eps": (setting(eps=float("inf")), INVALID, "eps is inf; wanted"),
    "an eps that is no number": (setting(eps=float("nan")), INVALID, "nan; wanted a finite number"),
    "an unknown method": (setting(method=4), INVALID, "method is 4, which is no mmm_method; wanted 0 (MMM_AUTO)"),
    "a step over many": (
        setting(method=Method.STEP),
        INVALID,
        "method is MMM_STEP, which takes one token; tokens is 9",
    ),
    "chunks on the CPU": (setting(method=Method.CHUNKED), UNSUPPORTED, "MMM_CHUNKED, which runs on CUDA only"),
    "chunks in float32": (
        setting(device=1, method=Method.CHUNKED),
        UNSUPPORTED,
        "MMM_CHUNKED has no kernel for io_dtype float32; built for float16, bfloat16",
    ),
    "chunks of other sizes": (
        setting(device=1, method=Method.CHUNKED, io_dtype=DType.BFLOAT16),
        UNSUPPORTED,
        "no kernel for head_dim x state_dim 16x32; built for 64x64, 128x128",
    ),
    "rows past 2^31": (setting(heads=2**31 - 2, state_dim=128), UNSUPPORTED, "a projected row of heads 2147483646"),
    "more than 2^63 bytes": (
        setting(batch=2**31 - 1, tokens=2**31 - 1),
        UNSUPPORTED,
        "batch 2147483647 of 2147483647 tokens in rows of 292 elements has more than 2^63 bytes",
    ),
}

ARGUMENTS: dict[str, tuple[Change, Code, str]] = {
    "negative segments": (setting(segments=-1), INVALID, "segments is -1; wanted 0 (chosen by the device) or more"),
    "an overlap of 2": (setting(overlap=2), INVALID, "overlap is 2; wanted 0 or 1"),
    "rows that overlap": (
        setting(projected_token_stride=ROW - 1),
        INVALID,
        f"projected_token_stride is {ROW - 1}; wanted at least {ROW}, the width of a row",
    ),
    "rows backwards": (setting(projected_token_stride=-ROW), INVALID, f"projected_token_stride is -{ROW}; wanted"),
    "batches backwards": (
        setting(projected_batch_stride=-1),
        INVALID,
        "projected_batch_stride is -1; wanted 0 or more",
    ),
    "a stride past 2^63": (setting(projected_token_stride=2**62), UNSUPPORTED, "spans more than 2^63 bytes"),
    "batches past 2^63": (setting(projected_batch_stride=2**63 - 1), UNSUPPORTED, "spans more than 2^63 bytes"),
    "rows past the end of memory": (setting(projected=2**64 - 256), INVALID, "bytes run past the end of memory"),
    **{
        f"no {name}": (setting(**{name: None}), INVALID, f"{name} is NULL; wanted")
        for name, _ in ScanArguments._fields_
        if name in ("projected", "conv_state", "ssm_state", "conv_weight", "conv_bias", "dt_bias", "A_log")
        or name in ("norm_weight", "y", "conv_state_out", "ssm_state_out")
    },
    **{
        f"{name} off by {nbytes}": (
            placing(name, name, nbytes),
            INVALID,
            f"wanted an address that is a multiple of {alignment} bytes",
        )
        for name, nbytes, alignment in (
            ("projected", 4, 16),
            ("ssm_state", 8, 16),
            ("y", 4, 16),
            ("ssm_state_out", 4, 16),
            ("conv_state", 2, 4),
            ("conv_state_out", 1, 4),
            ("conv_weight", 2, 4),
            ("conv_bias", 1, 4),
            ("dt_bias", 3, 4),
            ("A_log", 2, 4),
            ("norm_weight", 2, 4),
            ("lengths", 2, 4),
        )
    },
    "the conv state in place": (placing("conv_state_out", "conv_state"), INVALID, "overlaps conv_state"),
    "conv states by their ends": (
        placing("conv_state_out", "conv_state", CONV_BYTES - 4),
        INVALID,
        "conv_state_out (1792 bytes at",
    ),
    "SSM states in part": (
        placing("ssm_state_out", "ssm_state", 16),
        INVALID,
        "wanted the same address or separate memory",
    ),
    "SSM states in part, from before": (placing("ssm_state_out", "ssm_state", -16), INVALID, "overlaps"),
    "y in projected": (placing("y", "projected"), INVALID, "y (4608 bytes at"),
    "y in the SSM state": (placing("y", "ssm_state", STATE_BYTES - 16), INVALID, "overlaps ssm_state"),
    "y in the new SSM state": (placing("y", "ssm_state_out"), INVALID, "overlaps y"),
    "the new conv state in a weight": (placing("conv_state_out", "conv_weight"), INVALID, "overlaps conv_weight"),
    "the new SSM state in lengths": (placing("ssm_state_out", "lengths", -STATE_BYTES + 256), INVALID, "overlaps"),
}


def assert_refused(library: KernelLibrary, call: Call, code: Code, text: str) -> None:
    before = call.memory.copy()
    with pytest.raises(KernelError, match=re.escape(text)) as error:
        library.selective_scan(call.args)
    assert f"({code.name})" in str(error.value)
    assert np.array_equal(call.memory, before), "a refused call wrote something"


def test_the_call_that_all_others_change_is_taken(kernels: KernelLibrary) -> None:
    call = Call()
    kernels.selective_scan(call.args)
    y = (ctypes.c_char * 16).from_address(call.args.y).raw
    assert y == bytes(16)  # lengths are 0


@pytest.mark.parametrize("case", SHAPES)
def test_a_wrong_shape_is_refused_by_the_call_and_the_workspace_query(kernels: KernelLibrary, case: str) -> None:
    change, code, text = SHAPES[case]
    call = Call()
    change(call)
    assert_refused(kernels, call, code, text)
    with pytest.raises(KernelError, match=re.escape(text)):
        kernels.workspace_bytes(call.args.shape)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments_are_refused_and_nothing_is_written(kernels: KernelLibrary, case: str) -> None:
    change, code, text = ARGUMENTS[case]
    call = Call()
    change(call)
    assert_refused(kernels, call, code, text)


TAKEN: dict[str, Change] = {
    "no lengths": setting(lengths=None),
    "a batch of none needs nothing": setting(
        batch=0, **{name: None for name, kind in ScanArguments._fields_ if kind is ctypes.c_void_p}
    ),
    "no tokens need no rows": setting(tokens=0, projected=None, y=None, projected_token_stride=0),
    "one token has no stride": setting(tokens=1, projected_token_stride=-3, method=Method.STEP),
    "one row has no stride": setting(batch=1, projected_batch_stride=-3),
    "rows that all batches share": setting(projected_batch_stride=0),
    "the SSM state in place": placing("ssm_state_out", "ssm_state"),
    "states side by side": placing("conv_state_out", "conv_state", -CONV_BYTES),
    "token by token": setting(method=Method.SEQUENTIAL),
    "workspace that nobody needs": setting(workspace=8, workspace_bytes=1),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_only_looks_wrong_is_taken(kernels: KernelLibrary, case: str) -> None:
    call = Call()
    if case == "states side by side":
        call.args.conv_state += (CONV_BYTES + 255) // 256 * 256  # into the room before ssm_state and no further
        call.args.ssm_state = call.args.ssm_state_out
    TAKEN[case](call)
    kernels.selective_scan(call.args)


def test_lengths_out_of_range_are_taken_into_it(kernels: KernelLibrary) -> None:
    def run(*lengths: int) -> bytes:
        call = Call()
        call.memory[:] = 0
        (ctypes.c_int32 * 2).from_address(call.args.lengths)[:] = lengths
        (ctypes.c_float * (2 * 9 * ROW)).from_address(call.args.projected)[:] = np.linspace(-1, 1, 2 * 9 * ROW)
        kernels.selective_scan(call.args)
        return ctypes.string_at(call.args.y, 4608) + ctypes.string_at(call.args.ssm_state_out, STATE_BYTES)

    assert run(-3, 400) == run(0, 9)


def test_null_structs_are_refused_and_a_null_status_is_no_crash(kernels: KernelLibrary) -> None:
    functions = ctypes.CDLL(str(kernels.path))
    status, nbytes, call = Status(), ctypes.c_uint64(99), Call()
    assert functions.mmm_selective_scan(None, ctypes.byref(status)) == INVALID
    assert status.text == b"args is NULL; wanted a mmm_scan_args"
    assert functions.mmm_selective_scan(None, None) == INVALID
    query = functions.mmm_selective_scan_workspace
    assert query(None, ctypes.byref(nbytes), ctypes.byref(status)) == INVALID
    assert status.text == b"shape is NULL; wanted a mmm_scan_shape"
    assert query(ctypes.byref(call.args.shape), None, ctypes.byref(status)) == INVALID
    assert status.text == b"bytes is NULL; wanted a place for the answer"
    assert nbytes.value == 99
    assert query(ctypes.byref(call.args.shape), ctypes.byref(nbytes), None) == Code.MMM_OK
    assert nbytes.value == 0
    call.args.shape.eps = -1
    assert functions.mmm_selective_scan(ctypes.byref(call.args), None) == INVALID


def test_a_status_tells_of_its_own_call_only(kernels: KernelLibrary) -> None:
    functions = ctypes.CDLL(str(kernels.path))
    status, call = Status(code=5, text=b"left over"), Call()
    assert functions.mmm_selective_scan(ctypes.byref(call.args), ctypes.byref(status)) == Code.MMM_OK
    assert (status.code, status.text) == (Code.MMM_OK, b"")
