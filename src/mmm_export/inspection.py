"""What is in a checkpoint, a bundle, an engine or a state file, as plain data; runs without torch and reads no weights."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from mmm_export import names
from mmm_export.engine_manifest import check_engine_files, folder_kind, read_engine_manifest
from mmm_export.errors import EngineError, MmmError
from mmm_export.manifest import Dtype, check_files, read_manifest
from mmm_export.spec import LayerKind, ModelSpec
from mmm_export.state_bytes import state_bytes


def inspect(path: Path) -> dict[str, Any]:
    """Describe what `path` is; the key `kind` says checkpoint, bundle, engine or state.

    Raises:
        MmmError: it is none of them, or it is damaged.
    """
    if (path / names.MANIFEST_FILE).is_file():
        return _engine(path) if folder_kind(path) == "engine" else _bundle(path)
    if (path / names.CONFIG_FILE).is_file():
        return _checkpoint(path)
    if path.is_file():
        return _state(path)
    raise MmmError(
        f"{path} cannot be inspected",
        found=f"a folder without {names.CONFIG_FILE} or {names.MANIFEST_FILE}"
        if path.is_dir()
        else "no such file or folder",
        wanted="a checkpoint folder, a bundle or engine folder, or a state file",
    )


def _checkpoint(folder: Path) -> dict[str, Any]:
    from mmm_export.model.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "dtype": checkpoint.dtype,
        "parameters": checkpoint.parameters,
        **model(checkpoint.spec, checkpoint.dtype),
        "files": {path.name: path.stat().st_size for path in files},
        "findings": list(checkpoint.findings),
    }


def _bundle(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    check_files(folder, manifest, content=False)
    return {
        "kind": "bundle",
        "path": str(folder),
        "dtype": manifest.dtype,
        "source": manifest.source,
        "source_sha256": manifest.source_sha256,
        "model_sha256": manifest.model_sha256,
        "opset": manifest.opset,
        "body": manifest.body,
        "logits": manifest.logits,
        "max_tokens": manifest.max_tokens,
        **model(manifest.model, manifest.dtype),
        "files": {name: info.bytes for name, info in manifest.files.items()},
        "tools": manifest.tools,
        "environment": manifest.environment,
        "findings": list(manifest.findings),
    }


def _engine(folder: Path) -> dict[str, Any]:
    manifest = read_engine_manifest(folder)
    check_engine_files(folder, manifest, content=False)
    memory = {field: value for field, value in dataclasses.asdict(manifest.memory).items() if value}
    plugin = dataclasses.asdict(manifest.plugin)
    layers = read_layers(folder)
    return {
        "kind": "engine",
        "path": str(folder),
        "flavor": manifest.flavor,
        "tensorrt_version": manifest.tensorrt_version,
        "compute_capabilities": ", ".join(f"{n // 10}.{n % 10}" for n in manifest.compute_capabilities),
        "platform": manifest.platform,
        "target": manifest.target,
        "dtype": manifest.dtype,
        "bundle": manifest.bundle,
        "bundle_sha256": manifest.bundle_sha256,
        "source": manifest.source,
        "source_sha256": manifest.source_sha256,
        "logits": manifest.logits,
        "build_seconds": manifest.build_seconds,
        **model(manifest.model, manifest.dtype),
        "limits": dataclasses.asdict(manifest.limits),
        "precision": manifest.precision,
        "memory": memory,
        "plugin": {"file": manifest.plugin.file or ("in the plan" if manifest.plugin.embedded else "not needed")}
        | ({k: plugin[k] for k in ("abi", "version", "machine", "sha256")} if manifest.plugin.needed else {})
        | {"architectures": ", ".join(map(str, manifest.plugin.architectures)) or "none"},
        "profiles": {
            f"{name} {profile.name}": "; ".join(
                f"{tensor} {list(ranges.least)} to {list(ranges.most)}"
                for tensor, ranges in profile.inputs.items()
                if ranges.least != ranges.most
            )
            or "fixed shapes"
            for name, plan in manifest.plans.items()
            for profile in plan.profiles
        },
        "options": manifest.options,
        "plans": {
            name: {
                "build_seconds": plan.build_seconds,
                "peak_bytes": plan.peak_bytes,
                "key": plan.key,
                "in_place": plan.in_place,
                "inputs": [dataclasses.asdict(tensor) for tensor in plan.inputs],
                "outputs": [dataclasses.asdict(tensor) for tensor in plan.outputs],
            }
            for name, plan in manifest.plans.items()
        },
        "layers_by_part": {part: _counts(rows) for part, rows in layers.items()},
        "layer_listing": layers,
        "files": {name: info.bytes for name, info in manifest.files.items()},
        "tools": manifest.tools,
        "findings": list(manifest.findings),
    }


def read_layers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the layers that a build stored, by part: "decoder.plan prefill". Empty where the library told none.

    Raises:
        EngineError: the file is damaged.
    """
    try:
        data = json.loads((folder / names.LAYERS_FILE).read_text(encoding="utf-8"))
        return {
            f"{plan} {profile}": [_layer(row) for row in rows]
            for plan, listing in data.items()
            for profile, rows in listing["profiles"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"{folder / names.LAYERS_FILE} cannot be read",
            found=f"{type(error).__name__}: {error}",
            hint="build the engine again",
        ) from error


def _layer(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": str(row["kind"]),
        "name": str(row["name"]),
        "inputs": [str(tensor) for tensor in row["inputs"]],
        "outputs": [str(tensor) for tensor in row["outputs"]],
    }


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count layers by kind, most frequent first."""
    return {"layers": len(rows), **dict(Counter(row["kind"] for row in rows).most_common())}


def _state(path: Path) -> dict[str, Any]:
    from mmm_export.runtime.state_file import read_state_header

    header = read_state_header(path)
    return {"kind": "state", "path": str(path), "bytes": path.stat().st_size, **dataclasses.asdict(header)}


def model(spec: ModelSpec, dtype: Dtype) -> dict[str, Any]:
    """Describe dimensions, layer kinds and the state of one sequence.

    Args:
        spec: the model.
        dtype: number format of the conv states and KV cache; the SSM states are float32 always.
    """
    vision = spec.vision
    return {
        "dimensions": {
            "hidden": spec.hidden_size,
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "mlp": spec.intermediate_size,
            "vocabulary": spec.vocab_size + spec.special_tokens,
            "conv_width": spec.conv_width,
        },
        "layers": {
            "total": spec.layers,
            "embedding_stack": len(spec.embedding.kinds),
            "mamba2": len(spec.mamba_layers),
            "mha": len(spec.attention_layers),
            "kinds": compact(spec.kinds),
        },
        "images": {
            "tile_pixels": vision.tile_size,
            "patch_pixels": vision.patch_size,
            "tokens_per_tile": vision.tokens_per_tile,
            "max_tiles": vision.max_tiles if vision.dynamic_tiles else 1,
            "thumbnail": vision.dynamic_tiles and vision.use_thumbnail,
        },
        "state": state_bytes(spec, dtype),
    }


def compact(kinds: tuple[LayerKind, ...]) -> str:
    """Write the layer kinds by runs: "0-7 mamba2, 8 mha, 9-31 mamba2"."""
    runs: list[tuple[int, int, str]] = []
    for layer, kind in enumerate(kinds):
        if runs and runs[-1][2] == kind:
            runs[-1] = (runs[-1][0], layer, kind)
        else:
            runs.append((layer, layer, kind))
    return ", ".join(f"{first} {kind}" if first == last else f"{first}-{last} {kind}" for first, last, kind in runs)
