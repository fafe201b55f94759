"""What a model is, without its weights: dimensions, layer kinds, image geometry. Read from a checkpoint, stored in a manifest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, cast

LayerKind = Literal["mamba2", "mha"]
LAYER_KINDS: tuple[LayerKind, ...] = ("mamba2", "mha")

MOST_TOKENS = 1 << 20  # largest KV cache capacity that can be exported: at full size it takes 32 GB and more
GATE_NORM_EPS = 1e-5  # hard coded in the released model, never in config.json


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of the attention layers of one stack.

    `scaling` is "none" (what the released hybrid does at every length), "linear" or "dynamic" (what its teacher does when
    its config asks for it). `factor` and `max_tokens` matter only with scaling.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "dynamic"] = "none"
    factor: float = 1.0
    max_tokens: int = 0


@dataclass(frozen=True)
class StackSpec:
    """One of the two stacks of layers: the embedding stack (images meet text) or the language model."""

    kinds: tuple[LayerKind, ...]
    norm_eps: float
    rope: RopeSpec


@dataclass(frozen=True)
class VisionSpec:
    """Image tiles and how they become tokens.

    `tile_size` and `patch_size` in pixels; `position_grid` is the side of the stored position grid, interpolated when it
    differs from `tile_size // patch_size`; `shuffle` merges shuffle x shuffle patches into one token (1: no merging, no projection).
    """

    tile_size: int
    patch_size: int
    position_grid: int
    shuffle: int
    projected: bool
    dynamic_tiles: bool
    use_thumbnail: bool
    min_tiles: int
    max_tiles: int
    pad_to_square: bool
    channels: int = 3

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid // self.shuffle) ** 2


@dataclass(frozen=True)
class ModelSpec:
    """An mmMamba model, linear, hybrid, or its all-attention teacher."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    special_tokens: int  # extra rows of the text embedding, ids vocab_size..; 0 in the released models
    conv_width: int
    embedding: StackSpec
    llm: StackSpec
    vision: VisionSpec
    image_token_id: int
    normalize_embedding: bool
    template: str

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Kind of every layer by global index: embedding stack first."""
        return self.embedding.kinds + self.llm.kinds

    @property
    def layers(self) -> int:
        return len(self.kinds)

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.kinds) if kind == "mamba2")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.kinds) if kind == "mha")

    def stack(self, layer: int) -> StackSpec:
        """The stack that a global layer index belongs to."""
        return self.embedding if layer < len(self.embedding.kinds) else self.llm

    @property
    def state_dim(self) -> int:
        """N of the scan; equals head_dim in this family, since keys and values come from the same attention heads."""
        return self.head_dim

    @property
    def conv_channels(self) -> int:
        """C: channels [v | k | q] of the short convolution."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def projected_size(self) -> int:
        """Width of the packed in-projection [v | k | q | gate | dt]."""
        return self.conv_channels + self.heads * self.head_dim + self.heads

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """Inverse of `to_json`. Raises KeyError or TypeError on foreign data; callers turn that into their own error."""

        def stack(part: dict[str, Any]) -> StackSpec:
            kinds = tuple(part["kinds"])
            if not set(kinds) <= set(LAYER_KINDS):
                raise TypeError(f"unknown layer kind in {kinds}")
            return StackSpec(cast("tuple[LayerKind, ...]", kinds), part["norm_eps"], RopeSpec(**part["rope"]))

        rest = {k: v for k, v in data.items() if k not in ("embedding", "llm", "vision")}
        return cls(
            embedding=stack(data["embedding"]), llm=stack(data["llm"]), vision=VisionSpec(**data["vision"]), **rest
        )
