"""The CPU reference of the matrix products, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundles.linear_operands import BOUND, EPS, FORMATS, TYPES, Operands, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.compare import relative_l2

from mmm_export.errors import KernelError
from mmm_export.plugins.library import DType, KernelLibrary
from mmm_export.plugins.numpy_linear import LinearWeight, linear_numpy, pack_int4, unpack_int4


def run(kernels: KernelLibrary, operands: Operands, out_dtype: DType | None = None) -> Any:
    return linear_numpy(
        kernels,
        operands.x,
        operands.weight,
        norm_weight=operands.norm_weight,
        eps=EPS,
        residual=operands.residual,
        silu=operands.silu,
        out_dtype=out_dtype,
    )


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 19),
    outputs=st.integers(1, 70),
    groups=st.integers(1, 9),
    rest=st.integers(0, 127),
    weight_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(sorted(TYPES)),
    norm=st.booleans(),
    epilogue=st.sampled_from(["none", "residual", "silu"]),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_float64(
    kernels: KernelLibrary,
    tokens: int,
    outputs: int,
    groups: int,
    rest: int,
    weight_format: str,
    dtype: str,
    norm: bool,
    epilogue: str,
    seed: int,
) -> None:
    inputs = groups * 128 - (0 if weight_format == "int4" else rest)
    outputs *= 2 if epilogue == "silu" else 1
    operands = draw(tokens, outputs, inputs, weight_format, dtype, norm=norm, seed=seed).only(epilogue)
    found = run(kernels, operands)
    assert found.dtype == TYPES[dtype]
    # Of few outputs the residual can cancel the sums, whose rounding stays: so it is weighed against both.
    wanted = operands.oracle()
    size = np.linalg.norm(wanted) + (
        0 if operands.residual is None else np.linalg.norm(operands.residual.astype(np.float64))
    )
    assert np.linalg.norm(found.astype(np.float64) - wanted) <= BOUND[dtype] * size


@pytest.mark.parametrize("epilogue", ["none", "residual"])
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_kept_rows_are_computed_as_they_are(
    kernels: KernelLibrary, dtype: str, weight_format: str, epilogue: str
) -> None:
    operands = draw(5, 75, 256, weight_format, dtype, kept=7).only(epilogue)
    assert relative_l2(run(kernels, operands)[:, -7:], operands.oracle()[:, -7:]) <= BOUND[dtype]
    assert relative_l2(run(kernels, operands), operands.oracle()) <= BOUND[dtype]


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_logits_in_float32_are_not_rounded(kernels: KernelLibrary, weight_format: str, dtype: str) -> None:
    operands = draw(2, 97, 512, weight_format, dtype, norm=False).only("none")
    found = run(kernels, operands, DType.FLOAT32)
    assert found.dtype == np.float32
    assert relative_l2(found, operands.oracle()) <= BOUND["fp32"]


@pytest.mark.parametrize("scale_dtype", ["fp16", "bf16"])
def test_int4_scales_have_either_half_type(kernels: KernelLibrary, scale_dtype: str) -> None:
    operands = draw(3, 40, 256, "int4", "fp32", scale_dtype=scale_dtype)
    assert relative_l2(run(kernels, operands), operands.oracle()) <= BOUND["fp32"]


def test_every_byte_of_either_integer_format_is_read_right(kernels: KernelLibrary) -> None:
    bytes_ = np.arange(256, dtype=np.uint8)
    one = np.eye(128, dtype=np.float32)  # x picks one input after the other
    int8 = np.repeat(bytes_.view(np.int8)[:, None], 128, 1)
    found = linear_numpy(kernels, one, LinearWeight(int8, np.ones(256, np.float32)))
    assert np.array_equal(found, int8.T.astype(np.float32))
    int4 = np.repeat(bytes_[:, None], 64, 1)
    found = linear_numpy(kernels, one, LinearWeight(int4, np.ones((256, 1), np.float16)))
    assert np.array_equal(
        found[0::2, :], np.tile((bytes_ & 15).astype(np.float32) - 8, (64, 1))
    )  # low nibble: even inputs
    assert np.array_equal(found[1::2, :], np.tile((bytes_ >> 4).astype(np.float32) - 8, (64, 1)))


def test_packing_is_undone_by_unpacking() -> None:
    q = np.random.default_rng(0).integers(-8, 8, (5, 256))
    assert np.array_equal(unpack_int4(pack_int4(q)), q)


def test_a_strided_view_of_x_gives_the_bits_of_its_copy(kernels: KernelLibrary) -> None:
    operands = draw(4, 33, 64).only("none")
    wanted = run(kernels, operands)
    room = np.full((4, 96), np.nan, np.float32)
    room[:, 16:80] = operands.x
    view = linear_numpy(kernels, room[:, 16:80], operands.weight, norm_weight=operands.norm_weight, eps=EPS)
    assert np.array_equal(view, wanted)


def test_operands_that_do_not_fit_together_are_refused(kernels: KernelLibrary) -> None:
    x, weight = np.zeros((2, 128), np.float32), np.zeros((6, 128), np.float32)
    refused: list[tuple[str, dict[str, Any]]] = [
        ("no matrix", {"x": x[0]}),
        ("weight has the wrong shape", {"weight": LinearWeight(weight[:, :64])}),
        ("weight has another type", {"weight": LinearWeight(weight.astype(np.float16))}),
        ("no scales", {"weight": LinearWeight(weight.astype(np.int8))}),
        ("scales has the wrong shape", {"weight": LinearWeight(weight.astype(np.int8), np.ones(5, np.float32))}),
        ("norm_weight has the wrong shape", {"norm_weight": np.ones(64, np.float32)}),
        ("residual has the wrong shape", {"residual": np.ones((2, 5), np.float32)}),
        ("residual has another type", {"residual": np.ones((2, 6), np.float16)}),
        ("one epilogue", {"residual": np.ones((2, 6), np.float32), "silu": True}),
        ("not contiguous", {"x": np.zeros((2, 256), np.float32)[:, ::2]}),
        ("type without kernels", {"x": x.astype(np.float64), "weight": LinearWeight(weight.astype(np.float64))}),
    ]
    for text, changes in refused:
        call: dict[str, Any] = {"x": x, "weight": LinearWeight(weight), **changes}
        with pytest.raises(KernelError, match=text):
            linear_numpy(kernels, **call)
