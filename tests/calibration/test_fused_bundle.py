"""Quantized bundles for our kernels on a GPU: every product is one node with integers, and computes what plain Q/DQ computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles.operator_library import operator_library
from calibration_data.bundles import calibrated
from oracle.compare import relative_error

from mmm_export import names
from mmm_export.calibration.plan import QuantizeOptions
from mmm_export.calibration.quantize import quantize_bundle
from mmm_export.errors import BundleError, OptionError
from mmm_export.manifest import check_files, read_manifest
from mmm_export.model.testing import tiny_spec
from mmm_export.runtime import Session

PLAIN, INT8, INT4 = 0, 1, 2  # the attribute weight_format
FORMS = pytest.mark.parametrize("form", ["int8-weights", "int4"])


@pytest.fixture(scope="module", params=["linear", pytest.param("hybrid", marks=pytest.mark.slow)])
def bundle(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> Path:
    """Wide enough for groups of 128."""
    spec = tiny_spec(kinds=request.param, heads=4, head_dim=32)
    return make_bundle(make_checkpoint(spec), dtype="fp16", max_tokens=256)


@pytest.fixture(scope="module")
def quantized(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], Path]:
    made: dict[tuple[str, Any], Path] = {}

    def make(form: Any, consumer: Any) -> Path:
        if (form, consumer) not in made:
            folder = tmp_path_factory.mktemp("quantized") / "bundle"
            options = QuantizeOptions(form, consumer=consumer, head="int8")
            quantize_bundle(bundle, calibrated(bundle, tmp_path_factory), folder, options)
            made[form, consumer] = folder
        return made[form, consumer]

    return make


def logits_of(folder: Path, kernels: Any) -> list[Any]:
    with Session.open(folder, kernels=kernels, chunk_tokens=16, threads=1) as session:
        ids = np.random.default_rng(0).integers(3, 300, 23)
        return [session.prefill(ids), session.step(5), session.step(6)]


def products(folder: Path) -> list[Any]:
    graph = onnx.load(folder / names.DECODER_FILE, load_external_data=False).graph
    return [node for node in graph.node if node.op_type == names.LINEAR_OP]


def attribute(node: Any, name: str) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), 0)


@FORMS
def test_a_fused_bundle_gives_the_logits_of_the_reference_form(
    quantized: Callable[[str, Any], Path], form: str
) -> None:
    fused = logits_of(quantized(form, "onnxruntime-cuda"), operator_library())
    # The weights are the same numbers. In the reference form each is rounded to fp16 when it is read, SiLU, product and residual too,
    # at half a unit of 2**-11 each, and the layers behind carry that on; as for fused plain weights.
    for found, wanted in zip(fused, logits_of(quantized(form, "reference"), "none"), strict=True):
        assert relative_error(found, wanted) <= 8 * 2.0**-11


@FORMS
def test_every_product_has_integers_and_delta_rows_are_kept(quantized: Callable[[str, Any], Path], form: str) -> None:
    folder = quantized(form, "onnxruntime-cuda")
    spec = read_manifest(folder).model
    found = products(folder)
    mamba = spec.layers - len(spec.attention_layers)
    assert Counter(attribute(node, "weight_format") for node in found) == (
        {INT8: 4 * spec.layers + 1} if form == "int8-weights" else {INT4: 4 * spec.layers, INT8: 1}
    )
    assert sum(attribute(node, "keeps_rows") for node in found) == mamba
    graph = onnx.load(folder / names.DECODER_FILE, load_external_data=False).graph
    kept = {node.input[-1] for node in found if attribute(node, "keeps_rows")}
    assert {tuple(t.dims) for t in graph.initializer if t.name in kept} == {(spec.heads, spec.hidden_size)}
    assert not [node.op_type for node in graph.node if node.op_type in ("DequantizeLinear", "MatMulNBits")]


def test_the_manifest_says_that_it_needs_the_library(quantized: Callable[[str, Any], Path]) -> None:
    folder = quantized("int4", "onnxruntime-cuda")
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert manifest.needs_kernels
    assert manifest.quantization is not None
    assert manifest.quantization.consumer == "onnxruntime-cuda"
    with pytest.raises(BundleError, match="operators that only our kernel library computes"):
        Session.open(folder, kernels="none")


def test_int4_takes_int8_where_no_group_of_128_fits(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path: Path, tmp_path_factory: Any
) -> None:
    bundle = make_bundle(make_checkpoint("linear"), dtype="fp16", max_tokens=64)  # hidden 64, intermediate 128
    options = QuantizeOptions("int4", consumer="onnxruntime-cuda", head="int8")
    quantize_bundle(bundle, calibrated(bundle, tmp_path_factory), tmp_path / "out", options)
    layers = read_manifest(bundle).model.layers
    assert Counter(attribute(node, "weight_format") for node in products(tmp_path / "out")) == {
        INT4: layers,
        INT8: 3 * layers + 1,
    }


def test_fp32_and_fused_bundles_and_other_formats_are_refused(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    options = QuantizeOptions("int4", consumer="onnxruntime-cuda")
    for given, error, text in (
        ({"dtype": "fp32"}, OptionError, "fp32 model, whose products have no kernel on a GPU"),
        ({"dtype": "fp16", "fuse": True}, BundleError, "was exported with --fuse"),
    ):
        bundle = make_bundle(make_checkpoint("linear"), max_tokens=64, **given)
        with pytest.raises(error, match=text):
            quantize_bundle(bundle, tmp_path / "calibration.json", tmp_path / "out", options)
    with pytest.raises(OptionError, match="our kernels on a GPU have integer weights alone"):
        QuantizeOptions("int8", consumer="onnxruntime-cuda")
