"""Image features for a prompt that is fed in chunks: computed a few tiles at a time, just before they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.runtime.backend import Backend

# One 448-pixel tile needs some 50 MB of activations; four keep the cores busy without the peak growing with the image.
TILES_PER_CALL = 4


class ImageFeatures:
    """Hands out the features of image tiles row by row, in order, holding at most a few tiles' worth."""

    def __init__(self, backend: Backend, pixel_values: NDArray[np.float32] | None) -> None:
        self._backend = backend
        self._pixels = pixel_values
        self._tile = 0
        self._rest: NDArray[Any] | None = None

    def take(self, count: int) -> NDArray[Any] | None:
        """Return the next `count` rows, (count, hidden); None for 0. The caller never asks for more than there are."""
        if count == 0:
            return None
        pieces: list[NDArray[Any]] = [] if self._rest is None else [self._rest]
        have = sum(len(piece) for piece in pieces)
        while have < count:
            assert self._pixels is not None
            tiles = self._pixels[self._tile : self._tile + TILES_PER_CALL]
            assert len(tiles), "more image tokens than the prompt was checked for"
            self._tile += len(tiles)
            pieces.append(self._backend.image_features(tiles))
            have += len(pieces[-1])
        rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        self._rest = rows[count:]
        return rows[:count]
