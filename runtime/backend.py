"""What a session needs from an inference engine: three graphs and the state of one sequence, or of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Backend(Protocol):
    """One loaded model and the state of one sequence.

    `advance` and `write_state` take effect as a whole or not at all: when they raise, the state and `tokens` are those
    of before the call. A session relies on it, and finds out from `tokens` whether an interrupted call took effect. A backend
    that updates states in place may lose them instead when its engine fails: then `tokens` is that of before, and all calls but
    `write_state`, `clear` and `close` raise until one of those made the state whole.
    """

    @property
    def tokens(self) -> int:
        """Tokens that the state stands for."""

    def image_features(self, pixel_values: Array) -> Array:
        """Turn image tiles (tiles, 3, S, S) float32 into features (tiles * tokens_per_tile, hidden)."""

    def advance(self, input_ids: NDArray[np.int64], features: Array | None) -> NDArray[np.float32]:
        """Run T tokens through the model and update the state.

        Args:
            input_ids: (T,), T at least 1, all in the vocabulary; the KV cache has room for them.
            features: (M, hidden), one row for each image token of `input_ids` in order; None for none.

        Returns: logits of the last token, (vocab,); the caller may keep it.

        """

    def read_state(self, rows: int) -> dict[str, Array]:
        """Copy the state, by graph input name; of KV caches only the first `rows` tokens."""

    def write_state(self, arrays: Mapping[str, Array], tokens: int) -> None:
        """Replace the state by that of `tokens` tokens, laid out as `read_state` gives it.

        KV cache rows that `arrays` does not have are kept as they are, up to `tokens`.
        """

    def clear(self) -> None:
        """Go back to the state of no tokens."""

    def close(self) -> None:
        """Free the model. Nothing else may be called afterwards."""


class BatchBackend(Protocol):
    """One loaded model and the states of several sequences, a row for each."""

    @property
    def rows(self) -> tuple[Backend, ...]:
        """Each row as a backend of one sequence; what is done to one leaves the others as they are."""

    def step(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """Run one more token of some rows at once and update their states, all of them or, when it raises, none.

        Args:
            tokens: by row, each in the vocabulary and no image token; the row is not empty, and its KV cache has room.

        Returns: by row, logits (vocab,); the caller may keep them.

        """

    def close(self) -> None:
        """Free the model. Nothing else may be called afterwards."""
