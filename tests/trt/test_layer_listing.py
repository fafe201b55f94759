"""Listings of layers: nothing that a builder says is lost, and nothing that it says breaks the build."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmm_export.exporter.trt.layer_listing import STORED, is_copy, layers_by_profile, listing_form, summary
from mmm_export.exporter.trt.source_modules import source_module

LOG = """Engine Layer Information:
Layers:
Name: node_matmul_myl0_1, LayerType: gemm, Inputs: [ { Name: x [profile 0], Location: Device, Dimensions: [1,-1,64], Strides: [1], \
Vec: [], Datatype: Half, Format: Row major linear FP16 format (kLINEAR) }], Constants: [ { Name: w, Dimensions: [64,8] }], \
Outputs: [ { Name: t1, Location: Device, Dimensions: [1,-1,8], Datatype: Half, Format: any }], TacticName: a
Name: scan_myl1_2, LayerType: custom_layer, Inputs: [ { Name: past.0.conv [profile 1], Dimensions: [1,8,1], Datatype: Half }], \
Outputs: [], TacticName: b
something else entirely
I/O Tensors:
x
"""


def test_a_log_is_read_by_profile() -> None:
    found = layers_by_profile("log", LOG)
    assert found[0] == [
        {"kind": "gemm", "name": "node_matmul_myl0_1", "inputs": ["x:Half[1,-1,64]"], "outputs": ["t1:Half[1,-1,8]"]}
    ]
    assert found[1][0]["inputs"] == ["past.0.conv:Half[1,8,1]"]
    assert (found[1][1]["kind"], found[1][1]["name"]) == ("unknown", "something else entirely")


def test_a_stored_listing_comes_back() -> None:
    rows = [{"kind": "gemm", "name": "a", "inputs": [], "outputs": []}]
    text = json.dumps({"form": "inspector", "profiles": {"prefill": rows, "decode": []}})
    assert layers_by_profile(STORED, text) == {0: rows, 1: []}
    assert (listing_form(STORED, text), listing_form("log", LOG)) == ("inspector", "log")


@pytest.mark.parametrize(
    ("kind", "name", "copies"),
    [
        ("kgen", "__myl_Move_myl0_12", True),
        ("Reformat", "Reformatting CopyNode for Input Tensor 0", True),
        ("kgen", "__myl_ReshAdd_myl0_3", False),
        ("gemm", "node_matmul_12", False),
    ],
)
def test_copies_are_told_from_work(kind: str, name: str, copies: bool) -> None:
    row = {"kind": kind, "name": name, "inputs": [], "outputs": []}
    assert is_copy(row) == copies
    assert summary([row]) == {"layers": 1, kind: 1, "copies": int(copies)}


@given(st.text() | st.text().map(lambda middle: f"Layers:\n{middle}\nI/O Tensors:"))
def test_any_log_is_read(text: str) -> None:
    for rows in layers_by_profile("log", text).values():
        assert all(set(row) == {"kind", "name", "inputs", "outputs"} for row in rows)


values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["Layers", "Name", "Inputs", "Dimensions", "Datatype"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(values | values.map(lambda value: {"Layers": [value]}))
def test_any_inspector_output_is_read(value: object) -> None:
    for rows in layers_by_profile("inspector", json.dumps(value)).values():
        assert all(isinstance(row["kind"], str) for row in rows)


def test_a_node_leads_to_the_nearest_module_with_weights() -> None:
    import onnx_ir as ir

    weight = ir.Value(name="llm.layers.3.mlp.w1.weight", shape=ir.Shape([4, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    weight.const_value = ir.tensor([[0.0] * 4] * 4, name=weight.name)
    x = ir.Value(name="x", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    product = ir.node("MatMul", [x, weight], name="product")
    silu = ir.node("Swish", [product.outputs[0]], name="silu")
    graph = ir.Graph([x], [silu.outputs[0]], nodes=[product, silu], initializers=[weight], opset_imports={"": 24})
    model = ir.Model(graph, ir_version=10)
    assert source_module(model, "silu") == source_module(model, "product") == "llm.layers.3.mlp.w1"
    assert source_module(model, "no such node") is None
