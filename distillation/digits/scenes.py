"""Which patches lie where in a picture, with which digit on which colour: drawn by seed, not yet pixels."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmm_export.distillation.digits.assets import Split

GRID = 4  # cells along a side
CELL = 24  # pixels of a cell; one image token of the demo models covers it
SIDE = GRID * CELL  # of a picture, in pixels
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "green": (40, 140, 60),
    "blue": (45, 75, 200),
    "yellow": (235, 205, 50),
    "purple": (130, 50, 150),
    "white": (240, 240, 240),
}
# Training sees more of everything than is asked for: there are few handwritten samples, and each should look new every time.
SCALES: dict[Split, tuple[float, float]] = {"train": (0.72, 0.98), "test": (0.8, 0.95)}
ANGLES: dict[Split, float] = {"train": 13.0, "test": 6.0}
SLANTS: dict[Split, float] = {"train": 0.2, "test": 0.05}
TEST_LAYOUTS = 5  # one layout of so many is kept for the test set


@dataclass(frozen=True)
class Patch:
    """A coloured square in a cell, with a handwritten digit on it or blank.

    Attributes:
        row: of the cell, from 0 at the top.
        column: of the cell, from 0 at the left.
        colour: one of COLOURS.
        digit: 0..9; None for a blank patch, which is there to mislead.
        size: side of the square in pixels.
        top: pixels between the cell's upper edge and the square's.
        left: pixels between the cell's left edge and the square's.
        scale: side of the handwriting over that of the square.
        angle: by which the handwriting is turned, in degrees.
        slant: columns by which a row is moved for each row that it lies lower.
        pick: in 0..1, which handwritten sample of the digit.
    """

    row: int
    column: int
    colour: str
    digit: int | None
    size: int
    top: int
    left: int
    scale: float
    angle: float
    slant: float
    pick: float


@dataclass(frozen=True)
class Scene:
    """A picture in words: patches row by row, and where the background comes from (fractions of what there is)."""

    patches: tuple[Patch, ...]
    photograph: float
    shift: tuple[float, float]
    mirrored: bool

    @property
    def digits(self) -> tuple[Patch, ...]:
        """The patches that show a digit, row by row."""
        return tuple(patch for patch in self.patches if patch.digit is not None)

    @property
    def values(self) -> tuple[int, ...]:
        """The digits, row by row."""
        return tuple(patch.digit for patch in self.patches if patch.digit is not None)


def layout_split(cells: Sequence[tuple[int, int]]) -> Split:
    """Say which split a set of occupied cells belongs to: no layout is in both."""
    key = ",".join(f"{row}{column}" for row, column in sorted(cells))
    return "test" if hashlib.sha256(key.encode()).digest()[0] % TEST_LAYOUTS == 0 else "train"


def draw_scene(rng: random.Random, split: Split, digits: Sequence[int], blanks: int) -> Scene:
    """Place digits and blank patches at random cells of a layout that belongs to the split."""
    count = len(digits) + blanks
    while True:
        cells = [divmod(cell, GRID) for cell in rng.sample(range(GRID * GRID), count)]
        if layout_split(cells) == split:
            break
    content: list[int | None] = [*digits, *([None] * blanks)]
    patches = sorted(
        (_patch(rng, split, row, column, digit) for (row, column), digit in zip(cells, content, strict=True)),
        key=lambda patch: (patch.row, patch.column),
    )
    return Scene(tuple(patches), rng.random(), (rng.random(), rng.random()), rng.random() < 0.5)


def _patch(rng: random.Random, split: Split, row: int, column: int, digit: int | None) -> Patch:
    size = rng.randint(20, CELL - 1)
    return Patch(
        row=row,
        column=column,
        colour=rng.choice(list(COLOURS)),
        digit=digit,
        size=size,
        top=rng.randint(0, CELL - size),
        left=rng.randint(0, CELL - size),
        scale=rng.uniform(*SCALES[split]),
        angle=rng.uniform(-ANGLES[split], ANGLES[split]),
        slant=rng.uniform(-SLANTS[split], SLANTS[split]),
        pick=rng.random(),
    )
