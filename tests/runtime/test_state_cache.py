"""The state cache: what it hands out equals reading the prompt, and what is wrong in its folder never reaches an answer."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import text_ids, tiles, toy_manifest, toy_session

from mmm_export.errors import MmmError, OptionError
from mmm_export.runtime.generation import Generation, Turn
from mmm_export.runtime.generation_options import GenerationOptions
from mmm_export.runtime.state_cache import StateCache, boundaries_of, read_prompt

START = 7  # stands for <|im_start|>


class Letters:
    def push(self, token_id: int) -> str:
        return f"{token_id},"

    def flush(self) -> str:
        return ""


def prompt(question: int, *, image: int = 0, kinds: Any = "linear", length: int = 12) -> tuple[Any, Any]:
    """A system text, an image and a question, as ids and tiles."""
    spec = toy_manifest(kinds).model
    system, asked = text_ids(spec, 9, seed=100), text_ids(spec, length, seed=question)
    image_ids = np.full(2 * spec.vision.tokens_per_tile, spec.image_token_id)
    ids = np.concatenate([[START], system, [START], image_ids, asked]).astype(np.int64)
    return ids, tiles(spec, 2) + image


def ask(folder: Path, question: int, *, image: int = 0, kinds: Any = "linear", **cache: Any) -> tuple[Generation, Any]:
    session, backend = toy_session(kinds)
    ids, pixels = prompt(question, image=image, kinds=kinds)
    store = StateCache(folder, session.manifest, **cache)
    turn = Turn(ids, pixels, 0.0, store, START)
    options = GenerationOptions(max_new_tokens=4, stop_ids=())
    answer = Generation(session._context, turn, options, frozenset(), Letters())
    list(answer)
    return answer, backend


def plain(question: int, *, image: int = 0, kinds: Any = "linear") -> tuple[int, ...]:
    session, _ = toy_session(kinds)
    options = GenerationOptions(max_new_tokens=4, stop_ids=())
    answer = Generation(
        session._context, Turn(*prompt(question, image=image, kinds=kinds), 0.0), options, frozenset(), Letters()
    )
    list(answer)
    return answer.token_ids


@pytest.mark.parametrize("kinds", ["linear", "hybrid"])
def test_a_second_question_about_an_image_skips_its_prefill_and_answers_as_without_a_cache(
    tmp_path: Path, kinds: str
) -> None:
    first, one = ask(tmp_path, 1, kinds=kinds)
    second, two = ask(tmp_path, 2, kinds=kinds)
    assert first.statistics.cached_tokens == 0
    assert second.statistics.cached_tokens == len(prompt(2)[0]) - 12
    assert len(one.tile_calls) == 1
    assert two.tile_calls == []  # the vision graph did not run
    assert sum(two.calls) == 12 + 3  # the question, and the answer's tokens but the last
    assert first.token_ids == plain(1, kinds=kinds)
    assert second.token_ids == plain(2, kinds=kinds)


def test_another_image_shares_only_the_system_text(tmp_path: Path) -> None:
    ask(tmp_path, 1)
    other, backend = ask(tmp_path, 1, image=3)
    assert other.statistics.cached_tokens == 10
    assert sum(backend.tile_calls) == 2
    assert other.token_ids == plain(1, image=3)


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    ask(tmp_path, 1)
    manifest = toy_manifest("linear", sha="b" * 64)
    assert StateCache(tmp_path, manifest).longest(*prompt(1)) is None


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "renamed"])
def test_damaged_entries_are_reported_removed_and_never_used(tmp_path: Path, damage: str) -> None:
    ask(tmp_path, 1)
    files = sorted(tmp_path.glob("*.state"))
    assert len(files) == 2
    for path in files:
        content = bytearray(path.read_bytes())
        if damage == "truncated":
            content = content[: len(content) // 2]
        elif damage == "changed":
            content[-3] ^= 255
        elif damage == "empty":
            content = bytearray()
        path.write_bytes(bytes(content))
    if damage == "renamed":  # a whole state under the name of another prefix
        a, b = (path.read_bytes() for path in files)
        files[0].write_bytes(b)
        files[1].write_bytes(a)
    told: list[str] = []
    answer, _ = ask(tmp_path, 2, report=told.append)
    assert answer.statistics.cached_tokens == 0
    assert answer.token_ids == plain(2)
    assert len(told) == 2
    assert all("ignored" in text for text in told)


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    (tmp_path / "0.state").write_text("keep")
    ask(tmp_path, 1, max_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.state", "notes.txt"]


def test_the_folder_stays_within_its_bytes_and_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    ask(tmp_path, 1)
    one = max(path.stat().st_size for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    ask(tmp_path, 2)  # uses the longer of the two; the next one uses the system text, and stores its image
    ask(tmp_path, 1, image=5, max_bytes=2 * one)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * one
    newest, _ = ask(tmp_path, 3, image=5)
    evicted, _ = ask(tmp_path, 3)
    assert newest.statistics.cached_tokens == len(prompt(3)[0]) - 12
    assert evicted.statistics.cached_tokens == 10  # the system text alone


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    answer, _ = ask(tmp_path / "file" / "below", 1, report=told.append)
    assert answer.token_ids == plain(1)
    assert told
    assert all("cannot be written" in text for text in told)
    with pytest.raises(OptionError, match="no folder"):
        StateCache(tmp_path / "file", toy_manifest())
    with pytest.raises(OptionError, match="max_bytes"):
        StateCache(tmp_path, toy_manifest(), max_bytes=0)


@pytest.mark.parametrize("call", range(4))
def test_a_failure_while_reading_leaves_the_context_empty(tmp_path: Path, call: int) -> None:
    session, backend = toy_session()

    def fail(number: int) -> None:
        if number == call:
            raise MmmError("no memory")

    backend.before_call = fail
    with pytest.raises(MmmError, match="no memory"):
        read_prompt(session._context, StateCache(tmp_path, session.manifest), *prompt(1), [10])
    assert session.tokens == 0
    backend.before_call = lambda number: None
    ids, pixels = prompt(1)
    wanted = toy_session()[0].prefill(ids, pixels)
    np.testing.assert_array_equal(session.prefill(ids, pixels), wanted)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_boundaries_and_chunks_give_the_logits_of_one_prefill(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ids, pixels = prompt(1)
    boundaries = data.draw(st.lists(st.integers(-3, len(ids) + 3), max_size=5))
    folder = tmp_path_factory.mktemp("cache")
    wanted = toy_session()[0].prefill(ids, pixels)
    for _ in range(2):
        session, _ = toy_session(chunk_tokens=data.draw(st.integers(1, 40)))
        logits, cached = read_prompt(session._context, StateCache(folder, session.manifest), ids, pixels, boundaries)
        np.testing.assert_allclose(logits, wanted, rtol=1e-6)  # float64 inside, states rounded to float32 at each cut
        assert 0 <= cached < len(ids)


def test_boundaries_lie_behind_the_system_text_and_the_last_image() -> None:
    ids = np.array([1, START, 5, 5, START, 9, 9, 4, 9, 3, START, 3])
    assert boundaries_of(ids, 9, START) == (4, 9)
    assert boundaries_of(ids, 8, None) == ()


def _many(folder: Path, seed: int) -> None:
    for question in range(6):
        answer, _ = ask(folder, question, image=(question + seed) % 3, max_bytes=200_000, report=_refuse)
        assert answer.token_ids == plain(question, image=(question + seed) % 3)


def _refuse(text: str) -> None:
    raise AssertionError(text)


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_many, args=(tmp_path, seed)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
