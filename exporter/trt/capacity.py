"""A pass that makes the KV caches smaller than the bundle's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmm_export import names
from mmm_export.exporter.trt.cached_attention import attention_layers
from mmm_export.exporter.trt.matching import constant


def shrink_caches(model: ir.Model, capacity: int) -> bool:
    """Update `model`: give every KV cache room for `capacity` tokens; rotary tables stay, and are read less far.

    Returns: whether anything had to change.

    Raises:
        ValueError: the caches are smaller than that, or the mask has another form than the export gives it.
    """
    graph = model.graph
    layers = attention_layers(graph)
    if not layers:
        return False
    pasts = {past(layer) for layer in layers for past in (names.past_key, names.past_value)}
    caches = [v for v in graph.inputs if v.name in pasts]
    caches += [v for v in graph.outputs if v.name in {names.present(name) for name in pasts}]
    before = {int(value.shape[2]) for value in caches if value.shape is not None and isinstance(value.shape[2], int)}
    if before == {capacity}:
        return False
    if len(before) != 1 or min(before) < capacity:
        raise ValueError(f"caches of {sorted(before)} tokens cannot hold {capacity}")
    for value in caches:
        value.shape = _resized(value, capacity)
    slots = {node.inputs[0] for node in graph if node.op_type == "LessOrEqual" and node.domain == ""}
    changed = [value for value in slots if value is not None and _is_order(value, min(before))]
    if not changed:
        raise ValueError("no mask over the slots of the caches")
    for value in changed:
        tensor = ir.tensor(np.arange(capacity, dtype=np.int64), name=value.name)
        value.const_value, value.shape = tensor, ir.Shape([capacity])
    kept = {*graph.inputs, *graph.outputs}
    for node in graph:
        for output in node.outputs:
            if output not in kept and output.shape is not None and min(before) in tuple(output.shape):
                output.shape = None  # of masks and scores, found anew by whoever reads the graph
    return True


def _resized(value: ir.Value, capacity: int) -> ir.Shape:
    if value.shape is None:
        raise ValueError(f"{value.name} has no shape")
    dims = list(value.shape)
    dims[2] = capacity
    return ir.Shape(dims)


def _is_order(value: ir.Value, count: int) -> bool:
    numbers = constant(value)
    return numbers is not None and numbers.shape == (count,) and bool((numbers == np.arange(count)).all())
