"""The whole model: embedding with images, two stacks of layers, head."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from oracle.activations import silu
from oracle.array import Array
from oracle.attention import KVState, mha
from oracle.geometry import Geometry
from oracle.mamba2 import Mamba2State, mamba2
from oracle.norms import l2_normalize, rms_norm
from oracle.rope import Rope
from oracle.tensors import Tensors
from oracle.vision import image_features

EMBEDDING_LAYERS = "embedding_model.encoder"
LLM_LAYERS = "language_model.model.layers"

LayerKind = Literal["mamba2", "mha"]


@dataclass(frozen=True)
class OracleState:
    """What has been read so far: one state per layer (global index, batch of 1) and the number of tokens."""

    layers: tuple[Mamba2State | KVState, ...]
    tokens: int


@dataclass(frozen=True)
class OracleResult:
    """All in float64, for the T tokens of one call.

    logits (T, vocab); layer_outputs, one (T, hidden) per layer, residual included; embeds (T, hidden), what the first
    layer read; state, after the last token.
    """

    logits: Array
    layer_outputs: tuple[Array, ...]
    embeds: Array
    state: OracleState


@dataclass(frozen=True)
class _Layer:
    kind: LayerKind
    weights: Tensors
    eps: float
    rope: Rope


class OracleModel:
    """mmMamba, linear, hybrid or all attention, read from a checkpoint folder."""

    def __init__(self, config: dict[str, Any], tensors: Tensors, rope_scaling: Literal["ignore", "teacher"]) -> None:
        embedding, llm = config["embedding_config"], config["llm_config"]
        _refuse_variants(config, tensors)
        self._tensors = tensors
        # A key equal to its configuration class's default may be left out of config.json.
        embedding_eps = float(embedding.get("rms_norm_eps", 1e-5))
        self._final_eps = float(llm.get("rms_norm_eps", 1e-6))
        first = _layers(tensors, EMBEDDING_LAYERS, embedding, embedding_eps, rope_scaling)
        second = _layers(tensors, LLM_LAYERS, llm, self._final_eps, rope_scaling)
        self._layers = first + second
        self.embedding_layers = len(first)
        self.kinds = tuple(layer.kind for layer in self._layers)
        self.geometry = _geometry(self._layers, llm)
        self.image_token_id = int(embedding.get("img_context_token_id", 92546))
        self.vocab_size = tensors.shape("language_model.output.weight")[0]
        self._text_rows = tensors.shape("embedding_model.llm_text_embeddings.weight")[0]
        self._normalize = bool(config.get("normalize_encoder_output", embedding.get("normalize_encoder_output", False)))
        self._position_grid = math.isqrt(tensors.shape("embedding_model.vision_embeddings.position_embedding")[1] - 1)

    @classmethod
    def from_checkpoint(
        cls, folder: Path | str, *, rope_scaling: Literal["ignore", "teacher"] = "ignore"
    ) -> OracleModel:
        """Read a checkpoint folder, single or sharded, fp32, fp16 or bf16; tensors decide over labels."""
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(config, Tensors.open(folder), rope_scaling)

    def start(self) -> OracleState:
        """Return the state before the first token."""
        states: list[Mamba2State | KVState] = []
        for layer in self._layers:
            if layer.kind == "mamba2":
                width = layer.weights.shape("attention.conv1d.weight")[2]
                states.append(Mamba2State.zeros(1, self.geometry, width))
            else:
                states.append(KVState.empty(1, self.geometry))
        return OracleState(tuple(states), 0)

    def image_features(self, pixel_values: Array) -> Array:
        """(tiles, 3, S, S) -> (tiles * tokens per tile, hidden)."""
        weights = self._tensors.under("embedding_model.")
        return image_features(np.asarray(pixel_values, dtype=np.float64), weights, self._position_grid)

    def embed(self, input_ids: Any, features: Array | None = None) -> Array:
        """Look up (T,) ids; the k-th image token takes row k of `features` (M, hidden). Returns (T, hidden).

        Raises:
            ValueError: the number of image tokens is not M.
        """
        ids = np.asarray(input_ids, dtype=np.int64)
        table = self._tensors["embedding_model.llm_text_embeddings.weight"]
        special = "embedding_model.special_text_embeddings.weight"
        if special in self._tensors:
            table = np.concatenate([table[: self._text_rows], self._tensors[special]])
        if ids.size and (ids.min() < 0 or ids.max() >= len(table)):
            raise ValueError(f"ids from {ids.min()} to {ids.max()}, but the table has {len(table)} rows")
        places = np.flatnonzero(ids == self.image_token_id)
        rows = 0 if features is None else len(features)
        if len(places) != rows:
            raise ValueError(f"{len(places)} image tokens in the prompt, {rows} image features")
        embeds = table[ids]
        if features is not None:
            embeds[places] = features
        return embeds

    def forward(
        self, input_ids: Any, pixel_values: Array | None = None, state: OracleState | None = None
    ) -> OracleResult:
        """Read T tokens after what `state` has read (nothing by default).

        Args:
            input_ids: (T,) integers.
            pixel_values: (tiles, 3, S, S), normalised, for the image tokens among them.
            state: of an earlier call; not modified.
        """
        features = None if pixel_values is None else self.image_features(pixel_values)
        return self.forward_embeds(self.embed(input_ids, features), state)

    def forward_embeds(self, embeds: Array, state: OracleState | None = None) -> OracleResult:
        """Like `forward`, from embeds (T, hidden); an image may then be cut in the middle."""
        state = self.start() if state is None else state
        x = np.asarray(embeds, dtype=np.float64)[None]
        outputs, states = [], []
        for index, (layer, before) in enumerate(zip(self._layers, state.layers, strict=True)):
            if index == self.embedding_layers and self._normalize:
                x = l2_normalize(x)
            x, after = self._run_layer(layer, x, before)
            outputs.append(x[0])
            states.append(after)
        normed = rms_norm(x[0], self._tensors["language_model.model.norm.weight"], self._final_eps)
        logits = normed @ self._tensors["language_model.output.weight"].T
        return OracleResult(
            logits,
            tuple(outputs),
            np.array(embeds, dtype=np.float64),
            OracleState(tuple(states), state.tokens + len(embeds)),
        )

    def _run_layer(self, layer: _Layer, x: Array, state: Mamba2State | KVState) -> tuple[Array, Mamba2State | KVState]:
        weights = layer.weights
        mixer = weights.under("attention.")
        normed = rms_norm(x, weights["attention_norm.weight"], layer.eps)
        after: Mamba2State | KVState
        if isinstance(state, Mamba2State):
            mixed, after = mamba2(normed, mixer, self.geometry, state)
        else:
            mixed, after = mha(normed, mixer, self.geometry, layer.rope, state)
        x = x + mixed
        normed = rms_norm(x, weights["ffn_norm.weight"], layer.eps)
        inner = silu(normed @ weights["feed_forward.w1.weight"].T) * (normed @ weights["feed_forward.w3.weight"].T)
        return x + inner @ weights["feed_forward.w2.weight"].T, after


def _layers(
    tensors: Tensors, stack: str, part: dict[str, Any], eps: float, policy: Literal["ignore", "teacher"]
) -> tuple[_Layer, ...]:
    rope = Rope.from_config(part, policy)
    layers: list[_Layer] = []
    while f"{stack}.{len(layers)}.attention_norm.weight" in tensors:
        index = len(layers)
        weights = tensors.under(f"{stack}.{index}.")
        kind: LayerKind = "mamba2" if "attention.wvkqgdt.weight" in weights else "mha"
        if kind == "mamba2" and "attention.wqkv.weight" in weights:  # tensors of both kinds: only then a label decides
            kind = part["layers_block_type"][index]
        layers.append(_Layer(kind, weights, eps, rope))
    return tuple(layers)


def _geometry(layers: tuple[_Layer, ...], llm: dict[str, Any]) -> Geometry:
    hidden = layers[0].weights.shape("attention_norm.weight")[0]
    for layer in layers:
        if layer.kind == "mamba2":  # its shapes say everything; the configuration's defaults are wrong for this model
            heads = layer.weights.shape("attention.A_log_bias")[0]
            size = layer.weights.shape("attention.g_norm_swish_gate.weight")[0]
            channels = layer.weights.shape("attention.conv1d.weight")[0]
            return Geometry(hidden, heads, (channels // size - heads) // 2, size)
    heads = int(llm["num_attention_heads"])
    size = layers[0].weights.shape("attention.wo.weight")[1] // heads
    return Geometry(hidden, heads, (layers[0].weights.shape("attention.wqkv.weight")[0] // size - heads) // 2, size)


def _refuse_variants(config: dict[str, Any], tensors: Tensors) -> None:
    """Refuse what the oracle does not compute, so that it never answers wrongly."""
    embedding = config["embedding_config"]
    if embedding.get("pixel_shuffle_loc", "pre") != "pre":
        raise ValueError("the oracle computes pixel_shuffle_loc 'pre' only")
    if embedding.get("use_ls", False):
        raise ValueError("the oracle computes no layer scale")
    for name in tensors:
        if name.endswith("attention.D") or ".q_norm." in name or ".k_norm." in name:
            raise ValueError(f"the oracle has no use for {name}")
