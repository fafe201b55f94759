"""Small pieces to recognise and replace nodes of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node that makes `value`, if it is a standard operator of one of these names."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in operators else None


def before_cast(value: ir.Value | None) -> ir.Value | None:
    """Return the value that a Cast makes `value` from, else itself."""
    node = made_by(value, "Cast")
    return node.inputs[0] if node else value


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads `value`; None where there are others, or it is a graph output."""
    users = {usage.node for usage in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return the numbers of a constant, None for anything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_constant(value: ir.Value | None, wanted: float) -> bool:
    """Whether `value` is a constant of one element, `wanted`."""
    numbers = constant(value)
    return numbers is not None and numbers.size == 1 and float(numbers.reshape(())) == wanted


def new_node(
    operator: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
    *,
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
) -> ir.Node:
    """Make a node of one output; `name` names both, so that a builder's message leads back to the layer."""
    node = ir.node(operator, inputs, attributes, name=f"node_{name}")
    output = node.outputs[0]
    output.name, output.shape = name, shape
    if dtype is not None:
        output.dtype = dtype
    return node


def new_constant(graph: ir.Graph, name: str, numbers: Sequence[int] | int) -> ir.Value:
    """Update `graph`: give it an int64 initializer, unless one of that name is there; return its value."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def replace(graph: ir.Graph, old: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Update `graph`: put `nodes` where `old` was made; the output of the last takes its name, type and users."""
    maker = old.producer()
    if maker is None:
        raise ValueError(f"{old.name} is made by no node")
    new = nodes[-1].outputs[0]
    ir.convenience.replace_nodes_and_values(graph, maker, [maker], nodes, [old], [new])


def drop_unused(model: ir.Model) -> None:
    """Update `model`: remove nodes and initializers that nothing reads."""
    RemoveUnusedNodesPass()(model)
