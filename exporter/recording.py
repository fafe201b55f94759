"""What a model computes for one input, layer by layer, by PyTorch or by ONNX Runtime, in a form that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from mmm_export import names
from mmm_export.environment import environment
from mmm_export.errors import BundleError
from mmm_export.exporter.graphs import layer_output
from mmm_export.exporter.recorded import Array, Example, Recording, greedy
from mmm_export.manifest import Manifest
from mmm_export.model.decoder import MmMamba, States
from mmm_export.model.layers import LayerState, MambaState
from mmm_export.operator_library import register_library
from mmm_export.widen import widen_bf16


def record_torch(
    model: MmMamba, example: Example, *, forced: Sequence[int] | None = None, new_tokens: int = 0
) -> tuple[Recording, list[int]]:
    """Run PyTorch: one prefill, then steps over `forced` tokens, or over `new_tokens` greedy ones.

    Returns the recording and the tokens that were stepped over.
    """
    T = len(example.input_ids)
    count = len(forced) if forced is not None else new_tokens
    with torch.inference_mode():
        if len(example.pixel_values):
            features = model.image_features(torch.from_numpy(example.pixel_values))
        else:
            features = torch.zeros(0, model.spec.hidden_size, dtype=model.dtype)
        embeds = model.embed(torch.from_numpy(example.input_ids)[None], features)
        recording = Recording(_wide(features), _wide(embeds[0]))
        states = model.initial_states(1, T + count)
        hidden, states = model.hidden(
            embeds, _lengths(T), states, _lengths(0), on_layer=lambda _, x: recording.layers.append(_wide(x[0]))
        )
        recording.states = [_state_arrays(state, T) for state in states]
        recording.logits = _wide(model.logits(hidden[:, -1])[0])
        tokens = _step_torch(model, states, T, recording, forced, new_tokens)
    return recording, tokens


def _step_torch(
    model: MmMamba, states: States, past: int, recording: Recording, forced: Sequence[int] | None, new_tokens: int
) -> list[int]:
    tokens: list[int] = []
    scores = recording.logits
    for i in range(len(forced) if forced is not None else new_tokens):
        tokens.append(forced[i] if forced is not None else greedy(scores, model.spec))
        logits, states = model.step(torch.tensor([tokens[-1]]), states, _lengths(past + i))
        scores = _wide(logits[0, 0])
        recording.steps.append(scores)
    return tokens


class BundleRecorder:
    """Runs a bundle in ONNX Runtime on the CPU with every layer's output exposed."""

    def __init__(self, folder: Path, manifest: Manifest, library: Path | None = None) -> None:
        """Open the graphs; with a `library` of ours, it computes the scan instead of the function body."""
        self.manifest = manifest
        self.spec = manifest.model
        extra = [layer_output(i) for i in range(self.spec.layers)]
        self.vision = _session(folder, names.VISION_FILE, manifest)
        self.embedding = _session(folder, names.EMBEDDING_FILE, manifest)
        self.decoder = _session(folder, names.DECODER_FILE, manifest, extra, library)

    def record(self, example: Example, *, forced: Sequence[int] = (), split: int | None = None) -> Recording:
        """Run prefill and steps over `forced` tokens; with `split`, prefill that many tokens and step over the rest of the example."""
        features, embeds = self._embed(example)
        recording = Recording(features.astype(np.float64), embeds.astype(np.float64))
        T = len(example.input_ids)
        states = self._initial_states()
        first = T if split is None else split
        logits, states, layers = self._decode(embeds[:first], states, 0)
        for t in range(first, T):
            logits, states, rows = self._decode(embeds[t : t + 1], states, t)
            layers = [np.concatenate(pair) for pair in zip(layers, rows, strict=True)]
        recording.layers = [x.astype(np.float64) for x in layers]
        recording.logits = logits.astype(np.float64)
        recording.states = self._states_by_layer(states, T)
        for i, token in enumerate(forced):
            one = Example(np.array([token], dtype=np.int64), example.pixel_values[:0])
            _, embed = self._embed(one)
            logits, states, _ = self._decode(embed, states, T + i)
            recording.steps.append(logits.astype(np.float64))
        return recording

    def _embed(self, example: Example) -> tuple[Array, Array]:
        kind = self.embedding.get_inputs()[1].type
        features = np.zeros((0, self.spec.hidden_size), dtype=_NUMPY_TYPES[kind])
        if len(example.pixel_values):
            features = self.vision.run(None, {names.PIXEL_VALUES: example.pixel_values})[0]
        feeds = {names.INPUT_IDS: example.input_ids[None], names.IMAGE_FEATURES: features}
        return features, self.embedding.run(None, feeds)[0][0]

    def _initial_states(self) -> dict[str, Array]:
        inputs = {i.name: i for i in self.decoder.get_inputs()}
        return {
            name: np.zeros([1, *info.shape[1:]], dtype=_NUMPY_TYPES[info.type])
            for name, info in inputs.items()
            if name.startswith("past.")
        }

    def _decode(
        self, embeds: Array, states: dict[str, Array], past: int
    ) -> tuple[Array, dict[str, Array], list[Array]]:
        feeds: dict[str, Array] = {
            names.INPUTS_EMBEDS: embeds[None],
            names.LENGTHS: np.array([len(embeds)], dtype=np.int32),
            **states,
        }
        if self.spec.attention_layers:
            feeds[names.PAST_LENGTHS] = np.array([past], dtype=np.int32)
        outputs = dict(zip((o.name for o in self.decoder.get_outputs()), self.decoder.run(None, feeds), strict=True))
        new = {name: outputs[names.present(name)] for name in states}
        layers = [outputs[layer_output(i)][0] for i in range(self.spec.layers)]
        return outputs[names.LOGITS][0, -1], new, layers

    def _states_by_layer(self, states: dict[str, Array], tokens: int) -> list[dict[str, Array]]:
        rows: list[dict[str, Array]] = []
        for i, kind in enumerate(self.spec.kinds):
            if kind == "mamba2":
                arrays = {"conv": states[names.past_conv(i)][0], "ssm": states[names.past_recurrent(i)][0]}
            else:
                key, value = states[names.past_key(i)][0], states[names.past_value(i)][0]
                arrays = {"key": key[:, :tokens], "value": value[:, :tokens]}
            rows.append({name: array.astype(np.float64) for name, array in arrays.items()})
        return rows


