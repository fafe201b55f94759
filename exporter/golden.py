"""Golden files: what PyTorch computed for a few prompts, kept beside a bundle so that a device without PyTorch can be held to it.

A safetensors file; any reader can open it. Its metadata names the checkpoint. The k-th example has the tensors

    k.input_ids (T,) int64, k.pixel_values (tiles, 3, S, S), k.image_features (image tokens, hidden), k.logits (vocabulary,),
    k.forced (n,) int64: the greedy tokens after the prompt, k.steps (n, vocabulary): the logits after each of them,
    k.past.{i}.*: the states after the prompt, without the batch; of KV caches the T rows in use

all float32 but the ids. The prefill is computed at once, in float32: whoever runs it in chunks has to arrive at the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmm_export import names
from mmm_export.engine_manifest import EngineManifest
from mmm_export.errors import BundleError, PromptError
from mmm_export.exporter.recorded import Example, Recording
from mmm_export.manifest import Manifest
from mmm_export.spec import ModelSpec

KIND = "mmm-export golden"
FORMAT = "1"
MOST_EXAMPLES = 16

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GoldenExample:
    """One prompt, what it gave, and the greedy tokens that were stepped over. `wanted` has no embeddings and no layers' outputs."""

    name: str
    example: Example
    wanted: Recording
    forced: tuple[int, ...]


@dataclass(frozen=True)
class Golden:
    """A golden file; `source` and `source_sha256` are those of the checkpoint, as in a bundle's manifest."""

    source: str
    source_sha256: str
    examples: tuple[GoldenExample, ...]


def write_golden(path: Path, golden: Golden) -> None:
    """Write a golden file."""
    tensors: dict[str, Array] = {}
    for k, each in enumerate(golden.examples):
        tensors[f"{k}.input_ids"] = each.example.input_ids.astype(np.int64)
        tensors[f"{k}.forced"] = np.asarray(each.forced, np.int64)
        values: dict[str, Array] = {
            "pixel_values": each.example.pixel_values,
            "image_features": each.wanted.image_features,
            "logits": each.wanted.logits,
            "steps": np.stack(each.wanted.steps) if each.wanted.steps else np.zeros((0, len(each.wanted.logits))),
            **{name: array for state in each.wanted.states for name, array in state.items()},
        }
        tensors |= {f"{k}.{name}": np.ascontiguousarray(array, np.float32) for name, array in values.items()}
    metadata = {
        "kind": KIND,
        "format": FORMAT,
        "source": golden.source,
        "source_sha256": golden.source_sha256,
        "examples": "\n".join(each.name for each in golden.examples),
    }
    save_file(tensors, path, metadata)


