"""What a matrix product refuses, by which code and in which words; and that nothing is written then."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from mmm_export.plugins.library import (
    ABI_VERSION,
    Code,
    Device,
    DType,
    Epilogue,
    KernelLibrary,
    LinearArguments,
    LinearShape,
    Status,
    WeightFormat,
)

INVALID, UNSUPPORTED = Code.MMM_INVALID_ARGUMENT, Code.MMM_UNSUPPORTED
POISON = 0xA5
TOKENS, OUTPUTS, INPUTS = 3, 8, 256
BYTES = {
    "x": TOKENS * INPUTS * 4,
    "weight": OUTPUTS * INPUTS * 4,
    "scales": OUTPUTS * 4,
    "norm_weight": INPUTS * 4,
    "residual": TOKENS * OUTPUTS * 4,
    "out": TOKENS * OUTPUTS * 4,
}


class Call:
    """A valid product, each operand somewhere in one arena of memory."""

    def __init__(self) -> None:
        self.memory = np.full(sum(BYTES.values()) + 512 * len(BYTES), POISON, np.uint8)
        place, pointers = self.memory.ctypes.data // 256 * 256, {}
        for name, nbytes in BYTES.items():
            place += 256
            pointers[name] = place
            place = (place + nbytes + 255) // 256 * 256
        shape = LinearShape(ABI_VERSION, 0, 0, 0, 0, 0, Epilogue.RESIDUAL, 1, TOKENS, OUTPUTS, INPUTS, 1e-5)
        self.args = LinearArguments(shape=shape, x_stride=INPUTS, **pointers)

    def change(self, changes: dict[str, Any]) -> None:
        """Set fields; a text such as "x+4" stands for another field's pointer."""
        for name, value in changes.items():
            if isinstance(value, str):
                other, _, offset = value.partition("+")
                value = getattr(self.args, other) + int(offset or 0)
            setattr(self.args if hasattr(self.args, name) else self.args.shape, name, value)


REFUSED: dict[str, tuple[dict[str, Any], Code, str]] = {
    "an older interface": ({"abi_version": 1}, INVALID, f"abi_version is 1; this library was built with {ABI_VERSION}"),
    "an unknown device": ({"device": 2}, INVALID, "device is 2; wanted 0 (CPU) or 1 (CUDA)"),
    "float64": ({"io_dtype": 3}, UNSUPPORTED, "io_dtype float64 has no kernel; built for float32, float16, bfloat16"),
    "float32 on CUDA": ({"device": 1}, UNSUPPORTED, "io_dtype float32 has no kernel; built for float16, bfloat16"),
    "no type": ({"io_dtype": 9}, INVALID, "io_dtype is 9, which is no mmm_dtype"),
    "a half output of float32": (
        {"out_dtype": 1},
        INVALID,
        "out_dtype is 1; wanted that of x (float32) or 0 (float32)",
    ),
    "an unknown format": ({"weight_format": 3}, INVALID, "weight_format is 3, which is no mmm_weight_format"),
    "half scales of INT8": (
        {"weight_format": WeightFormat.INT8, "scale_dtype": DType.FLOAT16},
        INVALID,
        "scale_dtype is 1; wanted 0 (float32) for an INT8 weight",
    ),
    "float scales of INT4": (
        {"weight_format": WeightFormat.INT4},
        INVALID,
        "scale_dtype is 0; wanted 1 (float16) or 2 (bfloat16) for an INT4 weight",
    ),
    "an unknown epilogue": ({"epilogue": 3}, INVALID, "epilogue is 3, which is no mmm_epilogue"),
    "half a norm": ({"normalise": 2}, INVALID, "normalise is 2; wanted 0 or 1"),
    "no eps": ({"eps": 0.0}, INVALID, "eps is 0; wanted a finite number above 0"),
    "eps that is NaN": ({"eps": float("nan")}, INVALID, "eps is nan"),
    "less than no tokens": ({"tokens": -1}, INVALID, "tokens is -1; wanted 0 or more"),
    "no outputs": ({"outputs": 0}, INVALID, "outputs is 0; wanted 1 or more"),
    "no inputs": ({"inputs": 0}, INVALID, "inputs is 0; wanted 1 or more"),
    "an odd [gate | up]": ({"epilogue": Epilogue.SILU, "outputs": 7}, INVALID, "outputs is 7; wanted an even number"),
    "kept rows of a plain weight": ({"kept": 1}, INVALID, "1 rows are kept; wanted 0: the weight is plain"),
    "nothing but kept rows": (
        {"weight_format": WeightFormat.INT8, "kept": OUTPUTS},
        INVALID,
        "rows are kept; wanted 0 or more, and fewer than there are outputs",
    ),
    "less than no kept rows": ({"weight_format": WeightFormat.INT8, "kept": -1}, INVALID, "-1 rows are kept"),
    "a broken INT4 group": (
        {"weight_format": WeightFormat.INT4, "scale_dtype": 1, "inputs": 192},
        UNSUPPORTED,
        "inputs 192 has no INT4 kernel; wanted a multiple of 128",
    ),
    "rows that CUDA cannot load": (
        {"device": 1, "io_dtype": 1, "out_dtype": 1, "inputs": 24},
        UNSUPPORTED,
        "inputs 24 has no kernel on CUDA; wanted a multiple of 16, at most 32768",
    ),
    "more bytes than there are": (
        {"tokens": 2**31 - 1, "outputs": 2**31 - 1, "inputs": 2**31 - 1},
        UNSUPPORTED,
        "more than 2^63 bytes",
    ),
    "CUDA in a library without it": (
        {"device": Device.CUDA, "io_dtype": 1, "out_dtype": 1},
        UNSUPPORTED,
        "this library was built without CUDA",
    ),
    "half an overlap": ({"overlap": 2}, INVALID, "overlap is 2; wanted 0 or 1"),
    "less than no variant": ({"variant": -1}, INVALID, "variant is -1"),
    "rows over each other": ({"x_stride": 255}, INVALID, "x_stride is 255; wanted at least 256"),
    "a stride around the world": ({"x_stride": 2**62}, UNSUPPORTED, "span more than 2^63 bytes"),
    "no x": ({"x": None}, INVALID, "x is NULL; wanted 3072 bytes"),
    "no weight": ({"weight": None}, INVALID, "weight is NULL"),
    "no scales": ({"weight_format": 1, "scales": None}, INVALID, "scales is NULL; wanted 32 bytes"),
    "no norm_weight": ({"norm_weight": None}, INVALID, "norm_weight is NULL"),
    "no residual": ({"residual": None}, INVALID, "residual is NULL"),
    "no out": ({"out": None}, INVALID, "out is NULL"),
    "x off by one element": ({"x": "x+4"}, INVALID, "wanted an address that is a multiple of 16 bytes"),
    "out in x": ({"out": "x+16"}, INVALID, "out (96 bytes at"),
    "out in the weight": ({"out": "weight"}, INVALID, "overlaps weight"),
    "out next to the residual's start": ({"out": "residual+16"}, INVALID, "overlaps residual"),
}