_NUMPY_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def _session(
    folder: Path, name: str, manifest: Manifest, outputs: Sequence[str] = (), library: Path | None = None
) -> onnxruntime.InferenceSession:
    """Load one graph of a bundle, with more of its values as outputs. The weights stay where they are."""
    model = onnx.load(folder / name, load_external_data=False)
    known = {value.name: value for value in model.graph.value_info}
    for output in outputs:
        model.graph.output.append(known.get(output) or onnx.ValueInfoProto(name=output))
    if manifest.dtype == "bf16":
        widen_bf16(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if name == names.DECODER_FILE and manifest.quantization is not None:
        for key, value in manifest.quantization.session.items():
            options.add_session_config_entry(key, value)
    if library is not None:
        register_library(options, library)
    try:
        with environment(manifest.environment):
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except BundleError:
        raise
    except Exception as error:
        raise BundleError(
            f"ONNX Runtime cannot open {folder / name}",
            found=str(error).strip().splitlines()[0][:300],
            wanted=f"a graph that onnxruntime {onnxruntime.__version__} runs on a CPU",
            hint="upgrade onnxruntime, or export again with --body standard, which every version runs",
        ) from error


def _state_arrays(state: LayerState, tokens: int) -> dict[str, Array]:
    if isinstance(state, MambaState):
        return {"conv": _wide(state.conv[0]), "ssm": _wide(state.ssm[0])}
    return {"key": _wide(state.key[0, :, :tokens]), "value": _wide(state.value[0, :, :tokens])}


def _lengths(tokens: int) -> torch.Tensor:
    return torch.tensor([tokens], dtype=torch.int32)


def _wide(x: torch.Tensor) -> Array:
    return np.asarray(x.double().numpy())
