"""The decoder cut into its layers, each run by itself, so that memory holds one layer and not the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from mmm_export import names
from mmm_export.calibration.linears import Linear, Source, find_linears, find_sources
from mmm_export.environment import environment
from mmm_export.errors import BundleError
from mmm_export.manifest import Manifest
from mmm_export.widen import widen_bf16

Array = NDArray[Any]
Edit = Callable[[ir.Model], None]

# Q/DQ pairs are computed as they are written, instead of being fused into faster operators with other roundings.
EXACT_SETTINGS = {
    "session.disable_quant_qdq": "1",
    "session.x64quantprecision": "1",
    "session.qdq_matmulnbits_accuracy_level": "0",
}
_UNPACKED = {"session.disable_prepacking": "1"}  # each layer runs a few times only: packing its weights would not pay
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.float32}
_CPU = ["CPUExecutionProvider"]


def open_session(
    model: bytes | Path,
    folder: Path,
    manifest: Manifest,
    threads: int | None = None,
    settings: dict[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Open a graph whose weights lie in `folder`, on the CPU and with exact settings. Raises BundleError."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    entries = {**EXACT_SETTINGS, **_UNPACKED, **(settings or {})}
    if isinstance(model, bytes):
        entries["session.model_external_initializers_file_folder_path"] = str(folder)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        with environment(manifest.environment):
            return onnxruntime.InferenceSession(model, options, providers=_CPU)
    except BundleError:
        raise
    except Exception as error:
        raise BundleError(
            f"ONNX Runtime cannot open a graph of {folder}",
            found=(str(error).strip().splitlines() or [type(error).__name__])[0][:300],
            wanted=f"a graph that onnxruntime {onnxruntime.__version__} runs on a CPU",
            hint="upgrade onnxruntime, or export again with --body standard",
        ) from error


@dataclass(frozen=True)
class _Cut:
    """Nodes of one segment, by position, and what they read and give."""

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Decoder:
    """The decoder graph of a bundle without its weights, and its segments: one a layer, then the head."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.spec = manifest.model
        self.proto = onnx.load(folder / names.DECODER_FILE, load_external_data=False)
        if manifest.dtype == "bf16":
            widen_bf16(self.proto)
        self._makers = {name: i for i, node in enumerate(self.proto.graph.node) for name in node.output}
        self._initializers = {i.name: i for i in self.proto.graph.initializer}
        self._infos = {
            v.name: v for v in (*self.proto.graph.value_info, *self.proto.graph.input, *self.proto.graph.output)
        }
        self._inputs = {v.name for v in self.proto.graph.input}
        whole = ir.load(folder / names.DECODER_FILE)
        self.linears: tuple[Linear, ...] = find_linears(whole, self.spec)
        self.sources: tuple[Source, ...] = find_sources(whole, self.linears, self.spec)
        missing = next((i for i in range(self.spec.layers) if _boundary(i) not in self._makers), None)
        if missing is not None or not self.linears:
            raise BundleError(
                f"{folder / names.DECODER_FILE} cannot be calibrated",
                found="no linear maps" if missing is None else f"no value {_boundary(missing)}",
                wanted="a decoder written by mmm-export onnx, not quantized yet",
                hint="export the bundle again",
            )

    @property
    def segments(self) -> int:
        """Layers and head."""
        return self.spec.layers + 1

    def states_of(self, segment: int) -> tuple[str, ...]:
        """Names of the states that a segment reads and updates."""
        if segment == self.spec.layers:
            return ()
        if self.spec.kinds[segment] == "mamba2":
            return names.past_conv(segment), names.past_recurrent(segment)
        return names.past_key(segment), names.past_value(segment)

    def open(
        self, segment: int, taps: Iterable[str] = (), edit: Edit | None = None, threads: int | None = None
    ) -> Segment:
        """Open one segment.

        Args:
            segment: layer index, or the number of layers for the head.
            taps: values inside to return as well.
            edit: changes the graph of the segment, such as to quantize a part of it.
            threads: to compute with; None for one a core.
        """
        output = names.LOGITS if segment == self.spec.layers else _boundary(segment)
        outputs = [output, *(names.present(name) for name in self.states_of(segment))]
        taps = tuple(taps)
        proto = self._extract(self._cut(segment, [*outputs, *(t for t in taps if t not in outputs)]))
        if edit is not None:
            model = ir.serde.deserialize_model(proto)
            ir.external_data.set_base_dir(model.graph, self.folder)
            edit(model)
            proto = ir.serde.serialize_model(model)
        session = open_session(proto.SerializeToString(), self.folder, self.manifest, threads)
        return Segment(self, segment, session, output, taps)

    def _cut(self, segment: int, outputs: Sequence[str]) -> _Cut:
        """Collect what the outputs need; the layer before gives its output and is not run again."""
        before = _boundary(segment - 1) if segment else names.INPUTS_EMBEDS
        found: set[int] = set()
        inputs: list[str] = []
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            if name == before or name in self._inputs:
                if name not in inputs:
                    inputs.append(name)
            elif name in self._makers and self._makers[name] not in found:
                index = self._makers[name]
                found.add(index)
                waiting.extend(filter(None, self.proto.graph.node[index].input))
        return _Cut(tuple(sorted(found)), tuple(inputs), tuple(outputs))

    def _extract(self, cut: _Cut) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(onnx.ModelProto(ir_version=self.proto.ir_version))
        model.opset_import.extend(self.proto.opset_import)
        model.functions.extend(self.proto.functions)
        graph = model.graph
        graph.name = self.proto.graph.name or "decoder"
        graph.node.extend(self.proto.graph.node[i] for i in cut.nodes)
        read = {name for node in graph.node for name in node.input}
        graph.initializer.extend(tensor for name, tensor in self._initializers.items() if name in read)
        graph.input.extend(self._infos[name] for name in cut.inputs)
        graph.output.extend(self._infos.get(name) or onnx.ValueInfoProto(name=name) for name in cut.outputs)
        made = {name for node in graph.node for name in node.output} - set(cut.outputs)
        graph.value_info.extend(self._infos[name] for name in made if name in self._infos)
        return model

    def initial_state(self, name: str, max_tokens: int) -> Array:
        """A state of zeros."""
        spec, dtype = self.spec, _NUMPY[{"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.manifest.dtype]]
        kind = name.rpartition(".")[2]
        if kind == "recurrent":
            return np.zeros((1, spec.heads, spec.head_dim, spec.state_dim), np.float32)
        if kind == "conv":
            return np.zeros((1, spec.conv_channels, spec.conv_width - 1), dtype)
        return np.zeros((1, spec.kv_heads, max_tokens, spec.head_dim), dtype)


class Segment:
    """One open segment. `run` takes and gives float32 or float16 arrays of one sequence."""

    def __init__(
        self, decoder: Decoder, index: int, session: onnxruntime.InferenceSession, output: str, taps: tuple[str, ...]
    ) -> None:
        self.decoder = decoder
        self.session = session
        self._output = output
        self._taps = taps
        self.inputs = {node.name: node for node in session.get_inputs()}
        self._states = decoder.states_of(index)
        self.before = _boundary(index - 1) if index else names.INPUTS_EMBEDS
        self._max_tokens = decoder.manifest.max_tokens
        self.state: dict[str, Array] = {}
        self.tokens = 0
        self.reset()

    def reset(self) -> None:
        """Begin a new sequence."""
        self.state = {name: self.decoder.initial_state(name, self._max_tokens) for name in self._states}
        self.tokens = 0

    def run(self, hidden: Array) -> tuple[Array, dict[str, Array]]:
        """Read the next tokens; update the state.

        Shapes: hidden (T, hidden) -> output (T, hidden), or logits (1 or T, vocab) of the head; taps (T, channels) by name.
        """
        feeds: dict[str, Array] = {}
        for name, node in self.inputs.items():
            if name in (
                self.before,
                names.INPUTS_EMBEDS,
            ):  # the latter is only asked for its shape, beyond the first layer
                feeds[name] = hidden[None].astype(np.float16 if "float16" in node.type else np.float32, copy=False)
            elif name == names.LENGTHS:
                feeds[name] = np.array([len(hidden)], np.int32)
            elif name == names.PAST_LENGTHS:
                feeds[name] = np.array([self.tokens], np.int32)
            else:
                feeds[name] = (
                    self.state[name] if name in self.state else self.decoder.initial_state(name, self._max_tokens)
                )
        wanted = [self._output, *(names.present(name) for name in self._states)]
        extra = [name for name in self._taps if name not in wanted]
        given = dict(zip([*wanted, *extra], self.session.run([*wanted, *extra], feeds), strict=True))
        self.state = {name: given[names.present(name)] for name in self._states}
        self.tokens += len(hidden)
        return given[self._output][0], {name: given[name].reshape(-1, given[name].shape[-1]) for name in self._taps}


class HeadRows:
    """The head on many tokens at once: rows (R, hidden) -> logits (R, vocab) float32."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def logits(self, rows: Array) -> NDArray[np.float32]:
        """Every row is a sequence of one token."""
        feeds: dict[str, Array] = {}
        decoder, count = self._segment.decoder, len(rows)
        for name, node in self._segment.inputs.items():
            if name in (self._segment.before, names.INPUTS_EMBEDS):
                feeds[name] = rows[:, None].astype(np.float16 if "float16" in node.type else np.float32, copy=False)
            elif name == names.LENGTHS:
                feeds[name] = np.ones(count, np.int32)
            elif name == names.PAST_LENGTHS:
                feeds[name] = np.zeros(count, np.int32)
            else:
                feeds[name] = np.repeat(decoder.initial_state(name, decoder.manifest.max_tokens), count, axis=0)
        out = self._segment.session.run([names.LOGITS], feeds)[0]
        return np.asarray(out[:, -1], np.float32)


class Embedder:
    """Vision and embedding graphs: token ids and tiles to input embeddings."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        def session(file: str) -> onnxruntime.InferenceSession:
            proto = onnx.load(folder / file, load_external_data=False)
            if manifest.dtype == "bf16":
                widen_bf16(proto)
            return open_session(proto.SerializeToString(), folder, manifest)

        self._hidden = manifest.model.hidden_size
        self._vision = session(names.VISION_FILE)
        self._embedding = session(names.EMBEDDING_FILE)
        kind = next(i.type for i in self._embedding.get_inputs() if i.name == names.IMAGE_FEATURES)
        self._dtype: Any = np.float16 if "float16" in kind else np.float32

    def embed(self, input_ids: NDArray[np.int64], pixel_values: NDArray[np.float32]) -> Array:
        """Shapes: input_ids (T,), pixel_values (tiles, 3, S, S) -> (T, hidden)."""
        tiles = [
            self._vision.run(None, {names.PIXEL_VALUES: pixel_values[i : i + 1]})[0] for i in range(len(pixel_values))
        ]
        features = np.concatenate(tiles) if tiles else np.zeros((0, self._hidden), self._dtype)
        feeds = {names.INPUT_IDS: input_ids[None], names.IMAGE_FEATURES: features}
        embeds: Array = self._embedding.run([names.INPUTS_EMBEDS], feeds)[0][0]
        return embeds


def _boundary(layer: int) -> str:
    """Name of the value that a layer hands on, which `mmm-export onnx` keeps."""
    return f"layer.{layer}.output"
