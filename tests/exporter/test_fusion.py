"""Fused bundles: every product is one node, and what they compute is what the plain bundle computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles.operator_library import operator_library
from oracle.compare import relative_error

from mmm_export import names
from mmm_export.errors import BundleError, OptionError
from mmm_export.exporter.bundle import ExportOptions
from mmm_export.exporter.verify import VerifyOptions, verify_bundle
from mmm_export.manifest import check_files, read_manifest
from mmm_export.operator_library import CUDA_PROVIDER
from mmm_export.runtime import Session
from mmm_export.runtime.graph_loading import check_requirements

KINDS = pytest.mark.parametrize("kind", ["linear", "hybrid"])


@pytest.fixture(scope="module")
def library() -> Path:
    return operator_library()


def logits_of(bundle: Path, kernels: Any) -> list[Any]:
    with Session.open(bundle, kernels=kernels, chunk_tokens=16) as session:
        ids = np.random.default_rng(0).integers(3, 300, 23)
        return [session.prefill(ids), session.step(5), session.step(6)]


def nodes_of(bundle: Path) -> Counter[str]:
    model = onnx.load(bundle / names.DECODER_FILE, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    with_weight = [node for node in model.graph.node if node.op_type != "MatMul" or node.input[1] in weights]
    return Counter(node.op_type for node in with_weight)


@KINDS
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_fused_bundle_gives_the_logits_of_the_plain_one(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], library: Path, kind: str, dtype: str
) -> None:
    plain = make_bundle(make_checkpoint(kind), dtype=dtype, max_tokens=64)
    fused = make_bundle(make_checkpoint(kind), dtype=dtype, max_tokens=64, fuse=True)
    # Sums in another order in each of some 17 products, which the layers behind carry on. In fp16 the fused node also rounds less:
    # SiLU, product and residual stay float32 inside, where the plain graph rounds each to a unit of 2**-11.
    bound = {"fp32": 1e-5, "fp16": 6 * 2.0**-11}[dtype]
    for found, wanted in zip(logits_of(fused, library), logits_of(plain, "none"), strict=True):
        assert relative_error(found, wanted) <= bound


@KINDS
def test_every_product_with_a_weight_is_one_node_with_its_norm_and_addition(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], kind: str
) -> None:
    plain, fused = (make_bundle(make_checkpoint(kind), max_tokens=64, fuse=fuse) for fuse in (False, True))
    layers = read_manifest(plain).model.layers
    before, after = nodes_of(plain), nodes_of(fused)
    assert before["MatMul"] == 5 * layers + 1
    assert after["MatMul"] == 0
    assert after[names.LINEAR_OP] == 4 * layers + 1
    assert after["Pow"] == after["Reciprocal"] == after["Sigmoid"] == 0
    assert before["Pow"] == 2 * layers + 1


def test_scans_of_a_fused_bundle_may_read_their_states_early(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> None:
    bundle = make_bundle(make_checkpoint("linear"), max_tokens=64, fuse=True)
    graph = onnx.load(bundle / names.DECODER_FILE, load_external_data=False).graph
    scans = [node for node in graph.node if node.op_type == names.OP_NAME]
    given = {value.name for value in graph.input}
    assert scans
    for scan in scans:
        # The promise is kept: what it reads early comes from outside, so no node before it writes that.
        assert [a.i for a in scan.attribute if a.name == "overlap"] == [1]
        assert set(scan.input[2:4]) <= given


def test_the_weights_are_written_once_and_the_manifest_tells(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> None:
    plain, fused = (make_bundle(make_checkpoint("linear"), max_tokens=64, fuse=fuse) for fuse in (False, True))
    manifest = read_manifest(fused)
    assert manifest.needs_kernels
    assert not read_manifest(plain).needs_kernels
    check_files(fused, manifest, content=True)
    assert {path.name for path in fused.iterdir()} == {path.name for path in plain.iterdir()}
    sizes = [(folder / f"{names.DECODER_FILE}.data").stat().st_size for folder in (plain, fused)]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]  # only the padding differs


def test_verification_passes_for_a_fused_bundle(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], library: Path
) -> None:
    fused = make_bundle(make_checkpoint("hybrid"), max_tokens=512, fuse=True)
    report = verify_bundle(fused, make_checkpoint("hybrid"), VerifyOptions(new_tokens=3, kernels=str(library)))
    assert report.passed


def test_a_fused_bundle_is_refused_where_nothing_computes_it(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], library: Path
) -> None:
    fused = make_bundle(make_checkpoint("linear"), max_tokens=64, fuse=True)
    with pytest.raises(BundleError, match="only our kernel library computes"):
        Session.open(fused, kernels="none")
    with pytest.raises(BundleError, match="no kernel on a GPU"):
        check_requirements(fused, read_manifest(fused), [CUDA_PROVIDER], library)


def test_fusing_and_avoiding_our_operators_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        ExportOptions(fuse=True, standard_ops=True)
