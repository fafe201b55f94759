"""A pass that cuts the LM head along the vocabulary, and pads an odd vocabulary.

One product with the whole head needs one allocation of hidden * vocabulary elements, which an 8 GB board may refuse for lack of
contiguous memory; and rows of an odd length cannot be read in whole vectors. Both stay inside: `logits` has the width it had.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mmm_export import names
from mmm_export.exporter.trt.matching import before_cast, drop_unused, made_by, new_constant, new_node, replace

VOCABULARY_MULTIPLE = 64  # columns: 128 bytes of half precision, one line of the cache
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class HeadPart:
    """Columns [begin, end) of the padded head."""

    begin: int
    end: int


def head_parts(hidden: int, vocabulary: int, item_bytes: int, max_alloc_bytes: int) -> tuple[HeadPart, ...]:
    """Cut a head (hidden, vocabulary) into the fewest parts of at most `max_alloc_bytes`, all but the last of equal width.

    An odd vocabulary is padded to a multiple of VOCABULARY_MULTIPLE; one that is a multiple of 8 is not. A single column block of
    VOCABULARY_MULTIPLE is the least that a part can be.
    """
    padded = vocabulary if vocabulary % 8 == 0 else -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    widest = max(max_alloc_bytes // (hidden * item_bytes) // VOCABULARY_MULTIPLE, 1) * VOCABULARY_MULTIPLE
    count = -(-padded // widest)
    width = -(-padded // count // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    width = min(max(width, VOCABULARY_MULTIPLE), widest)
    return tuple(HeadPart(begin, min(begin + width, padded)) for begin in range(0, padded, width))


def split_head(model: ir.Model, data_file: Path, max_alloc_bytes: int) -> tuple[HeadPart, ...]:
    """Update `model`: compute the logits by parts of the head, and drop the columns of padding.

    Args:
        model: a decoder; its other weights stay where they are.
        data_file: file to write the parts to, beside which the model must be saved. Not written when one part without padding does.
        max_alloc_bytes: most that one part may take.

    Returns:
        The parts; one of them when the model was left as it was, as one with a quantized head is.

    Raises:
        ValueError: the graph does not end as the export ends it, or its head is quantized and larger than `max_alloc_bytes`.
    """
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == names.LOGITS)
    product = _head_product(logits)
    weight = None if product is None else product.inputs[1]
    quantized = _quantized_weight(weight)
    if quantized is not None:
        if quantized.nbytes > max_alloc_bytes:
            raise ValueError(
                f"a quantized LM head of {quantized.nbytes >> 20} MiB, to be cut below {max_alloc_bytes >> 20} MiB"
            )
        return (HeadPart(0, int(quantized.shape.numpy()[1])),)
    tensor = None if weight is None else weight.const_value
    if product is None or weight is None or tensor is None or weight.dtype is None:
        raise ValueError("the logits are not written as the export writes them")
    hidden, vocabulary = tensor.shape.numpy()
    parts = head_parts(hidden, vocabulary, int(weight.dtype.itemsize), max_alloc_bytes)
    if len(parts) == 1 and parts[0].end == vocabulary:
        return parts
    weights = _write_parts(graph, str(weight.name), tensor, parts, data_file)
    x = product.inputs[0]
    nodes = [new_node("MatMul", [x, part], f"logits.part_{i}", dtype=weight.dtype) for i, part in enumerate(weights)]
    if len(nodes) > 1:
        nodes.append(new_node("Concat", [node.outputs[0] for node in nodes], "logits.joined", {"axis": -1}))
    if parts[-1].end != vocabulary:
        bounds = [("logits_begin", 0), ("logits_end", vocabulary), ("logits_axis", -1)]
        begin, end, axis = (new_constant(graph, name, [number]) for name, number in bounds)
        nodes.append(new_node("Slice", [nodes[-1].outputs[0], begin, end, axis], "logits.without_padding"))
    replace(graph, product.outputs[0], nodes)
    drop_unused(model)
    return parts


def _head_product(logits: ir.Value) -> ir.Node | None:
    """Find the MatMul of the logits: before a Cast, or before the Mul that a quantized head ends with for TensorRT-RTX."""
    value = before_cast(logits)
    scaled = made_by(value, "Mul")
    return made_by(scaled.inputs[0] if scaled else value, "MatMul")


def _quantized_weight(weight: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the integers, or small floats, that a weight is dequantized from."""
    node = made_by(weight, "DequantizeLinear")
    return None if node is None or node.inputs[0] is None else node.inputs[0].const_value


def _write_parts(
    graph: ir.Graph, name: str, tensor: ir.TensorProtocol, parts: tuple[HeadPart, ...], data_file: Path
) -> list[ir.Value]:
    """Write each part as rows of its columns, a few rows of the head in memory at a time."""
    rows, vocabulary = tensor.shape.numpy()
    item_bytes = int(tensor.dtype.itemsize)
    source = _bits(tensor, item_bytes)
    values: list[ir.Value] = []
    with data_file.open("wb") as stream:
        for i, part in enumerate(parts):
            offset, width = stream.tell(), part.end - part.begin
            inside = min(part.end, vocabulary) - part.begin
            for first in range(0, rows, _BLOCK_ROWS):
                block = source[first : first + _BLOCK_ROWS, part.begin : part.begin + inside]
                padded = np.zeros((block.shape[0], width), block.dtype)
                padded[:, :inside] = block
                stream.write(padded.tobytes())
            shape = ir.Shape([rows, width])
            external = ir.ExternalTensor(
                data_file.name,
                offset,
                stream.tell() - offset,
                tensor.dtype,
                shape=shape,
                name=f"{name}.part_{i}",
                base_dir=data_file.parent,
            )
            value = ir.Value(name=external.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=external)
            graph.register_initializer(value)
            values.append(value)
    return values


def _bits(tensor: ir.TensorProtocol, item_bytes: int) -> npt.NDArray[Any]:
    """Return the numbers as integers of their size, mapped and not read where they lie in a file: numpy has no bfloat16."""
    kind = np.dtype(f"u{item_bytes}")
    shape = tuple(int(size) for size in tensor.shape.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        path = Path(tensor.base_dir) / tensor.location
        return np.memmap(path, kind, "r", offset=tensor.offset or 0, shape=shape)
    return np.frombuffer(tensor.tobytes(), kind).reshape(shape)
