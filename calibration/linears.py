"""The linear maps of a decoder graph: where each lies, what it reads, and where a factor on its input can be folded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from mmm_export import names
from mmm_export.spec import ModelSpec

Role = Literal["in", "out", "gate", "up", "down", "head"]
_ROLES: dict[str, Role] = {
    ".attention.wvkqgdt": "in",
    ".attention.wqkv": "in",
    ".attention.o_proj": "out",
    ".attention.wo": "out",
    ".feed_forward.w1": "gate",
    ".feed_forward.w3": "up",
    ".feed_forward.w2": "down",
    "language_model.output": "head",
}
_PACKED = ".attention.wvkqgdt"
_SUFFIX = ".weight"
_STACK = re.compile(r"(embedding_model\.encoder|language_model\.model\.layers)\.(\d+)\.")


@dataclass(frozen=True)
class Linear:
    """One MatMul with a weight (K, N).

    Attributes:
        name: of the weight, without its `.weight`.
        layer: global index; the head comes after the last layer.
        role: what it is in its layer.
        source: name of the value that it reads, (B, T, K).
        rows, columns: K and N.
        kept_columns: the last columns that are never quantized: delta's rows of the packed projection.
    """

    name: str
    layer: int
    role: Role
    source: str
    rows: int
    columns: int
    kept_columns: int

    @property
    def weight(self) -> str:
        return self.name + _SUFFIX

    @property
    def quantized_columns(self) -> int:
        return self.columns - self.kept_columns


@dataclass(frozen=True)
class Fold:
    """What takes the inverse of a factor on a source, so that the model computes the same.

    Attributes:
        kind: "norm" the weight of a norm, "scan" the norm inside the scan, whose weight all heads share; "linear" the columns of
            another linear map.
        target: name of the initializer or of the linear map.
        period: the factor repeats after so many channels; K itself unless heads share them.
    """

    kind: Literal["norm", "scan", "linear"]
    target: str
    period: int


@dataclass(frozen=True)
class Source:
    """A value that one or more linear maps read, and nothing else if it has a `fold`."""

    name: str
    layer: int
    linears: tuple[Linear, ...]
    fold: Fold | None

    @property
    def channels(self) -> int:
        return self.linears[0].rows


def find_linears(model: ir.Model, spec: ModelSpec) -> tuple[Linear, ...]:
    """List the linear maps of a decoder, or of a part of it, in graph order."""
    found = []
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or not (weight.name or "").endswith(_SUFFIX):
            continue
        name = str(weight.name).removesuffix(_SUFFIX)
        role = next((role for suffix, role in _ROLES.items() if name.endswith(suffix)), None)
        source = node.inputs[0]
        if role is None or weight.shape is None or source is None:
            continue
        rows, columns = weight.shape.numpy()
        kept = spec.heads if name.endswith(_PACKED) else 0
        found.append(Linear(name, _layer(name, spec), role, str(source.name), rows, columns, kept))
    return tuple(found)


def find_sources(model: ir.Model, linears: Iterable[Linear], spec: ModelSpec) -> tuple[Source, ...]:
    """Group linear maps by what they read, and look for the place where a factor on it can be folded."""
    by_source: dict[str, list[Linear]] = {}
    for linear in linears:
        by_source.setdefault(linear.source, []).append(linear)
    values = {value.name: value for node in model.graph for value in node.outputs}
    ups = {linear.weight: linear for linear in linears if linear.role == "up"}
    return tuple(
        Source(name, members[0].layer, tuple(members), _fold(values.get(name), len(members), ups, spec))
        for name, members in by_source.items()
    )


def _layer(name: str, spec: ModelSpec) -> int:
    match = _STACK.match(name)
    if match is None:
        return spec.layers
    return int(match[2]) + (0 if match[1].startswith("embedding") else len(spec.embedding.kinds))


def _fold(value: ir.Value | None, readers: int, ups: dict[str, Linear], spec: ModelSpec) -> Fold | None:
    node = None if value is None else value.producer()
    if value is None or node is None or len(value.uses()) != readers or value.is_graph_output():
        return None
    if node.op_type == names.OP_NAME:
        norm = node.inputs[len(node.inputs) - 1]
        return None if norm is None else Fold("scan", str(norm.name), spec.head_dim)
    if node.op_type != "Mul" or value.shape is None:
        return None
    channels = int(value.shape[-1]) if isinstance(value.shape[-1], int) else 0
    for factor in node.inputs:
        if factor is None:
            continue
        if factor.is_initializer():
            return Fold("norm", str(factor.name), channels)
        maker = factor.producer()
        weight = maker.inputs[1] if maker is not None and maker.op_type == "MatMul" else None
        if weight is not None and weight.name in ups and len(factor.uses()) == 1:
            return Fold("linear", ups[str(weight.name)].name, channels)
    return None
