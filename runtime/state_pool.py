"""All state buffers of one session, allocated once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.runtime.state_layout import TOKEN_AXIS, StateTensor


class StatePool:
    """Two slots of state buffers at fixed addresses: a run reads one, writes the other, and `commit` swaps them.

    A run that fails has touched the unused slot only, so the state before it is still whole. Which slot is current and
    how many tokens it stands for change in one assignment, which no Ctrl-C can split.
    """

    def __init__(self, layout: tuple[StateTensor, ...]) -> None:
        self.layout = layout
        self.slots = tuple({t.name: np.zeros(t.shape, t.storage) for t in layout} for _ in range(2))
        self._position = (0, 0)  # current slot, tokens

    @property
    def tokens(self) -> int:
        """Tokens that the current slot stands for."""
        return self._position[1]

    @property
    def current(self) -> int:
        """Index of the slot that a run reads; it writes the other."""
        return self._position[0]

    def commit(self, added: int) -> None:
        """Make the slot just written current; it stands for `added` tokens more."""
        slot, tokens = self._position
        self._position = (1 - slot, tokens + added)

    def read(self, rows: int) -> dict[str, NDArray[Any]]:
        """Copy the current state; of KV caches the first `rows` tokens."""
        buffers = self.slots[self.current]
        views = {t.name: buffers[t.name][:, :, :rows] if t.per_token else buffers[t.name] for t in self.layout}
        return {name: view.copy() for name, view in views.items()}

    def write(self, arrays: Mapping[str, NDArray[Any]], tokens: int) -> None:
        """Update the pool to a state laid out as `read` gives it, standing for `tokens` tokens.

        KV cache rows that `arrays` does not have are kept up to `tokens`; those beyond are zeroed, since a NaN in an
        unused row would spread through a masked sum.
        """
        old, new = self.slots[self.current], self.slots[1 - self.current]
        for tensor in self.layout:
            given = arrays[tensor.name]
            if not tensor.per_token:
                new[tensor.name][...] = given
                continue
            rows = given.shape[TOKEN_AXIS]
            cache = new[tensor.name]
            cache[:, :, :rows] = given
            cache[:, :, rows:tokens] = old[tensor.name][:, :, rows:tokens]
            cache[:, :, tokens:] = 0
        self._position = (1 - self.current, tokens)

    def clear(self) -> None:
        """Update the pool to the state of no tokens."""
        for buffer in self.slots[1 - self.current].values():
            buffer.fill(0)
        self._position = (1 - self.current, 0)
