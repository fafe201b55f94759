"""Which samples each step reads: a function of the seed and the step alone, so that resuming needs no memory of the past."""

from __future__ import annotations

import math

import numpy as np


class SampleOrder:
    """All samples in a new random order in every epoch, one epoch behind the other.

    Args:
        samples: number of samples.
        seed: of the orders.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    def step(self, step: int, batch_samples: int) -> list[int]:
        """Indices that a step reads, counted from step 0."""
        return [self._at(place) for place in range(step * batch_samples, (step + 1) * batch_samples)]

    def passes(self, step: int, batch_samples: int, samples_per_pass: int, rank: int, world: int) -> list[list[int]]:
        """Indices of each pass of one of `world` processes in a step; every process has the same number of passes."""
        mine = self.step(step, batch_samples)[rank::world]
        count = math.ceil(math.ceil(batch_samples / world) / samples_per_pass)
        return [mine[i * samples_per_pass : (i + 1) * samples_per_pass] for i in range(count)]

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, self.samples)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
            self._epoch = epoch
        return int(self._order[index])
