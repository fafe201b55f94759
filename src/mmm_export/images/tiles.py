"""A picture as the tiles the model sees: InternVL's dynamic grid, thumbnail and normalisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmm_export.errors import ImageError, OptionError
from mmm_export.images.files import MAX_PIXELS
from mmm_export.spec import VisionSpec

MAX_TILES = 1024  # of one picture; 2.5 GB of pixels at 448 x 448

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue
_STD = (0.229, 0.224, 0.225)
_PADDING = (123, 116, 103)  # _MEAN in 8 bits, cut off and not rounded, as in the reference


def choose_grid(width: int, height: int, *, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """Choose how many tiles a picture is cut into: the grid of min_tiles..max_tiles tiles nearest to its shape.

    Of grids equally near, the larger one wins if the picture has more than half the pixels of its tiles.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        min_tiles: least number of tiles.
        max_tiles: largest number of tiles, up to MAX_TILES.
        tile_size: side of a tile, in pixels.

    Returns:
        Columns and rows.

    Raises:
        OptionError: the numbers of tiles are not 1 <= min_tiles <= max_tiles <= MAX_TILES, or a size is below 1.

    """
    if not all(isinstance(number, int) for number in (min_tiles, max_tiles)):
        raise OptionError(
            "a number of tiles is no whole number", found=f"{min_tiles!r} to {max_tiles!r} tiles an image"
        )
    if min(width, height, tile_size) < 1:
        raise OptionError("a size in pixels is below 1", found=f"{width} x {height}, tiles of {tile_size}", wanted="1")
    if not 1 <= min_tiles <= max_tiles <= MAX_TILES:
        raise OptionError(
            "the number of tiles is out of range",
            found=f"{min_tiles} to {max_tiles} tiles an image",
            wanted=f"1 to {MAX_TILES}, the least number first",
        )
    shape = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(shape - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width * height > 0.5 * tile_size * tile_size * columns * rows:
            best = (columns, rows)
    return best


@lru_cache(maxsize=32)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """List every grid of min_tiles..max_tiles tiles by area, and grids of one area in the reference's order.

    The reference sorts a Python set by area alone, so grids of one area stay in the set's own order, which depends on
    the order of insertion. That decides ties between them (a 5:4 picture in exactly two tiles), so the set is built
    alike.
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    grids.sort(key=lambda grid: (max(*grid, min_tiles), grid))
    as_in_reference = set()
    for grid in grids:
        as_in_reference.add(grid)
    return tuple(sorted(as_in_reference, key=lambda grid: grid[0] * grid[1]))


def tiles_from_image(image: Image.Image, vision: VisionSpec, *, max_tiles: int | None = None) -> NDArray[np.float32]:
    """Cut a picture into normalised tiles, row by row; the whole picture is a last tile if the model wants a thumbnail.

    A model without dynamic tiles sees the whole picture as one tile, squeezed, or padded to a square with the mean
    colour.

    Args:
        image: an RGB picture of any size, not changed.
        vision: the model's tile size and number of tiles.
        max_tiles: largest number of tiles without the thumbnail, in the place of the model's.

    Returns:
        Pixels (tiles, 3, S, S), each channel with ImageNet's mean subtracted and divided by its standard deviation.

    Raises:
        OptionError: max_tiles is below the model's least number, or above MAX_TILES.
        ImageError: the picture is not RGB, or would be too large as a square.

    """
    if image.mode != "RGB":
        raise ImageError("the picture is not RGB", found=f"mode {image.mode}", hint="use load_image")
    side = vision.tile_size
    # Chosen for one tile too, so that a wrong max_tiles never passes unseen.
    grid = choose_grid(
        image.width,
        image.height,
        min_tiles=vision.min_tiles,
        max_tiles=vision.max_tiles if max_tiles is None else max_tiles,
        tile_size=side,
    )
    if not vision.dynamic_tiles:
        tile = _resized(_square(image) if vision.pad_to_square else image, side, side)
        return _normalised([tile], 1, side)
    thumbnail = vision.use_thumbnail and grid != (1, 1)
    return _normalised(_tiles(image, grid, side, thumbnail), grid[0] * grid[1] + thumbnail, side)


def _tiles(image: Image.Image, grid: tuple[int, int], side: int, thumbnail: bool) -> Iterator[Image.Image]:
    columns, rows = grid
    mosaic = _resized(image, side * columns, side * rows)
    for row in range(rows):
        for column in range(columns):
            yield mosaic.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
    if thumbnail:
        yield _resized(image, side, side)


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side * side > MAX_PIXELS:
        raise ImageError(
            "the picture is too large to be padded to a square",
            found=f"{image.width} x {image.height} pixels",
            wanted=f"at most {int(MAX_PIXELS**0.5)} pixels along a side",
            hint="scale the image down first",
        )
    square = Image.new("RGB", (side, side), _PADDING)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _normalised(tiles: Iterable[Image.Image], count: int, side: int) -> NDArray[np.float32]:
    """Turn RGB tiles of side S into pixels (count, 3, S, S)."""
    pixels = np.empty((count, 3, side, side), np.float32)
    for tile, out in zip(tiles, pixels, strict=True):
        values = np.asarray(tile)
        for channel, table in enumerate(_tables()):
            np.take(table, values[:, :, channel], out=out[channel])
    return pixels


@lru_cache(maxsize=1)
def _tables() -> NDArray[np.float32]:
    """Normalised value of every 8-bit value, (3, 256), by the reference's float32 operations in their order."""
    scaled = np.arange(256, dtype=np.float32) / np.float32(255)
    rows = [(scaled - np.float32(mean)) / np.float32(std) for mean, std in zip(_MEAN, _STD, strict=True)]
    return np.stack(rows)
