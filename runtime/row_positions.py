"""Where the states of several sequences are: for each row, which of two slots holds its state, and the tokens it stands for."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Position(NamedTuple):
    """Of one row: the slot that holds its state, and the tokens that it stands for; with none it is zeros and in no slot."""

    slot: int
    tokens: int


class RowPositions:
    """A position for each row; a run reads a row's state in one slot and writes it in the other.

    A run that fails has touched only what no position points to, so the states before it are still whole. Every change is one
    assignment, which no Ctrl-C can split.
    """

    def __init__(self, rows: int) -> None:
        self._of = (Position(0, 0),) * rows

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, row: int) -> Position:
        return self._of[row]

    @property
    def occupied(self) -> tuple[int, ...]:
        """Rows that stand for at least one token."""
        return tuple(row for row, position in enumerate(self._of) if position.tokens)

    @property
    def shared(self) -> int:
        """The slot that a step of all rows reads: that of most occupied ones."""
        return int(2 * sum(self._of[row].slot for row in self.occupied) > len(self.occupied))

    @property
    def strays(self) -> tuple[int, ...]:
        """Occupied rows whose state is in the other slot, which such a step would overwrite."""
        shared = self.shared
        return tuple(row for row in self.occupied if self._of[row].slot != shared)

    def target(self, row: int) -> int:
        """Return the slot that a run of this row alone writes; for an empty row the one in which it needs no move afterwards."""
        position = self._of[row]
        return 1 - position.slot if position.tokens else self.shared

    def place(self, row: int, slot: int, tokens: int) -> None:
        """Update a row's position."""
        self._of = (*self._of[:row], Position(slot, tokens), *self._of[row + 1 :])

    def commit(self, row: int, added: int) -> None:
        """Make what a run of this row alone has written its state, which stands for `added` tokens more."""
        self.place(row, self.target(row), self._of[row].tokens + added)

    def commit_step(self, stepped: Collection[int]) -> None:
        """Make what a step of all rows has written their states; those of `stepped` stand for one token more."""
        written = 1 - self.shared
        self._of = tuple(
            Position(written, position.tokens + (row in stepped)) if position.tokens else position
            for row, position in enumerate(self._of)
        )
