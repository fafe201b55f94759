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
from mmm_export.runtime.device_values import CUDA, DeviceStatePool, DeviceTensor
from mmm_export.runtime.graph_loading import ProviderChoice, open_graph
from mmm_export.runtime.onnxruntime_backend import explained
from mmm_export.runtime.pinned_memory import PinnedMemoryError, PinnedTensor
from mmm_export.runtime.state_layout import GRAPH_DTYPE, STORAGE, state_layout
from mmm_export.runtime.token_rows import TokenRows

_NO_GRAPH = "-1"  # the id of a run that ONNX Runtime shall neither capture nor replay
_CHECKED_ROWS = 64  # of the embedding table, compared with what the embedding graph makes of their ids


class OnnxRuntimeCudaBackend:
    """Runs a bundle on a GPU. Implements `Backend`.

    Of a call only token ids, or the embedding of one, go to the GPU, and only logits come back, written into the host's memory by the
    GPU itself. Decode steps of a model without attention layers are captured
    in two CUDA graphs, one for each direction between the two slots of states; where ONNX Runtime cannot capture, they are launched
    one by one.

    Args:
        folder: the bundle; its files were checked.
        manifest: of that folder; `check_requirements` has passed it.
        threads: for what little runs on the CPU; None for one a core.
        library: that computes the scan, see `choose_library`; without one ONNX Runtime's own operators do, far slower.
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
        self._pool = DeviceStatePool(state_layout(manifest), device)
        self._past_lengths = DeviceTensor((1,), "int32", device)
        self._no_features = DeviceTensor((0, self._spec.hidden_size), self._dtype, device)
        self._logits = _output((1, 1, self._spec.vocab_size), "float32", device)
        self._run_options = tuple(self._options_of(graph) for graph in (_NO_GRAPH, "1", "2"))
        self._chunk: _Chunk | None = None
        self._rows = self._checked_rows(folder)
        self._step_ids = DeviceTensor((1, 1), "int64", device)
        self._step_embeds = DeviceTensor((1, 1, self._spec.hidden_size), self._dtype, device)
        self._step_lengths = DeviceTensor((1,), "int32", device)
        self._step_lengths.write(np.array([1], np.int32))
        self._step_embedding = self._bound_embedding(self._step_ids, self._no_features, self._step_embeds)
        self._steps = tuple(
            self._bound_decoder(slot, self._step_embeds, self._step_lengths, self._logits) for slot in range(2)
        )

    @property
    def tokens(self) -> int:
        return self._pool.tokens

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

    def advance(self, input_ids: NDArray[np.int64], features: Array | None) -> NDArray[np.float32]:
        if self._takes_past_lengths:
            self._past_lengths.write(np.array([self._pool.tokens], np.int32))
        one_row = self._manifest.logits == "last"
        logits = self._step(input_ids) if len(input_ids) == 1 and features is None else self._read(input_ids, features)
        with explained(names.DECODER_FILE):
            host = logits.read()
        self._pool.commit(len(input_ids))
        last: NDArray[np.float32] = host[0, -1]
        return last if one_row else last.copy()

    def read_state(self, rows: int) -> dict[str, Array]:
        return self._pool.read(rows)

    def write_state(self, arrays: Mapping[str, Array], tokens: int) -> None:
        self._pool.write(arrays, tokens)

    def clear(self) -> None:
        self._pool.clear()

    def close(self) -> None:
        del self._steps, self._step_embedding, self._pool, self._decoder, self._vision, self._embedding
        if isinstance(self._logits, PinnedTensor):
            self._logits.close()
        del self._logits, self._step_ids, self._step_embeds, self._step_lengths, self._no_features, self._past_lengths
        del self._chunk, self._rows

    def _step(self, input_ids: NDArray[np.int64]) -> DeviceTensor | PinnedTensor:
        """Run one token from the current slot into the other; all addresses are fixed."""
        slot = self._pool.current
        if self._rows is not None:
            self._step_embeds.write(self._rows.look_up(input_ids)[None])
        else:
            self._step_ids.write(input_ids[None])
            with explained(names.EMBEDDING_FILE):
                self._embedding.run_with_iobinding(self._step_embedding)
        with explained(names.DECODER_FILE):
            self._decoder.run_with_iobinding(self._steps[slot], self._run_options[slot + 1])
        return self._logits

    def _read(self, input_ids: NDArray[np.int64], features: Array | None) -> DeviceTensor | PinnedTensor:
        """Run a chunk of tokens from the current slot into the other."""
        count = len(input_ids)
        if self._chunk is None or self._chunk.count != count:
            self._chunk = None  # gives its memory back before more is asked for
            self._chunk = _Chunk(count, self._spec.hidden_size, self._dtype, self._device)
        chunk = self._chunk
        chunk.ids.write(np.ascontiguousarray(input_ids[None]))
        rows = self._no_features
        if features is not None:
            rows = DeviceTensor(features.shape, self._dtype, self._device)
            rows.write(np.ascontiguousarray(features, STORAGE[self._dtype]))
        logits = self._logits
        if self._manifest.logits == "all":
            logits = DeviceTensor((1, count, self._spec.vocab_size), "float32", self._device)
        with explained(names.EMBEDDING_FILE):
            self._embedding.run_with_iobinding(self._bound_embedding(chunk.ids, rows, chunk.embeds))
        binding = self._bound_decoder(self._pool.current, chunk.embeds, chunk.lengths, logits)
        with explained(names.DECODER_FILE):
            self._decoder.run_with_iobinding(binding, self._run_options[0])
        return logits

    def _checked_rows(self, folder: Path) -> TokenRows | None:
        """Map the embedding table, if the embedding graph does nothing but look up its rows."""
        vocabulary = self._spec.vocab_size
        path = folder / (names.EMBEDDING_FILE + names.WEIGHTS_SUFFIX)
        rows = TokenRows.open(path, self._spec.hidden_size, STORAGE[self._dtype], vocabulary)
        ids = np.unique(np.linspace(0, vocabulary - 1, _CHECKED_ROWS, dtype=np.int64))
        ids = ids[ids != self._spec.image_token_id]
        taken = DeviceTensor((1, len(ids)), "int64", self._device)
        taken.write(ids[None])
        made = DeviceTensor((1, len(ids), self._spec.hidden_size), self._dtype, self._device)
        with explained(names.EMBEDDING_FILE):
            self._embedding.run_with_iobinding(self._bound_embedding(taken, self._no_features, made))
        if rows is None or rows.look_up(ids).tobytes() != made.read().tobytes():
            return None
        return rows

    def _options_of(self, graph: str) -> onnxruntime.RunOptions:
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
        self, slot: int, embeds: DeviceTensor, lengths: DeviceTensor, logits: DeviceTensor | PinnedTensor
    ) -> Any:
        """Bind a run that reads the states of one slot and writes those of the other."""
        binding = self._decoder.io_binding()
        embeds.bind_input(binding, names.INPUTS_EMBEDS)
        lengths.bind_input(binding, names.LENGTHS)
        if self._takes_past_lengths:
            self._past_lengths.bind_input(binding, names.PAST_LENGTHS)
        for name, tensor in self._pool.slots[slot].items():
            tensor.bind_input(binding, name)
        for name, tensor in self._pool.slots[1 - slot].items():
            tensor.bind_output(binding, names.present(name))
        logits.bind_output(binding, names.LOGITS)
        return binding


class _Chunk:
    """What a chunk of `count` tokens is read from, kept for the next one: allocating on a GPU waits for all that runs there."""

    def __init__(self, count: int, width: int, dtype: str, device: str) -> None:
        self.count = count
        self.ids = DeviceTensor((1, count), "int64", device)
        self.embeds = DeviceTensor((1, count, width), dtype, device)
        self.lengths = DeviceTensor((1,), "int32", device)
        self.lengths.write(np.array([count], np.int32))


def _output(shape: tuple[int, ...], dtype: str, device: str) -> DeviceTensor | PinnedTensor:
    """Memory for what goes to the host: there already, unless the driver gives none that a GPU can write."""
    if device == CUDA:
        try:
            return PinnedTensor(shape, dtype)
        except PinnedMemoryError:
            pass
    return DeviceTensor(shape, dtype, device)


def _provider_options(more: Mapping[str, str]) -> dict[str, str]:
    return {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and a chunk's activations would take twice their size
        "cudnn_conv_use_max_workspace": "0",
        "use_tf32": "0",  # float32 shall be float32: tf32 rounds to 10 bits
        **more,
    }
