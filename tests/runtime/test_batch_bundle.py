"""A batch on exported bundles: the tokens of single sessions, images and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy import text_ids

from mmm_export.runtime import BatchSession, GenerationOptions, Question, Session

CAPACITY = 96  # as the bundles of the other session tests, which need no export of their own then


@pytest.fixture(scope="module", params=["linear", "hybrid"])
def pair(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> tuple[BatchSession, Session]:
    bundle = make_bundle(make_checkpoint(request.param), max_tokens=CAPACITY)
    batch = BatchSession.open(bundle, rows=4, threads=1, chunk_tokens=16, kernels="none")
    return batch, Session.open(bundle, threads=1, chunk_tokens=16, kernels="none")


def likeliest(session: Session, logits: Any) -> int:
    """The likeliest token that stands for no image."""
    scores = logits.copy()
    scores[session.manifest.model.image_token_id] = -np.inf
    return int(np.argmax(scores))


def greedy(session: Session, ids: Any, count: int) -> list[int]:
    session.reset()
    logits = session.prefill(ids)
    tokens = []
    for _ in range(count):
        tokens.append(likeliest(session, logits))
        logits = session.step(tokens[-1])
    return tokens


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5)), min_size=2, max_size=8),
    seed=st.integers(0, 99),
)
def test_rows_of_any_lengths_give_the_greedy_tokens_of_single_sessions(
    pair: tuple[BatchSession, Session], lengths: list[tuple[int, int, int]], seed: int
) -> None:
    batch, session = pair
    spec = batch.manifest.model
    for row in range(batch.rows):  # what an example that failed has left
        if batch.tokens(row):
            batch.free(row)
    wanted: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    logits: dict[int, Any] = {}
    number_of: dict[int, int] = {}

    def step() -> None:
        tokens = {row: likeliest(session, scores) for row, scores in logits.items()}
        for row, token in tokens.items():
            found[number_of[row]].append(token)
        for row in list(tokens):
            if len(found[number_of[row]]) == lengths[number_of[row]][1]:
                batch.free(row)
                del logits[row], tokens[row]
        logits.update(batch.advance(tokens))

    for number, (prompt, count, steps) in enumerate(lengths):
        ids = text_ids(spec, prompt, seed=1000 * seed + number)
        wanted[number] = greedy(session, ids, count)
        while not batch.free_rows:
            step()
        row, scores = batch.prefill(ids)
        logits[row], number_of[row], found[number] = scores, number, []
        for _ in range(steps):
            step()
    while logits:
        step()
    assert found == wanted
    assert batch.free_rows == batch.rows


def test_questions_about_pictures_are_answered_as_by_single_sessions(pair: tuple[BatchSession, Session]) -> None:
    batch, session = pair
    if session.capacity is not None:
        pytest.skip("the default system text alone fills so small a KV cache")
    questions = [
        Question(
            f"What is in picture {number}?",
            (Image.new("RGB", (28 + 28 * number, 56), (40 * number, 90, 200)),) * (number % 3),
            GenerationOptions(max_new_tokens=3 + 2 * number, temperature=0.5 * (number % 2), seed=number, stop_ids=()),
        )
        for number in range(7)
    ]
    found = {done.number: done for done in batch.answers(questions)}
    assert len(found) == len(questions)
    for number, question in enumerate(questions):
        session.reset()
        answer = session.generate(question.prompt, question.images, question.options)
        text = "".join(answer)
        done = found[number].answer
        assert done is not None
        assert (done.text, done.token_ids, done.finish_reason) == (text, answer.token_ids, answer.finish_reason)
        assert done.statistics.prompt_tokens == answer.statistics.prompt_tokens
