"""The oracle on checkpoints of the product's own writer: names, shapes and settings that both were told must agree."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import OracleModel, relative_error
from oracle.tensors import Tensors
from oracle_checks.tiny_checkpoint import Sizes, shapes

MakeCheckpoint = Callable[..., Path]
KINDS = ["linear", "hybrid", "teacher"]


def _sizes(config: dict[str, Any], found: Tensors) -> Sizes:
    """Sizes that config.json states; the vision ones, which it does not, from the tensors."""
    embedding, llm = config["embedding_config"], config["llm_config"]
    hidden = llm["hidden_size"]
    conv = [found.shape(name)[2] for name in found if name.endswith("conv1d.weight")]
    return Sizes(
        (tuple(embedding["layers_block_type"]), tuple(llm["layers_block_type"])),
        hidden,
        llm["num_attention_heads"],
        llm["num_key_value_heads"],
        hidden // llm["num_attention_heads"],
        llm["intermediate_size"],
        llm["vocab_size"],
        conv[0] if conv else 2,
        embedding["patch_size"],
        embedding["image_size"] // embedding["patch_size"],
        round(1 / config["downsample_ratio"]),
    )


def _image_tokens(model: OracleModel, pixels: np.ndarray) -> list[int]:
    return [model.image_token_id] * len(model.image_features(pixels))


@pytest.mark.parametrize("kind", KINDS)
def test_writer_and_oracle_know_the_same_tensors(kind: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(kind)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = Tensors.open(folder)
    assert {name: found.shape(name) for name in found} == shapes(_sizes(config, found))


@pytest.mark.parametrize("kind", KINDS)
def test_written_checkpoints_answer_with_finite_logits_that_follow_their_input(
    kind: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint(kind)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = OracleModel.from_checkpoint(folder)
    assert model.kinds == tuple(
        config["embedding_config"]["layers_block_type"] + config["llm_config"]["layers_block_type"]
    )
    side = config["force_image_size"]
    pixels = np.random.default_rng(41).standard_normal((2, 3, side, side))
    image = _image_tokens(model, pixels)
    assert len(image) == 2 * (side // config["embedding_config"]["patch_size"] // 2) ** 2
    ids = [1, 7, *image, 9, 11, 5]
    one = model.forward(ids, pixels)
    assert np.isfinite(one.logits).all()
    assert one.logits.shape == (len(ids), model.vocab_size)
    # Noise that no input moves, or that explodes, would let a wrong export pass.
    two = model.forward(ids, pixels[::-1])
    three = model.forward([1, 8, *image, 9, 11, 5], pixels)
    for other in (two, three):
        assert relative_error(other.logits[-1], one.logits[-1]) > 1e-3
    for output in one.layer_outputs:
        assert 1e-2 < np.abs(output).max() < 1e4


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_written_checkpoint_changes_its_input(kind: str, make_checkpoint: MakeCheckpoint) -> None:
    result = OracleModel.from_checkpoint(make_checkpoint(kind)).forward([1, 7, 3, 9, 11, 5])
    before = result.embeds
    for output in result.layer_outputs:
        assert relative_error(output, before) > 1e-3
        before = output


def test_sharding_changes_no_logit_and_rounding_changes_few_digits(make_checkpoint: MakeCheckpoint) -> None:
    ids = [1, 7, 3, 9, 11, 5]
    one = OracleModel.from_checkpoint(make_checkpoint("hybrid", dtype="fp32")).forward(ids)
    sharded = OracleModel.from_checkpoint(make_checkpoint("hybrid", dtype="fp32", shards=3)).forward(ids)
    np.testing.assert_array_equal(sharded.logits, one.logits)
    for dtype, digits in (("fp16", 11), ("bf16", 8)):
        rounded = OracleModel.from_checkpoint(make_checkpoint("hybrid", dtype=dtype)).forward(ids)
        # Weights rounded at 2**-digits; errors of some tens of layers' matrices add up, mostly at random.
        assert 0 < relative_error(rounded.logits, one.logits) < 16 * 2.0**-digits


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(6, 3, 16), (4, 4, 8), (3, 1, 32)], ids=["6-over-3", "4-over-4", "3-over-1"]
)
def test_odd_sizes_are_written_as_the_oracle_reads_them(
    heads: int, kv_heads: int, head_dim: int, make_checkpoint: MakeCheckpoint
) -> None:
    from mmm_export.model.testing import tiny_spec

    spec = tiny_spec(kinds=("mamba2", "mha", "mamba2"), heads=heads, kv_heads=kv_heads, head_dim=head_dim, conv_width=3)
    model = OracleModel.from_checkpoint(make_checkpoint(spec))
    geometry = model.geometry
    assert (geometry.heads, geometry.kv_heads, geometry.head_dim) == (heads, kv_heads, head_dim)
    whole = model.forward([1, 7, 3, 9, 11, 5])
    part = model.forward([9, 11, 5], state=model.forward([1, 7, 3]).state)
    # float64 against float64 through three layers
    assert relative_error(part.logits, whole.logits[3:]) < 1e-11
    assert math.isfinite(float(np.abs(whole.logits).max()))
