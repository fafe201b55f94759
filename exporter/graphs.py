"""The three graphs of a bundle as modules to trace: tensors in, tensors out, every input and output with its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmm_export import names
from mmm_export.model.decoder import MmMamba
from mmm_export.model.layers import KeyValueCache, LayerState, MambaState
from mmm_export.model.scan import ScanSizes, ScanWeights

Dims = dict[int, str]

# Any sizes that differ from each other and from 1: the trace keeps them symbolic.
_BATCH, _TOKENS, _TILES, _IMAGE_TOKENS = 2, 5, 3, 7


@dataclass(frozen=True)
class GraphInput:
    """An example value and the names of its dynamic dimensions by axis."""

    name: str
    example: Tensor
    dims: Dims


class Graph(nn.Module, ABC):
    """A module whose forward takes `inputs()` in order and returns `outputs()` in order."""

    def __init__(self, model: MmMamba) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def inputs(self) -> list[GraphInput]:
        """Every input, in order."""

    @abstractmethod
    def outputs(self) -> list[str]:
        """Name of every output, in order."""


class VisionGraph(Graph):
    """pixel_values -> image_features."""

    def inputs(self) -> list[GraphInput]:
        vision = self.model.spec.vision
        example = torch.zeros(_TILES, vision.channels, vision.tile_size, vision.tile_size)
        return [GraphInput(names.PIXEL_VALUES, example, {0: "tiles"})]

    def outputs(self) -> list[str]:
        return [names.IMAGE_FEATURES]

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.image_features(pixel_values)


class EmbeddingGraph(Graph):
    """input_ids, image_features -> inputs_embeds."""

    def inputs(self) -> list[GraphInput]:
        features = torch.zeros(_IMAGE_TOKENS, self.model.spec.hidden_size, dtype=self.model.dtype)
        ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64)
        return [
            GraphInput(names.INPUT_IDS, ids, {0: "batch", 1: "tokens"}),
            GraphInput(names.IMAGE_FEATURES, features, {0: "image_tokens"}),
        ]

    def outputs(self) -> list[str]:
        return [names.INPUTS_EMBEDS]

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        return self.model.embed(input_ids, image_features)


class DecoderGraph(Graph):
    """inputs_embeds, lengths, states -> logits, states; each layer's output follows under `layer_output` for whoever debugs."""

    def __init__(self, model: MmMamba, *, logits: Literal["last", "all"], max_tokens: int) -> None:
        super().__init__(model)
        self.logits = logits
        self.max_tokens = max_tokens

    def inputs(self) -> list[GraphInput]:
        spec, model = self.model.spec, self.model
        embeds = torch.zeros(_BATCH, _TOKENS, spec.hidden_size, dtype=model.dtype)
        lengths = torch.full((_BATCH,), _TOKENS, dtype=torch.int32)
        rows = [
            GraphInput(names.INPUTS_EMBEDS, embeds, {0: "batch", 1: "tokens"}),
            GraphInput(names.LENGTHS, lengths, {0: "batch"}),
        ]
        if spec.attention_layers:
            rows.append(GraphInput(names.PAST_LENGTHS, torch.zeros(_BATCH, dtype=torch.int32), {0: "batch"}))
        states = model.initial_states(_BATCH, self.max_tokens)
        flat = (tensor for state in states for tensor in state)
        rows += [GraphInput(n, t, {0: "batch"}) for n, t in zip(self.state_names(), flat, strict=True)]
        return rows

    def outputs(self) -> list[str]:
        spec = self.model.spec
        layers = [layer_output(i) for i in range(spec.layers)]
        return [names.LOGITS, *(names.present(n) for n in self.state_names()), *layers]

    def state_names(self) -> list[str]:
        return list(_state_names(self.model.spec.kinds))

    def forward(self, inputs_embeds: Tensor, lengths: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        past_lengths, flat = (rest[0], rest[1:]) if self.model.spec.attention_layers else (None, rest)
        pairs = zip(flat[::2], flat[1::2], strict=True)
        states: list[LayerState] = [
            MambaState(*pair) if kind == "mamba2" else KeyValueCache(*pair)
            for kind, pair in zip(self.model.spec.kinds, pairs, strict=True)
        ]
        seen: list[Tensor] = []
        hidden, new = self.model.hidden(
            inputs_embeds, lengths, tuple(states), past_lengths, on_layer=lambda _, x: seen.append(x)
        )
        if self.logits == "last":
            hidden = self.model.last_valid(hidden, lengths)
        return (self.model.logits(hidden), *(tensor for state in new for tensor in state), *seen)


def layer_output(layer: int) -> str:
    """Name of the value that a layer hands on, (B, T, hidden). Not a graph output; `verify` makes it one."""
    return f"layer.{layer}.output"


def _state_names(kinds: tuple[str, ...]) -> Iterator[str]:
    for layer, kind in enumerate(kinds):
        if kind == "mamba2":
            yield from (names.past_conv(layer), names.past_recurrent(layer))
        else:
            yield from (names.past_key(layer), names.past_value(layer))


def scan_operator(
    projected: Tensor,
    lengths: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    sizes: ScanSizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Scan that leaves one MmmSelectiveScan node in the trace."""
    B, T, _ = projected.shape
    parameters = (weights.conv_weight, weights.conv_bias, weights.dt_bias, weights.A_log, weights.norm_weight)
    attributes: dict[str, Any] = {
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "state_dim": sizes.state_dim,
        "eps": sizes.eps,
        "plugin_version": "1",
    }
    y, conv_out, ssm_out = torch.onnx.ops.symbolic_multi_out(
        f"{names.OP_DOMAIN}::{names.OP_NAME}",
        (projected, lengths, conv_state, ssm_state, *parameters),
        attrs=attributes,
        dtypes=(projected.dtype, conv_state.dtype, ssm_state.dtype),
        shapes=((B, T, sizes.heads * sizes.head_dim), conv_state.shape, ssm_state.shape),
        version=1,
    )
    return y, conv_out, ssm_out