@pytest.fixture(scope="module")
def functions(kernel_folder: Any) -> ctypes.CDLL:
    return ctypes.CDLL(str(kernel_folder / "libmmm_kernels.so"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_call_is_refused_in_words_and_writes_nothing(functions: ctypes.CDLL, name: str) -> None:
    changes, code, text = REFUSED[name]
    call, status = Call(), Status()
    call.change(changes)
    assert functions.mmm_linear(ctypes.byref(call.args), ctypes.byref(status)) == code
    assert status.code == code
    assert text in status.text.decode()
    assert (call.memory == POISON).all()
    assert functions.mmm_linear(ctypes.byref(call.args), None) == code


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"out": "residual"},
        {"epilogue": Epilogue.NONE, "residual": None},
        {"normalise": 0, "norm_weight": None, "eps": 0.0},
        {"tokens": 0, "x": None, "out": None},
        {"tokens": 1, "x_stride": -5},
        {"epilogue": Epilogue.SILU},
    ],
    ids=str,
)
def test_what_the_header_allows_is_computed(functions: ctypes.CDLL, changes: dict[str, Any]) -> None:
    call, status = Call(), Status()
    call.change(changes)
    assert functions.mmm_linear(ctypes.byref(call.args), ctypes.byref(status)) == Code.MMM_OK, status.text


def test_nothing_is_told_where_nothing_is_given(functions: ctypes.CDLL) -> None:
    status, needed = Status(), ctypes.c_uint64()
    assert functions.mmm_linear(None, ctypes.byref(status)) == INVALID
    assert status.text == b"args is NULL; wanted a mmm_linear_args"
    assert functions.mmm_linear_workspace(None, ctypes.byref(needed), ctypes.byref(status)) == INVALID
    assert status.text == b"shape is NULL; wanted a mmm_linear_shape"
    assert functions.mmm_linear_workspace(ctypes.byref(Call().args.shape), None, ctypes.byref(status)) == INVALID
    assert status.text == b"bytes is NULL; wanted a place for the answer"


def test_the_cpu_needs_no_workspace(kernels: KernelLibrary) -> None:
    assert kernels.linear_workspace_bytes(Call().args.shape) == 0


def test_a_result_in_place_of_the_residual_is_the_one_written_elsewhere(functions: ctypes.CDLL) -> None:
    def result(**changes: Any) -> bytes:
        call = Call()
        for name in ("x", "weight", "norm_weight", "residual"):
            values = np.random.default_rng(len(name)).standard_normal(BYTES[name] // 4).astype(np.float32)
            ctypes.memmove(getattr(call.args, name), values.ctypes.data, values.nbytes)
        call.change(changes)
        assert functions.mmm_linear(ctypes.byref(call.args), None) == Code.MMM_OK
        return ctypes.string_at(call.args.out, BYTES["out"])

    assert result() == result(out="residual")
