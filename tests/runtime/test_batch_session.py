"""Several answers at once: each as if it were alone, whatever begins, ends or fails beside it. On toy models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy import toy_batch, toy_session

from mmm_export.errors import BatchFullError, ImageError, MmmError, OptionError, PromptError
from mmm_export.runtime import Answer, BatchSession, GenerationOptions, Question

ROOM = 300  # tokens of a KV cache that takes the default system text and a short answer
ENDLESS: dict[str, Any] = {"stop_ids": ()}


def alone(folder: Path, kinds: str, question: str, options: GenerationOptions) -> tuple[Any, ...]:
    """What a session says that has nothing else to do."""
    session, _ = toy_session(kinds, folder=folder, max_tokens=ROOM)
    answer = session.generate(question, options=options)
    list(answer)
    return outcome(answer)


def outcome(answer: Answer) -> tuple[Any, ...]:
    statistics = answer.statistics
    return (
        answer.text,
        answer.token_ids,
        answer.finish_reason,
        statistics.prompt_tokens,
        statistics.context_tokens,
        statistics.new_tokens,
    )


def run_to_end(batch: BatchSession) -> None:
    while batch.is_busy:
        batch.step()


OPTIONS = st.builds(
    GenerationOptions,
    max_new_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 9),
    stop=st.sampled_from([(), ("a",), ("e", "th")]),
    stop_ids=st.sampled_from([None, (), (260, 300, 310)]),
)
QUESTIONS = st.lists(
    st.tuples(st.text("abc def?", min_size=1, max_size=20).filter(str.strip), OPTIONS, st.integers(0, 4)),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("kinds", ["linear", "hybrid"])
@settings(deadline=None, max_examples=5)
@given(questions=QUESTIONS)
def test_every_answer_is_that_of_a_session_of_its_own_whenever_it_begins(
    folder: Path, kinds: str, questions: list[tuple[str, GenerationOptions, int]]
) -> None:
    batch, _ = toy_batch(kinds, rows=3, folder=folder, max_tokens=ROOM)
    answers = []
    pieces: dict[Answer, str] = {}

    def step() -> None:
        for answer, piece in batch.step():
            assert piece
            pieces[answer] = pieces.get(answer, "") + piece

    for question, options, steps in questions:
        while not batch.free_rows:
            step()
        answers.append(batch.add(question, options=options))
        for _ in range(steps):
            step()
    while batch.is_busy:
        step()
    for answer, (question, options, _) in zip(answers, questions, strict=True):
        assert outcome(answer) == alone(folder, kinds, question, options)
        assert pieces.get(answer, "") == answer.text
    assert batch.free_rows == 3


def test_one_run_serves_all_rows_and_ended_ones_take_no_part(folder: Path) -> None:
    batch, backend = toy_batch(rows=3, folder=folder)
    for length in (4, 2, 6):
        batch.add("Hi", options=GenerationOptions(max_new_tokens=length, **ENDLESS))
    run_to_end(batch)
    assert backend.steps == [(0, 1, 2), (0, 2), (0, 2), (2,), (2,)]  # the first token comes with the prompt
    assert all(toy.tokens == 0 for toy in backend.toys)


def test_the_lowest_free_row_is_taken_so_that_a_step_stays_small(folder: Path) -> None:
    batch, backend = toy_batch(rows=3, folder=folder)
    first = batch.add("Hi", options=GenerationOptions(max_new_tokens=9, **ENDLESS))
    batch.add("Hi", options=GenerationOptions(max_new_tokens=9, **ENDLESS))
    first.cancel()
    batch.add("Hi", options=GenerationOptions(max_new_tokens=3, **ENDLESS))
    batch.step()
    assert backend.steps == [(1, 0)]


def test_a_full_batch_refuses_a_question_until_an_answer_ends(folder: Path) -> None:
    batch, _ = toy_batch(rows=2, folder=folder)
    short = batch.add("Hi", options=GenerationOptions(max_new_tokens=2, **ENDLESS))
    batch.add("Hi", options=GenerationOptions(max_new_tokens=5, **ENDLESS))
    assert batch.free_rows == 0
    with pytest.raises(BatchFullError, match="no row"):
        batch.add("And?")
    batch.step()
    assert short.finish_reason == "length"
    assert batch.free_rows == 1
    batch.add("And?")


def test_an_answer_of_one_token_needs_no_step_and_its_piece_is_handed_out(folder: Path) -> None:
    batch, backend = toy_batch(rows=1, folder=folder)
    answer = batch.add("Hi", options=GenerationOptions(max_new_tokens=1, **ENDLESS))
    assert answer.finish_reason == "length"
    assert batch.free_rows == 1
    assert batch.is_busy == bool(answer.text)
    assert "".join(piece for _, piece in batch.step()) == answer.text
    assert backend.steps == []


def test_a_question_that_cannot_be_asked_leaves_its_row_free_and_the_others_as_they_were(folder: Path) -> None:
    options = GenerationOptions(max_new_tokens=6, **ENDLESS)
    batch, _ = toy_batch("hybrid", rows=2, folder=folder, max_tokens=ROOM)
    answer = batch.add("Who?", options=options)
    refused: list[tuple[type[MmmError], dict[str, Any]]] = [
        (PromptError, {"prompt": ""}),
        (PromptError, {"prompt": "long " * ROOM}),
        (ImageError, {"prompt": "See?", "images": [b"no image"]}),
        (OptionError, {"prompt": "Hi", "options": GenerationOptions(stop_ids=(100_000,))}),
    ]
    for error, arguments in refused:
        with pytest.raises(error):
            batch.add(**arguments)
        assert batch.free_rows == 1
        batch.step()
    run_to_end(batch)
    assert outcome(answer) == alone(folder, "hybrid", "Who?", options)


def test_a_prompt_that_fails_halfway_leaves_an_empty_row(folder: Path) -> None:
    batch, backend = toy_batch(rows=2, folder=folder)
    options = GenerationOptions(max_new_tokens=4, **ENDLESS)

    def fail(call: int) -> None:
        if call == 1:
            raise MmmError("no memory")

    backend.toys[0].after_call = fail
    with pytest.raises(MmmError, match="no memory"):
        batch.add("Who?", options=options)
    backend.toys[0].after_call = lambda call: None
    assert (batch.free_rows, backend.toys[0].tokens) == (2, 0)
    answer = batch.add("Who?", options=options)
    run_to_end(batch)
    assert outcome(answer) == alone(folder, "linear", "Who?", options)


def test_unusable_logits_end_one_answer_and_not_the_others(folder: Path) -> None:
    options = GenerationOptions(max_new_tokens=6, **ENDLESS)
    batch, backend = toy_batch(rows=3, folder=folder)
    answers = [batch.add(question, options=options) for question in ("a", "b", "c")]

    def spoil(logits: dict[int, Any]) -> None:
        if len(backend.steps) == 2:
            logits[1][7] = np.nan

    backend.after_step = spoil
    run_to_end(batch)
    assert answers[1].finish_reason == "failed"
    assert answers[1].error is not None
    assert "not usable" in str(answers[1].error)
    assert answers[1].statistics.new_tokens == 2
    for answer, question in ((answers[0], "a"), (answers[2], "c")):
        assert outcome(answer) == alone(folder, "linear", question, options)
    assert batch.free_rows == 3


@pytest.mark.parametrize("error", [MmmError("no memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_step_that_fails_may_be_tried_again(folder: Path, error: BaseException) -> None:
    options = GenerationOptions(max_new_tokens=6, temperature=1.0, seed=3, **ENDLESS)
    batch, backend = toy_batch(rows=2, folder=folder)
    answers = [batch.add(question, options=options) for question in ("a", "b")]

    def fail(logits: dict[int, Any]) -> None:
        if len(backend.steps) in (2, 3):
            raise error

    backend.after_step = fail
    failures = 0
    while batch.is_busy:
        try:
            batch.step()
        except (MmmError, KeyboardInterrupt):
            failures += 1
    assert failures == 2
    for answer, question in zip(answers, ("a", "b"), strict=True):
        assert outcome(answer) == alone(folder, "linear", question, options)


def test_an_interrupt_while_sampling_ends_one_answer_and_loses_no_token_of_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GenerationOptions(max_new_tokens=6, **ENDLESS)
    batch, _ = toy_batch(rows=3, folder=folder)
    answers = [batch.add(question, options=options) for question in ("a", "b", "c")]
    sampler: Any = answers[1]._sampler
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> int:
            raise KeyboardInterrupt

        patch.setattr(sampler, "choose", stop)
        with pytest.raises(KeyboardInterrupt):
            batch.step()
    run_to_end(batch)
    assert answers[1].finish_reason == "cancelled"
    for answer, question in ((answers[0], "a"), (answers[2], "c")):
        assert outcome(answer) == alone(folder, "linear", question, options)


def test_a_cancelled_answer_makes_room_at_once(folder: Path) -> None:
    batch, backend = toy_batch(rows=1, folder=folder)
    answer = batch.add("Hi", options=GenerationOptions(**ENDLESS))
    batch.step()
    answer.cancel()
    assert batch.free_rows == 1
    other = batch.add("Hi", options=GenerationOptions(max_new_tokens=3, **ENDLESS))
    run_to_end(batch)
    assert (answer.finish_reason, other.finish_reason) == ("cancelled", "length")
    assert answer.statistics.new_tokens == 2
    assert len(backend.steps) == 3


def test_the_context_of_an_ended_answer_is_told_as_it_was(folder: Path) -> None:
    batch, _ = toy_batch(rows=1, folder=folder)
    answer = batch.add("Hi", options=GenerationOptions(max_new_tokens=3, **ENDLESS))
    run_to_end(batch)
    before = answer.statistics
    assert before.context_tokens == before.prompt_tokens + 3
    batch.add("Something much longer than that?", options=GenerationOptions(**ENDLESS))
    assert answer.statistics == before


def test_images_reach_the_row_they_belong_to(folder: Path) -> None:
    options = GenerationOptions(max_new_tokens=5, **ENDLESS)
    pictures = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    batch, backend = toy_batch(rows=2, folder=folder)
    answers = [batch.add("What?", [picture], options) for picture in pictures]
    red, blue = (toy.read_state(0) for toy in backend.toys)
    assert not any(np.array_equal(red[name], blue[name]) for name in red)
    run_to_end(batch)
    for answer, picture in zip(answers, pictures, strict=True):
        session, _ = toy_session(folder=folder)
        single = session.generate("What?", [picture], options)
        list(single)
        assert answer.token_ids == single.token_ids


def test_a_list_of_questions_is_answered_as_rows_become_free(folder: Path) -> None:
    batch, backend = toy_batch(rows=2, folder=folder)
    drawn: list[int] = []

    def questions() -> Iterator[Question]:
        for number, length in enumerate((2, 9, 3, 2, 4)):
            drawn.append(number)
            yield Question(f"q{number}", options=GenerationOptions(max_new_tokens=length, **ENDLESS))

    ends = []
    for done in batch.answers(questions()):
        assert done.answer is not None
        assert len(drawn) <= len(ends) + 3  # no more are drawn than there is room for
        ends.append(done.number)
        expected = alone(folder, "linear", f"q{done.number}", done.question.options or GenerationOptions())
        assert outcome(done.answer) == expected
    assert sorted(ends) == [0, 1, 2, 3, 4]
    assert ends[0] == 0
    assert ends[-1] == 1  # the long one held its row while the other served three
    assert max(map(len, backend.steps)) == 2


def test_a_list_goes_on_after_a_question_that_cannot_be_answered(folder: Path) -> None:
    batch, backend = toy_batch(rows=2, folder=folder)
    options = GenerationOptions(max_new_tokens=3, **ENDLESS)

    def spoil(logits: dict[int, Any]) -> None:
        if len(backend.steps) == 1:
            logits[0][:] = np.inf

    backend.after_step = spoil
    found = {done.number: done for done in batch.answers(Question(text, options=options) for text in ("a", "", "c"))}
    assert sorted(found) == [0, 1, 2]
    assert found[0].answer is not None
    assert found[0].answer.finish_reason == "failed"
    assert found[0].error is found[0].answer.error is not None
    assert found[1].answer is None
    assert isinstance(found[1].error, PromptError)
    assert found[2].error is None
    assert found[2].answer is not None
    assert outcome(found[2].answer) == alone(folder, "linear", "c", options)


def test_leaving_a_list_early_frees_the_rows_of_answers_under_way(folder: Path) -> None:
    batch, _ = toy_batch(rows=3, folder=folder)
    lengths = (2, 50, 50, 50)
    questions = [Question("Hi", options=GenerationOptions(max_new_tokens=length, **ENDLESS)) for length in lengths]
    found = batch.answers(questions)
    assert next(found).number == 0
    found.close()  # type: ignore[attr-defined]
    assert batch.free_rows == 3


def test_a_list_does_not_wait_for_rows_that_nobody_will_free(folder: Path) -> None:
    batch, _ = toy_batch(rows=1, folder=folder)
    row, _ = batch.prefill([5, 6])
    with pytest.raises(BatchFullError):
        next(batch.answers([Question("Hi")]))
    batch.free(row)
    assert len(list(batch.answers([Question("Hi", options=GenerationOptions(max_new_tokens=2))]))) == 1


def test_a_closed_batch_says_so(folder: Path) -> None:
    batch, backend = toy_batch(folder=folder)
    with batch as same:
        assert same is batch
    assert backend.is_closed
    batch.close()
    uses: list[Any] = [
        lambda: batch.add("Hi"),
        batch.step,
        lambda: batch.prefill([5]),
        lambda: batch.advance({}),
        lambda: list(batch.answers([Question("Hi")])),
    ]
    for use in uses:
        with pytest.raises(MmmError, match="closed"):
            use()


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, 10**6])
def test_a_number_of_rows_out_of_range_is_refused(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rows is out of range"):
        BatchSession.open(tmp_path, rows=rows)
