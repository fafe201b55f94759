"""The attention teacher in PyTorch, twice: with a growing KV cache as transformers keeps it, and with a static one in a CUDA graph.

Both share weights and all arithmetic outside attention, which favours the first: PyTorch's own RMS norm, fused gate and up, rotary
tables computed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_models import Mlp, normed

from mmm_export.model.decoder import MmMamba
from mmm_export.model.rope import rope_table, rotate

Attention = Literal["eager", "flash", "cudnn", "products"]
Caches = list[tuple[Tensor, Tensor]]  # key and value of each layer, (B, kv_heads, tokens, head_dim)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class TeacherLayer:
    """Weights of a layer; the rows of qkv are [q | k | v], cos and sin (max_tokens, head_dim/2)."""

    norm: Any
    qkv: Tensor
    cos: Tensor
    sin: Tensor
    out: Tensor
    mlp: Mlp

    @classmethod
    def of(cls, layer: Any, cos: Tensor, sin: Tensor) -> TeacherLayer:
        """Turn the blocks of each KV head in a `Layer`, which gives its `wqkv` up."""
        a = layer.attention
        group = a.heads // a.kv_heads
        blocks = a.wqkv.weight.t().view(a.kv_heads, group + 2, a.head_dim, -1)
        parts = blocks[:, :group], blocks[:, group : group + 1], blocks[:, group + 1 :]
        qkv = torch.cat([part.flatten(0, 2) for part in parts])
        del a.wqkv.weight
        return cls(layer.attention_norm, qkv, cos, sin, a.wo.weight.t(), Mlp.of(layer))

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: attended (B, heads, T, dim), residual x (B, T, hidden)."""
        return self.mlp(x + F.linear(attended.transpose(1, 2).flatten(2), self.out))


class Teacher:
    """A model of attention layers alone, over the parameters of `MmMamba`.

    Args:
        model: gives its weights up; `wqkv` are turned from blocks for each KV head to rows [q | k | v].
        max_tokens: that its rotary tables cover.
    """

    def __init__(self, model: MmMamba, max_tokens: int) -> None:
        spec = model.spec
        self.heads, self.kv_heads, self.dim = spec.heads, spec.kv_heads, spec.head_dim
        self.table = model.embedding_model.llm_text_embeddings.weight
        self.norm = model.language_model.model.norm
        self.head = model.language_model.output.weight.t()
        self.device = self.table.device
        stacks = (
            (spec.embedding, model.embedding_model.encoder),
            (spec.llm, model.language_model.model.layers),
        )
        self.layers = []
        for stack, layers in stacks:
            cos, sin = (table.to(self.table) for table in rope_table(stack.rope, spec.head_dim, max_tokens))
            self.layers += [TeacherLayer.of(layer, cos, sin) for layer in layers]

    @property
    def weight_bytes(self) -> int:
        """Bytes that a decode step reads: all but the text table."""
        matrices = [m for layer in self.layers for m in (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down)]
        return sum(m.numel() * m.element_size() for m in (*matrices, self.head))

    def cache_bytes(self, batch: int, tokens: int) -> int:
        return 2 * len(self.layers) * batch * self.kv_heads * tokens * self.dim * self.table.element_size()

    def prefill(self, ids: Tensor, attention: Attention) -> tuple[Tensor, Caches]:
        """ids (T,), the whole prompt at once -> logits (vocab,) of the last token, and the KV caches of one row."""
        x, caches = self.table[ids][None], []
        for layer in self.layers:
            q, k, v = self._qkv(x, layer, 0)
            x = layer.rest(x, attend(q, k, v, attention, causal=True))
            caches.append((k, v.contiguous()))
        return self._logits(x[:, -1])[0], caches

    def grow(self, ids: Tensor, caches: Caches, attention: Attention) -> Tensor:
        """Update the caches by ids (B,), each layer's by a new, longer one -> logits (B, vocab)."""
        x = self.table[ids][:, None]
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(x, layer, caches[i][0].shape[2])
            caches[i] = (torch.cat([caches[i][0], k], 2), torch.cat([caches[i][1], v], 2))
            x = layer.rest(x, attend(q, *caches[i], attention))
        return self._logits(x[:, -1])

    def overwrite(self, ids: Tensor, caches: Caches, attention: Attention) -> Tensor:
        """Update the last row of static caches by ids (B,) -> logits (B, vocab). The addresses stay."""
        x = self.table[ids][:, None]
        for layer, (key, value) in zip(self.layers, caches, strict=True):
            q, k, v = self._qkv(x, layer, key.shape[2] - 1)
            key[:, :, -1:].copy_(k)
            value[:, :, -1:].copy_(v)
            x = layer.rest(x, attend(q, key, value, attention))
        return self._logits(x[:, -1])

    def generation(
        self, caches: Caches, first: Tensor, attention: Attention, *, static: bool
    ) -> Callable[[int], Tensor]:
        """Return a call that takes one greedy decode step; the chosen tokens (B,) stay on the device."""
        ids = first.clone()
        step = self.overwrite if static else self.grow

        def work(_: int) -> Tensor:
            ids.copy_(step(ids, caches, attention).argmax(-1))
            return ids

        return work

    def _qkv(self, x: Tensor, layer: TeacherLayer, position: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        rows = F.linear(normed(x, layer.norm), layer.qkv)
        rows = rows.view(batch, tokens, -1, self.dim).transpose(1, 2)  # (B, heads + 2 * kv_heads, T, dim)
        q, k, v = rows.split([self.heads, self.kv_heads, self.kv_heads], 1)
        angles = layer.cos[position : position + tokens], layer.sin[position : position + tokens]
        return rotate(q, *angles), rotate(k, *angles), v

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(normed(x, self.norm), self.head).float()


def attend(q: Tensor, k: Tensor, v: Tensor, how: Attention, *, causal: bool = False) -> Tensor:
    """Attention of q (B, heads, T, dim) over k, v (B, kv_heads, S, dim) -> (B, heads, T, dim).

    "eager" writes scores to memory, softmax in float32, keys and values repeated for each head, as transformers does; "flash" and
    "cudnn" are PyTorch's backends of these names; "products", one token alone, reads keys and values once by plain matrix products.
    """
    batch, heads, tokens, dim = q.shape
    group = heads // k.shape[1]
    scale = 1 / math.sqrt(dim)
    if how == "products":
        scores = torch.matmul(q.view(batch, -1, group, dim), k.mT) * scale
        return torch.matmul(torch.softmax(scores.float(), -1).to(q.dtype), v).view(q.shape)
    if how == "eager":
        k, v = (part[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for part in (k, v))
        scores = torch.matmul(q, k.mT) * scale
        if causal:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)
    backend = BACKENDS[how] if q.is_cuda else SDPBackend.MATH
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def static_caches(caches: Caches, batch: int) -> Caches:
    """Move the caches of one row into static ones of so many rows, with a row of room; empties `caches` layer by layer."""
    moved = []
    while caches:
        key, value = caches.pop(0)
        pair = []
        for part in (key, value):
            room = part.new_zeros(batch, part.shape[1], part.shape[2] + 1, part.shape[3])
            room[:, :, :-1] = part
            pair.append(room)
        moved.append((pair[0], pair[1]))
    return moved
