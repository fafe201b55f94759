"""Grids and tiles: the reference's numbers for real pictures, and its rule written out again for all others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmm_export.errors import ImageError, OptionError
from mmm_export.images import MAX_TILES, choose_grid, load_image, tiles_from_image
from mmm_export.images.tiles import _grids
from mmm_export.spec import VisionSpec

VISION = VisionSpec(
    tile_size=448,
    patch_size=14,
    position_grid=32,
    shuffle=2,
    projected=True,
    dynamic_tiles=True,
    use_thumbnail=True,
    min_tiles=1,
    max_tiles=12,
    pad_to_square=False,
)
SMALL = dataclasses.replace(VISION, tile_size=28, position_grid=2)

# Width, height, grid with at most 6 tiles, with at most 12, tiles of the latter with the thumbnail: the reference's own
# results for pictures of scikit-image and scikit-learn.
GRIDS = [
    ("astronaut.png", 512, 512, (1, 1), (1, 1), 1),
    ("coffee.png", 600, 400, (3, 2), (3, 2), 7),
    ("chelsea.png", 451, 300, (3, 2), (3, 2), 7),
    ("rocket.jpg", 640, 427, (3, 2), (3, 2), 7),
    ("motorcycle_left.png", 741, 500, (3, 2), (3, 2), 7),
    ("hubble_deep_field.jpg", 1000, 872, (2, 2), (2, 2), 5),
    ("retina.jpg", 1411, 1411, (2, 2), (3, 3), 10),
    ("text.png", 448, 172, (3, 1), (5, 2), 11),
    ("page.png", 384, 191, (2, 1), (2, 1), 3),
    ("cell.png", 550, 660, (1, 1), (3, 4), 13),
    ("coins.png", 384, 303, (3, 2), (4, 3), 13),
    ("horse.png", 400, 328, (1, 1), (4, 3), 13),
]


def reference_grids(least: int, most: int) -> list[tuple[int, int]]:
    """The candidates in the reference's order, made by its three loops."""
    found = {
        (i, j)
        for n in range(least, most + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if least <= i * j <= most
    }
    return sorted(found, key=lambda grid: grid[0] * grid[1])


@pytest.mark.parametrize(("name", "width", "height", "six", "twelve", "tiles"), GRIDS, ids=[row[0] for row in GRIDS])
def test_real_pictures_get_the_references_grids(
    name: str, width: int, height: int, six: tuple[int, int], twelve: tuple[int, int], tiles: int
) -> None:
    assert choose_grid(width, height, min_tiles=1, max_tiles=6, tile_size=448) == six
    assert choose_grid(width, height, min_tiles=1, max_tiles=12, tile_size=448) == twelve
    assert twelve[0] * twelve[1] + (twelve != (1, 1)) == tiles


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "page.png", "rocket.jpg"])
def test_real_files_give_that_many_tiles(name: str) -> None:
    skimage = pytest.importorskip("skimage")
    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        pytest.skip(f"this scikit-image does not ship {name}")
    tiles = next(row[-1] for row in GRIDS if row[0] == name)
    image = load_image(path)
    assert image.size == next(row[1:3] for row in GRIDS if row[0] == name)
    assert tiles_from_image(image, VISION).shape == (tiles, 3, 448, 448)


@pytest.mark.parametrize("most", [1, 2, 5, 6, 12, 24, 40])
def test_candidates_stand_in_the_references_order(most: int) -> None:
    for least in range(1, most + 1):
        assert list(_grids(least, most)) == reference_grids(least, most)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), bounds=st.tuples(st.integers(1, 8), st.integers(0, 16)))
def test_grid_is_the_nearest_by_shape_and_the_larger_of_equals(
    width: int, height: int, bounds: tuple[int, int]
) -> None:
    least, most = bounds[0], sum(bounds)
    columns, rows = choose_grid(width, height, min_tiles=least, max_tiles=most, tile_size=448)
    candidates = reference_grids(least, most)
    nearest = min(abs(width / height - i / j) for i, j in candidates)
    equals = [(i, j) for i, j in candidates if abs(width / height - i / j) == nearest]
    expected = equals[0]
    for i, j in equals[1:]:
        if width * height > 0.5 * 448 * 448 * i * j:
            expected = (i, j)
    assert (columns, rows) == expected


@pytest.mark.parametrize(("side", "grid"), [(633, (1, 1)), (634, (2, 2)), (950, (2, 2)), (951, (3, 3))])
def test_square_picture_gets_more_tiles_once_it_fills_half_of_them(side: int, grid: tuple[int, int]) -> None:
    # sqrt(0.5) * 448 * 2 = 633.57 and * 3 = 950.35
    assert choose_grid(side, side, min_tiles=1, max_tiles=12, tile_size=448) == grid


