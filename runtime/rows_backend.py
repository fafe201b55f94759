"""Several sequences in one loaded model, a row for each: what backends of that kind share, whatever memory their states live in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmm_export.runtime.backend import Array, Backend
from mmm_export.runtime.row_positions import RowPositions

Floats = NDArray[np.float32]

_ONE = np.ones(1, np.int32)


class RowPool(Protocol):
    """The states of all rows, as `StatePool` and `DeviceStatePool` keep them."""

    positions: RowPositions

    def read(self, kv_rows: int, row: int = 0) -> dict[str, Array]: ...
    def write(self, arrays: Mapping[str, Array], tokens: int, row: int = 0) -> None: ...
    def clear(self, row: int = 0) -> None: ...


class RowsBackend(ABC):
    """A backend of several rows. Implements `BatchBackend`, and `Backend` for row 0.

    A prompt is read row by row; a decode step runs all rows that take part at once. An empty row, or one that does not take part, has
    length 0 in the step, which leaves its state as it is.

    Args:
        pool: of the states of all rows.
    """

    def __init__(self, pool: RowPool) -> None:
        self._row_pool = pool
        self._positions = pool.positions

    @property
    def rows(self) -> tuple[Backend, ...]:
        return tuple(BackendRow(self, row) for row in range(len(self._positions)))

    @property
    def tokens(self) -> int:
        return self.tokens_of(0)

    def tokens_of(self, row: int) -> int:
        """Tokens that the state of a row stands for."""
        return self._positions[row].tokens

    @abstractmethod
    def image_features(self, pixel_values: Array) -> Array:
        """As of `Backend`."""

    def advance(self, input_ids: NDArray[np.int64], features: Array | None, row: int = 0) -> Floats:
        """As of `Backend`, for one row."""
        count = len(input_ids)
        if len(self._positions) == 1 and count == 1 and features is None and self.tokens:
            return self._step_only_row(input_ids)
        logits = self._read_row(row, input_ids, features)
        self._positions.commit(row, count)
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, Floats]:
        """As of `BatchBackend`."""
        self._gather()
        lanes = self._lanes(max(self._positions.occupied) + 1)
        ids, lengths, past_lengths = (
            np.zeros((lanes, 1), np.int64),
            np.zeros(lanes, np.int32),
            np.zeros(lanes, np.int32),
        )
        for row, token in tokens.items():
            assert self.tokens_of(row), "an empty row has nothing to go on from"
            ids[row], lengths[row] = token, 1
        for row in self._positions.occupied:
            past_lengths[row] = self.tokens_of(row)
        logits = self._step_rows(self._positions.shared, ids, lengths, past_lengths)
        self._positions.commit_step(tokens)
        return {row: logits[row] for row in tokens}

    def _step_only_row(self, input_ids: NDArray[np.int64]) -> Floats:
        """What `step` does where there is one row: in a decode step every microsecond on the host is one that the device waits."""
        slot, tokens = self._positions[0]
        logits = self._step_rows(slot, input_ids[None], _ONE, np.array([tokens], np.int32))
        self._positions.commit(0, 1)
        last: Floats = logits[0]
        return last

    def read_state(self, rows: int, row: int = 0) -> dict[str, Array]:
        return self._row_pool.read(rows, row)

    def write_state(self, arrays: Mapping[str, Array], tokens: int, row: int = 0) -> None:
        self._row_pool.write(arrays, tokens, row)

    def clear(self, row: int = 0) -> None:
        self._row_pool.clear(row)

    @abstractmethod
    def close(self) -> None:
        """As of `Backend`."""

    @abstractmethod
    def _read_row(self, row: int, input_ids: NDArray[np.int64], features: Array | None) -> Floats:
        """Run tokens of one row from its past into its present, and return the logits of the last, (vocab,)."""

    @abstractmethod
    def _step_rows(
        self, slot: int, ids: NDArray[np.int64], lengths: NDArray[np.int32], past_lengths: NDArray[np.int32]
    ) -> Floats:
        """Run a token of each of the first rows from one slot into the other.

        Shapes: ids (lanes, 1); lengths (lanes,) 1 or 0; past_lengths (lanes,) -> logits (lanes, vocab), of no meaning where the
        length is 0.
        """

    @abstractmethod
    def _gather(self) -> None:
        """Bring the states of all occupied rows into one slot."""

    @abstractmethod
    def _lanes(self, rows: int) -> int:
        """Return how many rows a step runs in which the first `rows` take part."""


class BackendRow:
    """One row as a `Backend` of one sequence. Closing it closes nothing: the model belongs to all rows."""

    def __init__(self, backend: RowsBackend, row: int) -> None:
        self._backend = backend
        self._row = row

    @property
    def tokens(self) -> int:
        return self._backend.tokens_of(self._row)

    def image_features(self, pixel_values: Array) -> Array:
        return self._backend.image_features(pixel_values)

    def advance(self, input_ids: NDArray[np.int64], features: Array | None) -> Floats:
        return self._backend.advance(input_ids, features, self._row)

    def read_state(self, rows: int) -> dict[str, Array]:
        return self._backend.read_state(rows, self._row)

    def write_state(self, arrays: Mapping[str, Array], tokens: int) -> None:
        self._backend.write_state(arrays, tokens, self._row)

    def clear(self) -> None:
        self._backend.clear(self._row)

    def close(self) -> None:
        pass


class OneRow:
    """A backend of one sequence, such as an engine's, as a `BatchBackend` of one row."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.rows: tuple[Backend, ...] = (backend,)

    def step(self, tokens: Mapping[int, int]) -> dict[int, Floats]:
        """As of `BatchBackend`."""
        return {row: self.rows[row].advance(np.array([token], np.int64), None) for row, token in tokens.items()}

    def close(self) -> None:
        """Free the model."""
        self._backend.close()
