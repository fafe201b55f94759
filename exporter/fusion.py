"""Writes a decoder's matrix products as MmmLinear nodes, each with the norm before it and what follows it.

One node takes the place of: RMS norm, MatMul, residual Add; RMS norm, two MatMuls, SiLU and Mul; and MatMul with the Cast of logits.
Its weight lies (out, in), as in the checkpoint, so it is turned, and gate and up are put one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmm_export import names
from mmm_export.exporter.weights import BLOCK_BYTES, DataFile
from mmm_export.manifest import FileInfo

NO_EPILOGUE, RESIDUAL, SILU = 0, 1, 2  # mmm_epilogue of plugins/include/mmm/kernels.h
PLAIN_WEIGHT = 0  # mmm_weight_format


@dataclass(frozen=True)
class _Norm:
    source: ir.Value
    weight: ir.Value
    eps: float


def fuse_products(model: ir.Model) -> int:
    """Update an optimised decoder whose weights are bound: put MmmLinear nodes in the place of its products with weights.

    New weights are views of the old ones, in other order; `write_weights` writes them.

    Returns: the number of nodes put in.
    """
    graph = model.graph
    fused = 0
    for fuse in (_gate_and_up, _one_product):  # pairs first, while both are there
        for node in list(graph):
            if node.op_type == "MatMul" and node.domain == "" and _is_matrix(node.inputs[1]):
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


def write_weights(model: ir.Model, path: Path, advance: Callable[[int], None]) -> FileInfo:
    """Update `model`: write the value of every initializer to the new file `path`, and let it refer to that.

    Args:
        model: whose initializers have values, in files or as views of files.
        path: the data file to write, beside which the model must be saved.
        advance: called with the number of bytes written.

    Returns: size and hash of the file.
    """
    with path.open("wb") as stream:
        data_file = DataFile(path, stream)
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if not isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
                continue  # a small constant, which stays in the graph: shape inference reads it there
            offset = data_file.align()
            for block in _row_blocks(tensor.numpy()):
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                data_file.put(data)
                advance(len(data))
            value.const_value = data_file.tensor(name, offset, tensor.dtype, tuple(tensor.shape.numpy()))
    return data_file.info()


def _one_product(graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, ir.Node]:
    """Fuse a product, the norm before it, and a residual or a Cast to float32 behind it. Returns what it computes, and the node."""
    x, weight = _given(node.inputs[0]), _given(node.inputs[1])
    norm = _norm_of(x)
    output, residual, is_float32 = node.outputs[0], None, False
    follower = _only_user(output)
    if follower is not None and follower.op_type == "Add":
        other = follower.inputs[0] if follower.inputs[1] is output else follower.inputs[1]
        if other is not None and other is not output and not other.is_initializer():
            output, residual = follower.outputs[0], other
    elif follower is not None and follower.op_type == "Cast" and _target(follower) == ir.DataType.FLOAT:
        output, is_float32 = follower.outputs[0], True
    rows = _turned(graph, (weight,))
    return output, _linear(x, rows, norm, residual=residual, is_float32=is_float32)


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
    other = up.producer() if up is not None else None
    if (
        other is None
        or other.op_type != "MatMul"
        or other.inputs[0] is not node.inputs[0]
        or not _is_matrix(other.inputs[1])
    ):
        return None
    x = _given(node.inputs[0])
    rows = _turned(graph, (_given(node.inputs[1]), _given(other.inputs[1])))
    return product.outputs[0], _linear(x, rows, _norm_of(x), epilogue=SILU)


def _reads_its_states_from_outside(scan: ir.Node) -> bool:
    """Whether no node of this graph writes the states of a scan, which may then be read while the node before it still runs."""
    return all(value is not None and value.is_graph_input() for value in scan.inputs[2:4])


def _linear(
    x: ir.Value,
    rows: ir.Value,
    norm: _Norm | None,
    *,
    residual: ir.Value | None = None,
    epilogue: int | None = None,
    is_float32: bool = False,
) -> ir.Node:
    inputs = [norm.source if norm else x, rows, *([norm.weight] if norm else []), *([residual] if residual else [])]
    attributes: dict[str, Any] = {
        "weight_format": PLAIN_WEIGHT,
        "epilogue": epilogue if epilogue is not None else RESIDUAL if residual else NO_EPILOGUE,
        "normalise": int(norm is not None),
        "float32_output": int(is_float32),
        "eps": norm.eps if norm else 1e-6,
        "plugin_version": "1",
    }
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


def _row_blocks(array: Any) -> list[Any]:
    if array.ndim < 2:
        return [array]
    step = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
    return [array[begin : begin + step] for begin in range(0, len(array), step)]


def _turned(graph: ir.Graph, matrices: tuple[ir.Value, ...]) -> ir.Value:
    """Add an initializer that holds the rows of matrices, one behind the other; those that nobody uses any more go later."""
    tensors = [_constant(matrix) for matrix in matrices]
    inputs = tensors[0].shape.numpy()[0]
    shape = ir.Shape((sum(tensor.shape.numpy()[1] for tensor in tensors), inputs))
    name = ".and.".join(str(matrix.name) for matrix in matrices) + ".rows"
    dtype = tensors[0].dtype

    def read() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([tensor.numpy().T for tensor in tensors]), dtype=dtype, name=name)

    lazy = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy)
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


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _constant(value: ir.Value) -> Any:
    tensor = value.const_value
    assert tensor is not None, value.name
    return tensor


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
