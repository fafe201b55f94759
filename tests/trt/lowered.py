"""Lowered graphs in ONNX Runtime: the scan gets its function body back, all else is what TensorRT reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from mmm_export import names
from mmm_export.exporter.scan_function import scan_function
from mmm_export.exporter.trt.lowering import Lowered, lower_graph
from mmm_export.exporter.trt.operators import Operators
from mmm_export.onnxruntime_support import best_body

MUCH = 1 << 30

Feeds = dict[str, Any]


def lower(
    bundle: Path, folder: Path, operators: Operators, *, name: str = names.DECODER_FILE, max_alloc: int = MUCH
) -> Lowered:
    folder.mkdir(parents=True, exist_ok=True)
    return lower_graph(bundle, name, folder, operators, max_alloc)


def operator_counts(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def session(path: Path) -> onnxruntime.InferenceSession:
    """Open a lowered graph. Its weights lie in files with two links, which some readers refuse, so they are copied first."""
    folder = path.parent / "copied"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("copied"))
    model = onnx.load(folder / path.name, load_external_data=False)
    if any(node.op_type == names.OP_NAME for node in model.graph.node):
        opset = next(o.version for o in model.opset_import if o.domain == "")
        model.functions.append(scan_function(best_body(), conv_width=_conv_width(model), opset=opset))
        if best_body() == "linear-attention":
            model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, folder / path.name)
    onnx.checker.check_model(folder / path.name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / path.name), options, providers=["CPUExecutionProvider"])


def run(opened: onnxruntime.InferenceSession, feeds: Feeds) -> Feeds:
    outputs = [output.name for output in opened.get_outputs()]
    return dict(zip(outputs, opened.run(outputs, feeds), strict=True))


def empty_states(path: Path, batch: int) -> Feeds:
    graph = onnx.load(path, load_external_data=False).graph
    states: Feeds = {}
    for value in graph.input:
        if value.name.startswith("past.") and value.name != names.PAST_LENGTHS:
            shape = [batch if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            states[value.name] = np.zeros(shape, dtype)
    return states


def next_states(outputs: Feeds) -> Feeds:
    return {n.replace("present", "past", 1): v for n, v in outputs.items() if n.startswith("present")}


def _conv_width(model: onnx.ModelProto) -> int:
    weight = next(node.input[4] for node in model.graph.node if node.op_type == names.OP_NAME)
    return next(i.dims[1] for i in model.graph.initializer if i.name == weight)


def plain_session(bundle: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = str(bundle / names.DECODER_FILE)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def input_type(opened: onnxruntime.InferenceSession) -> Any:
    kinds = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    return next(kinds[i.type] for i in opened.get_inputs() if i.name == names.INPUTS_EMBEDS)


def copy(bundle: Path, target: Path) -> None:
    shutil.copytree(bundle, target)
