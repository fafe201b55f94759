"""Small data, tokenised and on the device as a whole: a batch is a few gathers, and all batches have one shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mmm_export.distillation.batch import NO_TARGET, Batch
from mmm_export.errors import OptionError


class MemoryData:
    """Samples of at most T tokens with the same number of tiles each.

    Args:
        ids: (S, T) integers; what stands behind a sample's length is not read.
        answers: (S, T) bool: tokens that the model has to say.
        lengths: (S,) tokens of each sample.
        pixels: (S, tiles, 3, side, side), normalised in any float type, or uint8, which is then normalised by `mean` and `std`
            when a batch is made; tiles may be 0.
        device: where all of it goes.
        dtype: of the pixels of a batch.
        mean: of the pixels by channel, in 0..1.
        std: of the pixels by channel, in 0..1.
    """

    def __init__(
        self,
        ids: Tensor,
        answers: Tensor,
        lengths: Tensor,
        pixels: Tensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        if ids.shape[0] == 0:
            raise OptionError("the data is empty", found="0 samples", wanted="at least 1")
        T = ids.shape[1]
        order = torch.arange(T)
        valid = order[None] < lengths[:, None].cpu()
        targets = torch.full(ids.shape, NO_TARGET, dtype=torch.int64)
        follows = answers[:, 1:].cpu() & valid[:, 1:]
        targets[:, :-1] = torch.where(follows, ids[:, 1:].long().cpu(), NO_TARGET)
        self.ids = torch.where(valid, ids.cpu(), 0).to(device, torch.int32)
        self.targets = targets.to(device, torch.int32)
        self.valid = valid.to(device)
        self.positions = order.to(device)
        self.pixels = pixels.to(device)
        self.dtype = dtype
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def batches(self, plan: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Give a batch for each list of indices."""
        return map(self.batch, plan)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Gather the samples of some indices."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        if self.ids.is_cuda:
            chosen = chosen.pin_memory().to(self.ids.device, non_blocking=True)
        pixels = self.pixels[chosen].flatten(0, 1)
        if pixels.dtype == torch.uint8:
            pixels = (pixels.float() / 255 - self.mean) / self.std
        return Batch(
            ids=self.ids[chosen].long(),
            targets=self.targets[chosen].long(),
            valid=self.valid[chosen],
            positions=self.positions.expand(len(indices), -1),
            segments=None,
            pixels=pixels.to(self.dtype),
            samples=len(indices),
        )
