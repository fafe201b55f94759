"""A toy model behind the runtime's Backend protocol: float64, token by token, with every kind of state tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmm_export.manifest import FileInfo, Manifest
from mmm_export.model.testing import tiny_spec
from mmm_export.runtime import BatchSession, Session
from mmm_export.runtime.state_layout import state_layout
from mmm_export.runtime.state_pool import StatePool
from mmm_export.spec import ModelSpec

Script = Callable[[int], int]


def toy_manifest(kinds: Any = "linear", *, max_tokens: int = 64, sha: str = "a" * 64, **overrides: Any) -> Manifest:
    spec = tiny_spec(kinds=kinds, **overrides)
    return Manifest(
        model=spec,
        source="toy",
        source_sha256="0" * 64,
        dtype="fp32",
        opset=20,
        body="standard",
        logits="last",
        max_tokens=max_tokens if spec.attention_layers else 0,
        graphs={},
        files={"decoder.onnx": FileInfo(1, sha)},
        tools={},
    )


class ToyBackend:
    """Every state tensor remembers the tokens read, and the logits depend on every state tensor.

    Args:
        script: when given, the logits are largest at script(number of tokens read).
    """

    def __init__(self, manifest: Manifest, script: Script | None = None) -> None:
        self.pool = StatePool(state_layout(manifest))
        self.script = script
        self.calls: list[int] = []  # tokens of each advance
        self.tile_calls: list[int] = []  # tiles of each image_features
        self.before_call: Callable[[int], None] = lambda call: None  # may raise; told the number of the call
        self.after_call: Callable[[int], None] = lambda call: None  # likewise, when the state is written
        self.spec: ModelSpec = manifest.model
        random = np.random.default_rng(0)
        self.table = random.standard_normal((self.spec.vocab_size, self.spec.hidden_size))
        self.head = random.standard_normal((self.spec.vocab_size, self.spec.hidden_size))

    @property
    def tokens(self) -> int:
        return self.pool.positions[0].tokens

    def image_features(self, pixel_values: Any) -> Any:
        self.tile_calls.append(len(pixel_values))
        per_tile = self.spec.vision.tokens_per_tile
        rows = pixel_values.mean(axis=(1, 2, 3))[:, None, None] + np.arange(per_tile)[None, :, None]
        return np.repeat(rows, self.spec.hidden_size, axis=2).reshape(-1, self.spec.hidden_size).astype(np.float32)

    def advance(self, input_ids: Any, features: Any) -> Any:
        call = len(self.calls)
        self.calls.append(len(input_ids))
        self.before_call(call)
        images = iter(() if features is None else features)
        old, new = self.pool.past(0), self.pool.present(0)
        for name in old:
            new[name][...] = old[name]
        for offset, token in enumerate(input_ids):
            is_image = token == self.spec.image_token_id
            hidden = next(images).astype(np.float64) if is_image else self.table[token]
            position = self.pool.positions[0].tokens + offset
            for layer, tensor in enumerate(self.pool.layout):
                state = new[tensor.name]
                if tensor.per_token:
                    state[:, :, position] = hidden[: state.shape[3]]
                    hidden = np.roll(hidden, 1) + np.resize(state[:, :, : position + 1].mean(axis=2), hidden.shape)
                else:
                    state *= 0.5
                    state += np.resize(hidden, state.shape) * 0.5
                    hidden = np.tanh(np.roll(hidden, layer + 1) - np.resize(state.mean(axis=-1), hidden.shape))
        assert next(images, None) is None
        self.pool.positions.commit(0, len(input_ids))
        self.after_call(call)
        if self.script is not None:
            logits = np.zeros(self.spec.vocab_size, np.float32)
            logits[self.script(self.pool.positions[0].tokens)] = 9
            return logits
        return (self.head @ hidden).astype(np.float32)

    def read_state(self, rows: int) -> dict[str, Any]:
        return self.pool.read(rows)

    def write_state(self, arrays: Mapping[str, Any], tokens: int) -> None:
        self.pool.write(arrays, tokens)

    def clear(self) -> None:
        self.pool.clear()

    def close(self) -> None:
        pass


def toy_session(
    kinds: Any = "linear",
    *,
    folder: Path = Path("no-such-bundle"),
    chunk_tokens: int = 8,
    script: Script | None = None,
    **manifest: Any,
) -> tuple[Session, ToyBackend]:
    """Open a session on a toy backend."""
    made = toy_manifest(kinds, **manifest)
    backend = ToyBackend(made, script)
    return Session(folder, made, backend, chunk_tokens=chunk_tokens), backend


def text_ids(spec: ModelSpec, count: int, seed: int = 0) -> Any:
    """Random ids that are no image tokens."""
    return np.random.default_rng(seed).integers(3, spec.vocab_size - 20, count)


def tiles(spec: ModelSpec, count: int) -> Any:
    size = spec.vision.tile_size
    return np.random.default_rng(1).standard_normal((count, 3, size, size)).astype(np.float32)


class ToyBatch:
    """Rows of toys behind the runtime's BatchBackend protocol."""

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self.toys = tuple(ToyBackend(manifest) for _ in range(rows))
        self.rows: tuple[Any, ...] = self.toys
        self.steps: list[tuple[int, ...]] = []  # rows of each step
        self.after_step: Callable[[dict[int, Any]], None] = lambda logits: None  # may change them, or raise
        self.is_closed = False

    def step(self, tokens: Mapping[int, int]) -> dict[int, Any]:
        self.steps.append(tuple(tokens))
        kept = {row: self.toys[row].read_state(self.toys[row].tokens) for row in tokens}
        logits = {row: self.toys[row].advance(np.array([token]), None) for row, token in tokens.items()}
        try:
            self.after_step(logits)
        except BaseException:
            for row, arrays in kept.items():
                self.toys[row].write_state(arrays, self.toys[row].tokens - 1)
            raise
        return logits

    def close(self) -> None:
        self.is_closed = True


def toy_batch(
    kinds: Any = "linear",
    *,
    rows: int = 3,
    folder: Path = Path("no-such-bundle"),
    chunk_tokens: int = 8,
    **manifest: Any,
) -> tuple[BatchSession, ToyBatch]:
    """Open a batch on toys."""
    made = toy_manifest(kinds, **manifest)
    backend = ToyBatch(made, rows)
    return BatchSession(folder, made, backend, chunk_tokens=chunk_tokens), backend
