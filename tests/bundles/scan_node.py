"""Models of a single MmmSelectiveScan node, their inputs, and what float64 makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from oracle.activations import silu, softplus
from oracle.convolution import causal_conv
from oracle.norms import gated_rms_norm
from oracle.scan import scan

from mmm_export.exporter.scan_function import INPUTS, OUTPUTS

Feeds = dict[str, Any]
TYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
ONNX_TYPES = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
WEIGHTS = INPUTS[4:]
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    state_dim: int = 16
    conv_width: int = 2

    @property
    def channels(self) -> int:
        return self.kv_heads * (self.head_dim + self.state_dim) + self.heads * self.state_dim

    @property
    def width(self) -> int:
        return self.channels + self.heads * self.head_dim + self.heads

    def shapes(self, batch: Any, tokens: Any) -> dict[str, list[Any]]:
        states = {
            "conv_state": [batch, self.channels, self.conv_width - 1],
            "ssm_state": [batch, self.heads, self.head_dim, self.state_dim],
        }
        return {
            "projected": [batch, tokens, self.width],
            "lengths": [batch],
            **states,
            "conv_weight": [self.channels, self.conv_width],
            "conv_bias": [self.channels],
            "dt_bias": [self.heads],
            "A_log": [self.heads],
            "norm_weight": [self.head_dim],
            "y": [batch, tokens, self.heads * self.head_dim],
            **{f"{name}_out": shape for name, shape in states.items()},
        }


def node_model(
    sizes: Sizes,
    dtype: str = "fp32",
    *,
    weights: Feeds | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    edit: Callable[[onnx.NodeProto], None] = lambda node: None,
    opset: int = 20,
) -> bytes:
    """Serialize a model of one node.

    Args:
        sizes: of the node.
        dtype: of projected, conv_state and y.
        weights: become initializers; without them the weights are inputs of the graph.
        functions: bodies to put beside it.
        edit: changes the node.
        opset: of the standard operators.
    """
    shapes = sizes.shapes("B", "T")

    def info(name: str) -> onnx.ValueInfoProto:
        kind = (
            ONNX_TYPES[dtype] if name.removesuffix("_out") in ("projected", "conv_state", "y") else ONNX_TYPES["fp32"]
        )
        return onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.INT32 if name == "lengths" else kind, shapes[name]
        )

    attributes = {name: getattr(sizes, name) for name in ("heads", "kv_heads", "head_dim", "state_dim")}
    node = onnx.helper.make_node(
        "MmmSelectiveScan", INPUTS, OUTPUTS, domain="mmm", eps=EPS, plugin_version="1", **attributes
    )
    edit(node)
    graph = onnx.helper.make_graph(
        [node],
        "scan",
        [info(name) for name in INPUTS if weights is None or name not in WEIGHTS],
        [info(name) for name in OUTPUTS],
        [onnx.numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    opsets = [onnx.helper.make_opsetid(*pair) for pair in (("", opset), ("mmm", 1), ("com.microsoft", 1))]
    model = onnx.helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def draw(sizes: Sizes, lengths: Sequence[int], tokens: int, dtype: str = "fp32", seed: int = 0) -> Feeds:
    """All inputs random, start states included; NaN where a row is padding."""
    random = np.random.default_rng(seed)
    feeds = {name: random.standard_normal(shape) for name, shape in sizes.shapes(len(lengths), tokens).items()}
    feeds = {name: feeds[name].astype(np.float32) for name in INPUTS}
    feeds["dt_bias"] -= 3  # delta near 0.05: the start state still counts at the end
    feeds["lengths"] = np.array(lengths, np.int32)
    feeds["projected"][np.arange(tokens) >= feeds["lengths"][:, None]] = np.nan
    for name in ("projected", "conv_state"):
        feeds[name] = feeds[name].astype(TYPES[dtype])
    return feeds


def wanted(sizes: Sizes, feeds: Feeds) -> dict[str, Any]:
    """The outputs by the float64 oracle, row by row without its padding; y of padding is zero."""
    wide = {name: value.astype(np.float64) for name, value in feeds.items()}
    shapes = sizes.shapes(*wide["projected"].shape[:2])
    outputs = {name: np.zeros(shapes[name]) for name in OUTPUTS}
    for row, length in enumerate(feeds["lengths"]):
        here = slice(row, row + 1)
        raw, gate, dt = np.split(
            wide["projected"][here, :length], [sizes.channels, sizes.channels + sizes.heads * sizes.head_dim], -1
        )
        mixed, outputs["conv_state_out"][here] = causal_conv(
            raw, wide["conv_state"][here], wide["conv_weight"], wide["conv_bias"]
        )
        ends = np.cumsum([sizes.kv_heads * sizes.head_dim, sizes.kv_heads * sizes.state_dim])
        v, k, q = np.split(silu(mixed), ends, -1)
        share = sizes.heads // sizes.kv_heads
        v = np.repeat(v.reshape(1, length, sizes.kv_heads, sizes.head_dim), share, 2)
        k = np.repeat(k.reshape(1, length, sizes.kv_heads, sizes.state_dim), share, 2)
        q = q.reshape(1, length, sizes.heads, sizes.state_dim)
        delta = softplus(dt + wide["dt_bias"])
        y, outputs["ssm_state_out"][here] = scan(v, k, q, delta, -np.exp(wide["A_log"]), wide["ssm_state"][here])
        gated = gated_rms_norm(y, gate.reshape(y.shape), wide["norm_weight"])
        outputs["y"][here, :length] = gated.reshape(1, length, sizes.heads * sizes.head_dim)
    return outputs


def node_session(model: bytes, library: object = None, *, threads: int = 2) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_node(session: onnxruntime.InferenceSession, feeds: Feeds) -> dict[str, Any]:
    """Run through bound buffers, since bfloat16 arrays cannot be fed otherwise; outputs begin as NaN bytes."""
    taken = {node.name for node in session.get_inputs()}
    binding = session.io_binding()
    for name, value in feeds.items():
        if name in taken:
            binding.bind_ortvalue_input(name, ort_value(value))
    batch, tokens = feeds["projected"].shape[:2]
    heads, head_dim = feeds["ssm_state"].shape[1:3]
    outputs = {
        "y": np.empty((batch, tokens, heads * head_dim), feeds["projected"].dtype),
        "conv_state_out": np.empty_like(feeds["conv_state"]),
        "ssm_state_out": np.empty_like(feeds["ssm_state"]),
    }
    for name, value in outputs.items():
        value.view(np.uint8)[...] = 0xFF
        binding.bind_ortvalue_output(name, ort_value(value))
    session.run_with_iobinding(binding)
    return outputs


def ort_value(array: Any) -> onnxruntime.OrtValue:
    """Wrap an array, without a copy."""
    if array.dtype == TYPES["bf16"]:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ONNX_TYPES["bf16"])
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
