"""manifest.json of a bundle: what the folder holds, and proof that it still holds it. Every reader checks it first."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from mmm_export import names
from mmm_export.errors import BundleError, MmmError
from mmm_export.spec import ModelSpec

SCHEMA = 1
Dtype = Literal["fp32", "fp16", "bf16"]
T = TypeVar("T")
DTYPES: tuple[Dtype, ...] = ("fp32", "fp16", "bf16")

QuantizedFormat = Literal["int8", "int8-weights", "int4", "fp8"]
QUANTIZED_FORMATS: tuple[QuantizedFormat, ...] = ("int8", "int8-weights", "int4", "fp8")
Consumer = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-cuda", "reference"]
CONSUMERS: tuple[Consumer, ...] = ("tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-cuda", "reference")
# All that a bundle may set in ONNX Runtime: a bundle is data, so anything else in a manifest is refused.
SESSION_SETTINGS = ("session.disable_quant_qdq", "session.x64quantprecision", "session.qdq_matmulnbits_accuracy_level")

_MAX_SIZE = 2**31 - 1
_MAY_BE_ZERO = ("special_tokens", "max_tokens", "image_token_id", "shape", "abi", "least", "typical", "most")


@dataclass(frozen=True)
class TensorInfo:
    """One graph input or output. `dtype` is numpy's name or "bfloat16"; symbolic dimensions are strings."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphInfo:
    """Inputs and outputs of one ONNX file, in graph order."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Quantization:
    """How the decoder was quantized.

    `method` turned what was measured into ranges, `smooth` moved magnitude from activations into weights: "none", "auto", or
    SmoothQuant's alpha. `consumer` is what the form of the graph is written for. `source_model_sha256` is `model_sha256` of the
    bundle it was made from. `left` names the linear maps of the decoder that stay as they were. `session` are the settings of
    ONNX Runtime with which it computes what the graph says; see SESSION_SETTINGS.
    """

    format: QuantizedFormat
    method: str
    smooth: str
    consumer: Consumer
    source_model_sha256: str
    calibration_sha256: str  # of calibration.json
    left: tuple[str, ...]
    session: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """Content of a bundle's manifest.json.

    `max_tokens` is the KV cache capacity of a model with attention layers, 0 without. `environment` names variables that a
    runtime needs before it loads the graphs. `needs_kernels` says that graphs hold operators that only our library computes.
    `findings` are the checkpoint's contradictions and what was assumed instead.
    """

    model: ModelSpec
    source: str  # name of the checkpoint folder
    source_sha256: str  # Checkpoint.sha256 of what was exported
    dtype: Dtype
    opset: int
    body: str  # how the scan is written: linear-attention, standard, or standard-ops
    logits: Literal["last", "all"]
    max_tokens: int
    graphs: dict[str, GraphInfo]
    files: dict[str, FileInfo]
    tools: dict[str, str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    findings: tuple[str, ...] = ()
    needs_kernels: bool = False
    quantization: Quantization | None = None

    @property
    def model_sha256(self) -> str:
        """Identity of the graphs and weights; a saved state belongs to exactly one."""
        parts = sorted(f"{n} {f.sha256}" for n, f in self.files.items() if n.endswith((".onnx", names.WEIGHTS_SUFFIX)))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        if self.quantization is None:
            del data["quantization"]  # for the same reason as the next
        if not self.needs_kernels:
            del data["needs_kernels"]  # so that earlier versions read what they can run
        return {"schema": SCHEMA, "kind": "bundle", **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """Inverse of `to_json`. Raises KeyError, TypeError, ValueError or AttributeError on foreign data."""

        def tensors(rows: object) -> tuple[TensorInfo, ...]:
            return tuple(TensorInfo(r["name"], r["dtype"], as_tuple(r["shape"])) for r in as_tuple(rows))

        special = ("schema", "kind", "model", "graphs", "files", "findings", "quantization")
        fields = {k: v for k, v in data.items() if k not in special}
        manifest = cls(
            model=ModelSpec.from_json(data["model"]),
            graphs={n: GraphInfo(tensors(g["inputs"]), tensors(g["outputs"])) for n, g in data["graphs"].items()},
            files={n: FileInfo(**f) for n, f in data["files"].items()},
            findings=as_tuple(data.get("findings", ())),
            quantization=_quantization(data.get("quantization")),
            **fields,
        )
        check_value("manifest", manifest, cls)
        if manifest.model.vision.tokens_per_tile < 1:
            raise ValueError("vision gives no token for a tile")
        return manifest


def _quantization(data: dict[str, Any] | None) -> Quantization | None:
    if data is None:
        return None
    found = Quantization(**{**data, "left": as_tuple(data["left"])})
    unknown = sorted(set(found.session) - set(SESSION_SETTINGS))
    if unknown:
        raise ValueError(f"session settings {', '.join(unknown)} are not known")
    return found


def as_tuple(value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):  # a string would become its letters
        raise TypeError(f"{value!r:.80} is no list")
    return tuple(value)


def check_value(name: str, value: Any, declared: Any) -> None:
    """Refuse a value that is not of its field's declared type, or out of range. Raises TypeError or ValueError.

    A `bool` is no integer, an integer is a `float`, and text has to be writable as UTF-8.
    """
    if dataclasses.is_dataclass(declared):
        for field, hint in get_type_hints(declared).items():
            check_value(field, getattr(value, field), hint)
        return
    kind, arguments = get_origin(declared), get_args(declared)
    if kind in (UnionType, Union) and any(map(dataclasses.is_dataclass, arguments)):
        if value is not None:
            check_value(name, value, next(filter(dataclasses.is_dataclass, arguments)))
    elif kind is Literal:
        if value not in arguments:
            raise ValueError(f"{name} is {value!r:.80}, not one of {', '.join(arguments)}")
    elif kind is tuple:
        for item in value:
            check_value(name, item, arguments[0])
    elif kind is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{name} is {value!r:.80}, not an object")
        for key, item in value.items():
            check_value(f"a name in {name}", key, arguments[0])
            check_value(f"{name} {key!r:.80}", item, arguments[1])
    else:
        _check_plain(name, value, arguments or (declared,))


def _check_plain(name: str, value: Any, allowed: tuple[type, ...]) -> None:
    if type(value) not in allowed and not (float in allowed and type(value) is int):
        raise TypeError(f"{name} is {value!r:.80}, not {' or '.join(kind.__name__ for kind in allowed)}")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}")
    elif type(value) is int and float not in allowed:
        counts_bytes = name.endswith("bytes")
        least = 0 if counts_bytes or name in _MAY_BE_ZERO else 1
        if value < least or (value > _MAX_SIZE and not counts_bytes):
            raise ValueError(f"{name} is {value!r:.80}, not {least} to {_MAX_SIZE}")


def file_info(path: Path) -> FileInfo:
    """Size and SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else _digest(stream)
    return FileInfo(path.stat().st_size, digest.hexdigest())


