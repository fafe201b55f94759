"""From a scene to pixels. Plain numpy, so that every machine draws the same picture."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mmm_export.distillation.digits.assets import Assets, Bytes, Split
from mmm_export.distillation.digits.scenes import CELL, COLOURS, SIDE, Patch, Scene

CONTRAST = 0.6  # of the background: patches must stand out from any photograph
DARK, LIGHT = 15.0, 250.0  # ink on bright and on dark patches
BRIGHT = 140.0  # mean of a colour above which ink is dark


def draw(scene: Scene, assets: Assets, split: Split) -> Bytes:
    """Draw a scene with handwriting and photographs of a split; returns RGB (SIDE, SIDE, 3)."""
    canvas = _background(scene, assets.photographs[split])
    for patch in scene.patches:
        top, left = patch.row * CELL + patch.top, patch.column * CELL + patch.left
        canvas[top : top + patch.size, left : left + patch.size] = _square(patch, assets, split)
    picture: Bytes = np.clip(canvas + np.float32(0.5), 0, 255).astype(np.uint8)
    return picture


def _background(scene: Scene, photographs: tuple[Bytes, ...]) -> NDArray[np.float32]:
    photo = photographs[int(scene.photograph * len(photographs))]
    top, left = (int(part * (size - SIDE + 1)) for part, size in zip(scene.shift, photo.shape[:2], strict=True))
    crop = photo[top : top + SIDE, left : left + SIDE].astype(np.float32)
    if scene.mirrored:
        crop = crop[:, ::-1]
    return np.ascontiguousarray(128 + np.float32(CONTRAST) * (crop - 128), dtype=np.float32)


def _square(patch: Patch, assets: Assets, split: Split) -> NDArray[np.float32]:
    colour = np.asarray(COLOURS[patch.colour], np.float32)
    if patch.digit is None:
        return np.broadcast_to(colour, (patch.size, patch.size, 3))
    samples = assets.samples(split, patch.digit)
    grey = assets.handwriting[samples[int(patch.pick * len(samples))]].astype(np.float32) / 16
    ink = np.float32(DARK if colour.mean() > BRIGHT else LIGHT)
    share = _turned(grey, patch)[..., None]
    return np.asarray(colour + share * (ink - colour), np.float32)


def _turned(grey: NDArray[np.float32], patch: Patch) -> NDArray[np.float32]:
    """Scale and turn handwriting (8, 8) to the square of a patch, bilinearly; nothing lies outside it."""
    side = grey.shape[0]
    padded = np.zeros((side + 4, side + 4), np.float32)
    padded[2:-2, 2:-2] = grey
    step = side / (patch.scale * patch.size)
    cos, sin = math.cos(math.radians(patch.angle)) * step, math.sin(math.radians(patch.angle)) * step
    lines = np.arange(patch.size, dtype=np.float32)[:, None] - np.float32((patch.size - 1) / 2)
    columns = lines.T - np.float32(patch.slant) * lines
    middle = np.float32((padded.shape[0] - 1) / 2)
    y = np.clip(lines * np.float32(cos) + columns * np.float32(sin) + middle, 0, padded.shape[0] - 1.001)
    x = np.clip(columns * np.float32(cos) - lines * np.float32(sin) + middle, 0, padded.shape[0] - 1.001)
    row, column = y.astype(np.intp), x.astype(np.intp)
    v, u = y - row, x - column
    upper = padded[row, column] * (1 - u) + padded[row, column + 1] * u
    lower = padded[row + 1, column] * (1 - u) + padded[row + 1, column + 1] * u
    return np.asarray(upper * (1 - v) + lower * v, np.float32)
