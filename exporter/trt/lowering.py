"""Writes the graphs of a bundle as one target's TensorRT takes them. Names, types and shapes of inputs and outputs stay."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mmm_export import names
from mmm_export.errors import EngineError
from mmm_export.exporter.strip_functions import strip_functions
from mmm_export.exporter.trt.cached_attention import write_attentions, write_plain_caches
from mmm_export.exporter.trt.head import split_head
from mmm_export.exporter.trt.native_operators import write_rms_norms, write_rotary_embeddings, write_swishes
from mmm_export.exporter.trt.operators import Operators
from mmm_export.manifest import Manifest

HEAD_DATA = "head.data"


@dataclass(frozen=True)
class Lowered:
    """A lowered graph on disk.

    Attributes:
        path: the ONNX file; its weights lie beside it.
        in_place: outputs that the engine writes at the address of an input.
        head_parts: products that the LM head is cut into.
        rewritten: how many operators each pass wrote.
    """

    path: Path
    in_place: dict[str, str]
    head_parts: int
    rewritten: dict[str, int]


def lower_graph(bundle: Path, name: str, folder: Path, operators: Operators, max_alloc_bytes: int) -> Lowered:
    """Write graph `name` of a bundle into `folder` for a target, with links to the weights of the bundle.

    Args:
        bundle: a bundle folder, checked by the caller.
        name: names.DECODER_FILE or names.VISION_FILE.
        folder: where to write; on the file system of the bundle no weight is copied.
        operators: what the target takes.
        max_alloc_bytes: most that one part of the LM head may take.

    Raises:
        EngineError: the bundle was exported with --standard-ops, or a part has a form that this version does not know.
    """
    model = ir.load(bundle / name)
    refuse_foreign_operators(model, name)
    strip_functions(model)
    path = folder / name
    try:
        lowered = _lower(model, path, operators, max_alloc_bytes)
    except ValueError as error:
        raise EngineError(
            f"{name} of the bundle cannot be lowered",
            found=str(error),
            wanted="a graph as this version of mmm-export writes it",
            hint="export the bundle again with this version: mmm-export onnx CHECKPOINT -o BUNDLE",
        ) from error
    link_weights(model, bundle, folder)
    ir.save(model, path)
    return lowered


def _lower(model: ir.Model, path: Path, operators: Operators, max_alloc_bytes: int) -> Lowered:
    rewritten: dict[str, int] = {}
    in_place: dict[str, str] = {}
    parts = 1
    if operators.rms_norm:
        rewritten["RMSNormalization"] = write_rms_norms(model)
    if operators.rotary:
        rewritten["RotaryEmbedding"] = write_rotary_embeddings(model)
    if operators.swish:
        rewritten["Swish"] = write_swishes(model)
    if path.name == names.DECODER_FILE:
        if operators.cached_attention:
            in_place = write_attentions(model)
            rewritten["Attention"] = len(in_place) // 2
        else:
            rewritten["cache write"] = write_plain_caches(model)
        parts = len(split_head(model, path.parent / HEAD_DATA, max_alloc_bytes))
    # The operators that the export uses mean the same in both opsets.
    model.opset_imports[""] = operators.opset
    return Lowered(path, in_place, parts, {name: count for name, count in rewritten.items() if count})


def refuse_foreign_operators(model: ir.Model, name: str) -> None:
    """Raise EngineError for a graph with operators that no TensorRT has: what `--standard-ops` writes."""
    used = {node.op_type for node in model.graph}
    foreign = sorted(used & {"LinearAttention", "CausalConvWithState"})
    if foreign:
        raise EngineError(
            f"{name} of the bundle cannot become an engine",
            found=f"operators {', '.join(foreign)}: the bundle was exported with --standard-ops",
            wanted=f"{names.OP_NAME} nodes, which the plugin computes",
            hint="export the bundle again without --standard-ops",
        )


def link_weights(model: ir.Model, bundle: Path, folder: Path) -> None:
    """Give `folder` the data files that a model of `bundle` refers to: by hard link, else by copy.

    A symbolic link would do for none of them: readers of external data refuse files that lie outside the model's folder.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    files = {t.location for t in tensors if isinstance(t, ir.ExternalTensor) and Path(t.base_dir) != folder}
    for file in sorted(str(name) for name in files):
        target = folder / file
        with suppress(FileExistsError):
            try:
                os.link(bundle / file, target)
            except FileExistsError:
                raise
            except OSError:
                shutil.copyfile(bundle / file, target)


def weights_of(manifest: Manifest, name: str) -> int:
    """Bytes of the data file of a graph."""
    info = manifest.files.get(name + names.WEIGHTS_SUFFIX)
    return 0 if info is None else info.bytes
