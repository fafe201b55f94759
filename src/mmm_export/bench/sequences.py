"""What a benchmark drives: one sequence of a session, or all rows of a batch at once, by the same three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmm_export.engine_manifest import EngineManifest
from mmm_export.manifest import Manifest
from mmm_export.runtime import BatchSession, Session

Logits = NDArray[np.float32]


class Sequences(Protocol):
    """So many sequences of one model; `capacity` is what the KV cache of each holds, None for a linear model."""

    batch: int

    @property
    def manifest(self) -> Manifest | EngineManifest: ...
    @property
    def capacity(self) -> int | None: ...

    def clear(self) -> None:
        """Forget all of them."""

    def prefill(self, input_ids: NDArray[np.int64]) -> Logits:
        """Read a prompt into the next empty one, alone, and return its logits, (vocab,)."""

    def step(self, tokens: Sequence[int]) -> list[Logits]:
        """Give each a token, all in one run, and return their logits, (vocab,) each."""


def sequences_of(session: Session | BatchSession) -> Sequences:
    """Drive a session, or all rows of a batch."""
    return _One(session) if isinstance(session, Session) else _Rows(session)


class _One:
    batch = 1

    def __init__(self, session: Session) -> None:
        self._session = session
        self.manifest = session.manifest
        self.capacity = session.capacity

    def clear(self) -> None:
        self._session.reset()

    def prefill(self, input_ids: NDArray[np.int64]) -> Logits:
        return self._session.prefill(input_ids)

    def step(self, tokens: Sequence[int]) -> list[Logits]:
        return [self._session.step(tokens[0])]


class _Rows:
    def __init__(self, session: BatchSession) -> None:
        self.batch = session.rows
        self._session = session
        self.manifest = session.manifest
        self.capacity = session.capacity
        self._rows: list[int] = []

    def clear(self) -> None:
        for row in self._rows:
            self._session.free(row)
        self._rows = []

    def prefill(self, input_ids: NDArray[np.int64]) -> Logits:
        row, logits = self._session.prefill(input_ids)
        self._rows.append(row)
        return logits

    def step(self, tokens: Sequence[int]) -> list[Logits]:
        logits = self._session.advance(dict(zip(self._rows, tokens, strict=True)))
        return [logits[row] for row in self._rows]
