"""config.json in the key layout of the released models, from a ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from mmm_export.manifest import Dtype
from mmm_export.spec import ModelSpec, StackSpec

ABSENT: Final = object()  # as an override: the key is left out
TORCH_DTYPES: dict[Dtype, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def config_from_spec(spec: ModelSpec, *, dtype: Dtype, layers_block_type: bool = True) -> dict[str, Any]:
    """Give the content of config.json, keys and nesting as released.

    Args:
        spec: the model; what it cannot say (names of classes, dropout) is as released.
        dtype: the label, see TORCH_DTYPES.
        layers_block_type: whether the layer kinds are stated, as the released conversion does.
    """
    vision = spec.vision
    ratio = 1 / vision.shuffle
    class_names = {
        "AutoConfig": "configuration_mmMamba_chat.mmMambaChatConfig",
        "AutoModel": "modeling_mmMamba_chat.mmMambaChatModel",
        "AutoModelForCausalLM": "modeling_mmMamba_chat.mmMambaChatModel",
    }
    embedding_config = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_implementation": "flash_attention_2",
        "downsample_ratio": ratio,
        "hidden_act": "silu",
        **_geometry(spec),
        "image_size": vision.position_grid * vision.patch_size,
        "img_context_token_id": spec.image_token_id,
        "initializer_factor": 1e-05,
        "llm_hidden_size": spec.hidden_size,
        "llm_vocab_size": spec.vocab_size,
        "mlp_bias": False,
        "model_type": "mmMamba_embedding",
        "num_channels": vision.channels,
        "patch_size": vision.patch_size,
        "pixel_shuffle_loc": "pre",
        "pretraining_tp": 1,
        **_stack(spec.embedding, max_tokens=4096),
        "special_token_maps": {f"<special_{i}>": spec.vocab_size + i for i in range(spec.special_tokens)},
        "torch_dtype": TORCH_DTYPES[dtype],
        "use_autoregressive_loss": False,
        "use_img_start_end_tokens": True,
        "use_ls": False,
        "use_pixel_shuffle_proj": vision.projected,
    }
    llm_config = {
        "architectures": "mmMambaForCausalLM",
        "attn_implementation": "flash_attention_2",
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        **_geometry(spec),
        "initializer_range": 0.02,
        "model_type": "mmMamba",
        "pad_token_id": 2,
        **_stack(spec.llm, max_tokens=32768),
        "tie_word_embeddings": False,
        "torch_dtype": TORCH_DTYPES[dtype],
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    if layers_block_type:
        embedding_config["layers_block_type"] = list(spec.embedding.kinds)
        llm_config["layers_block_type"] = list(spec.llm.kinds)
    return {
        "architectures": "mmMambaChatModel",  # a plain string in the released files, not a list
        "auto_map": class_names,
        "downsample_ratio": ratio,
        "dynamic_image_size": vision.dynamic_tiles,
        "embedding_config": embedding_config,
        "force_image_size": vision.tile_size,
        "llm_config": llm_config,
        "max_dynamic_patch": vision.max_tiles,
        "min_dynamic_patch": vision.min_tiles,
        "model_type": "mmMamba_chat",
        "normalize_encoder_output": spec.normalize_embedding,
        "pad2square": vision.pad_to_square,
        "ps_version": "v2",
        "select_layer": -1,
        "template": spec.template,
        "torch_dtype": TORCH_DTYPES[dtype],
        "transformers_version": "4.37.2",
        "use_thumbnail": vision.use_thumbnail,
    }


def overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Copy `config` with `overrides` merged in.

    Nested mappings merge, anything else replaces, ABSENT removes. A dotted key goes down: "llm_config.rope_theta".
    """
    result = dict(config)
    for key, value in overrides.items():
        head, _, rest = key.partition(".")
        if rest:
            head, value = head, {rest: value}
        if value is ABSENT:
            result.pop(head, None)
        elif isinstance(value, Mapping) and isinstance(result.get(head), Mapping):
            result[head] = overridden(cast("Mapping[str, Any]", result[head]), value)
        else:
            result[head] = value
    return result


def _geometry(spec: ModelSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
    }


def _stack(stack: StackSpec, *, max_tokens: int) -> dict[str, Any]:
    rope = stack.rope
    scaling = None if rope.scaling == "none" else {"factor": rope.factor, "type": rope.scaling}
    return {
        "max_position_embeddings": rope.max_tokens or max_tokens,
        "num_hidden_layers": len(stack.kinds),
        "rms_norm_eps": stack.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": rope.theta,
    }
