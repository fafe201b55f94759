"""Saved states: a safetensors file whose metadata says which model and how many tokens it belongs to.

The header is fully determined by the model and the metadata, so a reader builds the header that should be there and
compares bytes; `sha256` covers header (with 64 zeros in its own place) and data. Any safetensors reader can open it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import StateFileError
from mmm_export.output import output_file
from mmm_export.runtime.context import ContextSnapshot
from mmm_export.runtime.state_layout import ModelFolder, StateTensor, state_layout

FORMAT = 1
KIND = "mmm-export state"
SEEN = "seen_tokens"  # one bit for each id of the vocabulary, packed: a repetition penalty needs it

_MAX_HEADER_BYTES = 4 << 20  # a 32-layer model needs 10 KB; more than this is another kind of file
_BLOCK_BYTES = 1 << 24
_NO_DIGEST = "0" * 64
_SAFETENSORS_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}


@dataclass(frozen=True)
class StateHeader:
    """What a state file says about itself.

    Attributes:
        format: version of the file layout.
        model_sha256: `Manifest.model_sha256` of the bundle it was saved from; it fits no other.
        source: name of the checkpoint that bundle was made from.
        dtype: of the conv states and the KV cache; SSM states are float32.
        tokens: in the context, `unfed` ones included.
        unfed: ids at the end of the context that the model has not read yet, such as the last one of an answer.
        last_token: id of the last token of the context, -1 for an empty one.
        sha256: checksum of the file.

    """

    format: int
    model_sha256: str
    source: str
    dtype: str
    tokens: int
    unfed: tuple[int, ...]
    last_token: int
    sha256: str


def read_state_header(path: Path | str) -> StateHeader:
    """Read what a state file says about itself; of the states only the size is checked. Raises StateFileError."""
    path = Path(path)
    with _opened(path) as stream:
        header, raw = _read_header(path, stream)
    entries = json.loads(raw[8:])
    try:
        wanted = len(raw) + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}", "the place of every tensor") from error
    if path.stat().st_size != wanted:
        raise _damaged(path, f"{path.stat().st_size} bytes", f"{wanted} bytes")
    return header


def write_state(path: Path | str, manifest: ModelFolder, snapshot: ContextSnapshot) -> None:
    """Write a snapshot to a file that appears only when it is complete.

    Raises:
        OutputError: it cannot be written.

    """
    unfed = snapshot.unfed
    arrays = {**snapshot.arrays, SEEN: np.packbits(snapshot.seen)}
    header = StateHeader(
        format=FORMAT,
        model_sha256=manifest.model_sha256,
        source=manifest.source,
        dtype=manifest.dtype,
        tokens=snapshot.tokens + len(unfed),
        unfed=unfed,
        last_token=snapshot.last_token,
        sha256=_NO_DIGEST,
    )
    tensors = _tensors(manifest)
    digest = hashlib.sha256(_header_bytes(header, tensors))
    for tensor in tensors:
        digest.update(_bytes(arrays[tensor.name]))
    with output_file(Path(path)) as temporary, temporary.open("wb") as stream:
        stream.write(_header_bytes(replace(header, sha256=digest.hexdigest()), tensors))
        for tensor in tensors:
            stream.write(_bytes(arrays[tensor.name]))


def read_state(path: Path | str, manifest: ModelFolder) -> ContextSnapshot:
    """Read and check a state that was saved from this very bundle.

    Raises:
        StateFileError: no state file, damaged, of another version, or of another model.

    """
    path = Path(path)
    with _opened(path) as stream:
        header, raw = _read_header(path, stream)
        _check_model(path, header, manifest)
        _check_position(path, header, manifest)
        tensors = _tensors(manifest)
        if raw != _header_bytes(header, tensors):
            raise _damaged(path, "a changed header", "the tensors of this model in their order")
        rows = header.tokens - len(header.unfed)
        wanted = len(raw) + sum(_used_bytes(tensor, rows) for tensor in tensors)
        found = path.stat().st_size
        if found != wanted:
            raise _damaged(path, f"{found} bytes", f"{wanted} bytes")
        digest = hashlib.sha256(_header_bytes(replace(header, sha256=_NO_DIGEST), tensors))
        arrays: dict[str, NDArray[Any]] = {}
        for tensor in tensors:
            arrays[tensor.name] = _read_array(path, stream, tensor, rows, digest.update)
    if digest.hexdigest() != header.sha256:
        raise _damaged(path, f"sha256 {digest.hexdigest()}", f"sha256 {header.sha256}")
    seen = np.unpackbits(arrays.pop(SEEN), count=_vocabulary(manifest)).astype(np.bool_)
    return ContextSnapshot(arrays, rows, header.unfed, header.last_token, seen)


def _vocabulary(manifest: ModelFolder) -> int:
    return manifest.model.vocab_size + manifest.model.special_tokens


def _tensors(manifest: ModelFolder) -> list[StateTensor]:
    return [*state_layout(manifest), StateTensor(SEEN, ((_vocabulary(manifest) + 7) // 8,), "uint8")]


def _used_bytes(tensor: StateTensor, rows: int) -> int:
    return prod(tensor.used_shape(rows)) * _itemsize(tensor)


def _itemsize(tensor: StateTensor) -> int:
    return int(np.dtype(tensor.storage).itemsize)


def _header_bytes(header: StateHeader, tensors: list[StateTensor]) -> bytes:
    """Length and header as safetensors wants them: 8 bytes little-endian, then JSON padded to a multiple of 8."""
    metadata = {
        "kind": KIND,
        "format": str(header.format),
        "model_sha256": header.model_sha256,
        "source": header.source,
        "dtype": header.dtype,
        "tokens": str(header.tokens),
        "unfed": json.dumps(header.unfed),
        "last_token": str(header.last_token),
        "sha256": header.sha256,
    }
    table: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        shape = tensor.used_shape(header.tokens - len(header.unfed))
        end = offset + prod(shape) * _itemsize(tensor)
        table[tensor.name] = {
            "dtype": _SAFETENSORS_DTYPE[tensor.dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise StateFileError(
            f"{path} is no state file", found="a folder" if path.is_dir() else "no such file", wanted="a saved state"
        )
    try:
        return path.open("rb")
    except OSError as error:
        raise StateFileError(f"{path} cannot be read", found=error.strerror) from error


def _read_header(path: Path, stream: BinaryIO) -> tuple[StateHeader, bytes]:
    """Return the header and the raw bytes up to the first tensor."""
    prefix = stream.read(8)
    size = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= size <= _MAX_HEADER_BYTES:
        raise _foreign(path, "not the header of a safetensors file")
    text = stream.read(size)
    if len(text) < size:
        raise _damaged(path, f"{8 + len(text)} bytes", f"a header of {size} bytes at least")
    try:
        metadata = json.loads(text)["__metadata__"]
        kind = metadata["kind"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _foreign(path, f"no state header ({type(error).__name__})") from error
    if kind != KIND:
        raise _foreign(path, f"kind {kind!r}")
    if metadata.get("format") != str(FORMAT):
        raise StateFileError(
            f"{path} is of another version",
            found=f"format {metadata.get('format')!r}",
            wanted=f"format {FORMAT}",
            hint="save the state again with this version of mmm-export",
        )
    try:
        header = StateHeader(
            format=FORMAT,
            model_sha256=_string(metadata["model_sha256"]),
            source=_string(metadata["source"]),
            dtype=_string(metadata["dtype"]),
            tokens=int(_string(metadata["tokens"])),
            unfed=tuple(map(_index, json.loads(metadata["unfed"]))),
            last_token=int(_string(metadata["last_token"])),
            sha256=_string(metadata["sha256"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}", "the metadata of a state file") from error
    if len(header.sha256) != len(_NO_DIGEST) or not 0 <= len(header.unfed) <= header.tokens:
        raise _damaged(path, "metadata that contradict each other", "the metadata of a state file")
    return header, prefix + text


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no string")
    return value


def _index(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no integer")
    return value


def _check_model(path: Path, header: StateHeader, manifest: ModelFolder) -> None:
    if header.model_sha256 != manifest.model_sha256:
        raise StateFileError(
            f"{path} belongs to another model",
            found=f"a state of {header.source}, {header.dtype}, model {header.model_sha256[:16]}",
            wanted=f"a state of {manifest.source}, {manifest.dtype}, model {manifest.model_sha256[:16]}",
            hint="a state fits only the very bundle that it was saved from",
        )


def _check_position(path: Path, header: StateHeader, manifest: ModelFolder) -> None:
    vocabulary = _vocabulary(manifest)
    capacity = manifest.max_tokens if manifest.model.attention_layers else header.tokens
    ids = (*header.unfed, max(header.last_token, 0))
    if header.tokens > capacity or header.last_token < -1 or not all(0 <= token < vocabulary for token in ids):
        raise _damaged(path, f"{header.tokens} tokens, ids {ids}", "tokens and ids that this model can have")


def _read_array(
    path: Path, stream: BinaryIO, tensor: StateTensor, rows: int, digest: Callable[[Any], object]
) -> NDArray[Any]:
    array = np.empty(tensor.used_shape(rows), tensor.storage)
    view = _bytes(array)
    for begin in range(0, len(view), _BLOCK_BYTES):
        block = view[begin : begin + _BLOCK_BYTES]
        if stream.readinto(block) != len(block):  # type: ignore[attr-defined]
            raise _damaged(path, "an early end", f"{tensor.name} of {array.nbytes} bytes")
        digest(block)
    return array


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _foreign(path: Path, found: str) -> StateFileError:
    return StateFileError(f"{path} is no state file", found=found, wanted="a file written by Session.save_state")


def _damaged(path: Path, found: str, wanted: str) -> StateFileError:
    return StateFileError(f"{path} is damaged", found=found, wanted=wanted, hint="save the state again")
