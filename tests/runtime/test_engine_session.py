"""Sessions on an engine folder, by a fake TensorRT that computes with ONNX Runtime: equal to sessions on the bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import PREFILL_TOKENS, FakeMachine, install, write_engine
from toy import text_ids, tiles

from mmm_export.errors import OptionError
from mmm_export.runtime import BatchSession, GenerationOptions, Question, Session

CAPACITY = 256


@pytest.fixture(scope="module", params=["linear", "hybrid"])
def bundle(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> Path:
    return make_bundle(
        make_checkpoint(request.param), max_tokens=CAPACITY, dtype="fp32", golden=True
    )  # as test_golden's


@pytest.fixture(scope="module")
def engine(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "engine"
    write_engine(bundle, folder)
    return folder


def prompt(session: Session, length: int = 21) -> tuple[Any, Any]:
    """Ids with the image tokens of one tile in the middle, and the tile."""
    spec = session.manifest.model
    text = text_ids(spec, length)
    marks = np.full(spec.vision.tokens_per_tile, spec.image_token_id)
    return np.concatenate([text[:9], marks, text[9:]]), tiles(spec, 1)


def greedy(session: Session, logits: Any, count: int) -> tuple[list[int], list[Any]]:
    tokens, seen = [], [logits]
    for _ in range(count):
        order = np.argsort(-seen[-1], kind="stable")
        tokens.append(int(next(t for t in order if t != session.manifest.model.image_token_id)))
        seen.append(session.step(tokens[-1]))
    return tokens, seen


def test_engine_writes_the_tokens_of_the_bundle(bundle: Path, engine: Path, machine: FakeMachine) -> None:
    with Session.open(bundle, threads=1, chunk_tokens=PREFILL_TOKENS) as right, Session.open(engine) as session:
        ids, pixels = prompt(session)
        wanted = greedy(right, right.prefill(ids, pixels), 8)
        found = greedy(session, session.prefill(ids, pixels), 8)
        assert found[0] == wanted[0]
        # The very same graphs on the very same chunks: whatever differs is ours.
        np.testing.assert_array_equal(np.stack(found[1]), np.stack(wanted[1]))
        left, there = right._backend.read_state(right.tokens), session._backend.read_state(session.tokens)  # type: ignore[union-attr]
        for name, array in left.items():
            np.testing.assert_array_equal(there[name], array, err_msg=name)


def test_a_batch_of_one_row_answers_as_the_session_and_more_rows_are_refused(
    engine: Path, machine: FakeMachine
) -> None:
    options = GenerationOptions(max_new_tokens=4, stop_ids=())
    with Session.open(engine) as session:
        wanted = "".join(session.generate("Hi", options=options))
    with BatchSession.open(engine, rows=1) as batch:
        (done,) = batch.answers([Question("Hi", options=options)])
    assert done.answer is not None
    assert done.answer.text == wanted
    with pytest.raises(OptionError, match="one sequence at a time"):
        BatchSession.open(engine, rows=2)


def test_prompt_is_read_in_chunks_that_the_engine_takes(engine: Path, machine: FakeMachine) -> None:
    with Session.open(engine, chunk_tokens=512) as session:
        session.prefill(text_ids(session.manifest.model, 2 * PREFILL_TOKENS + 3))
    assert [shape[1] for shape in machine.behaviour.shapes] == [PREFILL_TOKENS, PREFILL_TOKENS, 3]


def test_decode_is_recorded_once_for_each_side_and_then_launched(engine: Path, machine: FakeMachine) -> None:
    with Session.open(engine) as session:
        session.prefill([5, 6, 7])
        for token in range(10):
            session.step(token + 3)
        backend: Any = session._backend
        assert backend.graphs.stages == ("recorded", "recorded")
    assert machine.driver.launches == 8
    assert len(machine.driver.graphs) == 2
    assert machine.behaviour.plain_runs == 3  # the prompt, and one warming step a side


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx"])
def test_steps_that_cannot_be_recorded_run_plainly_with_the_same_result(
    bundle: Path, flavor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_engine(bundle, tmp_path / "engine", flavor=flavor, version="1.7.1.116")
    outcomes = []
    for broken in (False, True):
        machine = install(monkeypatch, flavor=flavor, version="1.7.1")
        machine.behaviour.capture_fails = broken
        machine.behaviour.uncapturable = broken
        with Session.open(tmp_path / "engine") as session:
            outcomes.append(greedy(session, session.prefill([5, 6, 7]), 8))
            backend: Any = session._backend
            assert backend.graphs.stages == (("plain", "plain") if broken else ("recorded", "recorded"))
            assert (backend.graphs.reason is not None) == broken
    assert outcomes[0][0] == outcomes[1][0]
    np.testing.assert_array_equal(np.stack(outcomes[0][1]), np.stack(outcomes[1][1]))


@pytest.mark.parametrize("change", [{"kv_in_place": False}, {"decode_profile": False}, {"least_prefill": 4}])
def test_other_engines_of_the_bundle_give_the_same_logits(
    change: dict[str, Any], bundle: Path, engine: Path, machine: FakeMachine, tmp_path: Path
) -> None:
    write_engine(bundle, tmp_path / "other", **change)
    with Session.open(engine) as right, Session.open(tmp_path / "other") as session:
        ids, pixels = prompt(session, 20)
        wanted, found = right.prefill(ids, pixels), session.prefill(ids, pixels)
        for token in (3, 4, 5, 6, 7):
            wanted, found = np.append(wanted, right.step(token)), np.append(found, session.step(token))
    # Padding changes the order of sums; nothing else may differ.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_saved_states_move_between_a_bundle_and_its_engine(
    bundle: Path, engine: Path, machine: FakeMachine, tmp_path: Path
) -> None:
    with Session.open(bundle, threads=1, chunk_tokens=PREFILL_TOKENS) as right, Session.open(engine) as session:
        ids, pixels = prompt(session)
        wanted = right.prefill(ids, pixels)
        right.save_state(tmp_path / "bundle.state")
        wanted = greedy(right, wanted, 4)
        session.step(9)  # is forgotten
        session.load_state(tmp_path / "bundle.state")
        assert session.tokens == len(ids)
        session.save_state(tmp_path / "engine.state")
        assert (tmp_path / "engine.state").read_bytes() == (tmp_path / "bundle.state").read_bytes()
        logits = [session.step(token) for token in wanted[0]]
        np.testing.assert_array_equal(np.stack(logits), np.stack(wanted[1][1:]))


def test_reset_session_answers_like_a_new_one(engine: Path, machine: FakeMachine) -> None:
    with Session.open(engine) as session:
        first = session.prefill([5, 6, 7])
        session.step(8)
        session.reset()
        assert session.tokens == 0
        np.testing.assert_array_equal(session.prefill([5, 6, 7]), first)


def test_images_of_more_tiles_than_the_engine_takes_are_seen_in_parts(
    bundle: Path, engine: Path, machine: FakeMachine
) -> None:
    with Session.open(bundle, threads=1) as right, Session.open(engine) as session:
        pixels = tiles(session.manifest.model, 3)
        found: Any = session._backend.image_features(pixels)  # type: ignore[union-attr]
        wanted: Any = right._backend.image_features(pixels)  # type: ignore[union-attr]
    # fp32 on both sides, tiles two and one at a time instead of three.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_engine_answers_a_question_about_an_image(bundle: Path, engine: Path, machine: FakeMachine) -> None:
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    options = GenerationOptions(max_new_tokens=6, stop_ids=())
    texts = []
    for folder in (bundle, engine):
        with Session.open(folder, chunk_tokens=PREFILL_TOKENS) as session:
            answer = session.generate("What is it?", [picture], options)
            list(answer)
            texts.append(answer.token_ids)
    assert texts[0] == texts[1]


def test_closed_session_gives_all_memory_back(engine: Path, machine: FakeMachine) -> None:
    session = Session.open(engine)
    session.prefill([5, 6])
    session.close()
    session.close()
    assert not machine.driver.device_memory
    assert not machine.driver.host_memory
    assert machine.driver.retained == 0
