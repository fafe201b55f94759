"""What is in a checkpoint, a bundle or a state file, as plain data; runs without torch and reads no weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mmm_export import names
from mmm_export.errors import MmmError
from mmm_export.manifest import Dtype, Quantization, check_files, read_manifest
from mmm_export.spec import LayerKind, ModelSpec

BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def inspect(path: Path) -> dict[str, Any]:
    """Describe what `path` is; the key `kind` says checkpoint, bundle or state.

    Raises:
        MmmError: it is none of them, or it is damaged.
    """
    if (path / names.MANIFEST_FILE).is_file():
        return _bundle(path)
    if (path / names.CONFIG_FILE).is_file():
        return _checkpoint(path)
    if path.is_file():
        return _state(path)
    raise MmmError(
        f"{path} cannot be inspected",
        found=f"a folder without {names.CONFIG_FILE} or {names.MANIFEST_FILE}"
        if path.is_dir()
        else "no such file or folder",
        wanted="a checkpoint folder, a bundle folder, or a state file",
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
        **({} if manifest.quantization is None else {"quantization": _quantization(manifest.quantization)}),
        **model(manifest.model, manifest.dtype),
        "files": {name: info.bytes for name, info in manifest.files.items()},
        "tools": manifest.tools,
        "environment": manifest.environment,
        "findings": list(manifest.findings),
    }


def _quantization(found: Quantization) -> dict[str, Any]:
    data = dataclasses.asdict(found)
    return {**data, "left": ", ".join(found.left), "session": ", ".join(f"{k}={v}" for k, v in found.session.items())}


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


def state_bytes(spec: ModelSpec, dtype: Dtype) -> dict[str, int]:
    """Count the bytes one sequence keeps: SSM and conv states, which never grow, and the KV cache's growth by token."""
    recurrent = len(spec.mamba_layers)
    return {
        "ssm_bytes": recurrent * spec.heads * spec.head_dim * spec.state_dim * 4,
        "conv_bytes": recurrent * spec.conv_channels * (spec.conv_width - 1) * BYTES[dtype],
        "kv_bytes_per_token": len(spec.attention_layers) * 2 * spec.kv_heads * spec.head_dim * BYTES[dtype],
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
