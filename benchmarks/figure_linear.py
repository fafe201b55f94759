"""The linear model in PyTorch: this project's plain modules, and the same with mamba-ssm's Triton operators in a CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_models import Mlp, normed

from mmm_export.model.decoder import MmMamba, States
from mmm_export.model.layers import MambaState
from mmm_export.model.scan import ScanSizes, ScanWeights, chunked
from mmm_export.spec import GATE_NORM_EPS, ModelSpec


@dataclass(frozen=True)
class MixerWeights:
    """What a mixer's operators read besides the projected rows."""

    scan: ScanWeights
    decay: Tensor  # A (H,) float32, negative


class MixerOperators(Protocol):
    """Everything between the two projections of a layer."""

    def prefill(self, rows: Tensor, weights: MixerWeights) -> tuple[Tensor, Tensor, Tensor]:
        """rows (T, projected_size), from no tokens -> y (T, H*P), conv state (C,), SSM state (H, P, N)."""

    def step(self, rows: Tensor, weights: MixerWeights, conv: Tensor, ssm: Tensor) -> Tensor:
        """Update conv (B, C) and ssm (B, H, P, N) by one row each, rows (B, projected_size) -> y (B, H*P)."""

    def retune(self) -> None:
        """Forget what was tuned, so that the next call tunes at its own length."""


class PlainOperators:
    """The project's own PyTorch functions; for a machine without a GPU."""

    def __init__(self, spec: ModelSpec) -> None:
        self.sizes = ScanSizes(spec.heads, spec.kv_heads, spec.head_dim, spec.state_dim, GATE_NORM_EPS)
        self.spec = spec

    def prefill(self, rows: Tensor, weights: MixerWeights) -> tuple[Tensor, Tensor, Tensor]:
        s = self.spec
        conv = rows.new_zeros(1, s.conv_channels, 1)
        ssm = rows.new_zeros((1, s.heads, s.head_dim, s.state_dim), dtype=torch.float32)
        lengths = torch.tensor([len(rows)], device=rows.device)
        y, conv, ssm = chunked(rows[None], lengths, conv, ssm, weights.scan, self.sizes)
        return y[0], conv[0, :, 0], ssm[0]

    def step(self, rows: Tensor, weights: MixerWeights, conv: Tensor, ssm: Tensor) -> Tensor:
        ones = torch.ones(len(rows), device=rows.device, dtype=torch.long)
        y, new_conv, new_ssm = chunked(rows[:, None], ones, conv[:, :, None], ssm, weights.scan, self.sizes)
        conv.copy_(new_conv[:, :, 0])
        ssm.copy_(new_ssm)
        return y[:, 0]

    def retune(self) -> None: ...


class TritonOperators:
    """mamba-ssm's scan and state update, with the convolution and the gated norm of `triton_kernels`.

    Args:
        folder: with the package `mamba_ssm`, or what of it is Triton's; None for an installed one.

    Raises:
        ImportError: it is not there.
    """

    def __init__(self, spec: ModelSpec, folder: Path | None, device: str = "cuda") -> None:
        if folder is not None:
            sys.path.insert(0, str(folder.resolve()))
        import triton_kernels
        from mamba_ssm.ops.triton.selective_state_update import (  # type: ignore[import-not-found]
            selective_state_update,
        )
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

        self.own, self.update, self.scan = triton_kernels, selective_state_update, mamba_chunk_scan_combined
        self.spec = spec
        self.group = spec.heads // spec.kv_heads
        # mamba-ssm's D, which this model has not and its function wants.
        self.skip = torch.zeros(spec.heads, 1, device=device)

    def prefill(self, rows: Tensor, weights: MixerWeights) -> tuple[Tensor, Tensor, Tensor]:
        s, w = self.spec, weights.scan
        count = len(rows)
        mixed, conv = self.own.convolve(rows[:, : s.conv_channels], w.conv_weight, w.conv_bias)
        v, k, q = mixed.split([s.kv_heads * s.head_dim, s.kv_heads * s.state_dim, s.heads * s.state_dim], -1)
        y, ssm = self.scan(
            v.view(1, count, s.kv_heads, s.head_dim).repeat_interleave(self.group, 2),
            rows[None, :, -s.heads :],
            weights.decay,
            k.view(1, count, s.kv_heads, s.state_dim).repeat_interleave(self.group, 2),
            q.view(1, count, s.heads, s.state_dim),
            128,  # tokens of a chunk, as the released model has it
            dt_bias=w.dt_bias.float(),
            dt_softplus=True,
            return_final_states=True,
        )
        gate = rows[:, s.conv_channels : -s.heads]
        gated: Tensor = self.own.gated_norm(y.view(count, -1), gate, w.norm_weight, GATE_NORM_EPS)
        return gated, conv, ssm[0].float()

    def step(self, rows: Tensor, weights: MixerWeights, conv: Tensor, ssm: Tensor) -> Tensor:
        s, w, batch = self.spec, weights.scan, len(rows)
        mixed = self.own.convolve_step(rows[:, : s.conv_channels], w.conv_weight, w.conv_bias, conv)
        v, k, q = mixed.split([s.kv_heads * s.head_dim, s.kv_heads * s.state_dim, s.heads * s.state_dim], -1)
        y = self.update(
            ssm,
            v.reshape(batch, s.kv_heads, s.head_dim).repeat_interleave(self.group, 1),
            rows[:, -s.heads :, None].expand(-1, -1, s.head_dim),
            weights.decay[:, None, None].expand(-1, s.head_dim, s.state_dim),
            k.reshape(batch, s.kv_heads, s.state_dim).repeat_interleave(self.group, 1),
            q.reshape(batch, s.heads, s.state_dim),
            self.skip.expand(-1, s.head_dim),
            None,
            w.dt_bias.float()[:, None].expand(-1, s.head_dim),
            True,
        )
        gate = rows[:, s.conv_channels : -s.heads]
        gated: Tensor = self.own.gated_norm(y.view(batch, -1), gate, w.norm_weight, GATE_NORM_EPS)
        return gated

    def retune(self) -> None:
        from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_state_passing

        # The keys of Triton's autotuner hold no length: whichever comes first would pick the kernels of all.
        for module in (ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_state_passing):
            for kernel in vars(module).values():
                while hasattr(kernel, "fn") and not hasattr(kernel, "configs"):
                    kernel = kernel.fn
                if hasattr(kernel, "configs"):
                    kernel.cache.clear()


