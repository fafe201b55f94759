"""Tiny checkpoints in the released layout, so that the oracle is checked without the product's writer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

IMAGE_TOKEN = 46


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; the defaults are the smallest that tell every dimension from every other."""

    kinds: tuple[tuple[str, ...], tuple[str, ...]] = (("mamba2",), ("mamba2", "mamba2"))
    hidden: int = 40
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 8
    inner: int = 56
    vocab: int = 50
    conv_width: int = 2
    patch: int = 4
    grid: int = 6
    shuffle: int = 2
    special: int = 0

    @property
    def shuffled(self) -> int:
        return self.hidden * self.shuffle**2


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, as the released checkpoint stores them."""
    d, heads, kv, size = sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim
    embedding, llm = "embedding_model.", "language_model."
    found: dict[str, tuple[int, ...]] = {
        embedding + "vision_embeddings.class_embedding": (1, 1, d),
        embedding + "vision_embeddings.position_embedding": (1, 1 + sizes.grid**2, d),
        embedding + "vision_embeddings.patch_embedding.weight": (d, 3, sizes.patch, sizes.patch),
        embedding + "vision_embeddings.patch_embedding.bias": (d,),
        embedding + "llm_text_embeddings.weight": (sizes.vocab, d),
        embedding + "pixel_shuffle_proj.0.weight": (d, sizes.shuffled),
        embedding + "pixel_shuffle_proj.0.bias": (d,),
        embedding + "pixel_shuffle_proj.2.weight": (d, d),
        embedding + "pixel_shuffle_proj.2.bias": (d,),
        llm + "model.tok_embeddings.weight": (sizes.vocab, d),
        llm + "model.norm.weight": (d,),
        llm + "output.weight": (sizes.vocab, d),
    }
    if sizes.special:
        found[embedding + "special_text_embeddings.weight"] = (sizes.special, d)
    for stack, kinds in zip((embedding + "encoder", llm + "model.layers"), sizes.kinds, strict=True):
        for i, kind in enumerate(kinds):
            layer = f"{stack}.{i}."
            found[layer + "attention_norm.weight"] = found[layer + "ffn_norm.weight"] = (d,)
            found[layer + "feed_forward.w1.weight"] = found[layer + "feed_forward.w3.weight"] = (sizes.inner, d)
            found[layer + "feed_forward.w2.weight"] = (d, sizes.inner)
            attention = layer + "attention."
            if kind == "mha":
                found[attention + "wqkv.weight"] = ((heads + 2 * kv) * size, d)
                found[attention + "wo.weight"] = (d, heads * size)
                continue
            channels = (heads + 2 * kv) * size
            found[attention + "wvkqgdt.weight"] = (channels + heads * size + heads, d)
            found[attention + "o_proj.weight"] = (d, heads * size)
            found[attention + "conv1d.weight"] = (channels, 1, sizes.conv_width)
            found[attention + "conv1d.bias"] = (channels,)
            found[attention + "dt_bias"] = found[attention + "A_log_bias"] = (heads,)
            found[attention + "g_norm_swish_gate.weight"] = (size,)
    return found


def random_tensors(sizes: Sizes, seed: int) -> dict[str, np.ndarray]:
    """float32 values of sensible size; delta lies around 0.3, so that the states matter and still forget."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(sizes).items():
        values = random.standard_normal(shape)
        if name.endswith("norm.weight") or "g_norm" in name:
            values = 1 + 0.2 * values
        elif name.endswith("A_log_bias"):
            values = random.uniform(-2.0, 1.0, shape)
        elif name.endswith("dt_bias"):
            values = values - 1
        elif len(shape) > 1 and "embedding" not in name.rsplit(".", 2)[-2]:
            values = values / np.sqrt(np.prod(shape[1:]))
        tensors[name] = values.astype(np.float32)
    return tensors


def config_of(sizes: Sizes) -> dict[str, Any]:
    """Build config.json; the two stacks differ in every value that they do not have to share."""
    part = {
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.inner,
    }
    embedding = {
        **part,
        "num_hidden_layers": len(sizes.kinds[0]),
        "layers_block_type": list(sizes.kinds[0]),
        "rms_norm_eps": 1e-3,
        "rope_theta": 500.0,
        "image_size": sizes.patch * sizes.grid,
        "patch_size": sizes.patch,
        "img_context_token_id": IMAGE_TOKEN,
        "llm_vocab_size": sizes.vocab,
        "use_ls": False,
        "pixel_shuffle_loc": "pre",
    }
    llm = {
        **part,
        "num_hidden_layers": len(sizes.kinds[1]),
        "layers_block_type": list(sizes.kinds[1]),
        "rms_norm_eps": 1e-2,
        "rope_theta": 2000.0,
        "vocab_size": sizes.vocab,
    }
    return {"model_type": "mmMamba_chat", "embedding_config": embedding, "llm_config": llm}


def write_tiny(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder
