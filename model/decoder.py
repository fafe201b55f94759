"""mmMamba in plain PyTorch: image and text embedding, two stacks of layers, the head. All layers mha is its teacher, HoVLE.

Module names follow the tensor names of a checkpoint. States are explicit: they go in, new ones come out, nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from mmm_export.model.layers import AttentionStep, KeyValueCache, Layer, LayerState, MambaState, Step
from mmm_export.model.linear import Projection, RMSNorm
from mmm_export.model.rope import ComputedRope
from mmm_export.model.scan import Scan, chunked
from mmm_export.model.vision import PixelShuffleProjection, VisionEmbeddings, merge_patches
from mmm_export.spec import ModelSpec, StackSpec

States = tuple[LayerState, ...]


class TokenTable(nn.Module):
    """Rows of `weight` (tokens, hidden) by token id."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, hidden), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


class EmbeddingModel(nn.Module):
    """Text table, image path and the first stack of layers, where images meet text."""

    def __init__(self, spec: ModelSpec, scan: Scan) -> None:
        super().__init__()
        self.vision_embeddings = VisionEmbeddings(spec)
        self.llm_text_embeddings = TokenTable(spec.vocab_size + spec.special_tokens, spec.hidden_size)
        if spec.vision.projected:
            merged = spec.hidden_size * spec.vision.shuffle**2
            self.pixel_shuffle_proj = PixelShuffleProjection(merged, spec.hidden_size)
        self.encoder = _layers(spec, spec.embedding, scan)


class LanguageStack(nn.Module):
    def __init__(self, spec: ModelSpec, scan: Scan) -> None:
        super().__init__()
        self.layers = _layers(spec, spec.llm, scan)
        self.norm = RMSNorm(spec.hidden_size, spec.llm.norm_eps)


class LanguageModel(nn.Module):
    """The second stack of layers, the final norm and the head."""

    def __init__(self, spec: ModelSpec, scan: Scan) -> None:
        super().__init__()
        self.model = LanguageStack(spec, scan)
        self.output = Projection(spec.hidden_size, spec.vocab_size)


