"""Questions about a scene, and their true answers. Each kind draws the scenes on which it can be asked."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from mmm_export.distillation.digits.assets import Split
from mmm_export.distillation.digits.scenes import COLOURS, GRID, Scene, draw_scene

MOST_DIGITS = 6
MOST_BLANKS = 2


@dataclass(frozen=True)
class Question:
    """A question and its only right answer."""

    kind: str
    text: str
    answer: str


Draw = Callable[[random.Random, Split], "tuple[Scene, Question] | None"]


def draw_question(rng: random.Random, split: Split, kind: str) -> tuple[Scene, Question]:
    """Draw a scene and a question of a kind that can be asked of it."""
    while True:
        drawn = KINDS[kind](rng, split)
        if drawn is not None:
            return drawn


def _scene(rng: random.Random, split: Split, least: int, most: int, values: int = 10) -> Scene:
    """Draw a scene of least..most digits; `values` below 10 takes them from so few that some come twice."""
    pool = rng.sample(range(10), values)
    digits = [rng.choice(pool) for _ in range(rng.randint(least, most))]
    return draw_scene(rng, split, digits, rng.randint(0, MOST_BLANKS))


def _place(row: int, column: int) -> str:
    return f"row {row + 1}, column {column + 1}"


def _position(rng: random.Random, split: Split) -> tuple[Scene, Question]:
    scene = _scene(rng, split, 1, MOST_DIGITS)
    patch = rng.choice(scene.digits)
    return scene, Question("position", f"Which digit is in {_place(patch.row, patch.column)}?", str(patch.digit))


EDGES = {"leftmost": ("column", -1), "rightmost": ("column", 1), "topmost": ("row", -1), "lowest": ("row", 1)}


def _edge(rng: random.Random, split: Split) -> tuple[Scene, Question] | None:
    scene = _scene(rng, split, 2, 5)
    edge = rng.choice(list(EDGES))
    axis, sign = EDGES[edge]
    first, second = sorted(scene.digits, key=lambda patch: -sign * getattr(patch, axis))[:2]
    if getattr(first, axis) == getattr(second, axis):
        return None
    return scene, Question("edge", f"Which digit is the {edge}?", str(first.digit))


def _count(rng: random.Random, split: Split) -> tuple[Scene, Question]:
    scene = _scene(rng, split, 1, MOST_DIGITS)
    return scene, Question("count", "How many digits are in the picture?", str(len(scene.digits)))


def _count_of(rng: random.Random, split: Split) -> tuple[Scene, Question]:
    scene = _scene(rng, split, 2, 5, values=3)
    digit = rng.choice(scene.values) if rng.random() < 0.8 else rng.randrange(10)
    return scene, Question("count of", f"How many times does the digit {digit} appear?", str(scene.values.count(digit)))


def _largest(rng: random.Random, split: Split) -> tuple[Scene, Question]:
    scene = _scene(rng, split, 2, 4)
    return scene, Question("largest", "What is the largest digit?", str(max(scene.values)))


def _smallest(rng: random.Random, split: Split) -> tuple[Scene, Question]:
    scene = _scene(rng, split, 2, 4)
    return scene, Question("smallest", "What is the smallest digit?", str(min(scene.values)))


def _sum(rng: random.Random, split: Split) -> tuple[Scene, Question]:
    scene = _scene(rng, split, 2, 3)
    return scene, Question("sum", "What is the sum of the digits?", str(sum(scene.values)))


def _colour(rng: random.Random, split: Split) -> tuple[Scene, Question] | None:
    scene = _scene(rng, split, 1, MOST_DIGITS)
    patch = rng.choice(scene.patches)
    if patch.digit is None or rng.random() < 0.3:
        return scene, Question(
            "colour", f"What colour is the patch in {_place(patch.row, patch.column)}?", patch.colour
        )
    if scene.values.count(patch.digit) > 1:
        return None
    return scene, Question("colour", f"What colour is behind the digit {patch.digit}?", patch.colour)


def _yes_no(rng: random.Random, split: Split) -> tuple[Scene, Question]:
    wanted = rng.random() < 0.5  # drawn first, so that neither answer is the likelier one
    while True:
        scene = _scene(rng, split, 2, 5)
        asked = rng.choice((_is_there, _is_further_left, _is_on))(rng, scene)
        if asked is not None and asked[1] == wanted:
            return scene, Question("yes or no", asked[0], "yes" if wanted else "no")


def _is_there(rng: random.Random, scene: Scene) -> tuple[str, bool]:
    digit = rng.randrange(10)
    return f"Is there a digit {digit}?", digit in scene.values


def _is_further_left(rng: random.Random, scene: Scene) -> tuple[str, bool] | None:
    one, other = rng.sample(scene.digits, 2)
    twice = any(scene.values.count(digit) > 1 for digit in (one.digit, other.digit) if digit is not None)
    if twice or one.column == other.column:
        return None
    return f"Is the digit {one.digit} further left than the digit {other.digit}?", one.column < other.column


def _is_on(rng: random.Random, scene: Scene) -> tuple[str, bool] | None:
    patch = rng.choice(scene.digits)
    colour = patch.colour if rng.random() < 0.5 else rng.choice(list(COLOURS))
    if any(other is not patch and other.digit == patch.digit for other in scene.digits):
        return None
    return f"Is the digit {patch.digit} on a {colour} patch?", patch.colour == colour


KINDS: dict[str, Draw] = {
    "position": _position,
    "edge": _edge,
    "count": _count,
    "count of": _count_of,
    "largest": _largest,
    "smallest": _smallest,
    "sum": _sum,
    "colour": _colour,
    "yes or no": _yes_no,
}


def all_texts() -> tuple[list[str], list[str]]:
    """List every question and every answer that can be drawn: they are few, so they can be encoded in advance."""
    places = [_place(row, column) for row in range(GRID) for column in range(GRID)]
    questions = [f"Which digit is in {place}?" for place in places]
    questions += [f"Which digit is the {edge}?" for edge in EDGES]
    questions += ["How many digits are in the picture?", "What is the sum of the digits?"]
    questions += ["What is the largest digit?", "What is the smallest digit?"]
    questions += [f"What colour is the patch in {place}?" for place in places]
    for digit in range(10):
        questions += [
            f"How many times does the digit {digit} appear?",
            f"What colour is behind the digit {digit}?",
            f"Is there a digit {digit}?",
        ]
        questions += [f"Is the digit {digit} further left than the digit {other}?" for other in range(10)]
        questions += [f"Is the digit {digit} on a {colour} patch?" for colour in COLOURS]
    return questions, [*map(str, range(28)), *COLOURS, "yes", "no"]
