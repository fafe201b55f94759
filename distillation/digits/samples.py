"""Samples of the task by split, seed and number: the same three always give the same picture and question."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from mmm_export.distillation.digits.assets import Assets, Bytes, Split
from mmm_export.distillation.digits.drawing import draw
from mmm_export.distillation.digits.questions import KINDS, Question, draw_question
from mmm_export.distillation.digits.scenes import Scene

TEST_SAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class Sample:
    """A picture and a question about it."""

    split: Split
    number: int
    scene: Scene
    question: Question

    def picture(self, assets: Assets) -> Bytes:
        """Draw it: RGB (SIDE, SIDE, 3)."""
        return draw(self.scene, assets, self.split)


def sample(split: Split, number: int, seed: int = SEED) -> Sample:
    """Draw sample `number` of a split; the kinds of questions take turns."""
    kinds = list(KINDS)
    rng = random.Random(f"{seed}/{split}/{number}")
    scene, question = draw_question(rng, split, kinds[number % len(kinds)])
    return Sample(split, number, scene, question)


def samples(split: Split, count: int, seed: int = SEED) -> Iterator[Sample]:
    """Draw the first `count` samples of a split."""
    return (sample(split, number, seed) for number in range(count))
