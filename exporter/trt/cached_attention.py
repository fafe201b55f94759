"""Passes for attention over a KV cache: as TensorScatter and Attention, or with a plain write of the cache.

Both leave the names of inputs and outputs. Unlike the scatter that the export writes, each reads `past.*` in one place only, element
by element before the same element is written: the cache may lie at one address before and after the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from mmm_export import names
from mmm_export.exporter.trt.matching import (
    before_cast,
    constant,
    drop_unused,
    made_by,
    new_constant,
    new_node,
    only_user,
    replace,
)


@dataclass(frozen=True)
class _Write:
    """One cache: `past` before, `present` after, and the rows `new` (B, kv_heads, T, head_dim) that go into it."""

    past: ir.Value
    present: ir.Value
    new: ir.Value


@dataclass(frozen=True)
class _Attention:
    """One layer's attention: rotated queries (B, heads, T, head_dim), their scale, who sees what (B, T, S), and the result."""

    query: ir.Value
    scale: float
    seen: ir.Value
    output: ir.Value


def write_attentions(model: ir.Model) -> dict[str, str]:
    """Update `model`: every attention layer -> two TensorScatters and one Attention.

    Returns: the caches that the engine will write in place, output -> input; empty for a model without attention layers.

    Raises:
        ValueError: a layer has another form than the export gives it.
    """
    graph = model.graph
    in_place: dict[str, str] = {}
    for layer in attention_layers(graph):
        key, value = (_write(graph, past(layer)) for past in (names.past_key, names.past_value))
        attention = _attention(key, value, layer)
        start = _shared(graph, "write_start", partial(_write_start, graph))
        # One a layer: TensorRT-RTX 1.7 names what it makes of a mask after the mask's node, and refuses two of one name.
        name = f"layer.{layer}.seen_by_head"
        seen = _shared(graph, name, partial(_seen_by_head, graph, attention.seen, name))
        for write in (key, value):
            name = f"layer.{layer}.{'key' if write is key else 'value'}_scatter"
            scatter = new_node("TensorScatter", [write.past, write.new, start], name, {"axis": -2, "mode": "linear"})
            in_place[str(write.present.name)] = str(write.past.name)
            replace(graph, write.present, [scatter])
        caches = [graph_output(graph, names.present(past(layer))) for past in (names.past_key, names.past_value)]
        # No softmax_precision: TensorRT refuses the attribute. Its fused attention sums in float32 whatever the inputs are.
        inputs = [attention.query, *caches, seen]
        node = new_node("Attention", inputs, f"layer.{layer}.attention", {"scale": attention.scale})
        replace(graph, attention.output, [node])
    drop_unused(model)
    return in_place


def write_plain_caches(model: ir.Model) -> int:
    """Update `model`: every cache slot takes a new row where there is one for it, else what it held. Returns the count of caches."""
    graph = model.graph
    count = 0
    for layer in attention_layers(graph):
        for past in (names.past_key, names.past_value):
            write = _write(graph, past(layer))
            source = _shared(graph, "slot_source", partial(_slot_source, graph, write))
            written = _shared(graph, "slot_written", partial(_slot_written, graph, write))
            name = f"{write.present.name}.write"
            # Rows first, so that one index a slot moves a whole row: (B, T, kv, dim) -> (B, S, kv, dim).
            rows = new_node("Transpose", [write.new], f"{name}.rows", {"perm": [0, 2, 1, 3]})
            taken = new_node("GatherND", [rows.outputs[0], source], f"{name}.taken", {"batch_dims": 1})
            turned = new_node("Transpose", [taken.outputs[0]], f"{name}.turned", {"perm": [0, 2, 1, 3]})
            where = new_node("Where", [written, turned.outputs[0], write.past], name)
            replace(graph, write.present, [rows, taken, turned, where])
            count += 1
    drop_unused(model)
    return count


def attention_layers(graph: ir.Graph) -> list[int]:
    """Global indices of the layers with a KV cache."""
    found = (str(value.name).split(".") for value in graph.inputs)
    return [int(parts[1]) for parts in found if parts[0] == "past" and parts[-1] == "key"]


def graph_output(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.outputs if value.name == name)


def _graph_input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _write(graph: ir.Graph, past_name: str) -> _Write:
    past, present = _graph_input(graph, past_name), graph_output(graph, names.present(past_name))
    scatter = made_by(present, "ScatterElements")
    chosen = made_by(scatter.inputs[2], "Where") if scatter else None
    taken = made_by(before_cast(chosen.inputs[1]), "GatherElements") if chosen else None
    if scatter is None or scatter.inputs[0] is not past or taken is None or taken.inputs[0] is None:
        raise ValueError(f"{present.name} is not written as the export writes it")
    return _Write(past, present, taken.inputs[0])


def _attention(key: _Write, value: _Write, layer: int) -> _Attention:
    """Follow the keys forward: scores, mask, softmax, product with the values, heads."""
    unknown = ValueError(f"the attention of layer {layer} is not written as the export writes it")
    keys = _next(key.present, "Transpose")
    scores = _next(_result(keys), "MatMul")
    shaped = _next(_result(scores), "Reshape")
    masked = _next(_result(shaped), "Add")
    weights = _next(_result(masked), "Softmax")
    flat = _next(_result(weights), "Reshape")
    mixed = _next(_result(flat), "MatMul")
    output = _next(_result(mixed), "Reshape")
    if scores is None or masked is None or mixed is None or output is None or mixed.inputs[1] is not value.present:
        raise unknown
    scaled = made_by(_first(made_by(scores.inputs[0], "Reshape")), "Mul")
    mask = made_by(_first(made_by(before_cast(masked.inputs[1]), "Unsqueeze")), "Where")
    scale = constant(scaled.inputs[1]) if scaled else None
    query, seen = _first(scaled), _first(mask)
    if scale is None or query is None or seen is None:
        raise unknown
    return _Attention(query, float(scale.reshape(())), seen, output.outputs[0])


