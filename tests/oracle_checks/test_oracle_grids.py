"""The oracle's tile grids against the reference's, for pictures that everybody can get."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.grids import tile_count, tile_grid

# Width, height, grid with at most 6 tiles, grid with at most 12; pictures of scikit-image and scikit-learn.
REFERENCE = [
    ("astronaut", 512, 512, (1, 1), (1, 1)),
    ("coffee", 600, 400, (3, 2), (3, 2)),
    ("chelsea", 451, 300, (3, 2), (3, 2)),
    ("china", 640, 427, (3, 2), (3, 2)),
    ("motorcycle_left", 741, 500, (3, 2), (3, 2)),
    ("hubble_deep_field", 1000, 872, (2, 2), (2, 2)),
    ("retina", 1411, 1411, (2, 2), (3, 3)),
    ("text", 448, 172, (3, 1), (5, 2)),
    ("page", 384, 191, (2, 1), (2, 1)),
    ("cell", 550, 660, (1, 1), (3, 4)),
    ("coins", 384, 303, (3, 2), (4, 3)),
    ("horse", 400, 328, (1, 1), (4, 3)),
]


@pytest.mark.parametrize(("name", "width", "height", "six", "twelve"), REFERENCE, ids=[row[0] for row in REFERENCE])
def test_reference_pictures_get_the_reference_grids(
    name: str, width: int, height: int, six: tuple[int, int], twelve: tuple[int, int]
) -> None:
    assert tile_grid(width, height, min_tiles=1, max_tiles=6, tile_size=448) == six
    assert tile_grid(width, height, min_tiles=1, max_tiles=12, tile_size=448) == twelve


def test_a_thumbnail_follows_only_a_real_grid() -> None:
    options = {"min_tiles": 1, "max_tiles": 12, "tile_size": 448}
    assert tile_count(1411, 1411, **options, thumbnail=True) == 10
    assert tile_count(1411, 1411, **options, thumbnail=False) == 9
    assert tile_count(512, 512, **options, thumbnail=True) == 1


def test_a_larger_grid_of_the_same_shape_needs_more_than_half_its_area() -> None:
    options = {"min_tiles": 1, "max_tiles": 4, "tile_size": 100}
    assert tile_grid(141, 141, **options) == (1, 1)  # 19881 pixels, half of 2 x 2 tiles is 20000
    assert tile_grid(142, 142, **options) == (2, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 14))
def test_no_allowed_grid_is_nearer_to_the_image_than_the_chosen_one(width: int, height: int, most: int) -> None:
    cols, rows = tile_grid(width, height, min_tiles=1, max_tiles=most, tile_size=448)
    assert 1 <= cols * rows <= most
    shape = Fraction(width, height)
    nearest = min(abs(shape - Fraction(i, j)) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most)
    # Exact quotients here, floating point in the rule: distances of shapes up to 5000 are equal to 1e-12.
    assert abs(shape - Fraction(cols, rows)) - nearest < 1e-12


@pytest.mark.parametrize("most", [1, 2, 6, 12, 18, 24, 40])
def test_two_grids_of_one_area_are_never_both_the_nearest(most: int) -> None:
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    shapes = sorted({Fraction(i, j) for i, j in grids})
    # The two shapes nearest to an image are neighbours, so only neighbours can tie; if they shared an area, the order
    # in which grids of one area are tried would decide.
    for low, high in pairwise(shapes):
        areas_low = {i * j for i, j in grids if Fraction(i, j) == low}
        areas_high = {i * j for i, j in grids if Fraction(i, j) == high}
        assert not areas_low & areas_high, (low, high)
