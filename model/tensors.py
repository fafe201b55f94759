"""Names and shapes of every tensor of a checkpoint, written once; all of it follows from a ModelSpec."""

from __future__ import annotations

from mmm_export.spec import LayerKind, ModelSpec

Shape = tuple[int, ...]

EMBEDDING_LAYERS = "embedding_model.encoder"
LLM_LAYERS = "language_model.model.layers"
CLASS_POSITION = "embedding_model.vision_embeddings.class_embedding"
POSITIONS = "embedding_model.vision_embeddings.position_embedding"
PATCH_WEIGHT = "embedding_model.vision_embeddings.patch_embedding.weight"
PATCH_BIAS = "embedding_model.vision_embeddings.patch_embedding.bias"
TEXT_TABLE = "embedding_model.llm_text_embeddings.weight"
SPECIAL_TABLE = "embedding_model.special_text_embeddings.weight"
SHUFFLE_IN_WEIGHT = "embedding_model.pixel_shuffle_proj.0.weight"
SHUFFLE_IN_BIAS = "embedding_model.pixel_shuffle_proj.0.bias"
SHUFFLE_OUT_WEIGHT = "embedding_model.pixel_shuffle_proj.2.weight"
SHUFFLE_OUT_BIAS = "embedding_model.pixel_shuffle_proj.2.bias"
LLM_TABLE = "language_model.model.tok_embeddings.weight"
FINAL_NORM = "language_model.model.norm.weight"
HEAD = "language_model.output.weight"

MAMBA_PROJECTION = "attention.wvkqgdt.weight"
ATTENTION_PROJECTION = "attention.wqkv.weight"
ROTARY_BUFFER = ".rotary_emb.inv_freq"  # stored by some conversions, computed by all readers
FIRST_PROJECTION: dict[LayerKind, str] = {"mamba2": MAMBA_PROJECTION, "mha": ATTENTION_PROJECTION}


def layer_prefix(spec: ModelSpec, layer: int) -> str:
    """Prefix, with its final dot, of the tensors of a layer given by global index."""
    first_llm_layer = len(spec.embedding.kinds)
    if layer < first_llm_layer:
        return f"{EMBEDDING_LAYERS}.{layer}."
    return f"{LLM_LAYERS}.{layer - first_llm_layer}."


def mixer_shapes(spec: ModelSpec, kind: LayerKind) -> dict[str, Shape]:
    """Tensors of the token mixer of one layer, without the layer's prefix."""
    width = spec.heads * spec.head_dim
    if kind == "mha":
        return {
            ATTENTION_PROJECTION: (spec.conv_channels, spec.hidden_size),
            "attention.wo.weight": (spec.hidden_size, width),
        }
    return {
        MAMBA_PROJECTION: (spec.projected_size, spec.hidden_size),
        "attention.o_proj.weight": (spec.hidden_size, width),
        "attention.conv1d.weight": (spec.conv_channels, 1, spec.conv_width),
        "attention.conv1d.bias": (spec.conv_channels,),
        "attention.dt_bias": (spec.heads,),
        "attention.A_log_bias": (spec.heads,),
        "attention.g_norm_swish_gate.weight": (spec.head_dim,),
    }


def layer_shapes(spec: ModelSpec, kind: LayerKind) -> dict[str, Shape]:
    """Tensors of one layer, without the layer's prefix."""
    return {
        "attention_norm.weight": (spec.hidden_size,),
        **mixer_shapes(spec, kind),
        "ffn_norm.weight": (spec.hidden_size,),
        "feed_forward.w1.weight": (spec.intermediate_size, spec.hidden_size),
        "feed_forward.w2.weight": (spec.hidden_size, spec.intermediate_size),
        "feed_forward.w3.weight": (spec.intermediate_size, spec.hidden_size),
    }


def vision_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Tensors of the image path."""
    hidden, vision = spec.hidden_size, spec.vision
    shapes: dict[str, Shape] = {
        POSITIONS: (1, vision.position_grid**2 + 1, hidden),
        PATCH_WEIGHT: (hidden, vision.channels, vision.patch_size, vision.patch_size),
        PATCH_BIAS: (hidden,),
    }
    if vision.projected:
        shapes[SHUFFLE_IN_WEIGHT] = (hidden, hidden * vision.shuffle**2)
        shapes[SHUFFLE_IN_BIAS] = (hidden,)
        shapes[SHUFFLE_OUT_WEIGHT] = (hidden, hidden)
        shapes[SHUFFLE_OUT_BIAS] = (hidden,)
    return shapes


def required_shapes(spec: ModelSpec, *, head: str = HEAD) -> dict[str, Shape]:
    """Every tensor that running the model needs, by stored name.

    Args:
        spec: the model.
        head: name of the tensor that holds the output head; LLM_TABLE when it is tied.
    """
    shapes = vision_shapes(spec)
    shapes[TEXT_TABLE] = (spec.vocab_size, spec.hidden_size)
    if spec.special_tokens:
        shapes[SPECIAL_TABLE] = (spec.special_tokens, spec.hidden_size)
    for layer, kind in enumerate(spec.kinds):
        prefix = layer_prefix(spec, layer)
        shapes.update({prefix + name: shape for name, shape in layer_shapes(spec, kind).items()})
    shapes[FINAL_NORM] = (spec.hidden_size,)
    shapes[head] = (spec.vocab_size, spec.hidden_size)
    return shapes


def unused_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Tensors that released checkpoints store and inference never reads."""
    return {CLASS_POSITION: (1, 1, spec.hidden_size), LLM_TABLE: (spec.vocab_size, spec.hidden_size)}