def read_golden(path: Path, manifest: Manifest | EngineManifest) -> Golden:
    """Read a golden file and check that it belongs to a folder's model.

    Raises:
        BundleError: no golden file, damaged, of another version, or of another checkpoint.
        PromptError: the KV cache of this folder is too small for its prompts.
    """
    try:
        with safe_open(path, "np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise _unusable(path, "is no golden file", f"kind {metadata.get('kind')!r}", f"kind {KIND!r}")
            if metadata.get("format") != FORMAT:
                raise _unusable(
                    path, "is of another version", f"format {metadata.get('format')!r}", f"format {FORMAT!r}"
                )
            _check_source(path, metadata, manifest)
            titles = metadata.get("examples", "").split("\n")
            if not 0 < len(titles) <= MOST_EXAMPLES:
                raise ValueError(f"{len(titles)} examples")
            expected = [f"{k}.{name}" for k in range(len(titles)) for name in _names(manifest.model)]
            if sorted(file.keys()) != sorted(expected):
                raise ValueError(f"other tensors than a model of {manifest.model.layers} layers has")
            tensors = {name: np.asarray(file.get_tensor(name)) for name in expected}
        examples = tuple(_example(k, title, tensors, manifest) for k, title in enumerate(titles))
    except FileNotFoundError as error:
        raise _unusable(path, "is not there", "no such file", "a golden file") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise _unusable(
            path, "is damaged", told, "a file that mmm-export onnx --golden wrote for this model"
        ) from error
    return Golden(metadata["source"], metadata["source_sha256"], examples)


def states_by_name(states: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """Name the states of a recording as the decoder's inputs: "conv" of layer 3 is "past.3.conv"."""
    renamed = {
        "conv": names.past_conv,
        "ssm": names.past_recurrent,
        "key": names.past_key,
        "value": names.past_value,
    }
    return [{renamed[name](i): array for name, array in state.items()} for i, state in enumerate(states)]


def _names(spec: ModelSpec) -> list[str]:
    return ["input_ids", "forced", "pixel_values", "image_features", "logits", "steps", *_state_shapes(spec, 1)]


def _state_shapes(spec: ModelSpec, tokens: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, kind in enumerate(spec.kinds):
        if kind == "mamba2":
            shapes[names.past_conv(i)] = (spec.conv_channels, spec.conv_width - 1)
            shapes[names.past_recurrent(i)] = (spec.heads, spec.head_dim, spec.state_dim)
        else:
            shapes[names.past_key(i)] = shapes[names.past_value(i)] = (spec.kv_heads, tokens, spec.head_dim)
    return shapes


def _example(k: int, title: str, tensors: Mapping[str, Array], manifest: Manifest | EngineManifest) -> GoldenExample:
    """Check the tensors of one example against the model. Raises ValueError."""
    spec = manifest.model
    ids, forced = tensors[f"{k}.input_ids"], tensors[f"{k}.forced"]
    for name, array in (("input_ids", ids), ("forced", forced)):
        if (
            array.ndim != 1
            or array.dtype != np.int64
            or ((array < 0) | (array >= spec.vocab_size + spec.special_tokens)).any()
        ):
            raise ValueError(f"{k}.{name} holds no ids of this vocabulary")
    T, images = len(ids), int((ids == spec.image_token_id).sum())
    if not T or images % spec.vision.tokens_per_tile or (forced == spec.image_token_id).any():
        raise ValueError(f"{k}.input_ids is no prompt of this model")
    if manifest.max_tokens and T + len(forced) > manifest.max_tokens:
        raise PromptError(
            "the golden prompts do not fit the KV cache",
            found=f"{T} tokens and {len(forced)} new ones in {title!r}",
            wanted=f"at most {manifest.max_tokens}",
            hint="export or build with a larger --max-tokens, or verify with --checkpoint and a shorter --prompt",
        )
    size = spec.vision.tile_size
    shapes: dict[str, tuple[int, ...]] = {
        "pixel_values": (images // spec.vision.tokens_per_tile, spec.vision.channels, size, size),
        "image_features": (images, spec.hidden_size),
        "logits": (spec.vocab_size,),
        "steps": (len(forced), spec.vocab_size),
        **_state_shapes(spec, T),
    }
    for name, shape in shapes.items():
        array = tensors[f"{k}.{name}"]
        if array.dtype != np.float32 or array.shape != shape:
            raise ValueError(f"{k}.{name} is {array.dtype} {array.shape}, not float32 {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{k}.{name} holds NaN or infinity")
    wanted = Recording(tensors[f"{k}.image_features"], np.zeros((0, spec.hidden_size)))
    wanted.logits = tensors[f"{k}.logits"]
    wanted.steps = list(tensors[f"{k}.steps"])
    layers = range(spec.layers)
    wanted.states = [{n: tensors[f"{k}.{n}"] for n in shapes if n.startswith(f"past.{i}.")} for i in layers]
    return GoldenExample(title, Example(ids, tensors[f"{k}.pixel_values"]), wanted, tuple(map(int, forced)))


def _check_source(path: Path, metadata: Mapping[str, str], manifest: Manifest | EngineManifest) -> None:
    found = metadata.get("source_sha256", "")
    if found != manifest.source_sha256:
        raise BundleError(
            f"{path} belongs to another checkpoint",
            found=f"{metadata.get('source')}, sha256 {found[:16]}",
            wanted=f"{manifest.source}, sha256 {manifest.source_sha256[:16]}",
            hint="take the golden file of the bundle that this was made from",
        )


def _unusable(path: Path, what: str, found: str, wanted: str) -> BundleError:
    return BundleError(
        f"{path} {what}", found=found, wanted=wanted, hint="mmm-export onnx CHECKPOINT -o BUNDLE --golden writes one"
    )
