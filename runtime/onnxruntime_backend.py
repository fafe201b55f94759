"""The ONNX Runtime backend: three graphs, states bound to fixed buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mmm_export import names
from mmm_export.errors import MmmError
from mmm_export.manifest import Manifest
from mmm_export.runtime.backend import Array
from mmm_export.runtime.graph_loading import first_line, open_graph
from mmm_export.runtime.rows_backend import RowsBackend
from mmm_export.runtime.state_layout import GRAPH_DTYPE, STORAGE, state_layout
from mmm_export.runtime.state_pool import StatePool

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


Values = dict[str, onnxruntime.OrtValue]


class OnnxRuntimeBackend(RowsBackend):
    """Runs a bundle with ONNX Runtime. Implements `Backend`, and `BatchBackend`.

    States live in host memory. On the CPU ONNX Runtime reads and writes them in place; with another provider it copies
    them to the device and back at every call, which is right but not fast.

    Args:
        folder: the bundle; its files were checked.
        manifest: of that folder; `check_requirements` has passed it.
        providers: full names of the execution providers, in order of preference, see `providers_from_names`.
        threads: to compute with; None for one a core.
        library: that computes the scan in place of the function body, see `choose_library`.
        batch: sequences, each with a row of its own.

    Raises:
        BundleError: a graph cannot be run here or is not what the manifest says.
        KernelError: the library cannot be used.

    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        providers: list[str],
        threads: int | None = None,
        library: Path | None = None,
        batch: int = 1,
    ) -> None:
        def session(file: str, threads: int | None) -> onnxruntime.InferenceSession:
            return open_graph(folder, file, manifest, providers=providers, threads=threads, library=library)

        self._embedding = session(names.EMBEDDING_FILE, 1)  # a look-up of rows has nothing to share among threads
        self._vision = session(names.VISION_FILE, threads)
        self._decoder = session(names.DECODER_FILE, threads)
        self._manifest = manifest
        self._spec = manifest.model
        self._storage = STORAGE[GRAPH_DTYPE[manifest.dtype]]
        self._is_bfloat16 = manifest.dtype == "bf16"
        self._takes_past_lengths = any(node.name == names.PAST_LENGTHS for node in self._decoder.get_inputs())
        self._pool = StatePool(state_layout(manifest), batch)
        super().__init__(self._pool)
        self._no_features = np.zeros((0, self._spec.hidden_size), self._storage)

    def image_features(self, pixel_values: Array) -> Array:
        rows = len(pixel_values) * self._spec.vision.tokens_per_tile
        features = np.empty((rows, self._spec.hidden_size), self._storage)
        inputs = {names.PIXEL_VALUES: self._value(np.ascontiguousarray(pixel_values))}
        _run_bound(names.VISION_FILE, self._vision, inputs, {names.IMAGE_FEATURES: self._value(features)})
        return features

    def _read_row(self, row: int, input_ids: NDArray[np.int64], features: Array | None) -> NDArray[np.float32]:
        past_lengths = np.array([self.tokens_of(row)], np.int32)
        past, present = self._values(self._pool.past(row)), self._values(self._pool.present(row))
        embeds = self._embed(input_ids[None], self._no_features if features is None else features)
        logits = self._decode(embeds, np.array([len(input_ids)], np.int32), past_lengths, past, present, len(input_ids))
        last: NDArray[np.float32] = logits[0, -1]
        return last if logits.shape[1] == 1 else last.copy()

    def _step_rows(
        self, slot: int, ids: NDArray[np.int64], lengths: NDArray[np.int32], past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        past, present = (self._values(self._pool.rows(side, 0, len(ids))) for side in (slot, 1 - slot))
        embeds = self._embed(ids, self._no_features)
        logits: NDArray[np.float32] = self._decode(embeds, lengths, past_lengths, past, present, 1)[:, 0]
        return logits

    def _gather(self) -> None:
        self._pool.gather()

    def _lanes(self, rows: int) -> int:
        return rows

    def _decode(
        self,
        embeds: onnxruntime.OrtValue,
        lengths: NDArray[np.int32],
        past_lengths: NDArray[np.int32],
        past: Values,
        present: Values,
        tokens: int,
    ) -> NDArray[np.float32]:
        """Run the decoder on (B, T, hidden) embeddings, which updates the memory of `present`; return logits (B, T or 1, vocab)."""
        inputs = {**past, names.INPUTS_EMBEDS: embeds, names.LENGTHS: self._value(lengths)}
        if self._takes_past_lengths:
            inputs[names.PAST_LENGTHS] = self._value(past_lengths)
        outputs = {names.present(name): value for name, value in present.items()}
        positions = tokens if self._manifest.logits == "all" else 1
        logits = np.empty((len(lengths), positions, self._spec.vocab_size), np.float32)
        outputs[names.LOGITS] = self._value(logits)
        _run_bound(names.DECODER_FILE, self._decoder, inputs, outputs)
        return logits

    def close(self) -> None:
        del self._pool, self._row_pool, self._decoder, self._vision, self._embedding

    def _embed(self, input_ids: NDArray[np.int64], features: Array) -> onnxruntime.OrtValue:
        inputs = {
            names.INPUT_IDS: self._value(np.ascontiguousarray(input_ids)),
            names.IMAGE_FEATURES: self._value(np.ascontiguousarray(features)),
        }
        with explained(names.EMBEDDING_FILE):
            (embeds,) = self._embedding.run_with_ort_values([names.INPUTS_EMBEDS], inputs)
        return embeds

    def _values(self, arrays: Mapping[str, NDArray[Any]]) -> Values:
        return {name: self._value(array) for name, array in arrays.items()}

    def _value(self, array: NDArray[Any]) -> onnxruntime.OrtValue:
        """Wrap an array without copying it; its memory is read, or written, when the graph runs."""
        if self._is_bfloat16 and array.dtype == np.uint16:
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _run_bound(
    file: str,
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, onnxruntime.OrtValue],
    outputs: Mapping[str, onnxruntime.OrtValue],
) -> None:
    """Run a graph, which updates the memory of `outputs`. The caller's mappings keep all memory alive meanwhile."""
    with explained(file):
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        session.run_with_iobinding(binding)


@contextmanager
def explained(file: str) -> Iterator[None]:
    """Tell a failure of ONNX Runtime as an MmmError that names the graph."""
    try:
        yield
    except Exception as error:
        raise MmmError(
            f"ONNX Runtime failed while running {file}",
            found=first_line(error),
            hint="is there enough memory? smaller chunks need less: chunk_tokens",
        ) from error
