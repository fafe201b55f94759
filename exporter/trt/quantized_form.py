"""Forms of quantized bundles that a library takes, and those that it would take and compute wrongly or at full size."""

from __future__ import annotations

from mmm_export.engine_manifest import Flavor
from mmm_export.errors import EngineError
from mmm_export.manifest import Manifest
from mmm_export.model.tensors import HEAD


def refuse_other_form(manifest: Manifest, flavor: Flavor) -> list[str]:
    """Return what a user should know of a quantized bundle with this library.

    Raises:
        EngineError: the bundle was written for ONNX Runtime, or in a form that the library computes wrongly or not at all.
    """
    how = manifest.quantization
    if how is None:
        return []
    again = (
        f"mmm-export calibrate BUNDLE --from BUNDLE.calibration/calibration.json --format {how.format} --for {flavor}"
    )
    if how.consumer.startswith("onnxruntime"):
        raise EngineError(
            "the bundle is quantized for ONNX Runtime",
            found=f"{how.format} in the operators of ONNX Runtime",
            wanted=f"Q/DQ pairs, as --for {flavor} writes them",
            hint=again,
        )
    if (
        flavor == "tensorrt-rtx"
        and how.format in ("int8", "fp8")
        and how.consumer != flavor
        and manifest.dtype != "fp32"
    ):
        raise EngineError(
            f"TensorRT-RTX would keep raw sums of {how.format.upper()} products in {manifest.dtype}, which overflow",
            found=f"a scale for each column, as --for {how.consumer} writes it",
            wanted="one scale in the product and the rest behind it, as --for tensorrt-rtx writes it",
            hint=again,
        )
    if flavor == "tensorrt" and how.format == "int8-weights":
        raise EngineError(
            "TensorRT has no INT8 weights with whole activations: it would store them in 16 bits",
            found="format int8-weights",
            wanted="int4, or int8 with activations",
            hint="quantize to one of these, or build with --flavor tensorrt-rtx where the device is a GeForce or RTX card",
        )
    findings = []
    if flavor == "tensorrt" and how.consumer == "tensorrt-rtx":
        findings.append(
            f"quantized for TensorRT-RTX: TensorRT computes the same, with a product more for each map; {again}"
        )
    if flavor == "tensorrt" and how.format == "int4" and HEAD.removesuffix(".weight") not in how.left:
        findings.append(
            "the LM head is INT8 with whole activations, which TensorRT may store in 16 bits: --head keep leaves it"
        )
    return findings
