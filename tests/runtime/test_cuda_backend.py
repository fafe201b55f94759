"""The backend that keeps states on a device, run in the CPU provider: the same code, memory and bindings, but for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import text_ids, tiles

from mmm_export.errors import MmmError
from mmm_export.manifest import read_manifest
from mmm_export.operator_library import CPU_PROVIDER
from mmm_export.runtime import GenerationOptions, Session, backends, device_values
from mmm_export.runtime.onnxruntime_cuda_backend import OnnxRuntimeCudaBackend
from mmm_export.runtime.opening import CUDA_CHUNK_TOKENS, DEFAULT_CHUNK_TOKENS, open_model
from mmm_export.runtime.token_rows import TokenRows

CAPACITY = 192


@pytest.fixture(scope="module", params=["linear", "hybrid", "linear-all-logits"])
def bundle(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> Path:
    kinds, _, logits = str(request.param).partition("-")
    more = {"logits": "all"} if logits else {}
    return make_bundle(make_checkpoint(kinds), max_tokens=CAPACITY, **more)


def device_session(bundle: Path) -> Session:
    manifest = read_manifest(bundle)
    backend = OnnxRuntimeCudaBackend(bundle, manifest, threads=1, provider=CPU_PROVIDER, device="cpu")
    return Session(bundle, manifest, backend, chunk_tokens=16)


@pytest.fixture
def both(bundle: Path) -> Iterator[tuple[Session, Session]]:
    with (
        device_session(bundle) as device,
        Session.open(bundle, threads=1, chunk_tokens=16, kernels="none") as host,
    ):
        yield device, host


def prompt(session: Session) -> tuple[Any, Any]:
    spec = session.manifest.model
    ids = text_ids(spec, 50)
    ids[10 : 10 + 2 * spec.vision.tokens_per_tile] = spec.image_token_id
    return ids, tiles(spec, 2)


def test_no_memory_for_a_chunk_is_told_and_the_session_goes_on(
    both: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, host = both
    device.prefill([3, 4])
    host.prefill([3, 4])
    with monkeypatch.context() as patch:

        def refuse(*_: Any) -> Any:
            raise RuntimeError("Failed to allocate memory for requested buffer\nand more")

        patch.setattr(device_values.onnxruntime.OrtValue, "ortvalue_from_shape_and_type", refuse)
        with pytest.raises(MmmError, match="the device has no memory") as error:
            device.prefill(text_ids(device.manifest.model, 7))
        assert error.value.found == "Failed to allocate memory for requested buffer"
        assert "bytes for" in str(error.value.wanted)
    np.testing.assert_array_equal(device.step(5), host.step(5))


def test_chunks_of_many_sizes_keep_no_more_than_two(both: tuple[Session, Session]) -> None:
    device, host = both
    for count in (3, 5, 3, 7, 5, 16):
        ids = text_ids(device.manifest.model, count)
        np.testing.assert_array_equal(device.prefill(ids), host.prefill(ids))
    assert list(device._backend._chunks) == [5, 16]  # type: ignore[union-attr]


def test_steps_without_a_table_of_rows_give_the_same(
    both: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, host = both
    host.prefill([3, 4])
    wanted = [host.step(token) for token in (5, 9)]
    device.prefill([3, 4])
    np.testing.assert_array_equal(device.step(5), wanted[0])
    monkeypatch.setattr(device._backend, "_token_rows", None)
    np.testing.assert_array_equal(device.step(9), wanted[1])


def test_a_table_with_other_rows_is_not_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with device_session(bundle) as session:
        assert session._backend._token_rows is not None  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(TokenRows, "look_up", lambda self, ids: self._rows[ids] + 1)
        with device_session(bundle) as session:
            assert session._backend._token_rows is None  # type: ignore[union-attr]


def test_prompts_and_steps_give_the_very_logits_of_the_host_backend(both: tuple[Session, Session]) -> None:
    device, host = both
    np.testing.assert_array_equal(*(session.prefill(*prompt(session)) for session in both))
    for token in (5, 9, 11, 5, 7):
        np.testing.assert_array_equal(device.step(token), host.step(token))
    device.reset()
    host.reset()
    np.testing.assert_array_equal(device.step(3), host.step(3))


def test_states_move_between_the_backends(both: tuple[Session, Session], tmp_path: Path) -> None:
    device, host = both
    device.prefill(*prompt(device))
    device.save_state(tmp_path / "device.state")
    host.load_state(tmp_path / "device.state")
    np.testing.assert_array_equal(device.step(5), host.step(5))
    host.save_state(tmp_path / "host.state")
    device.reset()
    device.load_state(tmp_path / "host.state")
    np.testing.assert_array_equal(device.step(6), host.step(6))


def test_a_chunk_that_fails_leaves_the_state_as_it_was(both: tuple[Session, Session], monkeypatch: Any) -> None:
    device, host = both
    ids, pixels = prompt(device)
    for session in both:
        session.prefill(ids, pixels)
    backend: Any = device._backend
    read, calls = backend._read_row, []

    def fail_late(*arguments: Any) -> Any:
        calls.append(read(*arguments))  # the states of the other slot are written by then
        if len(calls) == 2:
            raise MmmError("no memory")
        return calls[-1]

    monkeypatch.setattr(backend, "_read_row", fail_late)
    with pytest.raises(MmmError, match="no memory"):
        device.prefill(text_ids(device.manifest.model, 30, seed=3))
    assert device.tokens == host.tokens
    np.testing.assert_array_equal(device.step(5), host.step(5))


def test_answers_are_those_of_the_host_backend(both: tuple[Session, Session]) -> None:
    options = GenerationOptions(max_new_tokens=12, temperature=0.7, seed=5, stop_ids=())
    texts = []
    for session in both:
        answer = session.generate("What is it?", options=options)
        texts.append(("".join(answer), answer.token_ids))
    assert texts[0] == texts[1]


def test_chunks_are_larger_on_a_gpu_unless_their_size_is_given(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_device(*_: Any) -> Any:
        manifest = read_manifest(bundle)
        device = OnnxRuntimeCudaBackend(bundle, manifest, threads=1, provider=CPU_PROVIDER, device="cpu")
        return manifest, device, None

    found = {}
    for place in ("host", "device"):
        if place == "device":
            monkeypatch.setattr(backends, "open_bundle", on_a_device)
        for given in (None, 7):
            model = open_model(
                bundle, providers=None, chunk_tokens=given, threads=1, kernels="none", check_content=False
            )
            found[place, given] = model.chunk_tokens
            model.backend.close()
    assert found == {
        ("host", None): DEFAULT_CHUNK_TOKENS,
        ("host", 7): 7,
        ("device", None): CUDA_CHUNK_TOKENS,
        ("device", 7): 7,
    }
