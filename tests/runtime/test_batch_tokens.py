"""Rows of a batch driven token by token, on toy models: each as a session of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import text_ids, toy_batch, toy_session

from mmm_export.errors import OptionError, PromptError
from mmm_export.runtime import GenerationOptions


def single(ids: Any, tokens: list[int], kinds: str) -> tuple[Any, list[Any]]:
    session, _ = toy_session(kinds, max_tokens=64)
    return session.prefill(ids), [session.step(token) for token in tokens]


@pytest.mark.parametrize("kinds", ["linear", "hybrid"])
def test_rows_can_be_driven_token_by_token(kinds: str) -> None:
    batch, backend = toy_batch(kinds, rows=3, max_tokens=64)
    spec = batch.manifest.model
    prompts = [text_ids(spec, count, seed=count) for count in (3, 17, 9)]
    rows = [batch.prefill(ids)[0] for ids in prompts]
    assert rows == [0, 1, 2]
    assert batch.free_rows == 0
    first = batch.advance({0: 5, 2: 6})
    second = batch.advance({2: 7, 1: 8})
    np.testing.assert_array_equal(first[0], single(prompts[0], [5], kinds)[1][0])
    np.testing.assert_array_equal(second[1], single(prompts[1], [8], kinds)[1][0])
    np.testing.assert_array_equal(second[2], single(prompts[2], [6, 7], kinds)[1][1])
    assert [batch.tokens(row) for row in rows] == [4, 18, 11]
    batch.free(1)
    assert (batch.free_rows, batch.tokens(1)) == (1, 0)
    assert batch.prefill([9, 9])[0] == 1
    assert backend.steps == [(0, 2), (2, 1)]
    assert batch.advance({}) == {}


def test_held_rows_and_answers_do_not_disturb_each_other(folder: Path) -> None:
    options = GenerationOptions(max_new_tokens=4, stop_ids=())
    batch, _ = toy_batch(rows=2, folder=folder)
    row, _ = batch.prefill([5, 6, 7])
    answer = batch.add("Hi", options=options)
    batch.step()
    found = batch.advance({row: 8})[row]
    while batch.is_busy:
        batch.step()
    np.testing.assert_array_equal(found, single([5, 6, 7], [8], "linear")[1][0])
    session, _ = toy_session(folder=folder)
    alone = session.generate("Hi", options=options)
    list(alone)
    assert answer.token_ids == alone.token_ids


def test_tokens_that_a_row_cannot_take_change_no_row() -> None:
    batch, backend = toy_batch("hybrid", rows=2, max_tokens=8)
    full, _ = batch.prefill([5] * 8)
    other, _ = batch.prefill([5, 6])
    image = batch.manifest.model.image_token_id
    for tokens in ({other: 7, full: 7}, {other: image}, {other: 10**6}, {other: -1}):
        with pytest.raises(PromptError):
            batch.advance(tokens)
    assert [batch.tokens(row) for row in (full, other)] == [8, 2]
    assert backend.steps == []


def test_rows_that_are_not_the_callers_are_refused(folder: Path) -> None:
    batch, _ = toy_batch(rows=2, folder=folder)
    batch.add("Hi", options=GenerationOptions(stop_ids=()))
    for row in (0, 1, 2, -1):
        with pytest.raises(OptionError, match="not one that prefill has given"):
            batch.advance({row: 5})
        with pytest.raises(OptionError, match="not one that prefill has given"):
            batch.free(row)
    with pytest.raises(OptionError, match="no such row"):
        batch.tokens(2)
