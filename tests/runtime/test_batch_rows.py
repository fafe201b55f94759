"""Rows of one backend: whatever happens to the others, each gives what a session of its own gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import text_ids

from mmm_export.errors import MmmError
from mmm_export.manifest import read_manifest
from mmm_export.operator_library import CPU_PROVIDER
from mmm_export.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mmm_export.runtime.onnxruntime_cuda_backend import OnnxRuntimeCudaBackend
from mmm_export.runtime.rows_backend import RowsBackend

ROWS = 3
CAPACITY = 96  # as the bundles of the other session tests, which need no export of their own then

# float32: products of one row and of several are summed in another order, over 4 layers.
BOUND = 2e-5


@pytest.fixture(scope="module", params=["linear", "hybrid"])
def bundle(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> Path:
    return make_bundle(make_checkpoint(request.param), max_tokens=CAPACITY)


def opened(bundle: Path, kind: str, batch: int) -> RowsBackend:
    manifest = read_manifest(bundle)
    if kind == "host":
        return OnnxRuntimeBackend(bundle, manifest, providers=[CPU_PROVIDER], threads=1, batch=batch)
    return OnnxRuntimeCudaBackend(bundle, manifest, threads=1, provider=CPU_PROVIDER, device="cpu", batch=batch)


@pytest.fixture(scope="module", params=["host", "device"])
def rows(request: pytest.FixtureRequest, bundle: Path) -> RowsBackend:
    return opened(bundle, request.param, ROWS)


@pytest.fixture(scope="module")
def alone(bundle: Path) -> RowsBackend:
    return opened(bundle, "host", 1)


def emptied(backend: RowsBackend) -> RowsBackend:
    for row in backend.rows:
        row.clear()
    return backend


def error(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check_row(alone: RowsBackend, history: list[list[int]], found: Any) -> None:
    """Hold the last logits of a row to those of its tokens, read by a backend that has nothing else to do."""
    alone.clear()
    ids = np.concatenate([np.asarray(part, np.int64) for part in history])
    assert error(found, alone.advance(ids, None)) <= BOUND


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, ROWS - 1), st.integers(1, 9)),
        st.tuples(st.just("step"), st.sets(st.integers(0, ROWS - 1), min_size=1), st.just(0)),
        st.tuples(st.just("clear"), st.integers(0, ROWS - 1), st.just(0)),
    ),
    min_size=4,
    max_size=20,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, seed=st.integers(0, 99))
def test_any_order_of_reads_steps_and_clears_gives_every_row_its_own_logits(
    rows: RowsBackend, alone: RowsBackend, actions: list[Any], seed: int
) -> None:
    spec = read_manifest_spec(rows)
    emptied(rows)
    history: dict[int, list[list[int]]] = {row: [] for row in range(ROWS)}
    found: dict[int, Any] = {}
    for number, (action, which, count) in enumerate(actions):
        if action == "read":
            part = text_ids(spec, count, seed=100 * seed + number)
            if sum(map(len, history[which])) + count < CAPACITY // 2:
                found[which] = rows.rows[which].advance(part, None)
                history[which].append(part.tolist())
        elif action == "clear":
            rows.rows[which].clear()
            history[which] = []
            found.pop(which, None)
        else:
            tokens = {row: int(text_ids(spec, 1, seed=number + row)[0]) for row in which if history[row]}
            if tokens:
                found |= rows.step(tokens)
                for row, token in tokens.items():
                    history[row].append([token])
    for row, parts in history.items():
        assert rows.tokens_of(row) == sum(map(len, parts))
        if parts:
            check_row(alone, parts, found[row])


def read_manifest_spec(backend: RowsBackend) -> Any:
    spec: Any = backend._spec  # type: ignore[attr-defined]
    return spec


def test_a_step_that_fails_leaves_every_row_as_it_was(
    rows: RowsBackend, alone: RowsBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_manifest_spec(rows)
    emptied(rows)
    parts = [text_ids(spec, 4 + row, seed=row) for row in range(ROWS)]
    for row, part in enumerate(parts):
        rows.rows[row].advance(part, None)
    step: Any = rows._step_rows

    def fail_late(*arguments: Any) -> Any:
        step(*arguments)  # the other slot is written by then
        raise MmmError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(rows, "_step_rows", fail_late)
        with pytest.raises(MmmError, match="no memory"):
            rows.step({0: 5, 2: 7})
    assert [rows.tokens_of(row) for row in range(ROWS)] == [4, 5, 6]
    found = rows.step({0: 5, 2: 7})
    assert [rows.tokens_of(row) for row in range(ROWS)] == [5, 5, 7]
    check_row(alone, [parts[0], [5]], found[0])
    check_row(alone, [parts[2], [7]], found[2])


def test_what_a_row_left_behind_even_nan_reaches_nobody(rows: RowsBackend, alone: RowsBackend) -> None:
    spec = read_manifest_spec(rows)
    emptied(rows)
    keep = text_ids(spec, 6, seed=1)
    rows.rows[0].advance(keep, None)
    rows.rows[1].advance(text_ids(spec, 5, seed=2), None)
    spoilt = {name: np.full_like(array, np.nan) for name, array in rows.rows[1].read_state(5).items()}
    rows.rows[1].write_state(spoilt, 5)
    assert np.isnan(rows.step({0: 5, 1: 5})[1]).all()
    rows.rows[1].clear()
    check_row(alone, [keep, [5, 6]], rows.step({0: 6})[0])
    fresh = text_ids(spec, 7, seed=3)
    rows.rows[1].advance(fresh, None)
    found = rows.step({0: 7, 1: 8})
    check_row(alone, [keep, [5, 6, 7]], found[0])
    check_row(alone, [fresh, [8]], found[1])


def test_a_state_moves_from_one_row_to_another(rows: RowsBackend, alone: RowsBackend) -> None:
    spec = read_manifest_spec(rows)
    emptied(rows)
    parts = [text_ids(spec, 5, seed=4), text_ids(spec, 8, seed=5)]
    for row, part in enumerate(parts):
        rows.rows[row].advance(part, None)
    rows.rows[2].write_state(rows.rows[1].read_state(8), 8)
    found = rows.step({0: 3, 1: 4, 2: 9})
    check_row(alone, [parts[0], [3]], found[0])
    check_row(alone, [parts[1], [4]], found[1])
    check_row(alone, [parts[1], [9]], found[2])


def test_the_zeros_that_empty_rows_read_stay_zeros(rows: RowsBackend) -> None:
    spec = read_manifest_spec(rows)
    emptied(rows)
    for row in range(ROWS):
        rows.rows[row].advance(text_ids(spec, 3, seed=row), None)
    rows.step(dict.fromkeys(range(ROWS), 5))
    emptied(rows)
    for array in rows.rows[0].read_state(CAPACITY).values():
        assert not array.any()
    pool: Any = rows._row_pool
    for zeros in pool.zeros.values():
        assert not np.asarray(zeros.read() if hasattr(zeros, "read") else zeros).any()
