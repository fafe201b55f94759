"""Feeding tokens: chunks, images, room, and what is left after a failure. On a toy model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyBackend, text_ids, tiles, toy_session

from mmm_export.errors import MmmError, PromptError
from mmm_export.runtime import Session

KINDS = ["linear", "hybrid", "teacher"]


def same_state(a: ToyBackend, b: ToyBackend) -> bool:
    left, right = a.read_state(a.tokens), b.read_state(b.tokens)
    return a.tokens == b.tokens and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kinds", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=5),
    chunk_tokens=st.integers(1, 50),
    images=st.integers(0, 3),
)
def test_result_does_not_depend_on_calls_or_chunks(kinds: str, cuts: list[int], chunk_tokens: int, images: int) -> None:
    whole, one = toy_session(kinds, chunk_tokens=1000)
    spec = whole.manifest.model
    ids = text_ids(spec, 40)
    marks = images * spec.vision.tokens_per_tile
    ids[5 : 5 + marks] = spec.image_token_id
    pixels = tiles(spec, images)
    wanted = whole.prefill(ids, pixels)
    parts, other = toy_session(kinds, chunk_tokens=chunk_tokens)
    # Images go with the call that holds their tokens, so no call may end among them.
    ends = [cut for cut in sorted({*cuts, 40}) if not 5 < cut < 5 + marks and cut > 0]
    for begin, end in zip([0, *ends], ends, strict=False):
        has_images = images and begin <= 5 < end
        found = parts.prefill(ids[begin:end], pixels if has_images else None)
    assert np.array_equal(found, wanted)  # the toy reads token by token, so not even rounding may differ
    assert same_state(one, other)
    assert max(other.calls) <= chunk_tokens


def test_step_equals_prefill_of_one_token() -> None:
    a, _ = toy_session("hybrid")
    b, _ = toy_session("hybrid")
    assert np.array_equal(a.prefill([5, 6, 7]), [b.step(token) for token in (5, 6, 7)][-1])
    assert a.tokens == b.tokens == 3


def test_logits_are_one_float32_row_of_the_vocabulary() -> None:
    session, _ = toy_session()
    logits = session.prefill([3])
    assert logits.dtype == np.float32
    assert logits.shape == (session.manifest.model.vocab_size,)


def test_image_tiles_are_computed_a_few_at_a_time() -> None:
    session, backend = toy_session(chunk_tokens=7)
    spec = session.manifest.model
    ids = np.full(11 * spec.vision.tokens_per_tile, spec.image_token_id)
    session.prefill(ids, tiles(spec, 11))
    assert backend.tile_calls == [4, 4, 3]


def test_reset_gives_the_results_of_a_new_session() -> None:
    session, _ = toy_session("hybrid")
    first = session.prefill([4, 5, 6])
    session.reset()
    assert session.tokens == 0
    assert np.array_equal(session.prefill([4, 5, 6]), first)


@pytest.mark.parametrize(
    "container", [list, tuple, np.array, lambda x: np.array([x], np.int32), lambda x: np.array(x, np.uint8)]
)
def test_ids_come_in_any_integer_container(container: Any) -> None:
    session, _ = toy_session()
    wanted, _ = toy_session()
    assert np.array_equal(session.prefill(container([7, 8, 9])), wanted.prefill([7, 8, 9]))


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([], "0 token ids"),
        ([1.5], "float64"),
        (["a"], "<U1"),
        ([True], "bool"),
        ([[1, 2], [3, 4]], "(2, 2)"),
        ([[1], [2, 3]], "inhomogeneous"),
        ([3, -1], "id -1 at position 1"),
        ([3, 4, 512], "id 512 at position 2"),
        ([2**70], "object"),
    ],
)
def test_unusable_ids_are_refused_and_told(ids: Any, found: str) -> None:
    session, backend = toy_session()
    with pytest.raises(PromptError) as caught:
        session.prefill(ids)
    assert found in str(caught.value)
    assert backend.calls == []


def test_ids_of_special_text_embeddings_are_in_the_vocabulary() -> None:
    session, backend = toy_session(special_tokens=2)
    backend.table = np.zeros((514, session.manifest.model.hidden_size))
    session.prefill([512, 513])
    with pytest.raises(PromptError, match="outside the vocabulary"):
        session.prefill([514])


@pytest.mark.parametrize(("marks", "count"), [(0, 1), (1, 0), (3, 1), (5, 1), (4, 2), (4, None)])
def test_image_tokens_that_do_not_match_the_tiles_change_nothing(marks: int, count: int | None) -> None:
    session, backend = toy_session(chunk_tokens=2)
    spec = session.manifest.model
    assert spec.vision.tokens_per_tile == 4
    session.prefill([5])
    ids = [5, *[spec.image_token_id] * marks]
    with pytest.raises(PromptError, match="do not match"):
        session.prefill(ids, None if count is None else tiles(spec, count))
    assert session.tokens == 1
    assert backend.calls == [1]


@pytest.mark.parametrize(
    "pixels", [np.zeros((1, 3, 55, 56)), np.zeros((3, 56, 56)), np.zeros((1, 3, 56, 56), np.uint8), [[1.0]], "x"]
)
def test_pixel_values_of_another_shape_or_type_are_refused(pixels: Any) -> None:
    session, _ = toy_session()
    with pytest.raises(PromptError, match="pixel values"):
        session.prefill([session.manifest.model.image_token_id] * 4, pixels)


def test_prompt_past_the_kv_capacity_changes_nothing() -> None:
    session, backend = toy_session("hybrid", max_tokens=10)
    session.prefill([5] * 6)
    with pytest.raises(PromptError) as caught:
        session.prefill([5] * 5)
    message = str(caught.value)
    assert "6 tokens in the context and 5 more" in message
    assert "at most 10" in message
    assert "--max-tokens 11" in message
    assert session.tokens == 6
    session.prefill([5] * 4)  # the last row is usable
    assert session.tokens == session.capacity == 10
    with pytest.raises(PromptError):
        session.step(5)
    assert backend.calls == [6, 4]


def test_linear_model_has_no_capacity() -> None:
    session, _ = toy_session("linear", max_tokens=4)
    session.prefill([5] * 30)
    assert session.capacity is None


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("failing_call", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before_call", "after_call"])
def test_failed_prefill_leaves_the_state_of_before(
    kinds: str, before: int, failing_call: int, error: type[BaseException], when: str
) -> None:
    session, backend = toy_session(kinds, chunk_tokens=4)
    expected, untouched = toy_session(kinds, chunk_tokens=4)
    for each in (session, expected):
        if before:
            each.prefill([7] * before)
    first = len(backend.calls)

    def fail(call: int) -> None:
        if call == first + failing_call:
            raise error

    setattr(backend, when, fail)
    with pytest.raises(error):
        session.prefill([9] * 12)
    assert session.tokens == before
    assert same_state(backend, untouched)
    assert np.array_equal(session.prefill([3, 4]), expected.prefill([3, 4]))


def test_interrupt_just_after_a_single_chunk_leaves_its_tokens_in_the_context() -> None:
    session, backend = toy_session()
    expected, _ = toy_session()

    def interrupt(call: int) -> None:
        raise KeyboardInterrupt

    backend.after_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        session.prefill([7, 8])
    backend.after_call = lambda call: None
    expected.prefill([7, 8])
    assert session.tokens == 2
    assert np.array_equal(session.step(3), expected.step(3))


def test_second_interrupt_while_undoing_asks_for_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    session, backend = toy_session(chunk_tokens=2)
    session.prefill([5])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    backend.after_call = lambda call: interrupt() if call == 2 else None
    with monkeypatch.context() as patch:
        patch.setattr(backend, "write_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.prefill([9] * 6)
    with pytest.raises(MmmError, match="lost"):
        session.step(5)
    with pytest.raises(MmmError, match="lost"):
        session.save_state("never-written")
    session.reset()
    fresh, _ = toy_session()
    assert np.array_equal(session.step(5), fresh.step(5))


def test_closed_session_says_so() -> None:
    session, _ = toy_session()
    with session as same:
        assert same is session
    session.close()
    for use in (session.reset, lambda: session.prefill([5]), lambda: session.tokens):
        with pytest.raises(MmmError, match="closed"):
            use()


def test_state_buffers_keep_their_addresses() -> None:
    session, backend = toy_session("hybrid")
    addresses = [array.ctypes.data for slot in backend.pool.slots for array in slot.values()]
    session.prefill([5] * 20)
    session.step(5)
    session.reset()
    session.step(5)
    assert addresses == [array.ctypes.data for slot in backend.pool.slots for array in slot.values()]


def test_a_nan_in_the_kv_cache_is_gone_after_a_reset() -> None:
    session, backend = toy_session("hybrid")
    for slot in backend.pool.slots:
        for array in slot.values():
            array[...] = np.nan
    session.reset()
    assert np.isfinite(session.prefill([5, 6])).all()
    state = backend.pool.past(0)
    assert all(np.isfinite(array).all() for array in state.values())


def test_state_bytes_are_those_of_one_sequence() -> None:
    session, _ = toy_session("hybrid", max_tokens=10)
    spec = session.manifest.model
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.kinds.count("mha")) == (4, 2, 16, 1)
    ssm, conv, cache = 4 * 16 * 16 * 4, 128 * 1 * 4, 2 * 2 * 10 * 16 * 4
    assert session.state_bytes == 3 * (ssm + conv) + cache


def test_bfloat16_states_take_two_bytes() -> None:
    import dataclasses

    session, backend = toy_session("linear")
    half = Session(Path(), dataclasses.replace(session.manifest, dtype="bf16"), backend)
    assert session.state_bytes - half.state_bytes == 4 * 128 * 2  # the conv states of four layers
