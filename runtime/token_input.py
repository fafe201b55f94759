"""Checks of what a caller feeds: token ids, pixel values, and that they fit each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmm_export.errors import PromptError
from mmm_export.spec import ModelSpec


def ids_from_input(input_ids: ArrayLike, spec: ModelSpec) -> NDArray[np.int64]:
    """Return token ids as (T,) int64.

    Args:
        input_ids: integers, (T,) or (1, T).
        spec: the model, whose vocabulary they must be in.

    Raises:
        PromptError: no ids, not integers, another shape, or an id outside the vocabulary.

    """
    try:
        ids = np.asarray(input_ids)
    except ValueError as error:
        raise PromptError("token ids cannot be read", found=str(error), wanted="a list of integers") from error
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise PromptError("token ids have a wrong shape", found=f"{ids.shape}", wanted="(tokens,): one sequence")
    if ids.size == 0:
        raise PromptError("the prompt is empty", found="0 token ids", wanted="at least one")
    if ids.dtype.kind not in "iu":
        raise PromptError("token ids are no integers", found=f"dtype {ids.dtype}", wanted="integers")
    limit = spec.vocab_size + spec.special_tokens
    outside = np.flatnonzero((ids < 0) | (ids >= limit))
    if outside.size:
        raise PromptError(
            "a token id is outside the vocabulary",
            found=f"id {ids[outside[0]]} at position {outside[0]}",
            wanted=f"0 to {limit - 1}",
            hint="was the text encoded with another model's tokenizer?",
        )
    return ids.astype(np.int64)


def pixels_from_input(pixel_values: ArrayLike | None, spec: ModelSpec) -> NDArray[np.float32] | None:
    """Return image tiles as (tiles, 3, S, S) float32, or None for none.

    Raises:
        PromptError: not floating point, or another shape.

    """
    if pixel_values is None:
        return None
    size, channels = spec.vision.tile_size, spec.vision.channels
    pixels: NDArray[Any] = np.asarray(pixel_values)
    if pixels.ndim != 4 or pixels.shape[1:] != (channels, size, size) or pixels.dtype.kind != "f":
        raise PromptError(
            "pixel values do not fit this model",
            found=f"{pixels.dtype} {pixels.shape}",
            wanted=f"float32 (tiles, {channels}, {size}, {size}), normalised",
            hint="mmm_export.images.tiles_from_image makes them from an image",
        )
    if not np.isfinite(pixels).all():
        raise PromptError("pixel values are damaged", found="NaN or infinity", wanted="finite numbers")
    return np.ascontiguousarray(pixels, dtype=np.float32) if len(pixels) else None


def check_image_tokens(ids: NDArray[np.int64], pixels: NDArray[np.float32] | None, spec: ModelSpec) -> None:
    """Refuse a prompt whose image tokens are not exactly those of its tiles. Raises PromptError."""
    marks = int(np.count_nonzero(ids == spec.image_token_id))
    tiles = 0 if pixels is None else len(pixels)
    wanted = tiles * spec.vision.tokens_per_tile
    if marks != wanted:
        raise PromptError(
            "the prompt's image tokens do not match its images",
            found=f"{marks} ids {spec.image_token_id}",
            wanted=f"{wanted}: {tiles} tiles of {spec.vision.tokens_per_tile} tokens",
            hint="Session.encode makes both from a question and its images",
        )
