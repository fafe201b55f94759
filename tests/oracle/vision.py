"""From normalised pixels to image features: patches, positions, 2x2 merging, projection."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from oracle.activations import gelu
from oracle.array import Array


def patch_tokens(pixels: Array, weight: Array, bias: Array) -> Array:
    """Convolve with a stride of the kernel's size.

    Shapes: pixels (tiles, 3, S, S), weight (hidden, 3, p, p), bias (hidden,) -> (tiles, S/p, S/p, hidden).
    """
    size = weight.shape[-1]
    rows, cols = pixels.shape[2] // size, pixels.shape[3] // size
    kernel = weight.reshape(weight.shape[0], -1)
    grid = np.zeros((pixels.shape[0], rows, cols, weight.shape[0]))
    for r in range(rows):
        for c in range(cols):
            patch = pixels[:, :, r * size : (r + 1) * size, c * size : (c + 1) * size]
            grid[:, r, c] = patch.reshape(pixels.shape[0], -1) @ kernel.T + bias
    return grid


def bicubic(grid: Array, rows: int, cols: int) -> Array:
    """Resize (rows_in, cols_in, D) to (rows, cols, D) by cubic convolution.

    The kernel has a = -0.75 whatever the scale (no antialiasing), pixel centres lie at halves, borders are clamped.
    """
    return _cubic_matrix(cols, grid.shape[1]) @ np.tensordot(_cubic_matrix(rows, grid.shape[0]), grid, axes=1)


def _cubic_matrix(size_out: int, size_in: int) -> Array:
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        centre = (i + 0.5) * size_in / size_out - 0.5
        first = math.floor(centre) - 1
        for tap in range(first, first + 4):
            matrix[i, min(max(tap, 0), size_in - 1)] += _cubic(abs(centre - tap))
    return matrix


def _cubic(x: float, a: float = -0.75) -> float:
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * (x**3 - 5 * x**2 + 8 * x - 4)
    return 0.0


def space_to_depth(grid: Array, factor: int) -> Array:
    """Concatenate the vectors of each factor x factor square, row by row.

    Shapes: (tiles, R, C, D) -> (tiles, R / factor, C / factor, factor * factor * D).
    """
    rows, cols = grid.shape[1:3]
    if rows % factor or cols % factor:
        raise ValueError(f"a grid of {rows} x {cols} patches cannot be merged by {factor}")
    merged = [grid[:, i::factor, j::factor] for i in range(factor) for j in range(factor)]
    return np.concatenate(merged, axis=-1)


def image_features(pixels: Array, weights: Mapping[str, Array], position_grid: int) -> Array:
    """Features of image tiles, in reading order: (tiles * tokens per tile, hidden).

    Args:
        pixels: (tiles, 3, S, S), normalised.
        weights: by their checkpoint names after `embedding_model.`.
        position_grid: side of the stored position grid.
    """
    grid = patch_tokens(
        pixels,
        weights["vision_embeddings.patch_embedding.weight"],
        weights["vision_embeddings.patch_embedding.bias"],
    )
    hidden = grid.shape[-1]
    positions = weights["vision_embeddings.position_embedding"][0, 1:]  # row 0 is the class position, never used
    grid = grid + bicubic(positions.reshape(position_grid, position_grid, hidden), grid.shape[1], grid.shape[2])
    if "pixel_shuffle_proj.0.weight" not in weights:
        return grid.reshape(-1, hidden)
    widen = weights["pixel_shuffle_proj.0.weight"]
    merged = space_to_depth(grid, math.isqrt(widen.shape[1] // hidden))
    inner = gelu(merged @ widen.T + weights["pixel_shuffle_proj.0.bias"])
    features: Array = inner @ weights["pixel_shuffle_proj.2.weight"].T + weights["pixel_shuffle_proj.2.bias"]
    return features.reshape(-1, features.shape[-1])