class MmMamba(nn.Module):
    """The whole model.

    Args:
        spec: dimensions and layer kinds.
        dtype: type of the activations; weights keep their own type and are cast where used.
        scan: how the Mamba-2 layers run: mmm_export.model.scan.chunked (default), .sequential, or another of that contract.
    """

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype = torch.float32, scan: Scan = chunked) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.embedding_model = EmbeddingModel(spec, scan)
        self.language_model = LanguageModel(spec, scan)
        self.ropes = self.make_ropes(spec)

    @staticmethod
    def make_ropes(spec: ModelSpec) -> nn.ModuleDict:
        """A Rope for each stack that has attention layers, by stack name."""
        stacks = {"embedding": spec.embedding, "llm": spec.llm}
        return nn.ModuleDict({n: ComputedRope(s.rope, spec.head_dim) for n, s in stacks.items() if "mha" in s.kinds})

    def initial_states(self, batch: int = 1, max_tokens: int = 0) -> States:
        """States before the first token, all zero. `max_tokens` is the capacity of the KV caches."""
        spec = self.spec

        def state(kind: str) -> LayerState:
            if kind == "mamba2":
                wide = torch.promote_types(self.dtype, torch.float32)
                return MambaState(
                    torch.zeros(batch, spec.conv_channels, spec.conv_width - 1, dtype=self.dtype),
                    torch.zeros(batch, spec.heads, spec.head_dim, spec.state_dim, dtype=wide),
                )
            shape = (batch, spec.kv_heads, max_tokens, spec.head_dim)
            return KeyValueCache(torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype))

        return tuple(state(kind) for kind in spec.kinds)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Shapes: pixel_values (tiles, 3, S, S), normalised -> (tiles * tokens_per_tile, hidden)."""
        part = self.embedding_model
        tokens = part.vision_embeddings(pixel_values, self.dtype)
        if self.spec.vision.projected:
            tokens = part.pixel_shuffle_proj(merge_patches(tokens, self.spec.vision))
        return cast(Tensor, tokens.flatten(0, 1))

    def embed(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Embed tokens; the k-th image token, counted over all rows, takes row k of `image_features`.

        Shapes: input_ids (B, T) int64; image_features (M, hidden), M the number of image tokens -> (B, T, hidden).
        """
        text = self.embedding_model.llm_text_embeddings(input_ids).to(self.dtype)
        is_image = input_ids == self.spec.image_token_id
        row = (is_image.flatten().long().cumsum(0) - 1).clamp(min=0).view(input_ids.shape)
        padded = torch.cat([image_features, image_features.new_zeros(1, text.shape[-1])])  # M may be 0
        return torch.where(is_image[..., None], nn.functional.embedding(row, padded), text)

    def hidden(
        self,
        inputs_embeds: Tensor,
        lengths: Tensor,
        states: States,
        past_lengths: Tensor | None = None,
        on_layer: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, States]:
        """Run both stacks.

        Shapes: inputs_embeds (B, T, hidden); lengths (B,), valid tokens of each row; past_lengths (B,), tokens already in the KV
        caches, needed with attention layers. `on_layer` is shown each layer's output. Returns hidden (B, T, hidden), new states.
        """
        x, new = inputs_embeds, []
        first = len(self.spec.embedding.kinds)
        stacks = (("embedding", 0, self.embedding_model.encoder), ("llm", first, self.language_model.model.layers))
        for name, offset, layers in stacks:
            step = self._step(name, x.shape[1], lengths, past_lengths, states)
            for i, layer in enumerate(layers, offset):
                x, state = layer(x, states[i], step)
                new.append(state)
                if on_layer is not None:
                    on_layer(i, x)
            if name == "embedding" and self.spec.normalize_embedding:
                x = x / x.norm(dim=-1, keepdim=True)
        return x, tuple(new)

    def logits(self, hidden: Tensor) -> Tensor:
        """Shapes: hidden (..., hidden) -> (..., vocab) float32, or float64 for a float64 model."""
        scores: Tensor = self.language_model.output(self.language_model.model.norm(hidden))
        return scores.to(torch.promote_types(self.dtype, torch.float32))

    @staticmethod
    def last_valid(hidden: Tensor, lengths: Tensor) -> Tensor:
        """Each row's last valid token: hidden (B, T, hidden), lengths (B,) -> (B, 1, hidden); the first token where none is."""
        last = (lengths.long() - 1).clamp(min=0)[:, None, None]
        return hidden.gather(1, last.expand(-1, 1, hidden.shape[-1]))

    def prefill(
        self, inputs_embeds: Tensor, lengths: Tensor, states: States, past_lengths: Tensor | None = None
    ) -> tuple[Tensor, States]:
        """Read tokens; return the logits (B, 1, vocab) of each row's last valid token and the new states. Shapes as `hidden`."""
        x, states = self.hidden(inputs_embeds, lengths, states, past_lengths)
        return self.logits(self.last_valid(x, lengths)), states

    def step(self, input_ids: Tensor, states: States, past_lengths: Tensor | None = None) -> tuple[Tensor, States]:
        """One token for every row: input_ids (B,) text tokens -> logits (B, 1, vocab), new states."""
        nothing = torch.zeros(0, self.spec.hidden_size, dtype=self.dtype)
        return self.prefill(self.embed(input_ids[:, None], nothing), torch.ones_like(input_ids), states, past_lengths)

    def _step(self, stack: str, tokens: int, lengths: Tensor, past_lengths: Tensor | None, states: States) -> Step:
        if stack not in self.ropes:
            return Step(lengths)
        if past_lengths is None:
            raise ValueError("a model with attention layers needs past_lengths")
        capacity = next(s.key.shape[2] for s in states if isinstance(s, KeyValueCache))
        past = past_lengths.long()[:, None]
        order = torch.arange(tokens, device=lengths.device)[None]
        source = torch.minimum(order, (lengths.long() - 1).clamp(min=0)[:, None])
        positions = past + order
        slots = torch.arange(capacity, device=lengths.device)
        seen = slots <= positions[..., None]  # (B, T, S)
        mask = torch.where(seen, 0.0, -torch.inf)[:, None, None]
        cos, sin = self.ropes[stack](positions, past_lengths + lengths)
        write = (past + source).clamp(max=capacity - 1)
        return Step(lengths, AttentionStep(write, source, mask, cos, sin))


def _layers(spec: ModelSpec, stack: StackSpec, scan: Scan) -> nn.ModuleList:
    return nn.ModuleList(Layer(spec, kind, stack.norm_eps, scan) for kind in stack.kinds)
