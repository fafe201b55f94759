"""The prompts that other quantizers calibrate a decoder on: calls of its graph, with the states that belong to them.

Imports numpy and ONNX Runtime alone, since another quantizer may live in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader

Feeds = dict[str, Any]


class Calls(CalibrationDataReader):  # type: ignore[misc]
    """Feeds of one call after the other.

    Args:
        graph: the decoder.
        rows: file with `embeds` (all tokens, hidden) and `lengths` (prompts,): each prompt with its answer, one behind the other.
        by_token: a call a token, for quantizers whose histograms want arrays of one shape; else a call a prompt. Activations are
            the same either way.
    """

    def __init__(self, graph: Path, rows: Path, *, by_token: bool) -> None:
        with np.load(rows) as held:
            self._embeds, self._lengths = held["embeds"], held["lengths"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1  # calls of one token
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._states = {i.name: i.shape[1:] for i in self._session.get_inputs() if i.name.startswith("past.")}
        self._counts = any(i.name == "past_lengths" for i in self._session.get_inputs())
        self._by_token = by_token
        self._left = self._feeds()

    def get_next(self) -> Feeds | None:
        """Return the feeds of the next call, None after the last."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Begin again."""
        self._left = self._feeds()

    def get_first(self) -> Feeds:
        """Return the feeds of the first call, and stay where it is."""
        return next(self._feeds())

    def _feeds(self) -> Iterator[Feeds]:
        end = 0
        for length in self._lengths:
            begin, end = end, end + length
            state = {name: np.zeros((1, *shape), np.float32) for name, shape in self._states.items()}
            step = 1 if self._by_token else int(length)
            for at in range(begin, end, step):
                feeds = {
                    "inputs_embeds": self._embeds[None, at : at + step],
                    "lengths": np.array([step], np.int32),
                    **state,
                }
                if self._counts:
                    feeds["past_lengths"] = np.array([at - begin], np.int32)
                yield feeds
                if at + step < end:
                    after = self._session.run([name.replace("past.", "present.", 1) for name in state], feeds)
                    state = dict(zip(state, after, strict=True))
