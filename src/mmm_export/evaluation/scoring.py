"""Right or wrong, and how sure the share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmm_export.evaluation.answering import Answer, AnswerMany
from mmm_export.evaluation.samples import Sample

Z = 1.959963984540054  # of a normal distribution: 95 % lie within so many standard deviations


@dataclass(frozen=True)
class Share:
    """So many right of so many."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Right over total."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy: it stays within 0..1 and is right for small numbers too."""
        n, p = self.total, self.accuracy
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        # Rounding must not leave the share itself outside.
        return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))

    def to_json(self) -> dict[str, Any]:
        """Give it for a report."""
        low, high = self.interval
        return {
            "right": self.right,
            "total": self.total,
            "accuracy": round(self.accuracy, 6),
            "low": round(low, 6),
            "high": round(high, 6),
        }


@dataclass(frozen=True)
class Answered:
    """A sample and what the model said."""

    sample: Sample
    said: str

    @property
    def is_right(self) -> bool:
        """Whether it is the true answer, letter case, outer spaces and a final full stop aside."""
        return _plain(self.said) == _plain(self.sample.answer)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def ask_all(
    samples: Sequence[Sample], answer: Answer, advance: Callable[[int], None] = lambda done: None
) -> list[Answered]:
    """Ask every sample; `advance` is told 1 after each."""
    found = []
    for sample in samples:
        found.append(Answered(sample, answer(sample.question, sample.images)))
        advance(1)
    return found


def ask_together(
    samples: Sequence[Sample], answers: AnswerMany, advance: Callable[[int], None] = lambda done: None
) -> list[Answered]:
    """Ask every sample of what answers several at once; as `ask_all`, in the order of the samples."""
    said = {}
    for number, text in answers((sample.question, sample.images) for sample in samples):
        said[number] = text
        advance(1)
    return [Answered(sample, said[number]) for number, sample in enumerate(samples)]


def shares(answered: Iterable[Answered]) -> dict[str, Share]:
    """Count right answers: "all" first, then each kind in the order in which it came."""
    counts: dict[str, list[int]] = {"all": [0, 0]}
    for one in answered:
        for kind in ("all", one.sample.kind):
            count = counts.setdefault(kind, [0, 0])
            count[0] += one.is_right
            count[1] += 1
    return {kind: Share(right, total) for kind, (right, total) in counts.items()}
