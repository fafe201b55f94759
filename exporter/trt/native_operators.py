"""Passes that write RMSNorm, SiLU and RoPE as one operator each, for a TensorRT that has them.

Each takes a model, updates it and returns how many it wrote. What has another form than the export gives it is left as it is.
"""

from __future__ import annotations

import onnx_ir as ir

from mmm_export.exporter.trt.matching import (
    before_cast,
    constant,
    drop_unused,
    is_constant,
    made_by,
    new_node,
    replace,
)


def write_rms_norms(model: ir.Model) -> int:
    """Update `model`: x / sqrt(mean(x^2) + eps) in float32, rounded, times weight -> RMSNormalization."""
    count = 0
    for node in list(model.graph):
        found = _rms_norm(node)
        if found is None:
            continue
        x, weight, eps = found
        output = node.outputs[0]
        attributes = {"axis": -1, "epsilon": eps, "stash_type": int(ir.DataType.FLOAT)}
        new = new_node("RMSNormalization", [x, weight], f"{output.name}.rms_norm", attributes)
        replace(model.graph, output, [new])
        count += 1
    drop_unused(model)
    return count


def _rms_norm(node: ir.Node) -> tuple[ir.Value, ir.Value, float] | None:
    """Return x, weight and epsilon if `node` is the product with the weight."""
    if node.op_type != "Mul" or node.domain != "":
        return None
    normed, weight = node.inputs
    if weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 1:
        return None
    scaled = made_by(before_cast(normed), "Mul")
    if scaled is None:
        return None
    wide, inverse = scaled.inputs
    root = made_by(_input(made_by(inverse, "Reciprocal")), "Sqrt")
    sum_ = made_by(_input(root), "Add")
    if sum_ is None:
        return None
    eps = constant(sum_.inputs[1])
    mean = made_by(sum_.inputs[0], "ReduceMean")
    power = made_by(_input(mean), "Pow")
    if eps is None or mean is None or power is None or power.inputs[0] is not wide:
        return None
    x = before_cast(wide)
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    last = axes is not None and axes.tolist() == [-1]
    if x is None or not last or not is_constant(power.inputs[1], 2.0) or x.dtype != weight.dtype:
        return None
    return x, weight, float(eps.reshape(()))


def write_swishes(model: ir.Model) -> int:
    """Update `model`: x * sigmoid(x) -> Swish."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Mul" or node.domain != "":
            continue
        x, gate = node.inputs
        sigmoid = made_by(gate, "Sigmoid")
        if x is None or sigmoid is None or sigmoid.inputs[0] is not x:
            continue
        output = node.outputs[0]
        replace(model.graph, output, [new_node("Swish", [x], f"{output.name}.swish", {"alpha": 1.0})])
        count += 1
    drop_unused(model)
    return count


def write_rotary_embeddings(model: ir.Model) -> int:
    """Update `model`: products of halves with cosine and sine -> RotaryEmbedding, which takes both as (B, T, head_dim/2)."""
    count = 0
    angles: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(model.graph):
        found = _rotation(node)
        if found is None:
            continue
        x, cos, sin = found
        output = node.outputs[0]
        if output.dtype is None:
            continue
        rows = [_angles(model.graph, value, output.dtype, angles) for value in (cos, sin)]
        new = new_node("RotaryEmbedding", [x, *rows], f"{output.name}.rotary", {"interleaved": 0})
        replace(model.graph, output, [new])
        count += 1
    drop_unused(model)
    return count


def _rotation(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return x (B, heads, T, head_dim), cos and sin (B, T, head_dim/2) if `node` joins the two rotated halves."""
    if node.op_type != "Concat" or node.domain != "" or len(node.inputs) != 2 or _integer(node, "axis") != -1:
        return None
    difference, sum_ = made_by(node.inputs[0], "Sub"), made_by(node.inputs[1], "Add")
    if difference is None or sum_ is None:
        return None
    products = [made_by(value, "Mul") for value in (*difference.inputs, *sum_.inputs)]
    if any(product is None for product in products):
        return None
    # first*cos - second*sin, second*cos + first*sin
    (first, cos), (second, sin), (second_again, cos_again), (first_again, sin_again) = (
        tuple(product.inputs) for product in products if product is not None
    )
    if (first, second, cos, sin) != (first_again, second_again, cos_again, sin_again):
        return None
    halves = [made_by(half, "Slice") for half in (first, second)]
    rows = [_rows(angle) for angle in (cos, sin)]
    if halves[0] is None or halves[1] is None or halves[0].inputs[0] is not halves[1].inputs[0]:
        return None
    x = halves[0].inputs[0]
    if x is None or rows[0] is None or rows[1] is None or not _are_halves(x, halves[0], halves[1]):
        return None
    return x, rows[0], rows[1]


def _are_halves(x: ir.Value, first: ir.Node, second: ir.Node) -> bool:
    size = None if x.shape is None or len(x.shape) != 4 else x.shape[3]
    starts, ends = ([constant(half.inputs[i]) for half in (first, second)] for i in (1, 2))
    if not isinstance(size, int) or any(bound is None for bound in (*starts, *ends)):
        return False
    numbers = [int(bound.reshape(())) for bound in (*starts, *ends) if bound is not None]
    axes = [constant(half.inputs[3]) for half in (first, second)]
    on_last = all(axis is not None and int(axis.reshape(())) in (3, -1) for axis in axes)
    return on_last and numbers[:3] == [0, size // 2, size // 2] and numbers[3] >= size


def _rows(angle: ir.Value | None) -> ir.Value | None:
    """Return what (B, 1, T, head_dim/2) was unsqueezed from."""
    node = made_by(before_cast(angle), "Unsqueeze")
    return node.inputs[0] if node is not None and is_constant(node.inputs[1], 1) else None


def _angles(
    graph: ir.Graph, rows: ir.Value, dtype: ir.DataType, known: dict[tuple[ir.Value, ir.DataType], ir.Value]
) -> ir.Value:
    """Return `rows` in the type of what it rotates, cast once for all layers."""
    if rows.dtype == dtype:
        return rows
    if (rows, dtype) not in known:
        cast = new_node("Cast", [rows], f"{rows.name}.cast", {"to": int(dtype)}, dtype=dtype, shape=rows.shape)
        maker = rows.producer()
        if maker is None:
            raise ValueError(f"{rows.name} is made by no node")
        graph.insert_after(maker, cast)
        known[rows, dtype] = cast.outputs[0]
    return known[rows, dtype]


def _input(node: ir.Node | None) -> ir.Value | None:
    return None if node is None else node.inputs[0]


def _integer(node: ir.Node, name: str) -> int | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else attribute.as_int()