@dataclass(frozen=True)
class LinearLayer:
    norm: Any
    projection: Tensor
    mixer: MixerWeights
    out: Tensor
    mlp: Mlp

    @classmethod
    def of(cls, layer: Any) -> LinearLayer:
        a = layer.attention
        scan = ScanWeights(a.conv1d.weight, a.conv1d.bias, a.dt_bias, a.A_log_bias, a.g_norm_swish_gate.weight)
        mixer = MixerWeights(scan, -torch.exp(a.A_log_bias.float()))
        return cls(layer.attention_norm, a.wvkqgdt.weight.t(), mixer, a.o_proj.weight.t(), Mlp.of(layer))


class FastLinear:
    """The linear model over the parameters of `MmMamba`, one sequence without padding, as a well written PyTorch program runs it.

    Against the plain modules: fused gate and up, PyTorch's own RMS norm, states updated in place.
    """

    def __init__(self, model: MmMamba, operators: MixerOperators) -> None:
        self.spec = model.spec
        self.operators = operators
        self.table = model.embedding_model.llm_text_embeddings.weight
        self.norm = model.language_model.model.norm
        self.head = model.language_model.output.weight.t()
        layers = (*model.embedding_model.encoder, *model.language_model.model.layers)
        self.layers = [LinearLayer.of(layer) for layer in layers]

    def prefill(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """ids (T,) -> logits (vocab,) of the last token, and conv (C,) and SSM state (H, P, N) of each layer."""
        x, states = self.table[ids], []
        for layer in self.layers:
            rows = F.linear(normed(x, layer.norm), layer.projection)
            y, conv, ssm = self.operators.prefill(rows, layer.mixer)
            x = layer.mlp(x + F.linear(y, layer.out))
            states.append((conv, ssm))
        return self._logits(x[-1:])[0], states

    def step(self, ids: Tensor, states: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Update states, conv (B, C) and ssm (B, H, P, N) of each layer, by ids (B,) -> logits (B, vocab)."""
        x = self.table[ids]
        for layer, (conv, ssm) in zip(self.layers, states, strict=True):
            y = self.operators.step(F.linear(normed(x, layer.norm), layer.projection), layer.mixer, conv, ssm)
            x = layer.mlp(x + F.linear(y, layer.out))
        return self._logits(x)

    def generation(self, states: list[tuple[Tensor, Tensor]], first: Tensor) -> Callable[[int], Tensor]:
        """Return a call that takes one greedy decode step; the chosen tokens stay on the device."""
        ids = first.clone()

        def work(_: int) -> Tensor:
            ids.copy_(self.step(ids, states).argmax(-1))
            return ids

        return work

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(normed(x, self.norm), self.head).float()


def batched(states: list[tuple[Tensor, Tensor]], batch: int) -> list[tuple[Tensor, Tensor]]:
    """Copy the states of one sequence to so many rows."""
    return [tuple(s.expand(batch, *s.shape).contiguous() for s in layer) for layer in states]  # type: ignore[misc]


# No default device in what follows: PyTorch then looks at every call in Python, which would triple the time of a step.


def plain_prefill(model: MmMamba, ids: Tensor, chunk_tokens: int) -> tuple[Tensor, States]:
    """Read ids (T,) in chunks with the plain modules -> logits (vocab,), states."""
    with ids.device:
        states = model.initial_states()
    for begin in range(0, len(ids), chunk_tokens):
        chunk = ids[None, begin : begin + chunk_tokens]
        lengths = torch.full((1,), chunk.shape[1], device=ids.device)
        logits, states = model.prefill(model.embed(chunk, _no_features(model, ids)), lengths, states)
    return logits[0, 0], states


def plain_step(model: MmMamba, ids: Tensor, states: States) -> tuple[Tensor, States]:
    """As `MmMamba.step` without attention layers: ids (B,) -> logits (B, vocab), states."""
    embeds = model.embed(ids[:, None], _no_features(model, ids))
    logits, states = model.prefill(embeds, torch.ones_like(ids), states)
    return logits[:, 0], states


def plain_generation(model: MmMamba, states: States, first: Tensor) -> Callable[[int], Tensor]:
    """As `FastLinear.generation`, with the plain modules: first (B,) tokens."""
    held: list[Any] = [first.clone(), states]

    def work(_: int) -> Tensor:
        logits, held[1] = plain_step(model, held[0], held[1])
        held[0] = logits.argmax(-1)
        token: Tensor = held[0]
        return token

    return work


def _no_features(model: MmMamba, ids: Tensor) -> Tensor:
    return torch.zeros(0, model.spec.hidden_size, dtype=model.dtype, device=ids.device)


def plain_batched(states: States, batch: int) -> States:
    return tuple(MambaState(*(part.expand(batch, *part.shape[1:]).contiguous() for part in state)) for state in states)
