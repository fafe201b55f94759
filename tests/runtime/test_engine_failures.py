"""When TensorRT or the GPU fails, or somebody presses Ctrl-C, a session on an engine is whole, asks for a reset, or is closed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import CUresult
from fake_engine import FakeMachine
from toy import tiles

from mmm_export.errors import EngineError, MmmError
from mmm_export.runtime import Session


def wanted_after(engine: Path, machine: FakeMachine, *calls: list[int]) -> Any:
    with Session.open(engine) as session:
        for ids in calls:
            logits = session.prefill(ids)
    machine.behaviour.runs = 0
    return logits


def test_refused_run_asks_for_a_reset_and_names_the_reason(engine: Path, machine: FakeMachine, tmp_path: Path) -> None:
    right = wanted_after(engine, machine, [5, 6], [7])
    with Session.open(engine) as session:
        session.prefill([5, 6])
        session.save_state(tmp_path / "state")
        machine.behaviour.fail_enqueue = 1
        with pytest.raises(MmmError) as caught:
            session.prefill([7])
        assert "the plugin refused the call" in (caught.value.found or "")
        assert session.tokens == 2
        for call in (lambda: session.prefill([7]), lambda: session.save_state(tmp_path / "other")):
            with pytest.raises(MmmError, match="lost"):
                call()
        machine.behaviour.fail_enqueue = None
        session.load_state(tmp_path / "state")
        np.testing.assert_array_equal(session.prefill([7]), right)
        machine.behaviour.fail_enqueue = machine.behaviour.runs
        with pytest.raises(MmmError):
            session.prefill([8])
        machine.behaviour.fail_enqueue = None
        session.reset()
        session.prefill([5, 6])
        np.testing.assert_array_equal(session.prefill([7]), right)


def test_refused_first_run_leaves_an_empty_session_that_works(engine: Path, machine: FakeMachine) -> None:
    right = wanted_after(engine, machine, [5, 6])
    with Session.open(engine) as session:
        machine.behaviour.fail_enqueue = 0
        with pytest.raises(MmmError):
            session.prefill([5, 6])
        machine.behaviour.fail_enqueue = None
        assert session.tokens == 0
        np.testing.assert_array_equal(session.prefill([5, 6]), right)


def test_prompt_of_several_chunks_that_fails_puts_the_state_back(engine: Path, machine: FakeMachine) -> None:
    right = wanted_after(engine, machine, [5, 6], [7])
    for failing in (1, 2):  # its first chunk, its second
        machine.behaviour.runs = 0
        with Session.open(engine) as session:
            session.prefill([5, 6])
            machine.behaviour.fail_enqueue = failing
            with pytest.raises(MmmError):
                session.prefill(list(range(3, 20)))
            machine.behaviour.fail_enqueue = None
            assert session.tokens == 2
            np.testing.assert_array_equal(session.prefill([7]), right)


def test_refused_launch_of_a_recorded_step_is_told(engine: Path, machine: FakeMachine) -> None:
    with Session.open(engine) as session:
        session.prefill([5, 6])
        for token in (3, 4, 5, 6):
            session.step(token)
        machine.driver.fails["cuGraphLaunch"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
        with pytest.raises(MmmError, match="cuGraphLaunch") as caught:
            session.step(7)
        assert "OUT_OF_MEMORY" in (caught.value.found or "")
        assert session.tokens == 6
        np.testing.assert_array_equal(session.step(7), wanted_after(engine, machine, [5, 6], [3], [4], [5], [6], [7]))


def test_failed_kernel_ends_the_session_but_not_its_closing(engine: Path, machine: FakeMachine) -> None:
    session = Session.open(engine)
    session.prefill([5, 6])
    machine.behaviour.fail_kernel = 1
    with pytest.raises(MmmError, match="cuStreamSynchronize"):
        session.prefill([7])
    for call in (lambda: session.prefill([7]), session.reset):
        with pytest.raises(MmmError, match="the GPU failed"):
            call()
    session.close()
    with pytest.raises(MmmError, match="closed"):
        session.prefill([7])


@pytest.mark.parametrize("warm", [0, 1, 2, 3, 4])
def test_ctrl_c_during_a_run_waits_until_it_is_whole(warm: int, engine: Path, machine: FakeMachine) -> None:
    right = wanted_after(engine, machine, [5, 6], *[[3 + i] for i in range(warm)], [7], [8])
    with Session.open(engine) as session:
        session.prefill([5, 6])
        for i in range(warm):  # plain steps, steps that are being recorded, and launched ones
            session.step(3 + i)
        machine.behaviour.on_enqueue = lambda: os.kill(os.getpid(), signal.SIGINT)
        if warm < 4:
            with pytest.raises(KeyboardInterrupt):
                session.step(7)
        else:
            session.step(7)  # launched: nothing is enqueued by us any more
        machine.behaviour.on_enqueue = lambda: None
        assert session.tokens == 3 + warm  # the step took effect, and the context knows it
        np.testing.assert_array_equal(session.step(8), right)


def test_refused_image_leaves_the_context_alone(engine: Path, machine: FakeMachine) -> None:
    with Session.open(engine) as session:
        spec = session.manifest.model
        ids = [5, *[spec.image_token_id] * spec.vision.tokens_per_tile]
        machine.driver.fails["cuMemcpyHtoDAsync"] = CUresult.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(MmmError):
            session.prefill(ids, tiles(spec, 1))
        assert session.tokens == 0
        session.prefill(ids, tiles(spec, 1))


def test_more_tokens_than_the_profile_takes_are_refused_before_anything_runs(
    engine: Path, machine: FakeMachine
) -> None:
    with Session.open(engine) as session:
        backend: Any = session._backend
        with pytest.raises(EngineError, match="so many tokens"):
            backend.advance(np.full(9, 5), None)
        assert backend.advance(np.full(8, 5), None).shape == (session.manifest.model.vocab_size,)


@pytest.mark.parametrize("call", ["cuMemAlloc", "cuMemAllocHost", "cuStreamCreate"])
def test_failing_allocation_frees_what_was_taken(call: str, engine: Path, machine: FakeMachine) -> None:
    machine.driver.fails[call] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(MmmError, match=call):
        Session.open(engine)
    assert not machine.driver.device_memory
    assert not machine.driver.host_memory
    assert machine.driver.retained == 0
