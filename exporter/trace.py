"""Trace the graphs of a bundle with torch.export, without weights: every parameter is a fake tensor with shape and type only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmm_export.exporter.graphs import Graph, scan_operator
from mmm_export.manifest import Dtype
from mmm_export.model.decoder import MmMamba
from mmm_export.model.rope import ComputedRope, TabledRope
from mmm_export.spec import ModelSpec

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

OPSET = 20  # the newest that TensorRT 10.3 reads

# Weights of the scan stay float32 in every bundle: tiny, and rounding them would bend the recurrence.
_FP32_WEIGHTS = (
    ".conv1d.weight",
    ".conv1d.bias",
    ".dt_bias",
    ".A_log_bias",
    ".g_norm_swish_gate.weight",
)


def parameter_dtype(name: str, dtype: Dtype) -> torch.dtype:
    """Type of a parameter, by its name, in a bundle of `dtype`."""
    return torch.float32 if name.endswith(_FP32_WEIGHTS) else TORCH_DTYPES[dtype]


def trace(spec: ModelSpec, dtype: Dtype, max_tokens: int, graph: Callable[[MmMamba], Graph]) -> ir.Model:
    """Trace one graph at opset 20.

    Args:
        spec: the model.
        dtype: type of weights and activations.
        max_tokens: capacity of the KV caches, 0 without attention layers.
        graph: makes the module to trace from the model.

    Returns:
        The model with inputs and outputs named as `graph` says. Initializers have names, shapes and types but no values;
        parameters carry their checkpoint names, rotary tables `ropes.<stack>.cos` and `.sin`.
    """
    with FakeTensorMode(), _quiet():
        module = graph(_fake_model(spec, dtype, max_tokens)).eval()
        inputs = module.inputs()
        fixed = _forward_arity(module)
        examples = [i.example for i in inputs]
        shapes = [{axis: _dimension(name) for axis, name in i.dims.items()} for i in inputs]
        # What forward takes as *rest is one argument, a tuple, to torch.export.
        dynamic = (*shapes[:fixed], tuple(shapes[fixed:])) if len(inputs) > fixed else tuple(shapes)
        program = torch.onnx.export(
            module,
            tuple(examples),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            input_names=[i.name for i in inputs],
            output_names=module.outputs(),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model = program.model
    _strip(model)
    return model


def _forward_arity(module: Graph) -> int:
    """Number of named parameters of forward, *rest not counted."""
    return type(module).forward.__code__.co_argcount - 1


_DIMENSIONS: dict[str, torch.export.Dim] = {}


def _dimension(name: str) -> torch.export.Dim:
    """One Dim object for each name: torch.export compares them by identity."""
    return _DIMENSIONS.setdefault(name, torch.export.Dim(name, min=1))


def _fake_model(spec: ModelSpec, dtype: Dtype, max_tokens: int) -> MmMamba:
    model = MmMamba(spec, dtype=TORCH_DTYPES[dtype], scan=scan_operator)
    for name, value in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        typed = nn.Parameter(value.to(parameter_dtype(name, dtype)), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, typed)
    for stack, rope in model.ropes.items():
        if isinstance(rope, ComputedRope) and rope.spec.scaling != "dynamic":
            model.ropes[stack] = TabledRope(spec.head_dim, max_tokens)
        else:
            model.ropes[stack] = rope.float()  # TensorRT has no float64
    return model


def _strip(model: ir.Model) -> None:
    """Drop what the tracer noted about its own source files, and the name of the wrapping module from the parameters."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in list(model.graph.initializers.values()):
        value.metadata_props.clear()
        if value.name is not None:
            value.name = value.name.removeprefix("model.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer's remarks (torchvision missing, shared dynamic axes): nothing in them is for the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
