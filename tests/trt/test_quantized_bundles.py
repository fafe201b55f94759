"""Quantized bundles through the real command: engines of every format with TensorRT-RTX, and refusals before anything is built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from calibration_data.bundles import calibrated
from click.testing import CliRunner

from mmm_export.calibration.plan import QuantizeOptions
from mmm_export.calibration.quantize import quantize_bundle
from mmm_export.cli import cli
from mmm_export.engine_manifest import read_engine_manifest
from mmm_export.errors import EngineError
from mmm_export.exporter.trt.operators import PLAIN
from mmm_export.exporter.trt.planning import EngineOptions, plan_engine
from mmm_export.inspection import read_layers
from mmm_export.manifest import QUANTIZED_FORMATS, Consumer, QuantizedFormat
from trt import lowered
from trt.test_rtx_builds import build_command

# What a target has: SM 8.7 and 8.0 no FP8; TensorRT no INT8 weights alone.
REFUSED = {
    ("fp8", "orin-jp62"): "no FP8 arithmetic",
    ("fp8", "orin-jp72"): "no FP8 arithmetic",
    ("fp8", "datacenter"): "no FP8 arithmetic",  # of which the A100 is one; see the capabilities below
    ("fp8", "rtx"): "no FP8 arithmetic",
    ("int8-weights", "orin-jp62"): "store them in 16 bits",
    ("int8-weights", "orin-jp72"): "store them in 16 bits",
    ("int8-weights", "thor"): "store them in 16 bits",
    ("int8-weights", "datacenter"): "store them in 16 bits",
}
TARGETS = ("orin-jp62", "orin-jp72", "thor", "datacenter", "rtx")


@pytest.fixture(scope="module")
def quantized(
    tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[QuantizedFormat, Consumer], Path]:
    """The tiny fp16 model in a format and form, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(form: QuantizedFormat, consumer: Consumer) -> Path:
        if (form, consumer) not in made:
            # A copy: other tests' engine folders share the data of the bundle itself by hard links, which onnx-ir refuses to read.
            bundle = tmp_path_factory.mktemp("source") / "bundle"
            shutil.copytree(tiny_bundle(), bundle)
            folder = tmp_path_factory.mktemp("quantized") / f"{form}-{consumer}"
            quantize_bundle(
                bundle, calibrated(bundle, tmp_path_factory), folder, QuantizeOptions(form, consumer, smooth="none")
            )
            made[form, consumer] = folder
        return made[form, consumer]

    return make


def own_form(target: str) -> Consumer:
    return "tensorrt-rtx" if target == "rtx" else "tensorrt"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", QUANTIZED_FORMATS)
def test_a_target_takes_a_format_or_says_what_it_lacks(
    quantized: Callable[..., Path], no_device: None, form: QuantizedFormat, target: str
) -> None:
    bundle = quantized(form, own_form(target))
    run = CliRunner().invoke(cli, ["trt", str(bundle), "--target", target, "--dry-run"])
    if (form, target) in REFUSED:
        assert isinstance(run.exception, EngineError)
        assert REFUSED[form, target] in run.exception.what
        assert run.exception.hint
    else:
        assert run.exit_code == 0, run.output


def test_fp8_is_taken_by_the_devices_of_a_target_that_have_it(quantized: Callable[..., Path], no_device: None) -> None:
    options = EngineOptions(target="datacenter", capabilities=(89, 90, 100))
    assert plan_engine(quantized("fp8", "tensorrt"), options, dry_run=True).capabilities == (89, 90, 100)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_rtx_refuses_scales_that_would_leave_raw_sums_in_16_bits(
    quantized: Callable[..., Path], form: QuantizedFormat
) -> None:
    options = EngineOptions(target="rtx", capabilities=(89,))
    for consumer in ("tensorrt", "reference"):
        with pytest.raises(EngineError, match="which overflow") as caught:
            plan_engine(quantized(form, consumer), options, dry_run=True)
        assert "--for tensorrt-rtx" in str(caught.value.hint)


@pytest.mark.parametrize("target", TARGETS)
def test_the_form_of_onnx_runtime_is_refused_by_all(quantized: Callable[..., Path], target: str) -> None:
    with pytest.raises(EngineError, match="quantized for ONNX Runtime") as caught:
        plan_engine(quantized("int4", "onnxruntime"), EngineOptions(target=target), dry_run=True)
    assert f"--for {own_form(target)}" in str(caught.value.hint)


def test_what_a_target_computes_in_another_way_than_asked_for_is_told(quantized: Callable[..., Path]) -> None:
    def findings(form: QuantizedFormat, consumer: Consumer) -> str:
        options = EngineOptions(target="orin-jp72")
        return " ".join(plan_engine(quantized(form, consumer), options, dry_run=True).findings)

    assert "a product more" in findings("int8", "tensorrt-rtx")
    assert "--head keep" in findings("int4", "reference")
    assert "quantized" not in findings("int8", "tensorrt")
    assert "--head" not in findings("int4", "tensorrt")


def test_blocks_of_weights_keep_the_opset_that_brought_them(quantized: Callable[..., Path], tmp_path: Path) -> None:
    import onnx

    model = onnx.load(lowered.lower(quantized("int4", "tensorrt"), tmp_path, PLAIN).path, load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 21
    assert any(node.op_type == "DequantizeLinear" for node in model.graph.node)


def test_a_quantized_head_stays_whole_and_one_too_large_is_refused(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = quantized("int8", "tensorrt")
    (tmp_path / "whole").mkdir()
    assert lowered.lower(bundle, tmp_path / "whole", PLAIN).head_parts == 1
    shutil.rmtree(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    with pytest.raises(EngineError) as caught:
        lowered.lower(bundle, tmp_path / "cut", PLAIN, max_alloc=1 << 10)
    assert "quantized LM head" in str(caught.value.found)


@pytest.mark.slow
@pytest.mark.parametrize("form", QUANTIZED_FORMATS)
def test_rtx_builds_an_engine_of_every_format_and_computes_in_it(
    quantized: Callable[..., Path], tmp_path: Path, form: QuantizedFormat
) -> None:
    capabilities = (89, 120) if form == "fp8" else (80, 86, 89, 120)
    numbers = ",".join(f"{number // 10}.{number % 10}" for number in capabilities)
    done = build_command(quantized(form, "tensorrt-rtx"), tmp_path / "engine", "--compute-capability", numbers)
    assert done.returncode == 0, done.stderr
    manifest = read_engine_manifest(tmp_path / "engine")
    assert manifest.compute_capabilities == capabilities
    parts = [layers for part, layers in read_layers(tmp_path / "engine").items() if part.startswith("decoder")]
    assert len(parts) == 2  # profiles
    kind = {"int8": "Int8", "fp8": "FP8"}.get(form)
    for layers in parts:
        if kind:
            found = [row for row in layers if any(f":{kind}[" in tensor for tensor in row["inputs"])]
        else:  # weights of fewer bits are widened inside the kernel that multiplies by them, which is named for it
            found = [row for row in layers if "Cast" in row["name"] and ("Fc" in row["name"] or "Mul" in row["name"])]
        assert len(found) >= 4 * 4  # four layers of five linear maps, of which two may be one
