"""The operator library for ONNX Runtime, on the CPU: it computes the oracle's numbers, and refuses in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from bundles.operator_library import operator_library
from bundles.scan_node import (
    EPS,
    TYPES,
    WEIGHTS,
    Feeds,
    Sizes,
    draw,
    node_model,
    node_session,
    ort_value,
    run_node,
    wanted,
)
from oracle.compare import relative_l2

from mmm_export.exporter.scan_function import ATTRIBUTES, INPUTS, OUTPUTS, scan_function
from mmm_export.onnxruntime_support import best_body

# y is computed in float32 and rounded once: half a unit in the last place, 2**-(p+1) for a mantissa of p bits, is the most
# that one element can be off, and so the whole vector. float32 sums some hundred products instead: 1e-6 is 16 units.
Y_BOUND = {"fp32": 1e-6, "fp16": 2.0**-11, "bf16": 2.0**-8}
STATE_BOUND = 1e-6  # float32 in every case, computed from the same rounded inputs as the oracle's

ODD = Sizes(heads=6, kv_heads=2, head_dim=48, state_dim=32, conv_width=4)


@pytest.fixture(scope="module")
def library() -> Path:
    return operator_library()


def assert_close(found: Feeds, right: Feeds, dtype: str) -> None:
    assert relative_l2(found["y"], right["y"]) <= Y_BOUND[dtype]
    assert relative_l2(found["ssm_state_out"], right["ssm_state_out"]) <= STATE_BOUND
    assert np.array_equal(found["conv_state_out"].astype(np.float64), right["conv_state_out"])  # inputs, passed on


def poisoned_body(opset: int) -> onnx.FunctionProto:
    """A body of the operator's signature that gives zeros."""
    lines = [
        "zero = Constant <value_float = 0.0> ()",
        "zero_io = CastLike (zero, projected)",
        "y = Mul (projected, zero_io)",
        "conv_state_out = Mul (conv_state, zero_io)",
        "ssm_state_out = Mul (ssm_state, zero)",
    ]
    signature = f"({', '.join(INPUTS)}) => ({', '.join(OUTPUTS)})"
    head = f'<domain: "mmm", opset_import: ["" : {opset}]> MmmSelectiveScan <{", ".join(ATTRIBUTES)}>'
    return onnx.parser.parse_function(f"{head} {signature} {{{' '.join(lines)}}}")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", [Sizes(), ODD], ids=["16x16", "48x32"])
@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [(0, [0]), (1, [1]), (1, [1, 0]), (65, [65, 12]), (7, [0, 7, 3]), (3, [3] * 8)],
    ids=["T0", "T1", "T1-one-empty", "T65", "T7-ragged", "batch8"],
)
def test_outputs_are_those_of_float64(library: Path, dtype: str, sizes: Sizes, tokens: int, lengths: list[int]) -> None:
    feeds = draw(sizes, lengths, tokens, dtype)
    assert_close(run_node(node_session(node_model(sizes, dtype), library), feeds), wanted(sizes, feeds), dtype)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("tokens", [1, 65])
