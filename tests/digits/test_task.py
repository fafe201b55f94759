"""The demo task: seeded, its splits share nothing, and its answers are what an independent recount finds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mmm_export.distillation.digits.assets import TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, Assets, packaged_assets
from mmm_export.distillation.digits.questions import KINDS, all_texts
from mmm_export.distillation.digits.samples import Sample, samples
from mmm_export.distillation.digits.scenes import CELL, COLOURS, SIDE, Scene


@pytest.fixture(scope="module")
def assets() -> Assets:
    return packaged_assets()


@pytest.fixture(scope="module")
def drawn() -> list[Sample]:
    return [*samples("train", 1500), *samples("test", 1500)]


def grid_of(scene: Scene) -> dict[tuple[int, int], tuple[str, int | None]]:
    """Colour and digit of each occupied cell, counted from 1, and nothing of how the scene was made."""
    return {(patch.row + 1, patch.column + 1): (patch.colour, patch.digit) for patch in scene.patches}


def recount(scene: Scene, question: str) -> str:
    """Answer a question from its words alone."""
    grid = grid_of(scene)
    digits = {place: digit for place, (_, digit) in grid.items() if digit is not None}

    def place_of(digit: str) -> tuple[int, int]:
        (place,) = (p for p, d in digits.items() if d == int(digit))
        return place

    def extreme(axis: int, pick: Callable[[list[int]], int]) -> str:
        edge = pick([place[axis] for place in digits])
        (digit,) = (d for place, d in digits.items() if place[axis] == edge)
        return str(digit)

    rules: list[tuple[str, Callable[..., str]]] = [
        (r"Which digit is in row (\d), column (\d)\?", lambda r, c: str(digits[int(r), int(c)])),
        (r"Which digit is the leftmost\?", lambda: extreme(1, min)),
        (r"Which digit is the rightmost\?", lambda: extreme(1, max)),
        (r"Which digit is the topmost\?", lambda: extreme(0, min)),
        (r"Which digit is the lowest\?", lambda: extreme(0, max)),
        (r"How many digits are in the picture\?", lambda: str(len(digits))),
        (r"How many times does the digit (\d) appear\?", lambda d: str([*digits.values()].count(int(d)))),
        (r"What is the largest digit\?", lambda: str(max(digits.values()))),
        (r"What is the smallest digit\?", lambda: str(min(digits.values()))),
        (r"What is the sum of the digits\?", lambda: str(sum(digits.values()))),
        (r"What colour is the patch in row (\d), column (\d)\?", lambda r, c: grid[int(r), int(c)][0]),
        (r"What colour is behind the digit (\d)\?", lambda d: grid[place_of(d)][0]),
        (r"Is there a digit (\d)\?", lambda d: "yes" if int(d) in digits.values() else "no"),
        (
            r"Is the digit (\d) further left than the digit (\d)\?",
            lambda a, b: "yes" if place_of(a)[1] < place_of(b)[1] else "no",
        ),
        (r"Is the digit (\d) on a (\w+) patch\?", lambda d, c: "yes" if grid[place_of(d)][0] == c else "no"),
    ]
    for pattern, rule in rules:
        match = re.fullmatch(pattern, question)
        if match:
            return rule(*match.groups())
    raise AssertionError(f"no rule for {question!r}")


def test_answers_are_those_of_a_recount_from_the_words_of_the_question(drawn: list[Sample]) -> None:
    assert [s.question.text for s in drawn if recount(s.scene, s.question.text) != s.question.answer] == []


def test_every_kind_of_question_comes_equally_often(drawn: list[Sample]) -> None:
    counts = Counter(s.question.kind for s in drawn)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_yes_is_as_likely_as_no(drawn: list[Sample]) -> None:
    answers = [s.question.answer for s in drawn if s.question.kind == "yes or no"]
    # 333 fair draws: five standard deviations are 46.
    assert abs(answers.count("yes") - len(answers) / 2) < 46


def test_no_answer_can_be_guessed_from_its_kind(drawn: list[Sample]) -> None:
    """The commonest answer of any kind is right at most so often, so a blind model cannot come near the stated accuracy."""
    for kind in KINDS:
        answers = Counter(s.question.answer for s in drawn if s.question.kind == kind)
        assert max(answers.values()) / sum(answers.values()) < 0.6, kind


def test_everything_asked_and_answered_is_in_the_list_of_texts(drawn: list[Sample]) -> None:
    questions, answers = all_texts()
    assert {s.question.text for s in drawn} <= set(questions)
    assert {s.question.answer for s in drawn} <= set(answers)
    assert len(set(questions)) == len(questions)


def test_the_same_seed_draws_the_same_and_another_seed_another() -> None:
    assert list(samples("test", 20)) == list(samples("test", 20))
    assert list(samples("test", 20)) != list(samples("test", 20, seed=1))


def test_splits_share_no_layout(drawn: list[Sample]) -> None:
    layouts: dict[str, set[frozenset[tuple[int, int]]]] = {"train": set(), "test": set()}
    for sample in drawn:
        layouts[sample.split].add(frozenset(grid_of(sample.scene)))
    assert min(len(each) for each in layouts.values()) > 500
    assert layouts["train"] & layouts["test"] == set()


def test_splits_share_no_handwriting_and_no_photograph(assets: Assets) -> None:
    train, test = ({i for d in range(10) for i in assets.samples(split, d)} for split in ("train", "test"))
    assert train & test == set()
    assert train | test == set(range(1797))
    for digit in range(10):
        share = len(assets.samples("test", digit)) / int((assets.labels == digit).sum())
        assert share == pytest.approx(0.2, abs=0.005)  # rounded to whole samples of about 180
    assert set(TRAIN_PHOTOGRAPHS) & set(TEST_PHOTOGRAPHS) == set()


def test_the_split_does_not_move_between_versions(assets: Assets) -> None:
    """A model trained with another split would have seen some of this test set."""
    assert assets.samples("test", 7)[:5] == [112, 118, 211, 216, 240]


def test_pictures_show_every_patch_where_the_scene_has_it(assets: Assets) -> None:
    for sample in samples("test", 30):
        picture = sample.picture(assets).astype(int)
        assert picture.shape == (SIDE, SIDE, 3)
        for patch in sample.scene.patches:
            top, left = patch.row * CELL + patch.top, patch.column * CELL + patch.left
            square = picture[top : top + patch.size, left : left + patch.size]
            # Slanted handwriting may reach a corner with a trace of ink: a tenth of the way to black or white.
            assert np.abs(square[0, 0] - COLOURS[patch.colour]).max() <= 24
            assert bool((square == square[0, 0]).all()) == (patch.digit is None)


def test_assets_read_back_draw_the_same_pictures(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("assets") / "assets.npz"
    assets.save(path)
    again = Assets.load(path)
    for sample in (*samples("train", 5), *samples("test", 5)):
        assert np.array_equal(sample.picture(assets), sample.picture(again))
