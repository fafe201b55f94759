"""Shares, their intervals, and what counts as right."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmm_export.evaluation.samples import Sample
from mmm_export.evaluation.scoring import Answered, Share, ask_all, shares


# Wilson's interval solves |p - x| = z sqrt(x (1 - x) / n) for x: both ends are checked against that equation.
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_an_interval_are_where_the_share_is_z_deviations_away(counts: tuple[int, int]) -> None:
    share = Share(*counts)
    low, high = share.interval
    assert 0 <= low <= share.accuracy <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            distance = abs(share.accuracy - end) / math.sqrt(end * (1 - end) / share.total)
            assert distance == pytest.approx(1.959964, rel=1e-4)


def test_all_right_is_not_certainty() -> None:
    assert Share(100, 100).interval == (pytest.approx(0.963, abs=0.0005), 1.0)


def sample(kind: str, answer: str) -> Sample:
    return Sample("one", kind, "Which?", answer, ())


@pytest.mark.parametrize(
    ("said", "right"),
    [("Red", True), (" red.", True), ("red", True), ("reddish", False), ("", False), ("not red", False)],
)
def test_letter_case_and_a_full_stop_do_not_make_an_answer_wrong(said: str, right: bool) -> None:
    assert Answered(sample("colour", "red"), said).is_right is right


def test_shares_are_counted_by_kind_and_in_all() -> None:
    answered = ask_all([sample("a", "1"), sample("b", "1"), sample("a", "2")], lambda question, images: "1")
    assert shares(answered) == {"all": Share(2, 3), "a": Share(1, 2), "b": Share(1, 1)}