def test_library_and_function_body_agree(library: Path, dtype: str, tokens: int) -> None:
    sizes = Sizes()
    body = scan_function(best_body(), conv_width=sizes.conv_width, opset=20)
    model = node_model(sizes, dtype, functions=[body])
    feeds = draw(sizes, [tokens, tokens // 2], tokens, dtype)
    ours, theirs = (run_node(node_session(model, chosen), feeds) for chosen in (library, None))
    # Both are within one bound of the truth, so within two of each other.
    assert relative_l2(ours["y"], theirs["y"].astype(np.float64)) <= 2 * Y_BOUND[dtype]
    assert relative_l2(ours["ssm_state_out"], theirs["ssm_state_out"]) <= 2 * STATE_BOUND


def test_a_registered_kernel_is_used_instead_of_the_body(library: Path) -> None:
    sizes = Sizes()
    model = node_model(sizes, functions=[poisoned_body(20)])
    feeds = draw(sizes, [5], 5)
    assert_close(run_node(node_session(model, library), feeds), wanted(sizes, feeds), "fp32")


def test_constant_weights_give_what_fed_weights_give(library: Path) -> None:
    feeds = draw(ODD, [5], 5)
    constant = node_model(ODD, weights={name: feeds[name] for name in WEIGHTS})
    one, other = (run_node(node_session(model, library), feeds) for model in (constant, node_model(ODD)))
    assert all(np.array_equal(one[name], other[name]) for name in OUTPUTS)


def test_the_number_of_threads_does_not_change_a_bit(library: Path) -> None:
    feeds = draw(ODD, [33, 20, 1], 33)
    runs = [run_node(node_session(node_model(ODD), library, threads=n), feeds) for n in (1, 2, 5)]
    assert all(np.array_equal(runs[0][name], other[name]) for other in runs[1:] for name in OUTPUTS)


def test_many_threads_can_run_one_session(library: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    session = node_session(node_model(ODD), library)
    cases = [draw(ODD, [tokens], tokens, seed=tokens) for tokens in range(1, 9)]
    alone = [run_node(session, feeds) for feeds in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda feeds: run_node(session, feeds), cases * 4))
    for i, found in enumerate(together):
        assert np.array_equal(found["y"], alone[i % len(cases)]["y"])


def test_two_short_prefills_equal_one_long_prefill(library: Path) -> None:
    feeds = draw(ODD, [9], 9)
    session = node_session(node_model(ODD), library)
    whole = run_node(session, feeds)
    first = run_node(
        session, {**feeds, "projected": feeds["projected"][:, :4].copy(), "lengths": np.array([4], np.int32)}
    )
    states = {"conv_state": first["conv_state_out"], "ssm_state": first["ssm_state_out"]}
    rest = {**feeds, **states, "projected": feeds["projected"][:, 4:].copy(), "lengths": np.array([5], np.int32)}
    second = run_node(session, rest)
    # Token by token in both cases: the same operations in the same order.
    assert np.array_equal(second["ssm_state_out"], whole["ssm_state_out"])
    assert np.array_equal(np.concatenate([first["y"], second["y"]], 1), whole["y"])


def bind_in_place(session: onnxruntime.InferenceSession, feeds: Feeds, state: str) -> None:
    """Run with one buffer bound to a state before and after."""
    binding = session.io_binding()
    values = {name: ort_value(value) for name, value in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in OUTPUTS:
        if name == f"{state}_out":
            binding.bind_ortvalue_output(name, values[state])
        else:
            binding.bind_output(name)
    session.run_with_iobinding(binding)


def test_the_ssm_state_can_be_updated_in_place(library: Path) -> None:
    feeds = draw(ODD, [6, 2], 6)
    right = wanted(ODD, feeds)
    bind_in_place(node_session(node_model(ODD), library), feeds, "ssm_state")
    assert relative_l2(feeds["ssm_state"], right["ssm_state_out"]) <= STATE_BOUND


def test_a_conv_state_bound_in_place_is_refused(library: Path) -> None:
    with pytest.raises(Exception, match=r"MmmSelectiveScan: conv_state_out.* conv_state"):
        bind_in_place(node_session(node_model(ODD), library), draw(ODD, [6], 6), "conv_state")


def changed(name: str, value: Any) -> Any:
    """An edit of the node: an attribute replaced, or removed for None."""

    def edit(node: onnx.NodeProto) -> None:
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(onnx.helper.make_attribute(name, value))

    return edit


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("plugin_version", "2", 'plugin_version "2" and this library computes "1"'),
        ("plugin_version", "", 'plugin_version "" and this library computes "1"'),
        ("plugin_version", 1, "attribute plugin_version is missing or of another type"),
        *((name, None, f"attribute {name} is missing or of another type") for name in ATTRIBUTES),
        ("heads", 0, "attribute heads is 0"),
        ("heads", -3, "attribute heads is -3"),
        ("heads", 2**40, "attribute heads is 1099511627776"),
        ("heads", 5, "heads is 5; wanted a multiple of kv_heads"),
        ("head_dim", 24, "head_dim 24 has no kernel; built for 16, 32"),
        ("state_dim", 512, "state_dim 512 has no kernel; built for 16, 32"),
        ("eps", -EPS, "eps is"),
        ("eps", float("nan"), "eps is"),
    ],
)
def test_a_wrong_attribute_is_told_when_the_graph_is_loaded(
    library: Path, attribute: str, value: Any, said: str
) -> None:
    with pytest.raises(Exception, match="MmmSelectiveScan") as caught:
        node_session(node_model(Sizes(), edit=changed(attribute, value)), library)
    assert said in str(caught.value)


def without_shapes(model: bytes) -> bytes:
    """The same model with no shape declared, so that ONNX Runtime itself lets any through."""
    parsed = onnx.ModelProto.FromString(model)
    for value in (*parsed.graph.input, *parsed.graph.output):
        value.type.tensor_type.ClearField("shape")
    return bytes(parsed.SerializeToString())


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("change", ["longer", "another rank"])
def test_a_wrong_shape_is_told_with_the_right_one(library: Path, name: str, change: str) -> None:
    sizes = Sizes()
    feeds = draw(sizes, [4], 4)
    value = feeds[name]
    axis = 0 if name == "conv_weight" else -1  # its last axis is what conv_state is measured by
    feeds[name] = np.concatenate([value, value], axis) if change == "longer" else value[None]
    session = node_session(without_shapes(node_model(sizes)), library)
    with pytest.raises(Exception, match=rf"MmmSelectiveScan: {name} has shape \(.*\); wanted \("):
        session.run(None, feeds)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_wrong_constant_is_told_when_the_graph_is_loaded(library: Path, name: str) -> None:
    sizes = Sizes()
    feeds = draw(sizes, [4], 4)
    weights = {weight: feeds[weight] for weight in WEIGHTS}
    weights[name] = np.concatenate([weights[name]] * 2, 0)
    with pytest.raises(Exception, match=rf"MmmSelectiveScan: {name} has shape \(.*\); wanted \("):
        node_session(node_model(sizes, weights=weights), library)


def test_inputs_without_declared_shapes_are_run(library: Path) -> None:
    sizes = Sizes()
    feeds = draw(sizes, [4], 4)
    outputs = node_session(without_shapes(node_model(sizes)), library).run(None, feeds)
    assert_close(dict(zip(OUTPUTS, outputs, strict=True)), wanted(sizes, feeds), "fp32")


def test_shapes_of_outputs_are_inferred(library: Path) -> None:
    parsed = onnx.ModelProto.FromString(node_model(ODD, "fp16"))
    for value in parsed.graph.output:
        value.ClearField("type")
    session = node_session(parsed.SerializeToString(), library)
    shapes = ODD.shapes("B", "T")
    found = {node.name: (node.type, node.shape) for node in session.get_outputs()}
    types = {"y": "tensor(float16)", "conv_state_out": "tensor(float16)", "ssm_state_out": "tensor(float)"}
    assert found == {name: (types[name], shapes[name]) for name in OUTPUTS}


def test_mixed_types_are_refused_when_the_graph_is_loaded(library: Path) -> None:
    parsed = onnx.ModelProto.FromString(node_model(Sizes()))
    parsed.graph.input[2].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(Exception, match="MmmSelectiveScan"):
        node_session(parsed.SerializeToString(), library)
