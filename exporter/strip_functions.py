"""Remove the function body of MmmSelectiveScan, for runtimes whose plugin is the operator.

TensorRT's parsers take a function body where there is one (10.3, and from 10.15 on), and know no `com.microsoft` operators.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from mmm_export import names


def strip_functions(model: ir.Model) -> bool:
    """Update `model`: remove the functions of domain `mmm` and the opset imports that only they needed.

    Returns: whether anything was removed. The nodes stay, and so do functions of other domains.
    """
    ours = [identifier for identifier in model.functions if identifier[0] == names.OP_DOMAIN]
    for identifier in ours:
        del model.functions[identifier]
    if not ours:
        return False
    # The checker wants the standard domain even where no node is in it.
    used = {"", *(domain for graph in _graphs(model) for domain in _domains(graph))}
    for domain in [domain for domain in model.opset_imports if domain not in used]:
        del model.opset_imports[domain]
    return True


def _graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    yield model.graph
    yield from model.functions.values()


def _domains(graph: ir.Graph | ir.Function) -> Iterator[str]:
    """Domains of all nodes, those of nested graphs included."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield node.domain
