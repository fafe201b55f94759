"""From image tiles to image tokens: patches, positions, 2x2 merging, projection. There is no vision tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm_export.model.linear import BiasedProjection
from mmm_export.spec import ModelSpec, VisionSpec


class VisionEmbeddings(nn.Module):
    """Patch convolution and positions. `position_embedding` is (grid*grid, hidden), already at the grid of a tile."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        vision = spec.vision
        size = (vision.patch_size, vision.patch_size)
        self.patch_embedding = nn.Conv2d(vision.channels, spec.hidden_size, size, stride=size)
        self.patch_embedding.requires_grad_(False)
        self.position_embedding = nn.Parameter(torch.empty(vision.grid**2, spec.hidden_size), requires_grad=False)

    def forward(self, pixel_values: Tensor, dtype: torch.dtype) -> Tensor:
        """Shapes: pixel_values (tiles, 3, S, S) -> (tiles, grid*grid, hidden) in `dtype`."""
        conv = self.patch_embedding
        # ONNX Runtime has no bfloat16 convolution; in float32 it costs little, being the only one of the model.
        inside = torch.float32 if dtype == torch.bfloat16 else dtype
        bias = conv.bias if conv.bias is None else conv.bias.to(inside)
        patches = F.conv2d(pixel_values.to(inside), conv.weight.to(inside), bias, conv.stride).to(dtype)
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.to(dtype)


class PixelShuffleProjection(nn.Sequential):
    """Linear, exact GELU, Linear: one merged token to one image token."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(BiasedProjection(inputs, outputs), nn.GELU(), BiasedProjection(outputs, outputs))


def merge_patches(x: Tensor, vision: VisionSpec) -> Tensor:
    """Space to depth: (tiles, grid*grid, d) -> (tiles, tokens_per_tile, shuffle*shuffle*d), patches of a token row by row."""
    side, s = vision.grid // vision.shuffle, vision.shuffle
    x = x.reshape(x.shape[0], side, s, side, s, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(x.shape[0], side * side, -1)


def interpolate_positions(table: Tensor, vision: VisionSpec) -> Tensor:
    """Positions at the grid of a tile, from the stored table (1, 1 + position_grid^2, hidden).

    The first row belongs to a class token that this model does not use. Bicubic in float32 as in the reference, and left so:
    it is rounded where it is used. The stored rows when the grids are equal.
    """
    rows = table[0, 1:]
    if vision.grid == vision.position_grid:
        return rows
    side = vision.position_grid
    grid = rows.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(vision.grid, vision.grid), mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.contiguous()
