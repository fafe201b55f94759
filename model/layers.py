"""One decoder layer: a mixer (Mamba-2 or attention) and an MLP, both with a norm before and a residual around."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm_export.model.linear import Projection, RMSNorm
from mmm_export.model.rope import rotate
from mmm_export.model.scan import Scan, ScanSizes, ScanWeights
from mmm_export.spec import GATE_NORM_EPS, LayerKind, ModelSpec


class MambaState(NamedTuple):
    """Memory of a Mamba-2 layer: conv (B, C, K-1), the last raw inputs of the convolution; ssm (B, H, P, N)."""

    conv: Tensor
    ssm: Tensor


class KeyValueCache(NamedTuple):
    """Memory of an attention layer: key (after RoPE) and value, (B, kv_heads, max_tokens, head_dim) each."""

    key: Tensor
    value: Tensor


LayerState = MambaState | KeyValueCache


class Step(NamedTuple):
    """What every layer must know about the tokens of one call: lengths (B,), the valid tokens of each row."""

    lengths: Tensor
    attention: AttentionStep | None = None


class AttentionStep(NamedTuple):
    """What attention layers must know besides.

    write (B, T): cache slot of each token; source (B, T): the token that is written there; mask (B, 1, 1, T, max_tokens): 0 where
    a token sees a slot, else -inf; cos, sin (B, 1, T, head_dim/2).
    """

    write: Tensor
    source: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor


class DepthwiseConv(nn.Module):
    """Holds the weights of the short convolution, weight (C, K) and bias (C,); the scan applies them."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(channels), requires_grad=False)


class GateNorm(nn.Module):
    """Holds the weight (P,) of the norm over each head; the scan applies it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)


class MambaMixer(nn.Module):
    """Mamba-2 mixer: packed in-projection, scan, out-projection."""

    def __init__(self, spec: ModelSpec, scan: Scan) -> None:
        super().__init__()
        self.sizes = ScanSizes(spec.heads, spec.kv_heads, spec.head_dim, spec.state_dim, GATE_NORM_EPS)
        self.scan = scan
        self.wvkqgdt = Projection(spec.hidden_size, spec.projected_size)
        self.conv1d = DepthwiseConv(spec.conv_channels, spec.conv_width)
        self.dt_bias = nn.Parameter(torch.empty(spec.heads), requires_grad=False)
        self.A_log_bias = nn.Parameter(torch.empty(spec.heads), requires_grad=False)
        self.g_norm_swish_gate = GateNorm(spec.head_dim)
        self.o_proj = Projection(spec.heads * spec.head_dim, spec.hidden_size)

    def forward(self, x: Tensor, state: MambaState, step: Step) -> tuple[Tensor, MambaState]:
        weights = ScanWeights(
            self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log_bias, self.g_norm_swish_gate.weight
        )
        y, conv, ssm = self.scan(self.wvkqgdt(x), step.lengths, state.conv, state.ssm, weights, self.sizes)
        return self.o_proj(y), MambaState(conv, ssm)


class AttentionMixer(nn.Module):
    """Grouped-query attention over a preallocated KV cache."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.wqkv = Projection(spec.hidden_size, (spec.heads + 2 * spec.kv_heads) * spec.head_dim)
        self.wo = Projection(spec.heads * spec.head_dim, spec.hidden_size)

    def forward(self, x: Tensor, state: KeyValueCache, step: Step) -> tuple[Tensor, KeyValueCache]:
        at = step.attention
        if at is None:
            raise ValueError("an attention layer needs Step.attention")
        B, T, _ = x.shape
        kv, group, dim = self.kv_heads, self.heads // self.kv_heads, self.head_dim
        # Rows of wqkv are blocks per KV head: its query heads, then its key, then its value.
        blocks = self.wqkv(x).view(B, T, kv, group + 2, dim).permute(0, 2, 3, 1, 4)  # (B, kv, G+2, T, dim)
        q = rotate(blocks[:, :, :group].flatten(1, 2), at.cos, at.sin)
        key = _write(state.key, rotate(blocks[:, :, group], at.cos, at.sin), step.lengths, at)
        value = _write(state.value, blocks[:, :, group + 1], step.lengths, at)

        q = (q * dim**-0.5).reshape(B, kv, group * T, dim)
        scores = (q @ key.to(x.dtype).mT).view(B, kv, group, T, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = torch.softmax(scores.to(wide) + at.mask.to(wide), dim=-1).to(x.dtype)
        y = weights.reshape(B, kv, group * T, -1) @ value.to(x.dtype)
        y = y.view(B, kv * group, T, dim).transpose(1, 2).reshape(B, T, -1)
        return self.wo(y), KeyValueCache(key, value)


def _write(cache: Tensor, new: Tensor, lengths: Tensor, at: AttentionStep) -> Tensor:
    """Return the cache (B, kv, S, dim) with the valid tokens of new (B, kv, T, dim) in their slots.

    Padding repeats the last valid token, so it writes the same value to the same slot; a row without any valid token rewrites
    what is there. Hence no write depends on what the padding holds.
    """

    def spread(index: Tensor) -> Tensor:
        return index[:, None, :, None].expand(new.shape)

    slots = spread(at.write)
    values = new.gather(2, spread(at.source)).to(cache.dtype)
    values = torch.where((lengths > 0)[:, None, None, None], values, cache.gather(2, slots))
    return cache.scatter(2, slots, values)


class MLP(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.w1 = Projection(spec.hidden_size, spec.intermediate_size)
        self.w3 = Projection(spec.hidden_size, spec.intermediate_size)
        self.w2 = Projection(spec.intermediate_size, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: ModelSpec, kind: LayerKind, eps: float, scan: Scan) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.hidden_size, eps)
        self.attention = MambaMixer(spec, scan) if kind == "mamba2" else AttentionMixer(spec)
        self.ffn_norm = RMSNorm(spec.hidden_size, eps)
        self.feed_forward = MLP(spec)

    def forward(self, x: Tensor, state: LayerState, step: Step) -> tuple[Tensor, LayerState]:
        mixed, state = self.attention(self.attention_norm(x), state, step)
        x = x + mixed
        return x + self.feed_forward(self.ffn_norm(x)), state
