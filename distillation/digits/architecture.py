"""Dimensions of the demo models: small enough for a repository, in the proportions of the released ones."""

from __future__ import annotations

from mmm_export.distillation.digits.scenes import CELL, SIDE
from mmm_export.model.testing.specs import Kind, tiny_spec
from mmm_export.spec import LayerKind, ModelSpec, RopeSpec

VOCAB_SIZE = 512
EMBEDDING_LAYERS = 2
LLM_LAYERS = 6


def digits_spec(kinds: Kind | tuple[LayerKind, ...]) -> ModelSpec:
    """Describe a demo model: 2 + 6 layers of width 192, and one tile of SIDE pixels in tokens of CELL pixels.

    Args:
        kinds: "teacher", "linear", "hybrid" (every fourth layer attention, as released), or the kinds of all layers.
    """
    return tiny_spec(
        kinds=kinds,
        embedding_layers=EMBEDDING_LAYERS,
        llm_layers=LLM_LAYERS,
        hidden_size=192,
        heads=6,
        kv_heads=3,
        head_dim=32,
        intermediate_size=512,
        vocab_size=VOCAB_SIZE,
        tile_size=SIDE,
        patch_size=CELL // 2,
        shuffle=2,
        max_tiles=1,
        rope=RopeSpec(theta=10000.0),
    )
