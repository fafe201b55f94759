"""Ready-made ModelSpecs: a tiny one to vary, and those of the released models."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast

from mmm_export.model.testing.vocabulary import image_token_id
from mmm_export.spec import LayerKind, ModelSpec, RopeSpec, StackSpec, VisionSpec

Kind = Literal["linear", "hybrid", "teacher"]

ATTENTION_EVERY = 4  # layers 0, 4, 8, ... of the released hybrid are attention
EMBEDDING_ROPE = RopeSpec(theta=10000.0)
LLM_ROPE = RopeSpec(theta=1e6)


def layer_kinds(kind: Kind, layers: int) -> tuple[LayerKind, ...]:
    """Kinds of all layers by global index, as the released model of that kind places them."""
    attention = {"linear": layers, "hybrid": ATTENTION_EVERY, "teacher": 1}[kind]
    return tuple("mha" if kind != "linear" and i % attention == 0 else "mamba2" for i in range(layers))


def full_size_spec(kind: Kind) -> ModelSpec:
    """Give the dimensions of the released 2.7B models: 8 + 24 layers, hidden 2048, vocabulary 92553."""
    kinds = layer_kinds(kind, 32)
    return ModelSpec(
        hidden_size=2048,
        heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=92553,
        special_tokens=0,
        conv_width=2,
        embedding=StackSpec(kinds[:8], 1e-5, EMBEDDING_ROPE),
        llm=StackSpec(kinds[8:], 1e-5, LLM_ROPE),
        vision=VisionSpec(448, 14, 32, 2, True, True, True, 1, 12, False),
        image_token_id=image_token_id(92553),
        normalize_embedding=False,
        template="internlm2-chat",
    )


def tiny_spec(**overrides: Any) -> ModelSpec:
    """Describe a model of 1 + 3 layers, hidden 64, heads 4 over 2, 56-pixel tiles, vocabulary 512.

    Args:
        **overrides: any field of ModelSpec or VisionSpec by its own name, and
            kinds: "linear" (default), "hybrid", "teacher", or the kinds of all layers, embedding stack first;
            embedding_layers: default 1; llm_layers: default 3, or what explicit kinds leave;
            norm_eps: of both stacks; rope: RopeSpec of both stacks.

    Fields left out follow the ones given: hidden_size is heads * head_dim, intermediate_size twice hidden_size,
    position_grid that of the tile, image_token_id where the test vocabulary has <IMG_CONTEXT>.

    Raises:
        TypeError: an unknown override.
    """
    given = dict(overrides)
    take = given.pop
    heads = take("heads", 4)
    head_dim = take("head_dim", given["hidden_size"] // heads if "hidden_size" in given else 16)
    hidden_size = take("hidden_size", heads * head_dim)
    vocab_size = take("vocab_size", 512)
    embedding_kinds, llm_kinds = _stack_kinds(given)
    eps = take("norm_eps", 1e-5)
    rope = take("rope", None)
    return ModelSpec(
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=take("kv_heads", heads // 2 if heads % 2 == 0 else heads),
        head_dim=head_dim,
        intermediate_size=take("intermediate_size", 2 * hidden_size),
        vocab_size=vocab_size,
        special_tokens=take("special_tokens", 0),
        conv_width=take("conv_width", 2),
        embedding=take("embedding", StackSpec(embedding_kinds, eps, rope or EMBEDDING_ROPE)),
        llm=take("llm", StackSpec(llm_kinds, eps, rope or LLM_ROPE)),
        vision=take("vision", None) or _vision(given),
        image_token_id=take("image_token_id", image_token_id(vocab_size)),
        normalize_embedding=take("normalize_embedding", False),
        template=take("template", "internlm2-chat"),
        **given,  # what is left is unknown, and the constructor says so by name
    )


def _stack_kinds(given: dict[str, Any]) -> tuple[tuple[LayerKind, ...], tuple[LayerKind, ...]]:
    """Take the overrides about layers out of `given`; kinds of the embedding stack and of the language model."""
    kinds = given.pop("kinds", "linear")
    embedding_layers = given.pop("embedding_layers", 1)
    llm_layers = given.pop("llm_layers", 3 if isinstance(kinds, str) else len(kinds) - embedding_layers)
    if isinstance(kinds, str):
        kinds = layer_kinds(cast("Kind", kinds), embedding_layers + llm_layers)
    elif len(kinds) != embedding_layers + llm_layers:
        raise TypeError(f"{len(kinds)} kinds for {embedding_layers} + {llm_layers} layers")
    return tuple(kinds[:embedding_layers]), tuple(kinds[embedding_layers:])


def _vision(given: dict[str, Any]) -> VisionSpec:
    """Take the fields of VisionSpec out of `given`."""
    base = VisionSpec(
        tile_size=56,
        patch_size=14,
        position_grid=4,
        shuffle=2,
        projected=True,
        dynamic_tiles=True,
        use_thumbnail=True,
        min_tiles=1,
        max_tiles=12,
        pad_to_square=False,
    )
    fields = {field.name for field in dataclasses.fields(VisionSpec)}
    changed = {name: given.pop(name) for name in list(given) if name in fields}
    vision = dataclasses.replace(base, **changed)
    return vision if "position_grid" in changed else dataclasses.replace(vision, position_grid=vision.grid)
