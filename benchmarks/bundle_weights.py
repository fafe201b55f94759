"""Where the weights of a bundle lie in its data files, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from mmm_export import names

ITEM_BYTES = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
    onnx.TensorProto.INT8: 1,
    onnx.TensorProto.UINT8: 1,
    onnx.TensorProto.INT32: 4,
    onnx.TensorProto.INT64: 8,
}


@dataclass(frozen=True)
class StoredWeight:
    """One initializer: `bytes` of the data file from `offset` on; `onnx_type` is a number of onnx.TensorProto."""

    name: str
    offset: int
    bytes: int
    onnx_type: int
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes that belong together; 1 for types of less than a byte, which lie packed."""
        return ITEM_BYTES.get(self.onnx_type, 1)


def stored_weights(graph: Path) -> list[StoredWeight]:
    """List what a graph keeps in its data file, in the order of the file. Reads no weight."""
    model = onnx.load(graph, load_external_data=False)
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {pair.key: pair.value for pair in tensor.external_data}
        size = int(entry.get("length") or math.prod(tensor.dims) * ITEM_BYTES[tensor.data_type])
        offset = int(entry.get("offset", 0))
        found.append(StoredWeight(tensor.name, offset, size, tensor.data_type, tuple(tensor.dims)))
    return sorted(found, key=lambda weight: weight.offset)


def data_file(graph: Path) -> Path:
    return graph.with_name(graph.name + names.WEIGHTS_SUFFIX)


def mapped(graph: Path) -> NDArray[np.uint8]:
    """Map the data file of a graph."""
    return np.memmap(data_file(graph), np.uint8, "r")


def all_weights(
    bundle: Path, files: Sequence[str] = names.GRAPH_FILES
) -> Iterator[tuple[StoredWeight, NDArray[np.uint8]]]:
    """Yield every weight of a bundle's graphs with its bytes, which stay in the mapped file until they are read."""
    for file in files:
        weights = stored_weights(bundle / file)
        data = mapped(bundle / file) if weights else np.zeros(0, np.uint8)
        for weight in weights:
            yield weight, data[weight.offset : weight.offset + weight.bytes]
