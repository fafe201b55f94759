"""Several processes that train one network together: what they are, and what they add up."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """One process among `count`; `rank` from 0."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def add_up(self, *values: Tensor) -> None:
        """Update tensors to their sum over all processes."""
        if self.count > 1:
            for value in values:
                dist.all_reduce(value)

    def wait(self) -> None:
        """Wait for all the others."""
        if self.count > 1:
            dist.barrier()


SINGLE = Processes()
