"""All state buffers of a model's rows, allocated once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.runtime.row_positions import RowPositions
from mmm_export.runtime.state_layout import TOKEN_AXIS, StateTensor

Arrays = dict[str, NDArray[Any]]


class StatePool:
    """Two slots of state buffers (rows, ...) at fixed addresses, and zeros, which every empty row reads instead.

    So a row is emptied without touching memory, and what a sequence left behind, even NaN, is never read by the next.

    Args:
        layout: of one row.
        rows: sequences, each of its own.
    """

    def __init__(self, layout: tuple[StateTensor, ...], rows: int = 1) -> None:
        self.layout = layout
        self.positions = RowPositions(rows)
        self.slots = tuple({t.name: np.zeros((rows, *t.shape[1:]), t.storage) for t in layout} for _ in range(2))
        shared = {(t.shape, t.dtype): np.zeros(t.shape, t.storage) for t in layout}  # one for all layers
        self.zeros: Arrays = {t.name: shared[t.shape, t.dtype] for t in layout}

    def rows(self, slot: int, begin: int, end: int) -> Arrays:
        """Return views of some rows of a slot, (end - begin, ...) each."""
        return {name: array[begin:end] for name, array in self.slots[slot].items()}

    def past(self, row: int) -> Arrays:
        """Return views of a row's state, (1, ...) each: what a run of this row alone reads."""
        slot, tokens = self.positions[row]
        return self.rows(slot, row, row + 1) if tokens else self.zeros

    def present(self, row: int) -> Arrays:
        """Return views of where a run of this row alone writes, (1, ...) each."""
        return self.rows(self.positions.target(row), row, row + 1)

    def gather(self) -> None:
        """Update the pool so that the states of all occupied rows are in one slot, as a step of all rows needs it."""
        for row in self.positions.strays:
            for name, array in self.present(row).items():
                array[...] = self.past(row)[name]
            self.positions.commit(row, 0)

    def read(self, kv_rows: int, row: int = 0) -> Arrays:
        """Copy a row's state; of KV caches the first `kv_rows` tokens."""
        past = self.past(row)
        views = {t.name: past[t.name][:, :, :kv_rows] if t.per_token else past[t.name] for t in self.layout}
        return {name: view.copy() for name, view in views.items()}

    def write(self, arrays: Mapping[str, NDArray[Any]], tokens: int, row: int = 0) -> None:
        """Update a row to a state laid out as `read` gives it, standing for `tokens` tokens.

        KV cache rows that `arrays` does not have are kept up to `tokens`; those beyond are zeroed, since a NaN in an
        unused row would spread through a masked sum.
        """
        old, new = self.past(row), self.present(row)
        for tensor in self.layout:
            given = arrays[tensor.name]
            if not tensor.per_token:
                new[tensor.name][...] = given
                continue
            kv_rows = given.shape[TOKEN_AXIS]
            cache = new[tensor.name]
            cache[:, :, :kv_rows] = given
            cache[:, :, kv_rows:tokens] = old[tensor.name][:, :, kv_rows:tokens]
            cache[:, :, tokens:] = 0
        self.positions.place(row, self.positions.target(row), tokens)

    def clear(self, row: int = 0) -> None:
        """Update a row to the state of no tokens."""
        self.positions.place(row, 0, 0)
