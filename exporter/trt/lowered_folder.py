"""Writes the graphs that TensorRT would read into a folder of their own, for other tools: trtexec, Polygraphy, ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mmm_export import names
from mmm_export.exporter.scan_function import Body, scan_function
from mmm_export.exporter.trt.lowering import Lowered, lower_graph
from mmm_export.exporter.trt.planning import EnginePlan
from mmm_export.output import output_folder
from mmm_export.progress import Progress, SilentProgress

WITH_BODY = "decoder.with-body.onnx"  # the same decoder for a runtime that has no plugin


def write_lowered_graphs(
    plan: EnginePlan, output: Path | str, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Lowered]:
    """Write decoder.onnx and vision.onnx as the plan's library takes them, and WITH_BODY for ONNX Runtime; weights are copied.

    Args:
        plan: made by `plan_engine`; a dry run will do.
        output: the folder to write.
        force: replace `output`, if it is such a folder.
        progress: told what is being done.

    Raises:
        OutputError: `output` exists and `force` is not set, or the disk is too small.
    """
    progress = progress or SilentProgress()
    needed = 2 * plan.estimate.memory.weights_bytes
    made: dict[str, Lowered] = {}
    with output_folder(
        Path(output), force=force, needed_bytes=needed, marker=names.DECODER_FILE, protect=(plan.bundle,)
    ) as folder:
        for name in (names.DECODER_FILE, names.VISION_FILE):
            with progress.stage(f"lower {name}"):
                alloc, tokens = plan.sizes.max_alloc_bytes, plan.sizes.max_tokens or None
                made[name] = lower_graph(plan.bundle, name, folder, plan.operators, alloc, tokens, copy=True)
        _write_with_body(plan, folder)
    return made


def _write_with_body(plan: EnginePlan, folder: Path) -> None:
    model = ir.load(folder / names.DECODER_FILE)
    if plan.manifest.model.mamba_layers:
        body: Body = "standard" if plan.manifest.body == "standard" else "linear-attention"
        width, opset = plan.manifest.model.conv_width, model.opset_imports[""]
        function = ir.serde.deserialize_function(scan_function(body, conv_width=width, opset=opset))
        model.functions[function.identifier()] = function
        if body == "linear-attention":
            model.opset_imports["com.microsoft"] = 1
    ir.save(model, folder / WITH_BODY)
