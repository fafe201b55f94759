"""manifest.json of an engine folder: what was built, for which device and libraries, and proof that it is still that.

A runtime reads it before it loads any plan. Pieces that a bundle's manifest has too are those of `manifest`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mmm_export import names
from mmm_export.errors import EngineError
from mmm_export.manifest import (
    Dtype,
    FileInfo,
    FolderKind,
    TensorInfo,
    as_tuple,
    check_files,
    check_value,
    read_folder_manifest,
)
from mmm_export.spec import ModelSpec

SCHEMA = 1
Flavor = Literal["tensorrt", "tensorrt-rtx"]
FLAVORS: tuple[Flavor, ...] = ("tensorrt", "tensorrt-rtx")
ProfileName = Literal["prefill", "decode", "tiles"]

ENGINE = FolderKind(
    "engine", "an engine", "mmm-export trt", "mmm-export trt BUNDLE -o ENGINE", "build the engine again", EngineError
)


@dataclass(frozen=True)
class ShapeRange:
    """Shapes that one input may have under a profile; equal in all three where a size is fixed."""

    least: tuple[int, ...]
    typical: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True)
class ProfileInfo:
    """An optimization profile. Its place in `PlanInfo.profiles` is its number in the plan; it ranges over every input."""

    name: ProfileName
    inputs: dict[str, ShapeRange]


@dataclass(frozen=True)
class PlanInfo:
    """One serialized engine.

    Attributes:
        inputs: in the order of the engine; symbolic dimensions are strings, as in a bundle.
        outputs: likewise, after the inputs.
        profiles: decoder: prefill, then decode; vision: tiles.
        key: hash of all that the plan depends on: lowered graph and weights, options, versions, plugin. Equal keys need no rebuild.
        build_seconds: time the builder took, parsing included.
        peak_bytes: largest resident memory of the building process; 0 if it was not measured.
        in_place: present -> past: outputs that must have the address of that input, because the engine writes the cache in place.
            Every other pair of states may have one address or two.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profiles: tuple[ProfileInfo, ...]
    key: str
    build_seconds: float
    peak_bytes: int
    in_place: dict[str, str]


@dataclass(frozen=True)
class PluginInfo:
    """The library that holds MmmSelectiveScan.

    Attributes:
        file: its name in the folder, "" when the decoder plan carries it (or no layer needs it).
        embedded: the plan carries it: a runtime allows host code in the plan, and loads no file.
        needed: a model without Mamba layers needs none; the other fields then say nothing.
        sha256: of the library, wherever it is.
        abi: MMM_ABI_VERSION of its kernels.
        version: of mmm-export that compiled it.
        machine: processor, as `platform.machine()` spells it.
        architectures: GPU architectures with machine code: 87 is SM 8.7. Empty: it computes on the CPU and no engine can run it.
    """

    file: str
    embedded: bool
    needed: bool
    sha256: str
    abi: int
    version: str
    machine: str
    architectures: tuple[int, ...]


@dataclass(frozen=True)
class EmbeddingTable:
    """Rows of the text embedding, (rows, width) without padding, to be mapped; row = token id. Special tokens come last.

    The host looks rows up, and puts image features in the places of image tokens. `dtype` is numpy's name or "bfloat16".
    """

    file: str
    dtype: str
    rows: int
    width: int


@dataclass(frozen=True)
class Limits:
    """What the engine takes. `max_tokens` is the capacity of the KV caches, 0 for a model without attention layers."""

    max_batch: int
    max_prefill_tokens: int
    max_tokens: int
    max_tiles: int


@dataclass(frozen=True)
class DeviceMemory:
    """Device memory that the plan of the build expects, in bytes, at the largest batch."""

    weights_bytes: int
    state_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    workspace_bytes: int
    largest_allocation_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes + self.state_bytes + self.kv_cache_bytes + self.activation_bytes + self.workspace_bytes
        )


