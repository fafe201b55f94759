"""Image path and pointwise functions of the oracle against torch's operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle.activations import gelu, silu, softmax, softplus
from oracle.compare import relative_error
from oracle.norms import GATE_EPS, gated_rms_norm, l2_normalize, rms_norm
from oracle.vision import bicubic, image_features, patch_tokens, space_to_depth
from oracle_checks.second_formulation import image_features as torch_features
from oracle_checks.tiny_checkpoint import Sizes, random_tensors

EXACT = 1e-12  # float64 against float64: sums of some hundred terms of size 1


@pytest.mark.parametrize(
    ("before", "rows", "cols"), [(32, 6, 6), (6, 32, 32), (5, 7, 3), (4, 4, 9), (1, 3, 3), (2, 1, 1), (32, 16, 16)]
)
def test_bicubic_agrees_with_torch_interpolate(before: int, rows: int, cols: int) -> None:
    grid = np.random.default_rng(9).standard_normal((before, before, 5))
    wanted = F.interpolate(
        torch.from_numpy(grid).permute(2, 0, 1)[None], size=(rows, cols), mode="bicubic", align_corners=False
    )
    assert relative_error(bicubic(grid, rows, cols), wanted[0].permute(1, 2, 0)) < EXACT


def test_bicubic_to_the_same_size_changes_no_bit() -> None:
    grid = np.random.default_rng(10).standard_normal((8, 8, 3))
    np.testing.assert_array_equal(bicubic(grid, 8, 8), grid)


def test_patches_agree_with_conv2d() -> None:
    random = np.random.default_rng(11)
    pixels = random.standard_normal((2, 3, 20, 28))
    weight, bias = random.standard_normal((7, 3, 4, 4)), random.standard_normal(7)
    wanted = F.conv2d(torch.from_numpy(pixels), torch.from_numpy(weight), torch.from_numpy(bias), stride=4)
    assert relative_error(patch_tokens(pixels, weight, bias), wanted.permute(0, 2, 3, 1)) < EXACT


def test_merging_reads_each_square_row_by_row() -> None:
    grid = np.arange(16.0).reshape(1, 4, 4, 1)
    wanted = [[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]]
    np.testing.assert_array_equal(space_to_depth(grid, 2)[0], wanted)


def test_a_grid_that_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match="5 x 4 patches cannot be merged by 2"):
        space_to_depth(np.zeros((1, 5, 4, 3)), 2)


@pytest.mark.parametrize("side", [24, 16, 40])  # the stored grid of 6 patches, fewer, more
@pytest.mark.parametrize("shuffle", [1, 2])
def test_image_features_agree_with_the_torch_formulation(side: int, shuffle: int) -> None:
    sizes = Sizes(shuffle=shuffle)
    tensors = {name: value.astype(np.float64) for name, value in random_tensors(sizes, 12).items()}
    pixels = np.random.default_rng(13).standard_normal((3, 3, side, side))
    own = {name.removeprefix("embedding_model."): value for name, value in tensors.items()}
    found = image_features(pixels, own, sizes.grid)
    wanted = torch_features(torch.from_numpy(pixels), {n: torch.from_numpy(v) for n, v in tensors.items()}, sizes)
    assert found.shape == (3 * (side // sizes.patch // shuffle) ** 2, sizes.hidden)
    assert relative_error(found, wanted) < EXACT


def test_without_a_projection_every_patch_is_a_token() -> None:
    sizes = Sizes()
    tensors = {n: v.astype(np.float64) for n, v in random_tensors(sizes, 14).items() if "pixel_shuffle" not in n}
    own = {name.removeprefix("embedding_model."): value for name, value in tensors.items()}
    pixels = np.random.default_rng(15).standard_normal((1, 3, 24, 24))
    kernel = own["vision_embeddings.patch_embedding.weight"].reshape(sizes.hidden, -1)
    corner = kernel @ pixels[0, :, 4:8, :4].ravel() + own["vision_embeddings.patch_embedding.bias"]
    found = image_features(pixels, own, sizes.grid)
    assert relative_error(found[6], corner + own["vision_embeddings.position_embedding"][0, 7]) < EXACT


def test_pointwise_functions_agree_with_torch_also_far_out() -> None:
    x = np.concatenate([np.linspace(-40, 40, 4001), [-800.0, 800.0]])
    tensor = torch.from_numpy(x)
    # torch's softplus is the identity from its threshold on, 20 by default; from 50 on that is exact in float64.
    pairs = [(gelu(x), F.gelu(tensor)), (silu(x), F.silu(tensor)), (softplus(x), F.softplus(tensor, threshold=50))]
    for found, wanted in pairs:
        # A few ulp; absolute below 1, since torch takes 1 + erf, which cancels far out on the left.
        np.testing.assert_allclose(found, wanted, rtol=1e-14, atol=1e-14)
    rows = np.stack([x, np.where(x > 0, -np.inf, x)])
    # Exponents up to 840 are rounded at 1e-13; below 1e-300 numbers lose digits.
    np.testing.assert_allclose(softmax(rows), torch.softmax(torch.from_numpy(rows), -1), rtol=1e-12, atol=1e-300)


def test_norms_agree_with_torch() -> None:
    random = np.random.default_rng(16)
    x, gate, weight = random.standard_normal((3, 4, 5, 8)) * 1e-3
    weight = weight[0, 0]
    normed = F.rms_norm(torch.from_numpy(x), (8,), torch.from_numpy(weight), GATE_EPS)
    assert relative_error(rms_norm(x, weight, 1e-5), normed) < EXACT
    assert relative_error(gated_rms_norm(x, gate, weight), normed * F.silu(torch.from_numpy(gate))) < EXACT
    assert relative_error(np.linalg.norm(l2_normalize(x), axis=-1), np.ones((4, 5))) < EXACT
    assert relative_error(l2_normalize(7 * x), l2_normalize(x)) < EXACT
