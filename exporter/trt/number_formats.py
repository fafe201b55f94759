"""Number formats that a bundle's graphs use, and devices and libraries that lack one."""

from __future__ import annotations

import onnx_ir as ir

from mmm_export.engine_manifest import Flavor
from mmm_export.errors import EngineError
from mmm_export.exporter.trt.operators import Version
from mmm_export.exporter.trt.targets import dotted

# First compute capability with the format's matrix instructions, and first TensorRT whose parser and builder take it.
_NEEDS: dict[str, tuple[int, Version]] = {
    "bf16": (80, (10, 0)),
    "int8": (80, (10, 0)),
    "int4": (80, (10, 0)),
    "fp8": (89, (10, 0)),
    "fp4": (100, (10, 8)),
}
_NAMES = {
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "fp4",
}


def number_formats(model: ir.Model) -> set[str]:
    """Return those of _NEEDS that weights, scales' zero points or values of a graph have."""
    values = (*model.graph.initializers.values(), *(output for node in model.graph for output in node.outputs))
    types = {value.dtype for value in values}
    types |= {value.const_value.dtype for value in model.graph.initializers.values() if value.const_value is not None}
    return {_NAMES[kind] for kind in types if kind in _NAMES}


def refuse_unsupported(formats: set[str], capabilities: tuple[int, ...], flavor: Flavor, version: Version) -> None:
    """Raise EngineError if a device or the library lacks a format."""
    for name in sorted(formats & set(_NEEDS)):
        capability, since = _NEEDS[name]
        lacking = [number for number in capabilities if number < capability]
        if lacking:
            raise EngineError(
                f"the device has no {name.upper()} arithmetic, which the bundle uses",
                found=", ".join(f"SM {dotted(number)}" for number in lacking),
                wanted=f"SM {dotted(capability)} or newer",
                hint="quantize the bundle to INT8 or INT4, or leave it in FP16"
                if name in ("fp8", "fp4")
                else "export the bundle with --dtype fp16",
            )
        if flavor == "tensorrt" and version and version < since:
            raise EngineError(
                f"this TensorRT is too old for {name.upper()}, which the bundle uses",
                found=".".join(map(str, version)),
                wanted=f"{'.'.join(map(str, since))} or newer",
                hint="install a newer TensorRT, or use a bundle of another number format",
            )
