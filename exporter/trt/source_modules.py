"""Leads from a node of a graph back to the module of the model that it came from."""

from __future__ import annotations

from collections import deque

import onnx_ir as ir

_MOST_STEPS = 64  # far beyond one layer


def source_module(model: ir.Model, node_name: str) -> str | None:
    """Name the module whose weight is nearest to a node: "language_model.model.layers.3.attention". None where there is none."""
    start = next((node for node in model.graph if node.name == node_name), None)
    if start is None:
        return None
    seen, queue = {start}, deque([start])
    for _ in range(_MOST_STEPS):
        if not queue:
            return None
        node = queue.popleft()
        for value in node.inputs:
            if value is not None and value.is_initializer() and "." in str(value.name):
                return str(value.name).partition(".part_")[0].rpartition(".")[0]
        makers = (value.producer() for value in node.inputs if value is not None)
        users = (usage.node for output in node.outputs for usage in output.uses())
        for other in (*makers, *users):
            if other is not None and other not in seen:
                seen.add(other)
                queue.append(other)
    return None
