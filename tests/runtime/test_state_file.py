"""Saved states: what comes back, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import ToyBackend, text_ids, toy_manifest, toy_session

from mmm_export.errors import MmmError, StateFileError
from mmm_export.runtime import Session, read_state_header
from mmm_export.runtime.state_file import read_state, write_state

KINDS = ["linear", "hybrid"]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 13, 64])
def test_loaded_state_goes_on_like_the_saved_one(kinds: str, tokens: int, tmp_path: Path) -> None:
    saved, _ = toy_session(kinds, max_tokens=70)
    ids = text_ids(saved.manifest.model, 70)
    if tokens:
        saved.prefill(ids[:tokens])
    saved.save_state(tmp_path / "state")
    loaded, _ = toy_session(kinds, max_tokens=70)
    loaded.prefill([9, 9, 9])
    loaded.load_state(tmp_path / "state")
    assert loaded.tokens == tokens
    assert np.array_equal(loaded.prefill(ids[tokens:]), saved.prefill(ids[tokens:]))


def test_header_tells_what_the_file_is(tmp_path: Path) -> None:
    session, _ = toy_session("hybrid")
    session.prefill([5, 6, 7])
    session.save_state(tmp_path / "state")
    header = read_state_header(str(tmp_path / "state"))
    assert (header.tokens, header.unfed, header.last_token, header.dtype) == (3, (), 7, "fp32")
    assert header.model_sha256 == session.manifest.model_sha256
    assert header.source == "toy"
    json.dumps(dataclasses.asdict(header))


def test_file_holds_only_the_used_part_of_the_kv_cache(tmp_path: Path) -> None:
    sizes = {}
    for tokens in (10, 20):
        session, _ = toy_session("teacher", max_tokens=1000)
        session.prefill([5] * tokens)
        session.save_state(tmp_path / "state")
        sizes[tokens] = (tmp_path / "state").stat().st_size
    spec = session.manifest.model
    per_token = spec.layers * 2 * spec.kv_heads * spec.head_dim * 4
    # The header is padded to 8 bytes and its numbers may be a digit longer.
    assert abs(sizes[20] - sizes[10] - 10 * per_token) < 200


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    session, backend = toy_session("hybrid")
    session.prefill([5, 6, 7])
    session.save_state(tmp_path / "state")
    found = load_file(tmp_path / "state")
    for name, wanted in backend.read_state(3).items():
        assert np.array_equal(found[name], wanted)


def test_bfloat16_and_float16_states_keep_their_bits(tmp_path: Path) -> None:
    for dtype in ("bf16", "fp16"):
        manifest = dataclasses.replace(toy_manifest("hybrid"), dtype=dtype)
        backend = ToyBackend(manifest)
        random = np.random.default_rng(0)
        for slot in backend.pool.slots:
            for array in slot.values():
                array.view(np.uint8)[...] = random.integers(0, 256, array.view(np.uint8).shape, np.uint8)
        backend.pool.positions.commit(0, 3)
        session = Session(tmp_path, manifest, backend)
        session.save_state(tmp_path / "state")
        before = backend.read_state(3)
        session.reset()
        session.load_state(tmp_path / "state")
        after = backend.read_state(3)
        assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_seen_tokens_come_back(tmp_path: Path) -> None:
    session, _ = toy_session()
    session.prefill([5, 500])
    session.save_state(tmp_path / "state")
    loaded, _ = toy_session()
    loaded.load_state(tmp_path / "state")
    assert np.flatnonzero(loaded._context.seen).tolist() == [5, 500]


def refused(session: Session, backend: ToyBackend, path: Path) -> StateFileError:
    """Load a bad file into a session with a context, which must survive it."""
    before = backend.read_state(backend.tokens)
    tokens = session.tokens
    with pytest.raises(StateFileError) as caught:
        session.load_state(path)
    after = backend.read_state(backend.tokens)
    assert session.tokens == tokens
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert str(path) in caught.value.what
    return caught.value


def saved(folder: Path, kinds: str = "hybrid") -> tuple[Session, ToyBackend, Path]:
    session, backend = toy_session(kinds)
    session.prefill([5, 6, 7])
    session.save_state(folder / "state")
    session.step(8)
    return session, backend, folder / "state"


def test_state_of_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    _, _, path = saved(tmp_path)
    other, backend = toy_session("hybrid", sha="b" * 64)
    other.prefill([5])
    error = refused(other, backend, path)
    assert "another model" in error.what
    assert "toy" in str(error.found)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x00" * 64),
        lambda path: path.write_bytes(b"\xff" * 64),
        lambda path: path.write_text("{}"),
        lambda path: path.write_bytes((2).to_bytes(8, "little") + b"{}"),
        lambda path: path.write_bytes((2000).to_bytes(8, "little") + b"[" * 2000),
        lambda path: path.write_bytes((20).to_bytes(8, "little") + b'{"__metadata__": 17}'),
    ],
)
def test_foreign_file_is_refused(make: Any, tmp_path: Path) -> None:
    session, backend, _ = saved(tmp_path)
    path = tmp_path / "foreign"
    make(path)
    assert "is no state file" in refused(session, backend, path).what


def test_safetensors_file_of_a_model_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    session, backend, _ = saved(tmp_path)
    save_file({"x": np.zeros(3)}, tmp_path / "model", metadata={"format": "pt"})
    assert "is no state file" in refused(session, backend, tmp_path / "model").what


def test_newer_format_is_refused_as_such(tmp_path: Path) -> None:
    session, backend, path = saved(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"format": "1"', b'"format": "2"'))
    assert "another version" in refused(session, backend, path).what


def test_tokens_beyond_the_capacity_are_refused(tmp_path: Path) -> None:
    session, backend, path = saved(tmp_path)
    session_bytes = path.read_bytes()
    path.write_bytes(session_bytes.replace(b'"tokens": "3"', b'"tokens": "9999"'))
    assert "damaged" in refused(session, backend, path).what


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    session, backend, path = saved(tmp_path)
    data = path.read_bytes()
    for size in [*range(40), 500, 2000, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        refused(session, backend, path)
        with pytest.raises(StateFileError):
            read_state_header(path)
    path.write_bytes(data + b"\0")
    refused(session, backend, path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), bit=st.integers(0, 7))
def test_every_flipped_bit_is_refused(place: float, in_header: bool, bit: int, tmp_path: Path) -> None:
    session, backend, path = saved(tmp_path)
    data = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    data[int(place * (header_bytes if in_header else len(data)))] ^= 1 << bit
    path.write_bytes(data)
    refused(session, backend, path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(
        ["kind", "format", "model_sha256", "source", "dtype", "tokens", "unfed", "last_token", "sha256"]
    ),
    value=st.one_of(st.none(), st.integers(-10, 10**30), st.text(max_size=9), st.lists(st.integers(), max_size=2)),
)
def test_only_state_file_errors_come_from_any_metadata(field: str, value: Any, tmp_path: Path) -> None:
    session, backend, path = saved(tmp_path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end])
    table["__metadata__"][field] = value
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    refused(session, backend, path)
    with contextlib.suppress(StateFileError):
        read_state_header(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_only_state_file_errors_come_from_any_bytes(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(data)
    for size in (None, len(data)):  # the second time behind a length that fits
        if size is not None:
            path.write_bytes(size.to_bytes(8, "little") + data)
        with pytest.raises(StateFileError):
            read_state(path, toy_manifest())


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _, path = saved(tmp_path)
    before = path.read_bytes()
    snapshot = session._context.snapshot()
    broken = dataclasses.replace(snapshot, arrays={**snapshot.arrays})
    del broken.arrays[next(reversed(broken.arrays))]
    with pytest.raises(KeyError):
        write_state(path, session.manifest, broken)
    with pytest.raises(MmmError):
        session.save_state(tmp_path)  # a folder
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
