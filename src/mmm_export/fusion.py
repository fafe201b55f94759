"""Writes a decoder's matrix products as MmmLinear nodes, each with the norm before it and what follows it.

One node takes the place of: RMS norm, MatMul, residual Add; RMS norm, two MatMuls, SiLU and Mul; MatMul with the Cast of logits; and
two MatMuls joined by columns, of which the first has integers for a weight. Weights lie (out, in), as in the checkpoint, so they are
turned, and gate and up are put one behind the other. Integers are those of a DequantizeLinear, by column or by blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmm_export import names

_T = TypeVar("_T")

NO_EPILOGUE, RESIDUAL, SILU = 0, 1, 2  # mmm_epilogue of plugins/include/mmm/kernels.h
PLAIN_WEIGHT, INT8_WEIGHT, INT4_WEIGHT = 0, 1, 2  # mmm_weight_format
INT4_GROUP = 128  # inputs that share a scale


@dataclass(frozen=True)
class _Norm:
    source: ir.Value
    weight: ir.Value
    eps: float


@dataclass(frozen=True)
class _Weight:
    """What a product multiplies with: (K, N) as the graph has it, and for integers their scales, (N,) or (K/128, N)."""

    format: int
    values: ir.Value
    scales: ir.Value | None = None


def fuse_products(model: ir.Model) -> int:
    """Update an optimised decoder whose weights are bound: put MmmLinear nodes in the place of its products with weights.

    New weights are views of the old ones, in other order; `write_weights` writes them.

    Returns: the number of nodes put in.
    """
    graph = model.graph
    fused = 0
    for fuse in (_gate_and_up, _one_product):  # pairs first, while both are there
        for node in list(graph):
            if node.op_type == "MatMul" and node.domain == "" and _weight_of(node) is not None and _is_used(node):
                made = fuse(graph, node)
                if made is not None:
                    _take_over(graph, *made)
                    fused += 1
        RemoveUnusedNodesPass()(model)
    for node in graph:
        if node.op_type == names.OP_NAME:
            node.attributes["overlap"] = ir.AttrInt64("overlap", int(_reads_its_states_from_outside(node)))
    model.opset_imports[names.OP_DOMAIN] = 1
    return fused


def _one_product(graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, ir.Node]:
    """Fuse a product, the norm before it, and what is behind it: columns of another, a residual or a Cast to float32.

    Returns: what it computes, and the node.
    """
    x = _given(node.inputs[0])
    weight = _weight_of(node)
    assert weight is not None
    output, residual, is_float32 = node.outputs[0], None, False
    kept = _kept_columns(node) if weight.format != PLAIN_WEIGHT else None
    if kept is not None:
        output = _given(_only_user(output)).outputs[0]
    follower = _only_user(output)
    if follower is not None and follower.op_type == "Add":
        other = follower.inputs[0] if follower.inputs[1] is output else follower.inputs[1]
        if other is not None and other is not output and not other.is_initializer():
            output, residual = follower.outputs[0], other
    elif follower is not None and follower.op_type == "Cast" and _target(follower) == ir.DataType.FLOAT:
        output, is_float32 = follower.outputs[0], True
    made = _linear(graph, x, (weight,), residual=residual, kept=kept, is_float32=is_float32)
    return output, made


def _kept_columns(node: ir.Node) -> ir.Value | None:
    """Return the weight of the product whose columns are put behind those of `node`, if both read the same and alone are there."""
    concat = _only_user(node.outputs[0])
    if (
        concat is None
        or concat.op_type != "Concat"
        or len(concat.inputs) != 2
        or concat.inputs[0] is not node.outputs[0]
    ):
        return None
    other = _made_by(concat.inputs[1], "MatMul")
    same = other is not None and other.inputs[0] is node.inputs[0] and _only_user(other.outputs[0]) is concat
    return other.inputs[1] if other is not None and same and _is_matrix(other.inputs[1]) else None


def _gate_and_up(graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """Fuse `silu(x W1) * (x W3)`, seen from the product with W1; None if this is none."""
    gate = node.outputs[0]
    sigmoid = next((use.node for use in gate.uses() if use.node.op_type == "Sigmoid"), None)
    if sigmoid is None:
        return None
    silu = _only_user(sigmoid.outputs[0])
    if silu is None or silu.op_type != "Mul" or gate not in silu.inputs:
        return None
    product = _only_user(silu.outputs[0])
    if product is None or product.op_type != "Mul":
        return None
    up = product.inputs[0] if product.inputs[1] is silu.outputs[0] else product.inputs[1]
    other = _made_by(up, "MatMul")
    weights = (_weight_of(node), _weight_of(other) if other is not None else None)
    if other is None or other.inputs[0] is not node.inputs[0] or weights[0] is None or weights[1] is None:
        return None
    if weights[0].format != weights[1].format:
        return None
    return product.outputs[0], _linear(graph, _given(node.inputs[0]), (weights[0], weights[1]), epilogue=SILU)


def _reads_its_states_from_outside(scan: ir.Node) -> bool:
    """Whether no node of this graph writes the states of a scan, which may then be read while the node before it still runs."""
    return all(value is not None and value.is_graph_input() for value in scan.inputs[2:4])


def _linear(
    graph: ir.Graph,
    x: ir.Value,
    weights: Sequence[_Weight],
    *,
    residual: ir.Value | None = None,
    kept: ir.Value | None = None,
    epilogue: int | None = None,
    is_float32: bool = False,
) -> ir.Node:
    norm = _norm_of(x)
    inputs = [
        norm.source if norm else x,
        *_rows(graph, weights),
        *([norm.weight] if norm else []),
        *([residual] if residual else []),
    ]
    attributes: dict[str, Any] = {
        "weight_format": weights[0].format,
        "epilogue": epilogue if epilogue is not None else RESIDUAL if residual else NO_EPILOGUE,
        "normalise": int(norm is not None),
        "float32_output": int(is_float32),
        "eps": norm.eps if norm else 1e-6,
        "plugin_version": "1",
    }
    if kept is not None:
        inputs += _rows(graph, (_Weight(PLAIN_WEIGHT, kept),))
        attributes["keeps_rows"] = 1
    return ir.node(names.LINEAR_OP, inputs, attributes, domain=names.OP_DOMAIN)


def _norm_of(value: ir.Value) -> _Norm | None:
    """Read the RMS norm that made a value: round(x / sqrt(mean(x^2) + eps)) * weight; None if none did."""
    scaled = _made_by(value, "Mul")
    if scaled is None or not _given(scaled.inputs[1]).is_initializer():
        return None
    weight = _given(scaled.inputs[1])
    unit = _made_by(_before_cast(scaled.inputs[0]), "Mul")
    inverse = _made_by(unit.inputs[1], "Reciprocal") if unit else None
    root = _made_by(inverse.inputs[0], "Sqrt") if inverse else None
    total = _made_by(root.inputs[0], "Add") if root else None
    mean = _made_by(total.inputs[0], "ReduceMean") if total else None
    square = _made_by(mean.inputs[0], "Pow") if mean else None
    if unit is None or total is None or square is None or square.inputs[0] is not unit.inputs[0]:
        return None
    eps = _given(total.inputs[1]).const_value
    if eps is None or eps.size != 1 or len(weight.shape or ()) != 1:
        return None
    return _Norm(_given(_before_cast(unit.inputs[0])), weight, float(eps.numpy().reshape(())))


def _rows(graph: ir.Graph, weights: Sequence[_Weight]) -> list[ir.Value]:
    """Add initializers that hold the rows of weights, one behind the other, and the rows' scales; the old ones go later."""
    form = weights[0].format
    name = ".and.".join(str(weight.values.name) for weight in weights)
    tensors = [_constant(weight.values) for weight in weights]
    inputs, columns = tensors[0].shape.numpy()[0], sum(tensor.shape.numpy()[1] for tensor in tensors)

    def rows() -> Any:
        turned = np.concatenate([tensor.numpy().T for tensor in tensors])
        return _packed(turned) if form == INT4_WEIGHT else turned

    dtype = tensors[0].dtype if form == PLAIN_WEIGHT else ir.DataType.INT8
    made = [_lazy(graph, f"{name}.rows", rows, dtype, (columns, inputs // 2 if form == INT4_WEIGHT else inputs))]
    if form != PLAIN_WEIGHT:
        scales = [_constant(_given(weight.scales)) for weight in weights]

        def by_row() -> Any:
            if form == INT8_WEIGHT:
                return np.concatenate([scale.numpy().astype(np.float32) for scale in scales])
            return np.concatenate([scale.numpy().T for scale in scales])

        shape = (columns,) if form == INT8_WEIGHT else (columns, inputs // INT4_GROUP)
        kind = ir.DataType.FLOAT if form == INT8_WEIGHT else scales[0].dtype
        made.append(_lazy(graph, f"{name}.rows.scales", by_row, kind, shape))
    return made


def _packed(rows: Any) -> Any:
    """Integers of -8 to 7, (N, K), as INT4 weights lie: (N, K/2) bytes of q + 8 each, the low nibble first, called int8."""
    nibbles = (rows.astype(np.int8) + np.int8(8)).view(np.uint8)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(np.int8)


def _lazy(graph: ir.Graph, name: str, make: Callable[[], Any], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """Add an initializer that is computed when it is written."""

    def read() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(make()), dtype=dtype, name=name)

    lazy = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value


def _take_over(graph: ir.Graph, old: ir.Value, node: ir.Node) -> None:
    """Put `node` in the place of what computes `old`; its output takes that name, also as an output of the graph.

    That place is behind all that either of them needs: a residual may come later than the product that is added to it.
    """
    producer = old.producer()
    assert producer is not None
    graph.insert_before(producer, node)
    new = node.outputs[0]
    new.name, old.name = old.name, None
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _before_cast(value: ir.Value | None) -> ir.Value | None:
    cast = _made_by(value, "Cast")
    return cast.inputs[0] if cast is not None else value


def _target(cast: ir.Node) -> ir.DataType:
    return ir.DataType(cast.attributes["to"].as_int())


def _is_used(node: ir.Node) -> bool:
    """Whether what a node computes is still read, by a node that is itself read: what others have taken over stays until the end."""
    return any(
        output.is_graph_output()
        or any(made.uses() or made.is_graph_output() for use in output.uses() for made in use.node.outputs)
        for output in node.outputs
    )


def _weight_of(product: ir.Node) -> _Weight | None:
    """What a MatMul multiplies with, if that is a weight in one of the formats."""
    second = product.inputs[1]
    if _is_matrix(second):
        return _Weight(PLAIN_WEIGHT, _given(second))
    read = _made_by(second, "DequantizeLinear")
    if (
        read is None
        or len(read.inputs) != 2
        or not _is_matrix(read.inputs[0])
        or not _given(read.inputs[1]).is_initializer()
    ):
        return None
    values, scales = _given(read.inputs[0]), _given(read.inputs[1])
    axis = read.attributes.get_int("axis", 1)
    if values.dtype == ir.DataType.INT8 and axis == 1 and len(scales.shape or ()) == 1:
        return _Weight(INT8_WEIGHT, values, scales)
    block = read.attributes.get_int("block_size", 0)
    if values.dtype == ir.DataType.INT4 and axis == 0 and block == INT4_GROUP:
        return _Weight(INT4_WEIGHT, values, scales)
    return None


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _constant(value: ir.Value) -> Any:
    tensor = value.const_value
    assert tensor is not None, value.name
    return tensor


def _given(value: _T | None) -> _T:
    assert value is not None
    return value
