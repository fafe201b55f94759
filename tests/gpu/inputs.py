"""Seeded inputs of one call: everything random, start states included, so that nothing is right by being zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gpu.kernels import DEVICE

EPS = 1e-5

# Ranges of dt_bias and A_log. The middle one is how Mamba-2 is initialised: decays of 0.3 to 0.997 a token. With slow
# decays the state remembers thousands of tokens, with fast ones it forgets within a few.
DECAYS = {
    "middle": ((-5.0, -1.0), (0.0, 2.0)),
    "slow": ((-6.0, -4.0), (-5.0, -3.0)),
    "fast": ((0.0, 3.0), (1.0, 2.5)),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call; mmMamba's own by default."""

    batch: int = 1
    tokens: int = 1
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    state_dim: int = 128
    conv_width: int = 2

    @property
    def channels(self) -> int:
        return self.kv_heads * (self.head_dim + self.state_dim) + self.heads * self.state_dim

    @property
    def width(self) -> int:
        """Elements of a projected row."""
        return self.channels + self.heads * self.head_dim + self.heads


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call, named and shaped as in kernels.h; projected may be a strided view."""

    sizes: Sizes
    projected: torch.Tensor
    lengths: torch.Tensor | None
    conv_state: torch.Tensor
    ssm_state: torch.Tensor
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    dt_bias: torch.Tensor
    A_log: torch.Tensor
    norm_weight: torch.Tensor

    def tokens(self, begin: int, end: int) -> Inputs:
        """View the tokens begin..end-1 of all rows, with the same start states; for inputs without lengths."""
        assert self.lengths is None
        return replace(self, sizes=replace(self.sizes, tokens=end - begin), projected=self.projected[:, begin:end])

    def starting_from(self, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> Inputs:
        return replace(self, conv_state=conv_state, ssm_state=ssm_state)

    def valid(self) -> torch.Tensor:
        """(B,) valid tokens of each row, as the interface takes them: into 0..T."""
        if self.lengths is None:
            return torch.full((self.sizes.batch,), self.sizes.tokens, device=self.projected.device)
        return self.lengths.clamp(0, self.sizes.tokens).long()


def draw(
    sizes: Sizes,
    io: torch.dtype = torch.bfloat16,
    state: torch.dtype = torch.float32,
    *,
    lengths: Sequence[int] | None = None,
    decay: str = "middle",
    gap: int = 0,
    seed: int = 0,
    device: str = DEVICE,
) -> Inputs:
    """Draw the inputs of one call.

    Args:
        sizes: of the call.
        io: type of projected and the conv state.
        state: type of the SSM state.
        lengths: valid tokens of each row; what lies behind them is NaN.
        decay: a key of DECAYS.
        gap: elements between the end of a projected row and the next one, all NaN.
        seed: of the generator.
        device: where the tensors lie.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(sizes.heads, generator=generator, device=device) * (high - low) + low

    s = sizes
    buffer = torch.full((s.batch, s.tokens + (gap > 0), s.width + gap), float("nan"), device=device, dtype=io)
    projected = buffer[:, : s.tokens, : s.width]
    projected.copy_(normal(s.batch, s.tokens, s.width))
    if lengths is not None:
        for row, length in enumerate(lengths):
            projected[row, max(length, 0) :] = float("nan")
    dt_bias, a_log = DECAYS[decay]
    return Inputs(
        sizes=s,
        projected=projected,
        lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device),
        conv_state=normal(s.batch, s.channels, s.conv_width - 1).to(io),
        ssm_state=normal(s.batch, s.heads, s.head_dim, s.state_dim, scale=0.2).to(state),
        conv_weight=normal(s.channels, s.conv_width, scale=0.5),
        conv_bias=normal(s.channels, scale=0.1),
        dt_bias=uniform(*dt_bias),
        A_log=uniform(*a_log),
        norm_weight=1 + normal(s.head_dim, scale=0.1),
    )
