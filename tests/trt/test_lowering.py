"""A lowered graph computes what the bundle computes, in the operators of its target, with the same inputs and outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from oracle import relative_error

from mmm_export import names
from mmm_export.engine_manifest import FLAVORS
from mmm_export.errors import EngineError
from mmm_export.exporter.trt.operators import NATIVE, PLAIN, Operators, operators_of, parse_version
from mmm_export.manifest import read_manifest
from trt import lowered

# Products and sums in another order, and a root of another spelling: measured 3e-7 at most.
FP32 = 1e-5
# Every operator rounds to 11 bits, and Attention rounds its scores, which the bundle keeps in float32: measured 2e-3.
FP16 = 1e-2

SPELLINGS = {
    "TensorRT 10.3": operators_of("tensorrt", (10, 3), "fp16"),
    "TensorRT 10.16": operators_of("tensorrt", (10, 16), "fp16"),
    "TensorRT 11.4": operators_of("tensorrt", (11, 4), "bf16"),
    "TensorRT-RTX": operators_of("tensorrt-rtx", (1, 7), "fp16"),
}
HEAD_BYTES = 1 << 14  # cuts the head of the tiny models, 64 x 512, into several parts


@pytest.fixture(scope="module")
def bundle(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]) -> Callable[[str, str], Path]:
    return lambda kind, dtype: make_bundle(make_checkpoint(kind), dtype=dtype)


def test_each_version_gets_the_operators_that_it_has() -> None:
    assert SPELLINGS["TensorRT 10.3"] == operators_of("tensorrt", (10, 14, 9), "fp32") == PLAIN
    assert SPELLINGS["TensorRT 10.16"] == dataclasses.replace(NATIVE, swish=False)
    assert SPELLINGS["TensorRT 11.4"] == SPELLINGS["TensorRT-RTX"] == NATIVE
    for flavor in FLAVORS:
        wide = operators_of(flavor, (11, 4), "fp32")
        assert wide == dataclasses.replace(NATIVE, cached_attention=False)
    assert (PLAIN.opset, NATIVE.opset) == (20, 24)
    assert parse_version("10.3.0.30") == (10, 3, 0, 30)
    assert parse_version("11.4.0rc1") == (11, 4)


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "TensorRT-RTX"])  # equal to 11.4
def test_operators_are_those_of_the_target(
    bundle: Callable[[str, str], Path], tmp_path: Path, kind: str, spelling: str
) -> None:
    operators = SPELLINGS[spelling]
    made = lowered.lower(bundle(kind, "fp16"), tmp_path, operators)
    counts = lowered.operator_counts(made.path)
    spec = read_manifest(bundle(kind, "fp16")).model
    norms, attention = 2 * spec.layers + 1, len(spec.attention_layers)
    assert counts.get("RMSNormalization", 0) == (norms if operators.rms_norm else 0)
    assert counts.get("ReduceMean", 0) == (0 if operators.rms_norm else norms)
    assert counts.get("Swish", 0) == (spec.layers if operators.swish else 0)
    assert counts.get("Sigmoid", 0) == (0 if operators.swish else spec.layers)
    assert counts.get("RotaryEmbedding", 0) == (2 * attention if operators.rotary else 0)
    assert counts.get("Attention", 0) == (attention if operators.cached_attention else 0)
    assert counts.get("TensorScatter", 0) == (2 * attention if operators.cached_attention else 0)
    assert "ScatterElements" not in counts
    assert counts.get(names.OP_NAME, 0) == len(spec.mamba_layers)
    model = onnx.load(made.path, load_external_data=False)
    assert not model.functions
    assert {o.domain: o.version for o in model.opset_import if o.domain == ""} == {"": operators.opset}
    written = {f"present.{i}.{part}" for i in spec.attention_layers for part in ("key", "value")}
    assert set(made.in_place) == (written if operators.cached_attention else set())


@pytest.mark.parametrize("name", [names.DECODER_FILE, names.VISION_FILE])
@pytest.mark.parametrize("operators", [PLAIN, NATIVE], ids=["plain", "native"])
def test_inputs_and_outputs_stay(
    bundle: Callable[[str, str], Path], tmp_path: Path, name: str, operators: Operators
) -> None:
    folder = bundle("hybrid", "fp16")
    made = lowered.lower(folder, tmp_path, operators, name=name, max_alloc=HEAD_BYTES)
    before, after = (onnx.load(path, load_external_data=False).graph for path in (folder / name, made.path))
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "TensorRT-RTX"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("hybrid", "fp32"),
        ("hybrid", "fp16"),
        pytest.param("linear", "fp32", marks=pytest.mark.slow),
        pytest.param("teacher", "fp32", marks=pytest.mark.slow),
        pytest.param("linear", "fp16", marks=pytest.mark.slow),
    ],
)
def test_a_lowered_decoder_equals_the_bundle(
    bundle: Callable[[str, str], Path], tmp_path: Path, kind: str, dtype: str, spelling: str
) -> None:
    folder = bundle(kind, dtype)
    operators = SPELLINGS[spelling]
    made = lowered.lower(folder, tmp_path / "lowered", operators, max_alloc=HEAD_BYTES)
    assert made.head_parts > 1
    check_equality(lowered.session(made.path), folder, FP32 if dtype == "fp32" else FP16)


def check_equality(opened: object, folder: Path, tolerance: float) -> None:
    """A padded prefill of three rows, one of them empty, then more tokens and a step."""
    wanted_session = lowered.plain_session(folder)
    spec = read_manifest(folder).model
    rng = np.random.default_rng(0)
    states = [lowered.empty_states(folder / names.DECODER_FILE, 3) for _ in range(2)]
    past = np.zeros(3, np.int32)
    for tokens, lengths in ((9, [9, 4, 0]), (5, [2, 5, 5]), (1, [1, 1, 1])):
        embeds = rng.standard_normal((3, tokens, spec.hidden_size)) * 0.3
        feeds = {"lengths": np.array(lengths, np.int32)}
        if spec.attention_layers:
            feeds["past_lengths"] = past
        found, wanted = (
            lowered.run(s, {**feeds, "inputs_embeds": embeds.astype(lowered.input_type(s)), **state})
            for s, state in zip((opened, wanted_session), states, strict=True)
        )
        past = past + np.array(lengths, np.int32)
        rows = [row for row, length in enumerate(lengths) if length]
        assert relative_error(found["logits"][rows], wanted["logits"][rows]) < tolerance
        for name in (name for name in wanted if name.startswith("present")):
            if name.endswith((".key", ".value")):
                for row, end in enumerate(past):
                    assert relative_error(found[name][row, :, :end], wanted[name][row, :, :end]) < tolerance
            else:
                assert relative_error(found[name], wanted[name]) < tolerance
        states = [lowered.next_states(outputs) for outputs in (found, wanted)]


def test_the_plain_form_lets_no_padding_into_a_cache(bundle: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = bundle("hybrid", "fp32")
    opened = lowered.session(lowered.lower(folder, tmp_path, PLAIN).path)
    spec = read_manifest(folder).model
    embeds = np.full((2, 4, spec.hidden_size), np.nan, np.float32)
    embeds[0, :3] = 0.1
    before = {n: v + 7 for n, v in lowered.empty_states(folder / names.DECODER_FILE, 2).items()}
    feeds = {"inputs_embeds": embeds, "lengths": np.array([3, 0], np.int32), "past_lengths": np.array([5, 6], np.int32)}
    after = lowered.run(opened, {**feeds, **before})
    layer = spec.attention_layers[0]
    for part in ("key", "value"):
        cache = after[f"present.{layer}.{part}"]
        assert np.all(cache[1] == 7)
        assert np.all(cache[0, :, :5] == 7)
        assert np.all(cache[0, :, 8:] == 7)
        assert not np.any(cache[0, :, 5:8] == 7)


def test_a_graph_of_another_form_is_refused_with_a_way_out(
    bundle: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    lowered.copy(bundle("hybrid", "fp16"), folder)
    model = onnx.load(folder / names.DECODER_FILE, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "ScatterElements":
            node.op_type = "ScatterSomething"
    onnx.save(model, folder / names.DECODER_FILE)
    with pytest.raises(EngineError, match="cannot be lowered") as caught:
        lowered.lower(folder, tmp_path / "lowered", NATIVE)
    assert "is not written as the export writes it" in str(caught.value.found)


@pytest.mark.parametrize(("option", "flag"), [("standard_ops", "--standard-ops"), ("fuse", "--fuse")])
def test_a_bundle_of_other_operators_is_refused(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path: Path, option: str, flag: str
) -> None:
    folder = make_bundle(make_checkpoint("linear"), **{option: True})
    with pytest.raises(EngineError, match="cannot become an engine") as caught:
        lowered.lower(folder, tmp_path, NATIVE)
    assert f"without {flag}" in str(caught.value.hint)
