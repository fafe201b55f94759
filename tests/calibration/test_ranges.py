"""Histograms, and where a quantizer saturates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm_export.calibration.ranges import METHODS, Method, clip_from_values
from mmm_export.calibration.rounding import FP8, INT8, round_to_grid
from mmm_export.calibration.statistics import Histogram, Statistics


def values(seed: int, count: int = 20_000, spread: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(count) * spread).astype(np.float32)


def test_a_histogram_counts_every_value_however_it_has_to_widen() -> None:
    histogram = Histogram()
    for spread in (1e-3, 1.0, 1e4, 1e-2):
        histogram.add(np.abs(values(0, 1000, spread)))
    assert histogram.counts.sum() == 4000
    whole = Histogram()
    whole.add(np.abs(np.concatenate([values(0, 1000, spread) for spread in (1e4, 1e-2, 1e-3, 1.0)])))
    assert histogram.width == whole.width
    np.testing.assert_array_equal(histogram.counts, whole.counts)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(METHODS), st.floats(1e-3, 1e3))
def test_no_method_saturates_beyond_the_largest_value_or_at_nothing(seed: int, method: Method, spread: float) -> None:
    data = values(seed, 500, spread)
    largest = float(np.abs(data).max())
    assert 0 < clip_from_values(data, largest, method, INT8) <= largest


def test_minmax_keeps_the_largest_value() -> None:
    data = values(1)
    largest = float(np.abs(data).max())
    assert clip_from_values(data, largest, "minmax", INT8) == largest


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_a_single_outlier_does_not_set_the_range_of_the_other_methods(method: Method) -> None:
    data = np.append(values(2), np.float32(100.0))
    clip = clip_from_values(data, 100.0, method, INT8)
    assert clip < 95.0
    if method == "percentile":  # of 20,000 values one in ten thousand is left out; the largest of the others is about 4
        assert clip < 5.0


def test_mse_errs_less_than_minmax_where_there_is_an_outlier() -> None:
    data = np.append(values(3), np.float32(30.0))
    largest = 30.0
    clip = clip_from_values(data, largest, "mse", INT8)

    def error(at: float) -> float:
        return float(np.square(data - round_to_grid(data, at / 127, INT8)).mean())

    assert error(clip) < error(largest)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(METHODS), st.floats(1e-3, 1e3))
def test_floats_never_saturate_and_round_as_well_as_with_the_largest_value(
    seed: int, method: Method, spread: float
) -> None:
    data = np.abs(values(seed, 2000, spread))
    largest = float(data.max())
    clip = clip_from_values(data, largest, method, FP8)
    assert largest <= clip < 2 * largest

    def error(at: float) -> float:
        return float(np.square(data - round_to_grid(data, at / 448, FP8)).mean())

    # The choice is by the centres of 1,024 bins and more, whose step lies well below FP8's, which is 1/16 of a number.
    assert error(clip) <= 1.02 * error(largest)


def test_statistics_tell_phases_and_halves_apart() -> None:
    seen = Statistics(2)
    seen.add(np.array([[1.0, -2.0], [3.0, 0.0]], np.float32), np.array([0, 1], np.int8), is_first_half=True)
    seen.add(np.array([[-9.0, 1.0]], np.float32), np.array([2], np.int8), is_first_half=False)
    assert seen.phases == {"image": 2.0, "text": 3.0, "step": 9.0}
    assert seen.first_half == 3.0
    np.testing.assert_array_equal(seen.maxima, [9.0, 2.0])
    np.testing.assert_allclose(seen.squares, [91.0, 5.0])