def _next(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Return the node of this operator that reads `value`, over a Cast if there is one; no other node may read it."""
    if value is None:
        return None
    users = [usage.node for usage in value.uses()]
    node = users[0] if len(users) == 1 else None
    if node is not None and node.op_type == "Cast":
        node = only_user(node.outputs[0])
    return node if node is not None and node.op_type == operator else None


def _result(node: ir.Node | None) -> ir.Value | None:
    return None if node is None else node.outputs[0]


def _first(node: ir.Node | None) -> ir.Value | None:
    return None if node is None else node.inputs[0]


def _shared(graph: ir.Graph, name: str, make: Callable[[], list[ir.Node]]) -> ir.Value:
    """Return the value `name` that all layers share, made at the head of the graph by `make` when the first layer asks."""
    for node in graph:
        if node.outputs[0].name == name:
            return node.outputs[0]
    nodes = make()
    nodes[-1].outputs[0].name = name
    # After what they read: the masks are made near the head of the graph, before the first layer.
    makers = [value.producer() for node in nodes for value in node.inputs if value is not None]
    ours = set(nodes)
    others = [maker for maker in makers if maker is not None and maker not in ours]
    order = {node: place for place, node in enumerate(graph)}
    last = max(others, key=lambda node: order[node], default=None)
    if last is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(last, nodes)
    return nodes[-1].outputs[0]


def _write_start(graph: ir.Graph) -> list[ir.Node]:
    """Slot of the first new token of each row, (B,) int64."""
    past_lengths = _graph_input(graph, names.PAST_LENGTHS)
    return [
        new_node("Cast", [past_lengths], "write_start", {"to": 7}, dtype=ir.DataType.INT64, shape=past_lengths.shape)
    ]


def _seen_by_head(graph: ir.Graph, seen: ir.Value, name: str) -> list[ir.Node]:
    """(B, T, S) -> (B, 1, T, S) bool."""
    axis = new_constant(graph, "head_axis", [1])
    return [new_node("Unsqueeze", [seen, axis], name, dtype=ir.DataType.BOOL)]


def _offsets(graph: ir.Graph, write: _Write, prefix: str) -> tuple[list[ir.Node], ir.Value]:
    """How far each slot lies behind the first new one: (B, S) int64, negative for older slots."""
    capacity = write.past.shape[2] if write.past.shape is not None else None
    if not isinstance(capacity, int):
        raise ValueError(f"{write.past.name} has no fixed capacity")
    start = new_node("Cast", [_graph_input(graph, names.PAST_LENGTHS)], f"{prefix}.start", {"to": 7})
    column = new_node("Unsqueeze", [start.outputs[0], new_constant(graph, "token_axis", [1])], f"{prefix}.column")
    slots = new_constant(graph, "slots", list(range(capacity)))
    offset = new_node("Sub", [slots, column.outputs[0]], f"{prefix}.offset")
    return [start, column, offset], offset.outputs[0]


def _slot_source(graph: ir.Graph, write: _Write) -> list[ir.Node]:
    """The new token that each slot would take, (B, S, 1) int64, always one that exists."""
    nodes, offset = _offsets(graph, write, "slot_source")
    wide = new_node("Cast", [_graph_input(graph, names.LENGTHS)], "slot_source.lengths", {"to": 7})
    ends = new_node("Unsqueeze", [wide.outputs[0], new_constant(graph, "token_axis", [1])], "slot_source.ends")
    # By lengths, not by the shape of the input: a shape would be computed on the host and copied.
    last = new_node("Sub", [ends.outputs[0], new_constant(graph, "one_row", [1])], "slot_source.last")
    bounded = new_node("Min", [offset, last.outputs[0]], "slot_source.bounded")
    floor = new_node("Max", [bounded.outputs[0], new_constant(graph, "no_row", [0])], "slot_source.floor")
    index = new_node("Unsqueeze", [floor.outputs[0], new_constant(graph, "index_axis", [2])], "slot_source")
    return [*nodes, wide, ends, last, bounded, floor, index]


def _slot_written(graph: ir.Graph, write: _Write) -> list[ir.Node]:
    """Whether a valid new token belongs into each slot, (B, 1, S, 1) bool: padding is never written."""
    nodes, offset = _offsets(graph, write, "slot_written")
    wide = new_node("Cast", [_graph_input(graph, names.LENGTHS)], "slot_written.lengths", {"to": 7})
    ends = new_node("Unsqueeze", [wide.outputs[0], new_constant(graph, "token_axis", [1])], "slot_written.ends")
    not_older = new_node("GreaterOrEqual", [offset, new_constant(graph, "no_row", [0])], "slot_written.not_older")
    valid = new_node("Less", [offset, ends.outputs[0]], "slot_written.valid")
    both = new_node("And", [not_older.outputs[0], valid.outputs[0]], "slot_written.both")
    axes = new_constant(graph, "head_and_dim_axes", [1, 3])
    return [*nodes, wide, ends, not_older, valid, both, new_node("Unsqueeze", [both.outputs[0], axes], "slot_written")]
