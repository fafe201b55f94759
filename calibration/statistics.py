"""What is kept of an activation while it streams by: magnitudes by channel and phase, a histogram, and some rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

PHASES = ("image", "text", "step")
BINS = 2048

Array = NDArray[Any]


class Histogram:
    """Counts of magnitudes in BINS equal bins from 0; the bins double their width when a larger magnitude comes.

    So the counts do not depend on the order of the data but for the very first block, which sets the width.
    """

    def __init__(self, counts: NDArray[np.int64] | None = None, width: float = 0.0) -> None:
        self.counts = np.zeros(BINS, np.int64) if counts is None else counts
        self.width = width

    def add(self, magnitudes: Array) -> None:
        """Update the counts."""
        most = float(magnitudes.max(initial=0.0))
        if self.width == 0.0:
            if most == 0.0:
                self.counts[0] += magnitudes.size
                return
            # A power of two: then widening is exact, whatever came first.
            self.width = 2.0 ** np.ceil(np.log2(most / BINS))
        while most >= self.width * BINS:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.width *= 2.0
        index = np.minimum((magnitudes.ravel() * (1.0 / self.width)).astype(np.int32), BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    @property
    def centres(self) -> Array:
        return (np.arange(BINS) + 0.5) * self.width


@dataclass
class Statistics:
    """Of one activation of `channels` channels.

    Attributes:
        maxima: largest magnitude of each channel.
        squares: sum of squares of each channel over `count` tokens.
        phases: largest magnitude among image tokens, text tokens, and tokens read one by one.
        first_half: largest magnitude in the first half of the samples, to tell whether the range still grows.
        rows: (R, channels) whole tokens, to measure on what a choice costs.
    """

    channels: int
    maxima: Array = field(init=False)
    squares: Array = field(init=False)
    count: int = 0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    first_half: float = 0.0
    histogram: Histogram = field(default_factory=Histogram)
    rows: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.maxima = np.zeros(self.channels, np.float32)
        self.squares = np.zeros(self.channels, np.float64)

    def add(self, values: Array, phases: NDArray[np.int8], *, is_first_half: bool) -> None:
        """Update with tokens: values (T, channels) float32, finite; phases (T,) indices into PHASES."""
        magnitudes = np.abs(values)
        by_token = magnitudes.max(1, initial=0.0)
        np.maximum(self.maxima, magnitudes.max(0, initial=0.0), out=self.maxima)
        self.squares += np.einsum("tc,tc->c", values, values, dtype=np.float64)
        self.count += len(values)
        self.histogram.add(magnitudes)
        for index, phase in enumerate(PHASES):
            self.phases[phase] = max(self.phases[phase], float(by_token[phases == index].max(initial=0.0)))
        if is_first_half:
            self.first_half = max(self.first_half, float(by_token.max(initial=0.0)))

    @property
    def largest(self) -> float:
        return float(self.maxima.max())
