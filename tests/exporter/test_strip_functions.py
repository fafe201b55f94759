"""Taking the function body away leaves the node, and nothing that only the body needed."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from bundles.scan_node import Sizes, node_model

from mmm_export.exporter.scan_function import Body, scan_function
from mmm_export.exporter.strip_functions import strip_functions


def scan_model(body: Body) -> ir.Model:
    model = onnx.load_from_string(node_model(Sizes(), functions=[scan_function(body, conv_width=2, opset=20)]))
    return ir.serde.deserialize_model(model)


@pytest.mark.parametrize("body", ["linear-attention", "standard"])
def test_a_body_and_its_imports_go_and_the_node_stays(body: Body) -> None:
    model = scan_model(body)
    before = [str(node) for node in model.graph]
    assert strip_functions(model)
    assert not model.functions
    assert [str(node) for node in model.graph] == before
    assert sorted(model.opset_imports) == ["", "mmm"]
    onnx.checker.check_model(ir.serde.serialize_model(model))


def test_a_model_without_a_body_is_left_as_it_is() -> None:
    model = scan_model("standard")
    strip_functions(model)
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    assert not strip_functions(model)
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def test_functions_of_others_stay_with_the_domains_that_they_use() -> None:
    model = scan_model("linear-attention")
    foreign = scan_function("linear-attention", conv_width=2, opset=20)
    foreign.domain = "other"
    function = ir.serde.deserialize_function(foreign)
    model.functions[function.identifier()] = function
    model.opset_imports["other"] = 1
    assert strip_functions(model)
    assert [identifier[0] for identifier in model.functions] == ["other"]
    assert "com.microsoft" in model.opset_imports
