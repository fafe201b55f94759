"""Write a plan into a decoder graph, in the form that its consumer runs best. Zero points are 0 throughout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmm_export.calibration.plan import LinearPlan, Plan, SourcePlan
from mmm_export.calibration.rounding import (
    FP8,
    INT8,
    STORED,
    Grid,
    column_scales,
    group_scales,
    group_size,
    on_grid,
    on_group_grid,
    stored_scale,
)
from mmm_export.calibration.weights import Weights
from mmm_export.manifest import Consumer, Dtype
from mmm_export.widen import WIDE

Array = NDArray[Any]

BLOCK_OPSET = 21  # the first whose DequantizeLinear has int4 and blocks
NBITS_BLOCK = 128  # rows that share a scale in MatMulNBits; by-column scales are repeated
# ONNX Runtime computes MatMulNBits three times as fast at one token with activations rounded to int8 by block (level 4). Beside int4
# weights that rounding does not show; beside int8 weights it would, so those keep float32 (level 1).
_ACCURACY = {"int4": 4, "int8-weights": 1}
_MICROSOFT = "com.microsoft"


@dataclass
class Rewriter:
    """Updates one model: the whole decoder, or a part that holds the linear maps of the plan."""

    model: ir.Model
    weights: Weights
    consumer: Consumer
    dtype: Dtype

    def __post_init__(self) -> None:
        self._quantized: dict[tuple[str, float, str], ir.Value] = {}

    def apply(self, plan: Plan) -> None:
        """Rewrite every linear map of the plan that the model has, and fold its factors."""
        nodes = {
            str(node.inputs[1].name).removesuffix(WIDE): node
            for node in self.model.graph
            if node.op_type == "MatMul" and node.inputs[1] is not None
        }
        for source in plan.sources:
            self._fold(source)
        for linear in plan.linears:
            node = nodes.get(linear.linear.weight)
            if node is not None:
                self._rewrite(node, linear)
        if any(node.op_type == "DequantizeLinear" and "block_size" in node.attributes for node in self.model.graph):
            for imports in (self.model.opset_imports, *(f.opset_imports for f in self.model.functions.values())):
                imports[""] = max(imports.get("", BLOCK_OPSET), BLOCK_OPSET)

    def _fold(self, plan: SourcePlan) -> None:
        fold, factor = plan.source.fold, plan.factor
        if fold is None or factor is None or fold.kind == "linear":
            return
        for node in self.model.graph:
            if plan.source.name not in [output.name for output in node.outputs]:
                continue
            names = [str(value.name).removesuffix(WIDE) if value is not None else "" for value in node.inputs]
            index = names.index(fold.target)
            norm = self.weights.mapped(fold.target)
            kind = (
                np.float32 if norm.dtype == np.float32 else STORED[self.dtype]
            )  # the scan's weights are float32 always
            folded = (norm.astype(np.float32) / factor[: fold.period]).astype(kind)
            name = f"{plan.source.linears[0].name}.folded_norm"
            node.replace_input_with(index, self._constant(name, folded))

    def _rewrite(self, node: ir.Node, plan: LinearPlan) -> None:
        if plan.format is None:
            if plan.row_factor is not None or plan.column_factor is not None:
                weight = self._lazy(
                    plan.linear.weight + ".folded", self._kept(plan, 0), self._stored, self._kept_shape(plan, 0)
                )
                node.replace_input_with(1, weight)
            return
        old, x = node.outputs[0], node.inputs[0]
        if x is None:
            raise ValueError(f"{plan.linear.name} reads nothing")
        nodes: list[ir.Node] = []
        main = self._product(x, plan, nodes)
        if plan.linear.kept_columns:
            begin = plan.linear.quantized_columns
            kept = self._lazy(
                f"{plan.linear.weight}.kept", self._kept(plan, begin), self._stored, self._kept_shape(plan, begin)
            )
            rest = self._kept_product(x, kept, plan, nodes)
            main = self._node(nodes, "Concat", [main, rest], axis=-1)
        main.type, main.shape, name = old.type, old.shape, old.name
        ir.convenience.replace_nodes_and_values(self.model.graph, node, [node], nodes, [old], [main])
        main.name = name

    def _kept_product(self, x: ir.Value, kept: ir.Value, plan: LinearPlan, nodes: list[ir.Node]) -> ir.Value:
        """The part that is not quantized, (B, T, kept columns)."""
        if self.consumer != "tensorrt-rtx" or plan.format != "int8-weights" or self.dtype == "fp32":
            return self._node(nodes, "MatMul", [x, kept])
        # In float32: TensorRT-RTX would else join both products, for which it writes the int8 weights out in 16 bits at every step.
        wide = [self._node(nodes, "Cast", [value], to=int(ir.DataType.FLOAT)) for value in (x, kept)]
        return self._node(nodes, "Cast", [self._node(nodes, "MatMul", wide)], to=int(self._stored))

    def _product(self, x: ir.Value, plan: LinearPlan, nodes: list[ir.Node]) -> ir.Value:
        """The part that is quantized, (B, T, quantized columns)."""
        linear, form = plan.linear, plan.format
        if form in ("int8", "fp8"):
            x = self._quantized_input(x, plan, nodes)
        if form in ("int4", "int8-weights") and self.consumer == "onnxruntime":
            return self._nbits(x, plan, nodes)
        if form == "int4":
            weight, scales = self._int4(plan)
            read = self._node(nodes, "DequantizeLinear", [weight, scales], axis=0, block_size=plan.group)
            return self._node(nodes, "MatMul", [x, read])
        grid = FP8 if form == "fp8" else INT8
        kind = ir.DataType.FLOAT8E4M3FN if form == "fp8" else ir.DataType.INT8
        by_column = functools.cache(lambda: self._column_scales(plan, grid))
        columns = linear.quantized_columns
        name = f"{linear.weight}.{form}"
        weight = self._lazy(name, self._by_column(plan, grid, by_column), kind, (linear.rows, columns))
        if self.consumer == "tensorrt-rtx":
            # One scale for all columns goes into the product itself; the columns' own would leave raw sums in 16 bits.
            widest = self._scale(f"{linear.weight}.widest", by_column, np.max, ())
            relative = self._scale(f"{linear.weight}.relative", by_column, self._relative, (columns,))
            product = self._node(nodes, "MatMul", [x, self._node(nodes, "DequantizeLinear", [weight, widest])])
            return self._node(nodes, "Mul", [product, relative])
        inputs = [weight, self._scale(f"{linear.weight}.scale", by_column, np.asarray, (columns,))]
        if (
            self.consumer == "onnxruntime"
        ):  # which turns the weight into unsigned integers, and takes a missing point for a scalar
            zero: Any = ml_dtypes.float8_e4m3fn if form == "fp8" else np.int8
            inputs.append(self._constant(f"{linear.weight}.zero", np.zeros(columns, zero)))
        return self._node(nodes, "MatMul", [x, self._node(nodes, "DequantizeLinear", inputs, axis=1)])

    def _relative(self, scales: Array) -> Array:
        """Scales in units of the widest one, as that is stored."""
        return scales / stored_scale(scales.max(), self.dtype)

    def _quantized_input(self, x: ir.Value, plan: LinearPlan, nodes: list[ir.Node]) -> ir.Value:
        """Quantize and dequantize an activation, once for all linear maps that read it alike."""
        if plan.input_scale is None or plan.format is None:
            raise ValueError(f"{plan.linear.name} has no scale for its input")
        key = (str(x.name), plan.input_scale, plan.format)
        if key not in self._quantized:
            name = plan.linear.name + ".input"
            scale = self._constant(f"{name}.scale", np.float32(plan.input_scale).astype(STORED[self.dtype]))
            zero = np.zeros((), ml_dtypes.float8_e4m3fn if plan.format == "fp8" else np.int8)
            quantized = self._node(nodes, "QuantizeLinear", [x, scale, self._constant(f"{name}.zero", zero)])
            self._quantized[key] = self._node(nodes, "DequantizeLinear", [quantized, scale])
        return self._quantized[key]

    def _nbits(self, x: ir.Value, plan: LinearPlan, nodes: list[ir.Node]) -> ir.Value:
        """ONNX Runtime's MatMulNBits: unsigned integers by column, whose zero point, the middle, is the default."""
        linear, columns = plan.linear, plan.linear.quantized_columns
        form = "int4" if plan.format == "int4" else "int8-weights"
        bits = 4 if form == "int4" else 8
        size = plan.group or group_size(linear.rows, NBITS_BLOCK) or NBITS_BLOCK
        blocks = -(-linear.rows // size)

        @functools.cache
        def scales() -> Array:
            if form == "int4":
                return self._group_scales(plan)
            return np.repeat(self._column_scales(plan, INT8)[None], blocks, axis=0)

        grouped, by_column = self._grouped(plan, scales), self._by_column(plan, INT8, lambda: scales()[0])
        integers = grouped if form == "int4" else by_column
        shape = (columns, blocks, size * bits // 8)
        name = f"{linear.weight}.{form}"
        weight = self._lazy(name, lambda: _packed(integers(), bits, size), ir.DataType.UINT8, shape)
        flat = self._scale(f"{linear.weight}.scale", scales, lambda s: s.T.reshape(-1), (columns * blocks,))
        attributes = {"K": linear.rows, "N": columns, "bits": bits, "block_size": size}
        attributes["accuracy_level"] = _ACCURACY[form]
        self.model.opset_imports.setdefault(_MICROSOFT, 1)
        return self._node(nodes, "MatMulNBits", [x, weight, flat], domain=_MICROSOFT, **attributes)

    def _int4(self, plan: LinearPlan) -> tuple[ir.Value, ir.Value]:
        scales = functools.cache(lambda: self._group_scales(plan))
        K, N = plan.linear.rows, plan.linear.quantized_columns
        grouped = self._grouped(plan, scales)
        name = f"{plan.linear.weight}.int4"
        weight = self._lazy(name, lambda: grouped().astype(ml_dtypes.int4), ir.DataType.INT4, (K, N))
        return weight, self._scale(f"{plan.linear.weight}.scale", scales, np.asarray, (K // plan.group, N))

    def _block(self, plan: LinearPlan, begin: int, end: int) -> Array:
        """Columns of the weight with the factors of the plan, float32."""
        block = self.weights.columns(plan.linear, begin, end)
        if plan.row_factor is not None:
            block *= plan.row_factor[:, None]
        if plan.column_factor is not None:
            block /= plan.column_factor[begin:end]
        return block

    def _column_scales(self, plan: LinearPlan, grid: Grid) -> Array:
        blocks = self.weights.blocks(plan.linear)
        return np.concatenate([column_scales(self._block(plan, *block), grid, self.dtype) for block in blocks])

    def _group_scales(self, plan: LinearPlan) -> Array:
        parts = [
            group_scales(self._block(plan, *block), plan.group, plan.importance, self.dtype)
            for block in self.weights.blocks(plan.linear)
        ]
        return np.concatenate(parts, axis=1)

    def _by_column(self, plan: LinearPlan, grid: Grid, by_column: Callable[[], Array]) -> Callable[[], Array]:
        def make() -> Array:
            scales = by_column()
            kind: Any = ml_dtypes.float8_e4m3fn if grid.is_float else np.int8
            out = np.empty((plan.linear.rows, plan.linear.quantized_columns), kind)
            for begin, end in self.weights.blocks(plan.linear):
                out[:, begin:end] = on_grid(self._block(plan, begin, end) / scales[begin:end], grid).astype(kind)
            return out

        return make

    def _grouped(self, plan: LinearPlan, by_group: Callable[[], Array]) -> Callable[[], Array]:
        def make() -> Array:
            scales = by_group()
            out = np.empty((plan.linear.rows, plan.linear.quantized_columns), np.int8)
            for begin, end in self.weights.blocks(plan.linear):
                out[:, begin:end] = on_group_grid(self._block(plan, begin, end), scales[:, begin:end], plan.group)
            return out

        return make

    def _kept(self, plan: LinearPlan, begin: int) -> Callable[[], Array]:
        return lambda: self._block(plan, begin, plan.linear.columns).astype(STORED[self.dtype])

    @staticmethod
    def _kept_shape(plan: LinearPlan, begin: int) -> tuple[int, int]:
        return plan.linear.rows, plan.linear.columns - begin

    @property
    def _stored(self) -> ir.DataType:
        return {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[self.dtype]

    def _scale(
        self, name: str, scales: Callable[[], Array], shaped: Callable[[Array], Array], shape: tuple[int, ...]
    ) -> ir.Value:
        """An initializer of scales, in the type of the bundle."""
        return self._lazy(name, lambda: np.asarray(shaped(scales())).astype(STORED[self.dtype]), self._stored, shape)

    def _constant(self, name: str, array: Array) -> ir.Value:
        return self._initializer(name, ir.Tensor(np.asarray(array), name=name))

    def _lazy(self, name: str, make: Callable[[], Array], dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """An initializer that is computed when it is written."""
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(make(), dtype=dtype, name=name), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        return self._initializer(name, tensor)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
        )
        self.model.graph.register_initializer(value)
        return value

    @staticmethod
    def _node(
        nodes: list[ir.Node], op: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: Any
    ) -> ir.Value:
        made = ir.node(op, inputs, attributes=attributes, domain=domain)
        nodes.append(made)
        return made.outputs[0]


def _packed(integers: Array, bits: int, size: int) -> Array:
    """Signed integers (K, N) as MatMulNBits stores them: (N, blocks, size * bits / 8) bytes, the zero point in the middle."""
    K, N = integers.shape
    blocks = -(-K // size)
    zero = 1 << (bits - 1)
    padded = np.full((N, blocks * size), zero, np.uint8)
    padded[:, :K] = (integers.T.astype(np.int16) + zero).astype(np.uint8)
    if bits == 4:
        padded = padded[:, ::2] | (padded[:, 1::2] << 4)
    return padded.reshape(N, blocks, size * bits // 8)