@pytest.mark.parametrize(
    "bad", [{"max_tiles": 0}, {"max_tiles": -3}, {"min_tiles": 0}, {"min_tiles": 7}, {"max_tiles": MAX_TILES + 1},
            {"max_tiles": 2.5}, {"tile_size": 0}]
)  # fmt: skip
def test_nonsense_numbers_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        choose_grid(100, 100, **({"min_tiles": 1, "max_tiles": 6, "tile_size": 448} | bad))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("max_tiles", [0, -1, MAX_TILES + 1])
def test_nonsense_override_is_refused_even_for_a_single_tile(dynamic: bool, max_tiles: int) -> None:
    vision = dataclasses.replace(SMALL, dynamic_tiles=dynamic)
    with pytest.raises(OptionError, match="number of tiles"):
        tiles_from_image(Image.new("RGB", (50, 50)), vision, max_tiles=max_tiles)


def test_tiles_are_cut_row_by_row_with_the_thumbnail_last() -> None:
    image = Image.new("RGB", (84, 56))
    colours = [(40 * k, 255 - 40 * k, 7 * k) for k in range(6)]
    for k, colour in enumerate(colours):
        image.paste(colour, (k % 3 * 28, k // 3 * 28, k % 3 * 28 + 28, k // 3 * 28 + 28))
    tiles = tiles_from_image(image, SMALL)
    assert tiles.shape == (7, 3, 28, 28)
    assert tiles.dtype == np.float32
    for tile, colour in zip(tiles, colours, strict=False):
        np.testing.assert_array_equal(tile, normalised(np.full((28, 28, 3), colour, np.uint8)))
    whole = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(tiles[-1], normalised(whole))


def test_tiles_equal_the_reference_transform_on_a_resized_picture() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (61, 97, 3), np.uint8))
    tiles = tiles_from_image(image, SMALL)
    columns, rows = choose_grid(97, 61, min_tiles=1, max_tiles=12, tile_size=28)
    mosaic = np.asarray(image.resize((28 * columns, 28 * rows), Image.Resampling.BICUBIC))
    for k in range(columns * rows):
        top, left = k // columns * 28, k % columns * 28
        np.testing.assert_array_equal(tiles[k], normalised(mosaic[top : top + 28, left : left + 28]))


def test_normalisation_equals_torch_bit_for_bit() -> None:
    torch = pytest.importorskip("torch")
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    scaled = torch.from_numpy(values.copy()).permute(2, 0, 1).to(torch.float32).div(255)
    mean, std = (torch.tensor(row, dtype=torch.float32).view(3, 1, 1) for row in (MEAN, STD))
    np.testing.assert_array_equal(normalised(values), scaled.sub(mean).div(std).numpy())


def test_one_by_one_grid_has_no_thumbnail_and_a_model_may_want_none() -> None:
    image = Image.new("RGB", (30, 30))
    assert len(tiles_from_image(image, SMALL, max_tiles=1)) == 1
    wide = Image.new("RGB", (100, 50))
    assert len(tiles_from_image(wide, SMALL, max_tiles=2)) == 3
    assert len(tiles_from_image(wide, dataclasses.replace(SMALL, use_thumbnail=False), max_tiles=2)) == 2


def test_model_without_dynamic_tiles_squeezes_or_pads_with_the_mean_colour() -> None:
    image = Image.new("RGB", (56, 28), (255, 0, 0))
    plain = dataclasses.replace(SMALL, dynamic_tiles=False)
    np.testing.assert_array_equal(
        tiles_from_image(image, plain)[0], normalised(np.full((28, 28, 3), (255, 0, 0), np.uint8))
    )
    padded = tiles_from_image(image, dataclasses.replace(plain, pad_to_square=True))
    square = np.full((56, 56, 3), (123, 116, 103), np.uint8)
    square[14:42] = (255, 0, 0)
    resized = Image.fromarray(square).resize((28, 28), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(padded, normalised(np.asarray(resized))[None])
    # The padding is the mean colour, so it is nearly zero: one 8-bit step is 0.018, and the mean is cut to whole steps.
    assert np.abs(padded[0, :, 0, 0]).max() < 0.018


def test_long_picture_is_not_padded_to_gigabytes() -> None:
    vision = dataclasses.replace(SMALL, dynamic_tiles=False, pad_to_square=True)
    with pytest.raises(ImageError, match="padded to a square"):
        tiles_from_image(Image.new("RGB", (60_000, 1)), vision)


def test_single_pixel_and_extreme_shapes_give_finite_tiles() -> None:
    for size in ((1, 1), (5000, 1), (1, 5000)):
        tiles = tiles_from_image(Image.new("RGB", size, (9, 99, 199)), SMALL)
        assert np.isfinite(tiles).all()
        # A picture of one colour stays that colour however it is resized.
        np.testing.assert_array_equal(tiles[0], normalised(np.full((28, 28, 3), (9, 99, 199), np.uint8)))


def test_picture_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ImageError, match="not RGB"):
        tiles_from_image(Image.new("L", (9, 9)), SMALL)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Scale (S, S, 3) bytes to [0, 1], then ImageNet's mean and deviation, all in float32, as (3, S, S)."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    result: np.ndarray = ((scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(2, 0, 1)
    return result
