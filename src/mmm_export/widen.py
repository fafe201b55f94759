"""Turn a bfloat16 graph into a float32 one that keeps its bfloat16 weights: ONNX Runtime computes no bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import TensorProto

WIDE = ".float32"  # what the name of a weight ends in where it is read


def widen_bf16(model: onnx.ModelProto) -> None:
    """Update `model`: bfloat16 inputs, outputs and values become float32; bfloat16 initializers are cast where they are read."""
    graph = model.graph
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    narrow = {i.name for i in graph.initializer if i.data_type == TensorProto.BFLOAT16}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in narrow:
                node.input[i] = _wide_name(name)
        _widen_attributes(node.attribute)
    casts = [onnx.helper.make_node("Cast", [name], [_wide_name(name)], to=TensorProto.FLOAT) for name in sorted(narrow)]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _wide_name(name: str) -> str:
    return name + WIDE


def _widen_attributes(attributes: Iterable[onnx.AttributeProto]) -> None:
    for attribute in attributes:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
            values = onnx.numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(values, attribute.t.name))
