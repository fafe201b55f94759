"""The ONNX Runtime backend for an NVIDIA GPU: states stay in its memory, and a decode step is one CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mmm_export import names
from mmm_export.errors import BundleError
from mmm_export.manifest import Manifest
from mmm_export.operator_library import CUDA_PROVIDER
from mmm_export.runtime.backend import Array
from mmm_export.runtime.decode_step import DecodeStep
from mmm_export.runtime.device_values import CUDA, DeviceRows, DeviceStatePool, DeviceTensor
from mmm_export.runtime.graph_loading import ProviderChoice, open_graph
from mmm_export.runtime.onnxruntime_backend import explained
from mmm_export.runtime.pinned_memory import PinnedTensor, tensor_for_host
from mmm_export.runtime.rows_backend import RowsBackend
from mmm_export.runtime.state_layout import GRAPH_DTYPE, STORAGE, state_layout
from mmm_export.runtime.token_rows import TokenRows

_NO_GRAPH = "-1"  # the id of a run that ONNX Runtime shall neither capture nor replay
_KEPT_CHUNKS = 2  # sizes of chunks: that of a long prompt, and its rest
_CHECKED_ROWS = 64  # of the embedding table, compared with what the embedding graph makes of their ids


class OnnxRuntimeCudaBackend(RowsBackend):
    """Runs a bundle on a GPU. Implements `Backend`, and `BatchBackend`.

    Of a prompt only token ids go to the GPU, of a step the embeddings of its tokens; only logits come back, written into host memory
    by the GPU itself. Decode steps of a model without attention layers are captured in CUDA graphs, one for each number of rows and
    direction between the two slots of states; where ONNX Runtime cannot capture, they
    are launched one by one. A step runs 1, 2, 4, 8 ... rows, or all: the least that holds those in use.

    Args:
        folder: the bundle; its files were checked.
        manifest: of that folder; `check_requirements` has passed it.
        threads: for what little runs on the CPU; None for one a core.
        library: that computes the scan, see `choose_library`; without one ONNX Runtime's own operators do, far slower.
        batch: sequences, each with a row of its own.
        provider: another one, for tests of this code without a GPU.
        device: where its memory lies.
        memory_limit_bytes: that each of the three graphs may take for activations and weights; None for all that is free.
        capture: decode steps in CUDA graphs where that is possible.

    Raises:
        BundleError: a graph cannot be run here or is not what the manifest says.
        KernelError: the library cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        library: Path | None = None,
        batch: int = 1,
        provider: str = CUDA_PROVIDER,
        device: str = CUDA,
        memory_limit_bytes: int | None = None,
        capture: bool = True,
    ) -> None:
        limit = {} if memory_limit_bytes is None else {"gpu_mem_limit": str(memory_limit_bytes)}
        self._manifest = manifest
        self._spec = manifest.model
        self._device = device
        self._dtype = GRAPH_DTYPE[manifest.dtype]

        def session(file: str, **options: str) -> onnxruntime.InferenceSession:
            chosen: list[ProviderChoice] = [
                (provider, _provider_options({**limit, **options})) if device == CUDA else provider
            ]
            return open_graph(folder, file, manifest, providers=chosen, threads=threads, library=library)

        self.captures_steps = capture and device == CUDA and not self._spec.attention_layers
        self._embedding = session(names.EMBEDDING_FILE)
        self._vision = session(names.VISION_FILE)
        if self.captures_steps:
            try:
                self._decoder = session(names.DECODER_FILE, enable_cuda_graph="1")
            except BundleError:  # some node of the function body runs on the CPU; with the library none does
                self.captures_steps = False
        if not self.captures_steps:
            self._decoder = session(names.DECODER_FILE)
        self._takes_past_lengths = any(node.name == names.PAST_LENGTHS for node in self._decoder.get_inputs())
        self._pool = DeviceStatePool(state_layout(manifest), device, batch)
        super().__init__(self._pool)
        self._past_lengths = DeviceTensor((1,), "int32", device)
        self._no_features = DeviceTensor((0, self._spec.hidden_size), self._dtype, device)
        self._row_logits = tensor_for_host((1, 1, self._spec.vocab_size), device)
        self._steps: dict[int, DecodeStep] = {}
        self._prompt_options = self._run_options(_NO_GRAPH)
        self._chunks: dict[int, _Chunk] = {}
        self._token_rows = self._checked_rows(folder)

    def image_features(self, pixel_values: Array) -> Array:
        rows = len(pixel_values) * self._spec.vision.tokens_per_tile
        pixels = DeviceTensor(pixel_values.shape, "float32", self._device)
        pixels.write(pixel_values)
        features = DeviceTensor((rows, self._spec.hidden_size), self._dtype, self._device)
        binding = self._vision.io_binding()
        pixels.bind_input(binding, names.PIXEL_VALUES)
        features.bind_output(binding, names.IMAGE_FEATURES)
        with explained(names.VISION_FILE):
            self._vision.run_with_iobinding(binding)
        return features.read()

    def close(self) -> None:
        host_tensors = [self._row_logits, *(step.logits for step in self._steps.values())]
        del self._steps, self._pool, self._row_pool, self._decoder, self._vision, self._embedding
        del self._row_logits, self._no_features, self._past_lengths, self._chunks, self._token_rows
        for tensor in host_tensors:
            if isinstance(tensor, PinnedTensor):
                tensor.close()  # last: no graph that writes it is left

    def _read_row(self, row: int, input_ids: NDArray[np.int64], features: Array | None) -> NDArray[np.float32]:
        logits = self._run_row(row, input_ids, features, len(input_ids))
        with explained(names.DECODER_FILE):
            host = logits.read()
        last: NDArray[np.float32] = host[0, -1]
        return last if host.shape[1] == 1 else last.copy()

    def _run_row(
        self, row: int, input_ids: NDArray[np.int64], features: Array | None, length: int
    ) -> DeviceTensor | PinnedTensor:
        """Run a chunk of which `length` tokens count from a row's past into its present; return the logits."""
        chunk = self._chunk_of(len(input_ids))
        chunk.write(input_ids, length)
        if self._takes_past_lengths:
            self._past_lengths.write(np.array([self.tokens_of(row)], np.int32))
        embedding = chunk.embedding
        if features is not None:
            rows = DeviceTensor(features.shape, self._dtype, self._device)
            rows.write(np.ascontiguousarray(features, STORAGE[self._dtype]))
            embedding = self._bound_embedding(chunk.ids, rows, chunk.embeds)
        with explained(names.EMBEDDING_FILE):
            self._embedding.run_with_iobinding(embedding)
        logits = self._row_logits
        if self._manifest.logits == "all":
            logits = DeviceTensor((1, chunk.count, self._spec.vocab_size), "float32", self._device)
            binding = self._bound_row(row, chunk, logits)
        else:
            place = (row, *self._pool.place(row))
            if place not in chunk.decoders:
                chunk.decoders[place] = self._bound_row(row, chunk, logits)
            binding = chunk.decoders[place]
        with explained(names.DECODER_FILE):
            self._decoder.run_with_iobinding(binding, self._prompt_options)
        return logits

    def _chunk_of(self, count: int) -> _Chunk:
        """Return what a chunk of `count` tokens is read from, as it was left if there was one lately."""
        chunk = self._chunks.pop(count, None)
        if chunk is None:
            if len(self._chunks) == _KEPT_CHUNKS:
                del self._chunks[next(iter(self._chunks))]  # the one used longest ago; before more memory is asked for
            chunk = _Chunk(count, self._spec.hidden_size, self._dtype, self._device)
            chunk.embedding = self._bound_embedding(chunk.ids, self._no_features, chunk.embeds)
        self._chunks[count] = chunk
        return chunk

    def _bound_row(self, row: int, chunk: _Chunk, logits: DeviceTensor | PinnedTensor) -> Any:
        past, present = self._pool.past(row), self._pool.present(row)
        return self._bound_decoder(chunk.embeds, chunk.lengths, self._past_lengths, past, present, logits)

    def _step_rows(
        self, slot: int, ids: NDArray[np.int64], lengths: NDArray[np.int32], past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        lanes = len(ids)
        step = self._steps.get(lanes) or self._made_step(lanes)
        step.write(lengths, past_lengths if self._takes_past_lengths else None)
        if self._token_rows is not None:
            step.embeds.write(self._token_rows.look_up(ids))
        else:
            step.ids.write(ids)
            with explained(names.EMBEDDING_FILE):
                self._embedding.run_with_iobinding(step.embedding)
        with explained(names.DECODER_FILE):
            self._decoder.run_with_iobinding(step.decoders[slot], step.options[slot])
            logits: NDArray[np.float32] = step.logits.read()
        return logits[:, 0]

    def _checked_rows(self, folder: Path) -> TokenRows | None:
        """Map the embedding table, if the embedding graph does nothing but look up its rows."""
        vocabulary = self._spec.vocab_size
        path = folder / (names.EMBEDDING_FILE + names.WEIGHTS_SUFFIX)
        rows = TokenRows.open(path, self._spec.hidden_size, STORAGE[self._dtype], vocabulary)
        if rows is None:
            return None
        ids = np.unique(np.linspace(0, vocabulary - 1, _CHECKED_ROWS, dtype=np.int64))
        ids = ids[ids != self._spec.image_token_id]
        chunk = self._chunk_of(len(ids))
        chunk.write(ids, len(ids))
        with explained(names.EMBEDDING_FILE):
            self._embedding.run_with_iobinding(chunk.embedding)
        return rows if rows.look_up(ids).tobytes() == chunk.embeds.read().tobytes() else None

    def _gather(self) -> None:
        # A run of no tokens writes the state that it reads: a copy within the device, for the price of a decode step.
        for row in self._positions.strays:
            self._run_row(row, np.zeros(1, np.int64), None, 0)
            self._positions.commit(row, 0)

    def _lanes(self, rows: int) -> int:
        return min(1 << (rows - 1).bit_length(), len(self._positions))

    def _made_step(self, lanes: int) -> DecodeStep:
        step = DecodeStep(self._spec, self._dtype, self._device, lanes)
        step.embedding = self._bound_embedding(step.ids, self._no_features, step.embeds)
        sides = [self._pool.rows(slot, 0, lanes) for slot in range(2)]
        step.decoders = tuple(
            self._bound_decoder(step.embeds, step.lengths, step.past_lengths, sides[slot], sides[1 - slot], step.logits)
            for slot in range(2)
        )
        step.options = tuple(self._run_options(str(2 * lanes + slot)) for slot in range(2))
        self._steps[lanes] = step
        return step

    def _run_options(self, graph: str) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        if self.captures_steps:
            options.add_run_config_entry("gpu_graph_id", graph)
        return options

    def _bound_embedding(self, ids: DeviceTensor, features: DeviceTensor, embeds: DeviceTensor) -> Any:
        binding = self._embedding.io_binding()
        ids.bind_input(binding, names.INPUT_IDS)
        features.bind_input(binding, names.IMAGE_FEATURES)
        embeds.bind_output(binding, names.INPUTS_EMBEDS)
        return binding

    def _bound_decoder(
        self,
        embeds: DeviceTensor,
        lengths: DeviceTensor,
        past_lengths: DeviceTensor,
        past: Mapping[str, DeviceRows],
        present: Mapping[str, DeviceRows],
        logits: DeviceTensor | PinnedTensor,
    ) -> Any:
        """Bind a run that reads the states `past` and writes `present`."""
        binding = self._decoder.io_binding()
        embeds.bind_input(binding, names.INPUTS_EMBEDS)
        lengths.bind_input(binding, names.LENGTHS)
        if self._takes_past_lengths:
            past_lengths.bind_input(binding, names.PAST_LENGTHS)
        for name, tensor in past.items():
            tensor.bind_input(binding, name)
        for name, tensor in present.items():
            tensor.bind_output(binding, names.present(name))
        logits.bind_output(binding, names.LOGITS)
        return binding


class _Chunk:
    """What a chunk of `count` tokens is read from, and the bindings of the runs that read it.

    Kept for the next chunk: to allocate on a GPU is to wait for all that runs there, and while the host binds, the GPU idles.
    `decoders` are by row and by where the states lie that a run reads and writes.
    """

    def __init__(self, count: int, width: int, dtype: str, device: str) -> None:
        self.count = count
        self.ids = DeviceTensor((1, count), "int64", device)
        self.embeds = DeviceTensor((1, count, width), dtype, device)
        self.lengths = DeviceTensor((1,), "int32", device)
        self.embedding: Any = None
        self.decoders: dict[tuple[int, int | None, int], Any] = {}
        self._length = -1  # as it is on the device

    def write(self, input_ids: NDArray[np.int64], length: int) -> None:
        """Update what the next run reads."""
        self.ids.write(np.ascontiguousarray(input_ids[None]))
        if length != self._length:
            self.lengths.write(np.array([length], np.int32))
            self._length = length


def _provider_options(more: Mapping[str, str]) -> dict[str, str]:
    return {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and a chunk's activations would take twice their size
        "cudnn_conv_use_max_workspace": "0",
        "use_tf32": "0",  # float32 shall be float32: tf32 rounds to 10 bits
        **more,
    }
