"""The TensorRT backend: one decoder plan with a prefill and a decode profile, a vision plan, states at fixed addresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export import names
from mmm_export.engine_manifest import EngineManifest
from mmm_export.errors import EngineError, MmmError, PromptError
from mmm_export.interrupts import signals_deferred
from mmm_export.runtime.backend import Array
from mmm_export.runtime.state_layout import STORAGE, StateTensor, state_layout
from mmm_export.runtime.tensorrt.binding_table import (
    ITEM_BYTES,
    SCRATCH,
    DecoderBindings,
    buffer_sizes,
    check_engine,
    decoder_bindings,
    second,
    vision_output_dtype,
)
from mmm_export.runtime.tensorrt.buffer_plan import plan_buffers
from mmm_export.runtime.tensorrt.cuda import CudaDevice, PinnedBuffer
from mmm_export.runtime.tensorrt.decode_graphs import DecodeGraphs
from mmm_export.runtime.tensorrt.device_states import DeviceStates
from mmm_export.runtime.tensorrt.embedding_rows import EmbeddingRows
from mmm_export.runtime.tensorrt.library import Engine, Execution, TensorRT
from mmm_export.runtime.tensorrt.profiles import DecoderProfiles, Profile, decoder_profiles, vision_profile


@dataclass(frozen=True)
class EngineShapes:
    """Everything about an engine that its manifest decides: made before a GPU is touched, see `engine_shapes`."""

    layout: tuple[StateTensor, ...]
    bindings: DecoderBindings
    profiles: DecoderProfiles
    tiles: Profile | None
    features_dtype: str
    vision_bytes: dict[str, int]


def engine_shapes(manifest: EngineManifest) -> EngineShapes:
    """Sort and check the tensors and profiles of a manifest. Raises EngineError."""
    spec, decoder = manifest.model, manifest.plans[names.DECODER_PLAN]
    layout = state_layout(manifest)
    bindings = decoder_bindings(
        names.DECODER_PLAN,
        decoder,
        layout,
        hidden=spec.hidden_size,
        vocabulary=spec.vocab_size,
        embeds_dtype=manifest.embedding.dtype,
    )
    profiles = decoder_profiles(names.DECODER_PLAN, decoder, names.INPUTS_EMBEDS)
    vision = manifest.plans.get(names.VISION_PLAN)
    if vision is None:
        return EngineShapes(layout, bindings, profiles, None, manifest.embedding.dtype, {})
    size = spec.vision.tile_size
    tile = (spec.vision.channels, size, size)
    features = vision_output_dtype(names.VISION_PLAN, vision, tile=tile, hidden=spec.hidden_size)
    if features != manifest.embedding.dtype:
        raise EngineError(
            f"the parts of {manifest.bundle}'s engine do not fit each other",
            found=f"image features of {features}, embeddings of {manifest.embedding.dtype}",
            wanted="one type for both",
            hint="build the engine again: mmm-export trt",
        )
    tiles = vision_profile(names.VISION_PLAN, vision, names.PIXEL_VALUES)
    rows = tiles.most * spec.vision.tokens_per_tile
    vision_bytes = {
        names.PIXEL_VALUES: tiles.most * tile[0] * tile[1] * tile[2] * ITEM_BYTES["float32"],
        names.IMAGE_FEATURES: rows * spec.hidden_size * ITEM_BYTES[features],
    }
    return EngineShapes(layout, bindings, profiles, tiles, features, vision_bytes)


class TensorRTBackend:
    """Runs an engine folder. Implements `Backend`, but for one thing: SSM states are updated in place.

    A run that TensorRT refuses in the middle may therefore leave no whole state. Then `tokens` stays as it was, and every call but
    `clear`, `write_state` and `close` says that the state was lost. Ctrl-C waits until a run is complete. When a kernel fails, CUDA
    itself is lost to this process: every call says so, and `close` still works.

    Args:
        folder: the engine; its files were checked.
        manifest: of that folder.
        shapes: of the manifest.
        device: the GPU; closed with the backend.
        library: started, with the plugin loaded.
        use_graphs: record decode steps into CUDA graphs.

    Raises:
        EngineError: a plan cannot be loaded or is not what the manifest says.
        CudaError: not enough memory.
    """

    def __init__(
        self,
        folder: Path,
        manifest: EngineManifest,
        shapes: EngineShapes,
        device: CudaDevice,
        library: TensorRT,
        *,
        use_graphs: bool = True,
    ) -> None:
        self._device = device
        self._library = library
        self._spec = manifest.model
        self._shapes = shapes
        self._is_closed = False
        self._is_under_way = False  # a run was begun that may have touched the states
        self._rows = EmbeddingRows(folder, manifest.embedding, manifest.model.image_token_id)
        engines = {file: self._load(folder, file, manifest) for file in manifest.plans}
        decoder, vision = engines[names.DECODER_PLAN], engines.get(names.VISION_PLAN)
        profiles = shapes.profiles
        step = profiles.decode or profiles.prefill
        scratch = max(
            decoder.scratch_bytes(profiles.prefill.index),
            decoder.scratch_bytes(step.index),
            vision.scratch_bytes(shapes.tiles.index) if vision and shapes.tiles else 0,
        )
        self._most_tokens = profiles.prefill.most
        self._capacity = manifest.max_tokens if manifest.model.attention_layers else None
        plan = plan_buffers(
            buffer_sizes(
                shapes.bindings,
                tokens=self._most_tokens,
                hidden=self._spec.hidden_size,
                scratch=scratch,
                vision=shapes.vision_bytes,
            )
        )
        arenas = [device.allocate(size) for size in plan.arenas]
        self._addresses = {name: arenas[place.arena] + place.offset for name, place in plan.places.items()}
        self.device_bytes = plan.total_bytes
        self._states = DeviceStates(device, shapes.layout, shapes.bindings.states, self._state_addresses())
        self._states.clear()

        def execution(engine: Engine, profile: int) -> Execution:
            return engine.execution(profile, self._addresses[SCRATCH], scratch, device.stream)

        self._prefill = execution(decoder, profiles.prefill.index)
        # A context for each side: what a graph was recorded from then never changes.
        self._steps = (execution(decoder, step.index), execution(decoder, step.index))
        self._vision = execution(vision, shapes.tiles.index) if vision and shapes.tiles else None
        self._graphs = DecodeGraphs(device, enabled=use_graphs and profiles.decode is not None)
        self._stage_host_buffers()
        for side, context in enumerate(self._steps):
            self._bind_decoder(context, side)
            if profiles.decode is not None:
                self._set_shapes(context, 1)
        device.synchronize()

    @property
    def tokens(self) -> int:
        return self._states.tokens

    @property
    def graphs(self) -> DecodeGraphs:
        """What decode steps do: recorded, or plain and why."""
        return self._graphs

    def image_features(self, pixel_values: Array) -> Array:
        self._begin()
        if self._vision is None or self._shapes.tiles is None:
            raise EngineError(
                "this engine cannot see",
                found=f"no {names.VISION_PLAN}",
                hint="build it again without leaving vision out",
            )
        most = self._shapes.tiles.most
        parts = [self._see(pixel_values[begin : begin + most]) for begin in range(0, len(pixel_values), most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def advance(self, input_ids: NDArray[np.int64], features: Array | None) -> NDArray[np.float32]:
        self._begin()
        self._states.check_whole()
        count = len(input_ids)
        if count > self._most_tokens:
            raise EngineError(
                "the engine does not take so many tokens at once",
                found=f"{count} tokens",
                wanted=f"at most {self._most_tokens}",
                hint="read the prompt in smaller chunks, or build with a larger --prefill-tokens",
            )
        run = self._shapes.profiles.choose(count)[1]
        if self._capacity and self.tokens + run > self._capacity:
            raise PromptError(
                "the KV cache has no room for the padding that the engine wants",
                found=f"{self.tokens} tokens in the context, {count} more, run as {run}",
                wanted=f"at most {self._capacity} in all",
                hint="build the engine with --prefill-tokens from 1 on",
            )
        self._rows.write(self._embeds[:count], input_ids, features)
        self._embeds[count:run] = 0  # padding
        self._lengths[0], self._past_lengths[0] = count, self._states.tokens
        with signals_deferred(), self._whole_or_lost():
            self._enqueue(count)
            self._device.synchronize()
            self._states.commit(count)
        last: NDArray[np.float32] = self._logits[: self._spec.vocab_size].copy()
        return last

    def read_state(self, rows: int) -> dict[str, Array]:
        self._begin()
        return self._states.read(rows)

    def write_state(self, arrays: Mapping[str, Array], tokens: int) -> None:
        self._begin()
        self._states.write(arrays, tokens)

    def clear(self) -> None:
        self._begin()
        self._states.clear()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        # Contexts before engines, engines before the runtime, and all of them before the memory they use.
        for name in ("_prefill", "_steps", "_vision"):
            self.__dict__.pop(name, None)
        self._library.close()
        for name in ("_embeds", "_lengths", "_past_lengths", "_logits", "_rows"):  # views of memory that is freed now
            self.__dict__.pop(name, None)
        self._device.close()

    def _load(self, folder: Path, file: str, manifest: EngineManifest) -> Engine:
        engine = self._library.load(folder / file)
        check_engine(file, manifest.plans[file], engine.tensors())
        return engine

    def _state_addresses(self) -> dict[str, tuple[int, int]]:
        rows = {}
        for binding in self._shapes.bindings.states:
            first = self._addresses[binding.past]
            rows[binding.past] = (first, first if binding.in_place else self._addresses[second(binding.past)])
        return rows

    def _stage_host_buffers(self) -> None:
        """Pinned memory for all that goes to the device and back in a step; graphs read and write it where it is."""
        hidden = self._spec.hidden_size
        size = self._most_tokens * hidden * ITEM_BYTES[self._shapes.bindings.embeds]
        self._pinned: dict[str, PinnedBuffer] = {
            names.INPUTS_EMBEDS: self._device.allocate_pinned(size),
            names.LENGTHS: self._device.allocate_pinned(4),
            names.PAST_LENGTHS: self._device.allocate_pinned(4),
            names.LOGITS: self._device.allocate_pinned(self._shapes.bindings.vocabulary * 4),
        }
        storage = STORAGE[self._shapes.bindings.embeds]
        self._embeds: NDArray[Any] = self._pinned[names.INPUTS_EMBEDS].bytes.view(storage).reshape(-1, hidden)
        self._lengths = self._pinned[names.LENGTHS].bytes.view(np.int32)
        self._past_lengths = self._pinned[names.PAST_LENGTHS].bytes.view(np.int32)
        self._logits = self._pinned[names.LOGITS].bytes.view(np.float32)

    def _bind_decoder(self, context: Execution, side: int) -> None:
        bindings = self._shapes.bindings
        context.bind(names.INPUTS_EMBEDS, self._addresses[names.INPUTS_EMBEDS])
        context.bind(names.LOGITS, self._addresses[names.LOGITS])
        for name, is_taken in (
            (names.LENGTHS, bindings.takes_lengths),
            (names.PAST_LENGTHS, bindings.takes_past_lengths),
        ):
            if is_taken:
                context.bind(name, self._addresses[name])
        for name, address in self._states.bound(side).items():
            context.bind(name, address)

    def _set_shapes(self, context: Execution, tokens: int) -> None:
        bindings = self._shapes.bindings
        context.set_shape(names.INPUTS_EMBEDS, (1, tokens, self._spec.hidden_size))
        for name, is_taken in (
            (names.LENGTHS, bindings.takes_lengths),
            (names.PAST_LENGTHS, bindings.takes_past_lengths),
        ):
            if is_taken:
                context.set_shape(name, (1,))
        for tensor in self._shapes.layout:
            context.set_shape(tensor.name, tensor.shape)
        context.check_complete()

    def _enqueue(self, count: int) -> None:
        """Enqueue one call of the decoder: what goes up, the run, and the last token's logits down."""
        profile, tokens = self._shapes.profiles.choose(count)
        side = self._states.side
        if profile is self._shapes.profiles.decode:
            context = self._steps[side]

            def enqueue() -> None:
                self._enqueue_on(context, 1, 1)

            self._graphs.run(side, enqueue, lambda: context.is_capturable(self._device.stream))
            return
        self._set_shapes(self._prefill, tokens)
        self._bind_decoder(self._prefill, side)
        self._enqueue_on(self._prefill, tokens, count)

    def _enqueue_on(self, context: Execution, tokens: int, count: int) -> None:
        bindings, device = self._shapes.bindings, self._device
        row_bytes = self._spec.hidden_size * ITEM_BYTES[bindings.embeds]
        self._upload(names.INPUTS_EMBEDS, tokens * row_bytes)
        for name, is_taken in (
            (names.LENGTHS, bindings.takes_lengths),
            (names.PAST_LENGTHS, bindings.takes_past_lengths),
        ):
            if is_taken:
                self._upload(name, 4)
        self._is_under_way = True
        context.enqueue(device.stream)
        logits_bytes = bindings.vocabulary * ITEM_BYTES["float32"]
        row = count - 1 if bindings.all_logits else 0
        source = self._addresses[names.LOGITS] + row * logits_bytes
        device.download(self._pinned[names.LOGITS].address, source, logits_bytes)

    def _upload(self, name: str, size: int) -> None:
        self._device.upload(self._addresses[name], self._pinned[name].address, size)

    def _see(self, pixel_values: Array) -> Array:
        """Run the vision plan on tiles that it takes at once."""
        assert self._vision is not None
        pixels = np.ascontiguousarray(pixel_values, np.float32)
        rows = len(pixels) * self._spec.vision.tokens_per_tile
        features = np.empty((rows, self._spec.hidden_size), STORAGE[self._shapes.features_dtype])
        with signals_deferred():
            self._vision.set_shape(names.PIXEL_VALUES, pixels.shape)
            for name in (names.PIXEL_VALUES, names.IMAGE_FEATURES):
                self._vision.bind(name, self._addresses[name])
            self._device.upload(self._addresses[names.PIXEL_VALUES], pixels.ctypes.data, pixels.nbytes)
            try:
                self._vision.enqueue(self._device.stream)
                self._device.download(features.ctypes.data, self._addresses[names.IMAGE_FEATURES], features.nbytes)
            finally:
                self._device.synchronize()  # even after a failure: copies from and to these arrays may be under way
        return features

    @contextmanager
    def _whole_or_lost(self) -> Iterator[None]:
        """Note a state that a failure may have left half written; one of no tokens is simply cleared."""
        self._is_under_way = False
        try:
            yield
        except BaseException:
            if self._is_under_way:
                self._states.lose()
                if self._states.tokens == 0 and not self._device.is_dead:
                    self._device.synchronize()
                    self._states.clear()
            raise

    def _begin(self) -> None:
        if self._device.is_dead:
            raise MmmError(
                "the GPU failed in this session",
                wanted="a session whose kernels all ran",
                hint="close it and open another; where that fails too, start the program again and see dmesg",
            )
        self._device.activate()
