"""What a safetensors file stores, read from its header alone: names, number formats, shapes and places."""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import CheckpointError
from mmm_export.manifest import Dtype

LONGEST_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MOST_DIMENSIONS = 8
VALUE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
DTYPES: dict[str, Dtype] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. `format` is the format's name for its number type; `start` and `bytes` say where."""

    name: str
    format: str
    shape: tuple[int, ...]
    file: Path
    start: int
    bytes: int

    @property
    def values(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file; the values are not touched.

    Raises:
        CheckpointError: unreadable, truncated, or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER_BYTES):
                raise _truncated(path, f"{size} bytes", "a header of 8 bytes" if size < 8 else f"{8 + length} or more")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", found=error.strerror or type(error).__name__) from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"a header that is a {type(header).__name__}")
    header.pop("__metadata__", None)
    stored = {name: _stored_tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_places(path, stored, 8 + length, size)
    return stored


def _stored_tensor(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """Check one entry of a header; `data` is where the values begin in the file."""
    if not name.isprintable():
        raise _damaged(path, f"a tensor named {name!r:.80}")
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"no dtype, shape and data_offsets for tensor {name!r:.80}") from error
    numbers = [*shape, start, end] if isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or start > end:
        raise _damaged(path, f"tensor {name!r:.80}: shape, data_offsets = {reprlib.repr((shape, [start, end]))}")
    if not isinstance(dtype, str) or dtype not in VALUE_BYTES:
        raise CheckpointError(
            f"tensor {name!r:.80} of {path} has an unknown number format",
            found=reprlib.repr(dtype),
            wanted=", ".join(DTYPES),
        )
    if math.prod(shape) * VALUE_BYTES[dtype] != end - start:
        raise _damaged(path, f"{end - start} bytes for tensor {name!r:.80}, {dtype} {shape!r:.60}")
    return StoredTensor(name, dtype, tuple(shape), path, data + start, end - start)


def _check_places(path: Path, stored: dict[str, StoredTensor], data: int, size: int) -> None:
    """Check that the tensors cover the rest of the file without gap or overlap."""
    position = data
    for tensor in sorted(stored.values(), key=lambda tensor: (tensor.start, tensor.bytes)):
        if tensor.start != position:
            raise _damaged(path, f"tensor {tensor.name!r:.80} at byte {tensor.start}, expected at {position}")
        position += tensor.bytes
    if size < position:
        raise _truncated(path, f"{size} bytes", f"{position} bytes")
    if size > position:
        raise _damaged(path, f"{size - position} bytes behind the last tensor")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _truncated(path: Path, found: str, wanted: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated", found=found, wanted=wanted, hint="copy or download the file again")


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged",
        found=found,
        wanted="a safetensors file with one entry for each tensor",
        hint="copy or download the file again",
    )


def float_values(tensor: StoredTensor) -> NDArray[np.float32]:
    """Read the values of a small tensor as float32, flat, without torch. Its format must be one of DTYPES."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        raw = stream.read(tensor.bytes)
    if tensor.format == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f4" if tensor.format == "F32" else "<f2").astype(np.float32)
