"""The two token mixers of a layer under distillation, up to the output projection that they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm_export.model.layers import DepthwiseConv, GateNorm
from mmm_export.model.linear import Projection
from mmm_export.model.rope import rotate
from mmm_export.model.scan import ScanSizes, ScanWeights
from mmm_export.model.scan_training import scan_sequences
from mmm_export.spec import GATE_NORM_EPS, ModelSpec


class Frame(NamedTuple):
    """What the mixers must know of a batch.

    segments (B, T) or None, see Batch; seen (B, 1, T, T) bool, which token sees which, or None for plain causality;
    cos, sin (B, 1, T, head_dim/2) of the stack's rotary embedding, None in a stack without attention.
    """

    segments: Tensor | None
    seen: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


class TeacherMixer(nn.Module):
    """Grouped-query attention over whole sequences, without its output projection."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.wqkv = Projection(spec.hidden_size, (spec.heads + 2 * spec.kv_heads) * spec.head_dim)

    def forward(self, u: Tensor, frame: Frame) -> Tensor:
        """Shapes: u (B, T, hidden), normalised -> (B, T, H*P)."""
        if frame.cos is None or frame.sin is None:
            raise ValueError("an attention layer needs the rotary embedding of its stack")
        B, T, _ = u.shape
        kv, group, dim = self.kv_heads, self.heads // self.kv_heads, self.head_dim
        # Rows of wqkv are blocks per KV head: its query heads, then its key, then its value.
        blocks = self.wqkv(u).view(B, T, kv, group + 2, dim).permute(0, 2, 3, 1, 4)  # (B, kv, G+2, T, dim)
        q = rotate(blocks[:, :, :group].flatten(1, 2), frame.cos, frame.sin)
        key = rotate(blocks[:, :, group], frame.cos, frame.sin)
        value = blocks[:, :, group + 1]
        # Repeated here, since the fast kernels with a mask take no groups.
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, key, value, attn_mask=frame.seen, is_causal=frame.seen is None)
        return y.transpose(1, 2).reshape(B, T, -1)


class StudentMixer(nn.Module):
    """A Mamba-2 mixer without its output projection; its in-projection is in parts, which train in different stages."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.sizes = ScanSizes(spec.heads, spec.kv_heads, spec.head_dim, spec.state_dim, GATE_NORM_EPS)
        self.wvkq = Projection(spec.hidden_size, spec.conv_channels)
        self.wg = Projection(spec.hidden_size, spec.heads * spec.head_dim)
        self.wdt = Projection(spec.hidden_size, spec.heads)
        self.conv1d = DepthwiseConv(spec.conv_channels, spec.conv_width)
        self.dt_bias = nn.Parameter(torch.empty(spec.heads), requires_grad=False)
        self.A_log_bias = nn.Parameter(torch.empty(spec.heads), requires_grad=False)
        self.g_norm_swish_gate = GateNorm(spec.head_dim)

    def forward(self, u: Tensor, frame: Frame) -> Tensor:
        """Shapes: u (B, T, hidden), normalised -> (B, T, H*P)."""
        packed = torch.cat([part.weight.to(u.dtype) for part in (self.wvkq, self.wg, self.wdt)], dim=1)
        weights = ScanWeights(
            self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log_bias, self.g_norm_swish_gate.weight
        )
        return scan_sequences(u @ packed, frame.segments, weights, self.sizes)
