"""MmmLinear in ONNX Runtime on the CPU: float64's numbers in every format, and refusals in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles.linear_node import linear_model, run_linear
from bundles.linear_operands import BOUND, FORMATS, TYPES, draw
from bundles.operator_library import operator_library
from bundles.scan_node import node_session
from oracle.compare import relative_l2

EPILOGUES = ("none", "residual", "silu")


@pytest.fixture(scope="module")
def library() -> Path:
    return operator_library()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_outputs_are_those_of_float64(library: Path, dtype: str, weight_format: str, epilogue: str, norm: bool) -> None:
    operands = draw(3, 74, 384, weight_format, dtype, norm=norm).only(epilogue)
    found = run_linear(node_session(linear_model(operands), library), operands)
    assert relative_l2(found, operands.oracle()) <= BOUND[dtype]


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "fed"])
@pytest.mark.parametrize("epilogue", ["none", "residual"])
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_rows_that_are_kept_follow_the_others(library: Path, weight_format: str, epilogue: str, constant: bool) -> None:
    operands = draw(3, 74, 384, weight_format, "fp16", kept=10).only(epilogue)
    session = node_session(linear_model(operands, constant=constant), library)
    assert session.get_outputs()[0].shape == ["M", 74]
    assert relative_l2(run_linear(session, operands), operands.oracle()) <= BOUND["fp16"]


def test_kept_rows_that_are_not_there_are_told(library: Path) -> None:
    with pytest.raises(Exception, match="the node has 3 inputs; its attributes call for 4"):
        node_session(linear_model(draw(2, 40, 256, "int8", norm=False).only("none"), keeps_rows=1), library)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 33])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_any_number_of_tokens_is_computed(library: Path, weight_format: str, tokens: int) -> None:
    operands = draw(tokens, 40, 256, weight_format).only("residual")
    found = run_linear(node_session(linear_model(operands), library), operands)
    assert relative_l2(found, operands.oracle()) <= BOUND["fp32"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_logits_come_in_float32(library: Path, dtype: str, weight_format: str) -> None:
    operands = draw(1, 92_553 // 9, 128, weight_format, dtype, norm=False).only("none")
    session = node_session(linear_model(operands, float32_output=True), library)
    assert session.get_outputs()[0].type == "tensor(float)"
    found = run_linear(session, operands, float32_output=True)
    assert relative_l2(found, operands.oracle()) <= BOUND["fp32"]


def test_fed_weights_give_what_constant_weights_give(library: Path) -> None:
    operands = draw(2, 40, 256, "int4", "fp16")
    one, other = (
        run_linear(node_session(linear_model(operands, constant=constant), library), operands)
        for constant in (True, False)
    )
    assert np.array_equal(one, other)


def test_the_number_of_threads_does_not_change_a_bit(library: Path) -> None:
    operands = draw(5, 200, 512, "int8")
    model = linear_model(operands)
    runs = [run_linear(node_session(model, library, threads=n), operands) for n in (1, 2, 5)]
    assert all(np.array_equal(runs[0], other) for other in runs[1:])


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_shape_and_type_of_the_output_are_inferred(library: Path, epilogue: str) -> None:
    operands = draw(2, 40, 128, "int8", "fp16").only(epilogue)
    (out,) = node_session(linear_model(operands), library).get_outputs()
    assert (out.type, out.shape) == ("tensor(float16)", ["M", 20 if epilogue == "silu" else 40])


def with_input(name: str, value: Any, **changes: Any) -> bytes:
    """A model with another constant."""
    operands = draw(2, 40, 256, changes.get("weight_format", "int8")).only("none")
    model = onnx.ModelProto.FromString(linear_model(operands))
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    return bytes(model.SerializeToString())


REFUSED = {
    "scales of the wrong length": (
        with_input("scales", np.ones(39, np.float32)),
        r"scales has shape \(39\); wanted \(40\)",
    ),
    "half scales of INT8": (with_input("scales", np.ones(40, np.float16)), "scales is float16; wanted float32"),
    "float scales of INT4": (
        with_input("scales", np.ones((40, 2), np.float32), weight_format="int4"),
        "scale_dtype is 0; wanted 1 .float16.",
    ),
    "a weight of floats": (with_input("weight", np.ones((40, 256), np.float32)), "weight is float32; wanted int8"),
    "a weight of three axes": (
        with_input("weight", np.ones((40, 2, 128), np.int8)),
        r"weight has shape \(40, 2, 128\); wanted \(outputs, inputs\)",
    ),
    "a norm of the wrong width": (with_input("norm_weight", np.ones(128, np.float32)), "norm_weight has shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_constant_is_told_when_the_graph_is_loaded(library: Path, name: str) -> None:
    model, text = REFUSED[name]
    with pytest.raises(Exception, match=f"MmmLinear: {text}"):
        node_session(model, library)


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"weight_format": 3}, "attribute weight_format is 3; wanted 0 to 2"),
        ({"epilogue": -1}, "attribute epilogue is -1; wanted 0 to 2"),
        ({"normalise": 0}, "the node has 4 inputs; its attributes call for 3"),
        ({"epilogue": 1}, "the node has 4 inputs; its attributes call for 5"),
        ({"eps": 0.0}, "eps is 0"),
        ({"plugin_version": "2"}, 'plugin_version "2"'),
    ],
    ids=str,
)
def test_a_wrong_attribute_is_told_when_the_graph_is_loaded(library: Path, attributes: Any, text: str) -> None:
    operands = draw(2, 40, 256, "int8").only("none")
    with pytest.raises(Exception, match=f"MmmLinear: .*{text}"):
        node_session(linear_model(operands, **attributes), library)


def test_x_of_another_width_is_told_when_it_runs(library: Path) -> None:
    operands = draw(2, 40, 256, "int8").only("none")
    model = onnx.ModelProto.FromString(linear_model(operands))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    session = node_session(model.SerializeToString(), library)
    with pytest.raises(Exception, match=r"MmmLinear: x has shape \(2, 128\); wanted \(..., 256\)"):
        run_linear(session, replace(operands, x=operands.x[:, :128].copy()))