@dataclass(frozen=True)
class EngineManifest:
    """Content of an engine folder's manifest.json.

    Attributes:
        model: dimensions, as in the bundle.
        flavor: library that built the plans and must run them.
        tensorrt_version: its version, "10.3.0.30". Plans run on no other one; TensorRT-RTX says itself what it takes.
        compute_capabilities: what the plans were built for: 87 is SM 8.7. Several only with TensorRT-RTX.
        platform: of the device: machine and system, "aarch64-linux".
        target: name in the table of targets, or "auto".
        dtype: number format of weights and activations.
        precision: number format by part: decoder, vision, embedding, ssm_state, conv_state, kv_cache, logits.
        bundle: name of the bundle folder.
        bundle_sha256: Manifest.model_sha256 of the bundle; a saved state belongs to it.
        source: name of the checkpoint, and source_sha256 its hash, from the bundle.
        logits: as in the bundle.
        limits: largest batch, tokens, tiles.
        plans: by file name.
        plugin: the library beside or inside the decoder plan.
        embedding: the mapped table.
        memory: what the plan of the build expects.
        options: of the build, as text.
        build_seconds: of the whole command.
        tools: versions.
        files: each file but the manifest itself.
        findings: what a user should know, those of the bundle included.
    """

    model: ModelSpec
    flavor: Flavor
    tensorrt_version: str
    compute_capabilities: tuple[int, ...]
    platform: str
    target: str
    dtype: Dtype
    precision: dict[str, str]
    bundle: str
    bundle_sha256: str
    source: str
    source_sha256: str
    logits: Literal["last", "all"]
    limits: Limits
    plans: dict[str, PlanInfo]
    plugin: PluginInfo
    embedding: EmbeddingTable
    memory: DeviceMemory
    options: dict[str, str]
    build_seconds: float
    tools: dict[str, str]
    files: dict[str, FileInfo]
    findings: tuple[str, ...] = ()

    @property
    def model_sha256(self) -> str:
        """What a saved state must match: that of the bundle, so that states move between a bundle and its engines."""
        return self.bundle_sha256

    @property
    def max_tokens(self) -> int:
        """As of a bundle's manifest: tokens that the KV caches hold, 0 for a model without."""
        return self.limits.max_tokens

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": ENGINE.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineManifest:
        """Inverse of `to_json`. Raises KeyError, TypeError, ValueError or AttributeError on foreign data."""
        manifest = _from_plain(cls, {k: v for k, v in data.items() if k not in ("schema", "kind")})
        check_value("manifest", manifest, cls)
        _check_consistency(manifest)
        return manifest  # type: ignore[no-any-return]


def _from_plain(declared: Any, value: Any) -> Any:
    """Build what a type says out of JSON; values are checked by `check_value` afterwards."""
    if declared is ModelSpec:
        return ModelSpec.from_json(value)
    if dataclasses.is_dataclass(declared):
        hints = get_type_hints(declared)
        built = {k: _from_plain(hints[k], v) for k, v in dict(value).items()}
        return declared(**built)  # type: ignore[operator]
    kind, arguments = get_origin(declared), get_args(declared)
    if kind is tuple:
        return tuple(_from_plain(arguments[0], item) for item in as_tuple(value))
    if kind is dict:
        return {k: _from_plain(arguments[1], v) for k, v in dict(value).items()}
    return value


def _check_consistency(manifest: EngineManifest) -> None:
    """Refuse parts that contradict each other. Raises ValueError."""
    if names.DECODER_PLAN not in manifest.plans:
        raise ValueError(f"no plan {names.DECODER_PLAN}")
    if not manifest.compute_capabilities:
        raise ValueError("compute_capabilities is empty")
    if manifest.model.vision.tokens_per_tile < 1:
        raise ValueError("vision gives no token for a tile")
    named = {*manifest.plans, manifest.embedding.file, *filter(None, [manifest.plugin.file])}
    if missing := sorted(named - set(manifest.files)):
        raise ValueError(f"{', '.join(missing)} is not among the files")
    for file, plan in manifest.plans.items():
        inputs = {tensor.name: tensor for tensor in plan.inputs}
        outputs = {tensor.name for tensor in plan.outputs}
        if not plan.profiles:
            raise ValueError(f"{file} has no profile")
        for profile in plan.profiles:
            if set(profile.inputs) != set(inputs):
                raise ValueError(f"profile {profile.name} of {file} ranges over other inputs than the plan has")
            for name, ranges in profile.inputs.items():
                _check_range(f"{name} in profile {profile.name} of {file}", ranges, inputs[name])
        for present, past in plan.in_place.items():
            if present not in outputs or past not in inputs:
                raise ValueError(f"{file} has no pair {past}, {present}")


def _check_range(what: str, ranges: ShapeRange, tensor: TensorInfo) -> None:
    sizes = (ranges.least, ranges.typical, ranges.most)
    if any(len(shape) != len(tensor.shape) for shape in sizes):
        raise ValueError(f"{what} has another rank than the plan's input")
    for dimension, *range_of in zip(tensor.shape, *sizes, strict=True):
        if range_of != sorted(range_of) or (isinstance(dimension, int) and set(range_of) != {dimension}):
            raise ValueError(f"{what} ranges over {range_of}, not within {dimension}")


def write_engine_manifest(folder: Path, manifest: EngineManifest) -> None:
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False)
    (folder / names.MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_engine_manifest(folder: Path) -> EngineManifest:
    """Read and check the manifest of an engine folder. Raises EngineError; the files are checked by `check_engine_files`."""
    return read_folder_manifest(folder, ENGINE, SCHEMA, EngineManifest.from_json)


def check_engine_files(folder: Path, manifest: EngineManifest, *, content: bool = True) -> None:
    """Compare the files with the manifest, see `manifest.check_files`. Raises EngineError."""
    check_files(folder, manifest, content=content, kind=ENGINE)


def folder_kind(folder: Path) -> str | None:
    """Read what a folder's manifest says that it is, "bundle" or "engine"; None where it says nothing readable."""
    try:
        kind = json.loads((folder / names.MANIFEST_FILE).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return kind if isinstance(kind, str) else None
