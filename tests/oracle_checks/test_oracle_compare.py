"""The measure itself: a wrong one would make every other test pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracle.compare import relative_error, relative_l2


def test_relative_error_is_the_worst_difference_over_the_largest_wanted_value() -> None:
    assert relative_error([1.0, 2.5, -4.0], [1.0, 2.0, -4.0]) == 0.125
    assert relative_error([1.0, 1.0, -4.0], [1.0, 2.0, -4.0]) == 0.25
    assert relative_l2([3.0, 4.0], [0.0, 5.0]) == pytest.approx(math.sqrt(10) / 5)


@pytest.mark.parametrize("measure", [relative_error, relative_l2])
def test_nothing_wrong_is_measured_as_small(measure: object) -> None:
    assert callable(measure)
    assert measure(np.zeros(3), np.zeros(3)) == 0.0
    assert measure(np.zeros((2, 0)), np.zeros((2, 0))) == 0.0
    assert measure(np.ones(3), np.zeros(3)) == math.inf
    assert not measure([1.0, math.nan], [1.0, 1.0]) < 1.0
    with pytest.raises(ValueError, match=r"\(1, 3\), wanted \(3,\)"):
        measure(np.ones((1, 3)), np.ones(3))
