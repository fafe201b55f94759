"""How images become tiles and tokens: VisionSpec from tensors and config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from mmm_export.errors import CheckpointError
from mmm_export.model import tensors
from mmm_export.model.config import Section
from mmm_export.model.stored import StoredTensor
from mmm_export.model.tensor_check import missing_tensor
from mmm_export.spec import VisionSpec

Stored = Mapping[str, StoredTensor]
_PROJECTION = (
    tensors.SHUFFLE_IN_WEIGHT,
    tensors.SHUFFLE_IN_BIAS,
    tensors.SHUFFLE_OUT_WEIGHT,
    tensors.SHUFFLE_OUT_BIAS,
)


def vision_spec(config: Section, stored: Stored, hidden_size: int, findings: list[str]) -> VisionSpec:
    """Read the image geometry; adds to `findings` where labels of config.json are wrong.

    Raises:
        CheckpointError: tensors of impossible shape, a variant that is not supported, or sizes that do not divide.
    """
    embedding = cast(Section, config.section("embedding_config"))
    _check_shuffle_place(config, embedding)
    patch, channels = _patch(embedding, stored, findings)
    grid = _position_grid(stored)
    shuffle, projected = _shuffle(config, embedding, stored, hidden_size, findings)
    tile = _tile_size(config, embedding, patch, grid, findings)
    if tile % (patch * shuffle):
        raise CheckpointError(
            f"tiles of {tile} pixels cannot be cut into patches",
            found=f"tile size {tile}, patches of {patch} pixels, {shuffle}x{shuffle} patches to a token",
            wanted=f"a multiple of {patch * shuffle} pixels",
        )
    if config.flag("dynamic_image_size") is None:
        findings.append("config.json does not state dynamic_image_size: every image is one tile")
    least = config.integer("min_dynamic_patch") or 1
    most = config.integer("max_dynamic_patch") or 6
    if most < least:
        raise CheckpointError(
            f"{config.where('max_dynamic_patch')} is below min_dynamic_patch",
            found=f"{most} tiles at most, {least} at least",
            wanted="a range of tile counts",
        )
    return VisionSpec(
        tile_size=tile,
        patch_size=patch,
        position_grid=grid,
        shuffle=shuffle,
        projected=projected,
        dynamic_tiles=config.flag("dynamic_image_size") or False,
        use_thumbnail=config.flag("use_thumbnail") or False,
        min_tiles=least,
        max_tiles=most,
        pad_to_square=config.flag("pad2square") or False,
        channels=channels,
    )


def _check_shuffle_place(config: Section, embedding: Section) -> None:
    for section in (embedding, config):
        place = section.text("pixel_shuffle_loc")
        if place not in (None, "pre"):
            raise CheckpointError(
                f"{section.where('pixel_shuffle_loc')} asks for a variant that is not supported",
                found=f"{place!r:.60}",
                wanted="'pre', as in the released models: both stacks then read the same tokens",
            )


def _patch(embedding: Section, stored: Stored, findings: list[str]) -> tuple[int, int]:
    """Side of a patch in pixels, and channels of the image."""
    shape = _shape(stored, tensors.PATCH_WEIGHT, 4)
    _, channels, height, width = shape
    if height != width or height < 1 or channels != 3:
        raise CheckpointError(
            f"tensor {tensors.PATCH_WEIGHT} has the wrong shape",
            found=str(list(shape)),
            wanted="[hidden, 3, P, P]: square patches of an RGB image",
        )
    for key, actual in (("patch_size", height), ("num_channels", channels)):
        stated = embedding.integer(key)
        if stated is not None and stated != actual:
            findings.append(f"{embedding.where(key)} is {stated}, the tensors have {actual} and decide")
    return height, channels


def _position_grid(stored: Stored) -> int:
    """Side of the stored grid of positions; its first row is the class position."""
    rows = _shape(stored, tensors.POSITIONS, 3)[1]
    grid = math.isqrt(max(rows - 1, 0))
    if grid < 1 or grid * grid + 1 != rows:
        raise CheckpointError(
            f"tensor {tensors.POSITIONS} has the wrong shape",
            found=f"{rows} rows",
            wanted="one row for the class and a square number of others",
        )
    return grid


def _shuffle(
    config: Section, embedding: Section, stored: Stored, hidden_size: int, findings: list[str]
) -> tuple[int, bool]:
    """Side of the square of patches that becomes one token, and whether a projection follows."""
    projected = any(name in stored for name in _PROJECTION)
    side = 1
    if projected:
        width = _shape(stored, tensors.SHUFFLE_IN_WEIGHT, 2)[1]
        side = math.isqrt(width // hidden_size)
        if side < 1 or side * side * hidden_size != width:
            raise CheckpointError(
                f"tensor {tensors.SHUFFLE_IN_WEIGHT} has the wrong shape",
                found=f"{width} columns",
                wanted=f"a square number times the hidden size, {hidden_size}",
            )
    label = embedding.flag("use_pixel_shuffle_proj")
    if label is not None and label != projected:
        presence = "present" if projected else "absent"
        where = embedding.where("use_pixel_shuffle_proj")
        findings.append(f"{where} is {str(label).lower()}, but its tensors are {presence} and decide")
    for section in (config, embedding):
        ratio = section.number("downsample_ratio")
        if ratio is not None and not math.isclose(ratio * side, 1.0, rel_tol=1e-3):  # 1/3 is stored rounded
            findings.append(
                f"{section.where('downsample_ratio')} is {ratio:g}, the tensors say {1 / side:.4g} and decide"
            )
    return side, projected


def _tile_size(config: Section, embedding: Section, patch: int, grid: int, findings: list[str]) -> int:
    """Side of a tile in pixels; it may differ from the grid of positions, which is then interpolated."""
    stated = embedding.integer("image_size")
    if stated is not None and stated // patch != grid:
        findings.append(
            f"{embedding.where('image_size')} is {stated}, but the stored positions are of {grid * patch} pixels; "
            "the tensors decide"
        )
        stated = None
    return config.integer("force_image_size") or stated or grid * patch


def _shape(stored: Stored, name: str, rank: int) -> tensors.Shape:
    """Shape of a tensor that must be there with `rank` dimensions."""
    if name not in stored:
        raise missing_tensor(name)
    shape = stored[name].shape
    if len(shape) != rank:
        raise CheckpointError(f"tensor {name} has the wrong shape", found=str(list(shape)), wanted=f"{rank} dimensions")
    return shape
