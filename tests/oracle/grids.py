"""Into how many tiles an image is cut."""

from __future__ import annotations


def tile_grid(width: int, height: int, *, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """Columns and rows of the grid whose shape is nearest to the image's, sizes in pixels.

    Among equally near grids a larger one wins only if the image fills more than half of its area. Grids of one area are
    tried in ascending order of columns; the reference leaves that order open. It never decides when `min_tiles` is 1.
    """
    candidates = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if min_tiles <= cols * rows <= max_tiles
    ]
    best, best_distance = (1, 1), float("inf")
    for cols, rows in sorted(candidates, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - cols / rows)
        fills = width * height > 0.5 * tile_size**2 * cols * rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (cols, rows), distance
    return best


def tile_count(width: int, height: int, *, min_tiles: int, max_tiles: int, tile_size: int, thumbnail: bool) -> int:
    """Tiles of one image; a grid of more than one tile may be followed by the whole image, shrunk."""
    cols, rows = tile_grid(width, height, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size)
    return cols * rows + (1 if thumbnail and cols * rows > 1 else 0)
