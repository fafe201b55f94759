"""Weights on their grids."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm_export.calibration.rewrite import _packed
from mmm_export.calibration.rounding import (
    FP8,
    INT4,
    INT8,
    column_scales,
    group_scales,
    group_size,
    on_grid,
    on_group_grid,
    round_to_grid,
    stored_scale,
)
from mmm_export.manifest import DTYPES, Dtype


def weight(seed: int, rows: int = 64, columns: int = 24) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_columns_err_by_half_a_step(dtype: Dtype) -> None:
    w = weight(0)
    scales = column_scales(w, INT8, dtype)
    error = np.abs(w - round_to_grid(w, scales, INT8))
    # A scale that its type rounded down saturates the column's extreme: by 127 times half an ulp (bf16: 2^-9) of the scale.
    assert (error <= scales * (0.5 + 127 * 2.0**-9)).all()


def test_fp8_is_rounded_as_the_type_is_and_saturates() -> None:
    numbers = np.array([0.3, -17.0, 448.0, 500.0, -1e9], np.float32)
    wanted = np.clip(numbers, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(on_grid(numbers, FP8), wanted)
    assert on_grid(numbers, FP8)[3] == 448.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_columns_never_saturate_and_round_no_worse_than_with_the_least_scale(dtype: Dtype) -> None:
    w = weight(2)
    scales = column_scales(w, FP8, dtype)
    least = stored_scale(np.abs(w).max(0) / 448, dtype)
    assert ((least <= scales) & (scales < 2 * least)).all()

    def errors(scale: np.ndarray) -> np.ndarray:
        return np.asarray(np.square(w - round_to_grid(w, scale, FP8)).sum(0))

    assert (errors(scales) <= errors(least)).all()
    assert errors(scales).sum() < 0.95 * errors(least).sum()  # eight places in a power of two: about a tenth is gained


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_narrowed_groups_cost_the_output_no_more_than_whole_ones(seed: int) -> None:
    w = weight(seed, 128, 8)
    importance = np.random.default_rng(seed).random(128).astype(np.float32) + 0.01

    def cost(scales: np.ndarray) -> float:
        error = w - (on_group_grid(w, scales, 32).reshape(4, 32, 8) * scales[:, None]).reshape(128, 8)
        return float((importance[:, None] * error**2).sum())

    assert cost(group_scales(w, 32, importance, "fp32")) <= cost(group_scales(w, 32, None, "fp32")) * (1 + 1e-6)


def test_a_column_of_zeros_stays_zeros_in_every_type() -> None:
    w = weight(1)
    w[:, 3] = 0.0
    for dtype in DTYPES:
        scales = column_scales(w, INT8, dtype)
        assert np.isfinite(scales).all()
        assert (scales > 0).all()
        assert (on_grid(w / scales, INT8)[:, 3] == 0).all()
        assert (on_group_grid(w, group_scales(w, 32, None, dtype), 32)[:, 3] == 0).all()


def test_float16_scales_keep_their_digits() -> None:
    small = stored_scale(np.float32(1e-6), "fp16")
    assert small == pytest.approx(2.0**-14, rel=1e-3)  # the least normal float16


@pytest.mark.parametrize(("rows", "wanted"), [(2048, 128), (8192, 128), (64, 64), (96, 32), (48, 16), (100, 0), (7, 0)])
def test_a_group_divides_the_rows(rows: int, wanted: int) -> None:
    assert group_size(rows, 128) == wanted


@pytest.mark.parametrize(("bits", "least", "most"), [(4, -8, 7), (8, -127, 127)])
def test_packed_weights_unpack_to_the_same_integers(bits: int, least: int, most: int) -> None:
    integers = np.random.default_rng(0).integers(least, most + 1, (40, 6)).astype(np.int8)
    packed = _packed(integers, bits, 16)
    assert packed.shape == (6, 3, 16 * bits // 8)
    flat = packed.reshape(6, -1)
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], -1).reshape(6, -1)
    zero = 1 << (bits - 1)
    np.testing.assert_array_equal(flat[:, :40].astype(np.int16) - zero, integers.T)
    assert (flat[:, 40:] == zero).all()  # what pads the last block stands for 0


def test_grids_have_no_zero_point() -> None:
    assert all(on_grid(np.zeros(1), grid)[0] == 0 for grid in (INT8, INT4, FP8))