def _digest(stream: Any) -> Any:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False)
    (folder / names.MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a bundle folder. Raises BundleError; the files themselves are checked by `check_files`."""
    return read_folder_manifest(folder, BUNDLE, SCHEMA, Manifest.from_json)


@dataclass(frozen=True)
class FolderKind:
    """What errors say of a kind of folder: its name, article first, the command that writes it, and how to get it again."""

    kind: str
    named: str
    written_by: str
    command: str
    again: str
    error: type[MmmError]


BUNDLE = FolderKind(
    "bundle",
    "a bundle",
    "mmm-export onnx",
    "mmm-export onnx CHECKPOINT -o BUNDLE",
    "export the bundle again",
    BundleError,
)


def read_folder_manifest(folder: Path, kind: FolderKind, schema: int, from_json: Callable[[dict[str, Any]], T]) -> T:
    """Read manifest.json of a folder of one kind and schema. Raises the kind's error, whatever the file holds."""
    path = folder / names.MANIFEST_FILE
    try:
        if not path.is_file():
            raise kind.error(
                f"{folder} is not {kind.named}",
                found="no such folder" if not folder.exists() else f"no {names.MANIFEST_FILE} in it",
                wanted=f"a folder written by {kind.written_by}",
                hint=kind.command,
            )
        data = json.loads(path.read_text(encoding="utf-8"))
        found_schema = data["schema"]
        found_kind = data["kind"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise kind.error(
            f"{path} cannot be read",
            found=f"{type(error).__name__}: {error}",
            wanted="JSON written by mmm-export",
            hint=kind.again,
        ) from error
    if found_schema != schema or found_kind != kind.kind:
        newer = isinstance(found_schema, int) and found_schema > schema
        raise kind.error(
            f"{path} is of another schema",
            found=f"schema {found_schema!r}, kind {found_kind!r}",
            wanted=f"schema {schema}, kind {kind.kind!r}",
            hint="upgrade mmm-export" if newer else f"{kind.again} with this version",
        )
    try:
        return from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise kind.error(
            f"{path} is damaged",
            found=f"{type(error).__name__}: {error}",
            wanted=f"all fields of schema {schema}, each with a value that it can have",
            hint=kind.again,
        ) from error


class Listing(Protocol):
    """A manifest, as far as its files go."""

    @property
    def files(self) -> dict[str, FileInfo]: ...


def check_files(folder: Path, manifest: Listing, *, content: bool = True, kind: FolderKind = BUNDLE) -> None:
    """Compare the files of a folder with its manifest: names, sizes and, with `content`, SHA-256.

    Every listed file lies in the folder itself and is no link. Other files may lie beside them and are not looked at.

    Raises:
        BundleError: a file is missing or changed; for another kind of folder, its own error.

    """
    try:
        _check_names_and_sizes(folder, manifest.files, kind)
        if content:
            _check_content(folder, manifest.files, kind)
    except OSError as error:
        raise kind.error(f"{folder} cannot be read", found=f"{error.filename}: {error.strerror}") from error


def _check_names_and_sizes(folder: Path, files: dict[str, FileInfo], kind: FolderKind) -> None:
    with os.scandir(folder) as entries:
        present = {entry.name: entry for entry in entries}
    for name, info in files.items():
        entry = present.get(name)
        if entry is None or not entry.is_file(follow_symlinks=False):
            raise kind.error(
                f"{folder} is incomplete",
                found=f"no file {name!r}" if entry is None else f"{name!r}, which is a link or a folder",
                wanted="each file of the manifest in the folder itself",
                hint=kind.again,
            )
        size = entry.stat(follow_symlinks=False).st_size
        if size != info.bytes:
            raise kind.error(
                f"{folder / name} was changed",
                found=f"{size} bytes",
                wanted=f"{info.bytes} bytes",
                hint=f"copy it again, or {kind.again}",
            )


def _check_content(folder: Path, files: dict[str, FileInfo], kind: FolderKind) -> None:
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda name: file_info(folder / name), files))
    for (name, info), found in zip(files.items(), actual, strict=True):
        if found.sha256 != info.sha256:
            raise kind.error(
                f"{folder / name} was changed",
                found=f"sha256 {found.sha256}",
                wanted=f"sha256 {info.sha256}",
                hint=f"copy it again, or {kind.again}",
            )
