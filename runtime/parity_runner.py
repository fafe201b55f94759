"""A session as a verification drives it: logits, states and image features as plain floats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.engine_manifest import EngineManifest
from mmm_export.manifest import Manifest
from mmm_export.runtime.backend import Backend
from mmm_export.runtime.session import Session
from mmm_export.runtime.state_layout import GRAPH_DTYPE, state_layout

Array = NDArray[Any]


class ParityRunner:
    """Runs a bundle or an engine for `mmm-export verify`. Use it as a context manager, or call `close`."""

    def __init__(self, session: Session, backend: Backend, *, on: str | None = None) -> None:
        """Drive a session and its backend; `on` names the execution provider for the report, None the CPU's."""
        self._on = on
        self._session = session
        self._backend = backend
        self._types = {tensor.name: tensor.dtype for tensor in state_layout(session.manifest)}

    @classmethod
    def open(cls, path: Path, *, kernels: str | Path = "auto", providers: Sequence[str] | None = None) -> ParityRunner:
        """Open a folder as `Session.open` does, which says what it raises."""
        session = Session.open(path, kernels=kernels, providers=providers)
        backend = session._backend  # a verification looks below the session, into the states
        assert backend is not None
        return cls(session, backend, on=providers[0] if providers else None)

    @property
    def manifest(self) -> Manifest | EngineManifest:
        return self._session.manifest

    @property
    def kernels(self) -> Path | None:
        """As of the session."""
        return self._session.kernels

    @property
    def name(self) -> str:
        """What runs it, for a report."""
        manifest = self._session.manifest
        if isinstance(manifest, EngineManifest):
            return f"{manifest.flavor} {manifest.tensorrt_version}"
        return f"ONNX Runtime, {self._on}" if self._on else "ONNX Runtime"

    def reset(self) -> None:
        """Forget the context."""
        self._session.reset()

    def prefill(self, input_ids: NDArray[np.int64], pixel_values: Array | None) -> Array:
        """Go on with tokens and tiles; logits of the last token, (vocabulary,)."""
        return self._session.prefill(input_ids, pixel_values)

    def image_features(self, pixel_values: Array) -> Array:
        """Features of tiles, (image tokens, hidden)."""
        dtype = GRAPH_DTYPE[self._session.manifest.dtype]
        rows = [self._backend.image_features(tile[None]) for tile in pixel_values]
        return floats(np.concatenate(rows), dtype)

    def states(self) -> dict[str, Array]:
        """The states without the batch, by name; of KV caches the rows in use."""
        arrays = self._backend.read_state(self._backend.tokens)
        return {name: floats(array[0], self._types[name]) for name, array in arrays.items()}

    def close(self) -> None:
        """Close the session."""
        self._session.close()

    def __enter__(self) -> ParityRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def floats(array: Array, dtype: str) -> Array:
    """Return values as floats; numpy has no bfloat16, so its bits come as uint16."""
    if dtype == "bfloat16" and array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
