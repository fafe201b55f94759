"""A reader of safetensors folders that needs nothing but numpy: header by struct and json, data by memory map."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oracle.array import Array

STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class _Place:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Tensors(Mapping[str, Array]):
    """Tensors of a checkpoint by name; every access reads the file and returns a fresh float64 array."""

    def __init__(self, places: dict[str, _Place]) -> None:
        self._places = places

    @classmethod
    def open(cls, folder: Path) -> Tensors:
        """Read the headers of model.safetensors, or of the shards that model.safetensors.index.json names."""
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        places: dict[str, _Place] = {}
        for name in files:
            for tensor, place in _read_header(folder / name).items():
                if tensor in places:
                    raise ValueError(f"{tensor} is in two files of {folder}")
                places[tensor] = place
        return cls(places)

    def __getitem__(self, name: str) -> Array:
        place = self._places[name]
        count = int(np.prod(place.shape, dtype=np.int64))
        raw = np.memmap(place.path, STORED[place.dtype], "r", place.offset, (count,)) if count else np.empty(0)
        if place.dtype == "BF16":  # bfloat16 is the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return np.array(raw, dtype=np.float64).reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def under(self, prefix: str) -> Tensors:
        """Keep the tensors whose names begin with `prefix`, under the rest of their names."""
        return Tensors({n.removeprefix(prefix): p for n, p in self._places.items() if n.startswith(prefix)})


def _read_header(path: Path) -> dict[str, _Place]:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if end - begin != int(np.prod(shape, dtype=np.int64)) * STORED[entry["dtype"]].itemsize:
            raise ValueError(f"{name} in {path}: {end - begin} bytes do not hold shape {shape} of {entry['dtype']}")
        places[name] = _Place(path, entry["dtype"], shape, 8 + length + begin)
    return places
