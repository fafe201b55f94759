"""The function bodies of MmmSelectiveScan against the float64 scan, in ONNX Runtime and in ONNX's own evaluator."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundles.plain import environment
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from mmm_export.exporter.bundle import STANDARD_OPS_ENVIRONMENT, STANDARD_OPS_OPSET
from mmm_export.exporter.scan_function import BODIES, INPUTS, OUTPUTS, scan_function
from mmm_export.model import scan
from mmm_export.onnxruntime_support import has_linear_attention

FLOAT, FLOAT16, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT32


def one_node_model(body, *, heads, kv_heads, head_dim, conv_width=2, io_type=FLOAT):
    opset = STANDARD_OPS_OPSET if body == "standard-ops" else 20
    channels = (heads + 2 * kv_heads) * head_dim
    width = channels + heads * head_dim + heads

    def info(name, kind, shape):
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    shapes = {
        "projected": (io_type, ["B", "T", width]),
        "lengths": (INT32, ["B"]),
        "conv_state": (io_type, ["B", channels, conv_width - 1]),
        "ssm_state": (FLOAT, ["B", heads, head_dim, head_dim]),
        "conv_weight": (FLOAT, [channels, conv_width]),
        "conv_bias": (FLOAT, [channels]),
        "dt_bias": (FLOAT, [heads]),
        "A_log": (FLOAT, [heads]),
        "norm_weight": (FLOAT, [head_dim]),
        "y": (io_type, ["B", "T", heads * head_dim]),
        "conv_state_out": (io_type, ["B", channels, conv_width - 1]),
        "ssm_state_out": (FLOAT, ["B", heads, head_dim, head_dim]),
    }
    attributes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "state_dim": head_dim}
    node = onnx.helper.make_node(
        "MmmSelectiveScan", INPUTS, OUTPUTS, domain="mmm", eps=1e-5, plugin_version="1", **attributes
    )
    graph = onnx.helper.make_graph(
        [node], "scan", [info(n, *shapes[n]) for n in INPUTS], [info(n, *shapes[n]) for n in OUTPUTS]
    )
    opsets = [onnx.helper.make_opsetid(*pair) for pair in (("", opset), ("mmm", 1), ("com.microsoft", 1))]
    function = scan_function(body, conv_width=conv_width, opset=opset)
    return onnx.helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def feeds_of(model, batch, tokens, lengths, seed=0):
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        sizes = {"B": batch, "T": tokens}
        shape = [sizes.get(d.dim_param, d.dim_value) for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    feeds["lengths"] = np.array(lengths, np.int32)
    feeds["dt_bias"] -= 6  # delta near 0.002, as in a seeded model: where a careless softplus loses its digits
    feeds["projected"][np.arange(tokens) >= feeds["lengths"][:, None]] = np.nan
    return feeds


def wanted_of(feeds, sizes):
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    weights = scan.ScanWeights(*(tensors[name] for name in INPUTS[4:]))
    states = (tensors["conv_state"].double(), tensors["ssm_state"].double())
    outputs = scan.sequential(tensors["projected"].double(), tensors["lengths"], *states, weights, sizes)
    return [output.numpy() for output in outputs]


def relative_l2(found, wanted):
    return np.linalg.norm(found.astype(np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-30)


@pytest.fixture(scope="module")
def sessions():
    made = {}

    def make(body, **sizes):
        if body != "standard" and not has_linear_attention():
            pytest.skip("this ONNX Runtime is older than its LinearAttention (1.26)")
        key = (body, *sorted(sizes.items()))
        if key not in made:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            model = one_node_model(body, **sizes)
            onnx.checker.check_model(model)
            with environment(STANDARD_OPS_ENVIRONMENT if body == "standard-ops" else {}):
                session = onnxruntime.InferenceSession(
                    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            made[key] = (model, session)
        return made[key]

    return make


SIZES = ({"heads": 6, "kv_heads": 3, "head_dim": 16}, {"heads": 4, "kv_heads": 1, "head_dim": 32, "conv_width": 4})


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("size", SIZES, ids=["six heads over three", "one kv head, wide conv"])
@settings(max_examples=12, deadline=None)
@given(tokens=st.sampled_from([1, 2, 7, 63, 64, 65, 130, 200]), data=st.data())
def test_body_equals_the_float64_scan_whatever_the_padding_holds(sessions, body, size, tokens, data):
    model, session = sessions(body, **size)
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=1, max_size=3))
    feeds = feeds_of(model, len(lengths), tokens, lengths, seed=tokens)
    found = session.run(None, feeds)
    wanted = wanted_of(feeds, scan.ScanSizes(size["heads"], size["kv_heads"], *[size["head_dim"]] * 2, 1e-5))
    valid = np.arange(tokens) < np.array(lengths)[:, None]
    assert np.isfinite(found[0]).all()
    # float32 sums of up to 200 tokens: measured 2e-7, bounded by about fifty roundings of 6e-8.
    assert relative_l2(found[0][valid], wanted[0][valid]) < 3e-6
    assert np.array_equal(found[1], wanted[1])
    assert relative_l2(found[2], wanted[2]) < 3e-6


@pytest.mark.parametrize("body", BODIES)
def test_float16_body_keeps_the_state_in_float32(sessions, body):
    size = SIZES[0]
    model, session = sessions(body, **size, io_type=FLOAT16)
    feeds = feeds_of(model, 2, 100, [100, 40])
    found = session.run(None, feeds)
    wanted = wanted_of(feeds, scan.ScanSizes(6, 3, 16, 16, 1e-5))
    assert found[0].dtype == np.float16
    assert found[2].dtype == np.float32
    assert relative_l2(found[2], wanted[2]) < 3e-6  # the rows are exact float16 numbers, all after them is float32


def test_standard_body_runs_where_there_are_only_standard_operators():
    model = one_node_model("standard", **SIZES[0])
    assert {f.domain for f in model.functions} == {"mmm"}
    assert {node.domain for node in model.functions[0].node} == {""}
    for tokens in (1, 70):
        feeds = feeds_of(model, 1, tokens, [tokens])
        y, _, ssm = ReferenceEvaluator(model).run(None, feeds)
        wanted = wanted_of(feeds, scan.ScanSizes(6, 3, 16, 16, 1e-5))
        assert relative_l2(y, wanted[0]) < 3e-6
        assert relative_l2(ssm, wanted[2]) < 3e-6


def test_small_delta_keeps_its_digits(sessions):
    """log(1 + e) rounds e to a multiple of 1.2e-7: at delta 1e-6 that is an error of ten percent."""
    model, session = sessions("linear-attention", **SIZES[0])
    feeds = feeds_of(model, 1, 1, [1])
    feeds["dt_bias"][:] = -13.8
    feeds["projected"][..., -6:] = 0
    feeds["ssm_state"][:] = 0
    wanted = wanted_of(feeds, scan.ScanSizes(6, 3, 16, 16, 1e-5))
    found = session.run(None, feeds)
    assert relative_l2(found[2], wanted[2]) < 1e-6  # a handful of float32 roundings
