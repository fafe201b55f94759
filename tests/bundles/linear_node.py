"""Models of a single MmmLinear node around the operands of a product."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from bundles.linear_operands import EPS, TYPES, Operands
from bundles.scan_node import ONNX_TYPES, ort_value

INPUTS = ("x", "weight", "scales", "norm_weight", "residual", "kept_weight")
_ONNX = {
    np.dtype(np.int8): onnx.TensorProto.INT8,
    **{TYPES[name]: kind for name, kind in ONNX_TYPES.items()},
}


def feeds_of(operands: Operands) -> dict[str, Any]:
    """The inputs of the node by name; integers as int8, whatever they hold."""
    weight = operands.weight
    arrays = {
        "x": operands.x,
        "weight": weight.weight.view(np.int8) if weight.scales is not None else weight.weight,
        "scales": weight.scales,
        "norm_weight": operands.norm_weight,
        "residual": operands.residual,
        "kept_weight": weight.kept,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def attributes_of(operands: Operands, *, float32_output: bool = False) -> dict[str, int]:
    return {
        "weight_format": int(operands.weight.format),
        "normalise": int(operands.norm_weight is not None),
        "epilogue": 2 if operands.silu else int(operands.residual is not None),
        "float32_output": int(float32_output),
        **({} if operands.weight.kept is None else {"keeps_rows": 1}),
    }


def linear_model(
    operands: Operands, *, constant: bool = True, float32_output: bool = False, **attributes: Any
) -> bytes:
    """Serialize a model of one node; with `constant` the weights are initializers. `attributes` replace those of the operands."""
    feeds = feeds_of(operands)
    weights = {name: feeds[name] for name in ("weight", "scales", "norm_weight", "kept_weight") if name in feeds}
    given = {**attributes_of(operands, float32_output=float32_output), "eps": EPS, "plugin_version": "1", **attributes}
    node = onnx.helper.make_node("MmmLinear", list(feeds), ["out"], domain="mmm", **given)
    kind = ONNX_TYPES["fp32"] if float32_output else _ONNX[operands.x.dtype]
    taken = [name for name in feeds if not (constant and name in weights)]
    infos = []
    for name in taken:
        dims = (["M"] if name in ("x", "residual") else list(feeds[name].shape[:1])) + list(feeds[name].shape[1:])
        infos.append(onnx.helper.make_tensor_value_info(name, _ONNX[feeds[name].dtype], dims))
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        infos,
        [onnx.helper.make_tensor_value_info("out", kind, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()] if constant else [],
    )
    opsets = [onnx.helper.make_opsetid(*pair) for pair in (("", 20), ("mmm", 1))]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def run_linear(session: Any, operands: Operands, *, float32_output: bool = False) -> Any:
    """Run through bound buffers, since bfloat16 arrays cannot be fed otherwise; the output begins as NaN bytes."""
    taken = {node.name for node in session.get_inputs()}
    binding = session.io_binding()
    for name, value in feeds_of(operands).items():
        if name in taken:
            binding.bind_ortvalue_input(name, ort_value(value))
    columns = len(operands.wide) // (2 if operands.silu else 1)
    out = np.empty((operands.x.shape[0], columns), np.float32 if float32_output else operands.x.dtype)
    out.view(np.uint8)[...] = 0xFF
    binding.bind_ortvalue_output("out", ort_value(out))
    session.run_with_iobinding(binding)
    return out
