"""Writes the graphs of a bundle as one target's TensorRT takes them. Names, types and shapes of inputs and outputs stay."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mmm_export import names
from mmm_export.errors import EngineError
from mmm_export.exporter.strip_functions import strip_functions
from mmm_export.exporter.trt.cached_attention import write_attentions, write_plain_caches
from mmm_export.exporter.trt.capacity import shrink_caches
from mmm_export.exporter.trt.head import split_head
from mmm_export.exporter.trt.native_operators import write_rms_norms, write_rotary_embeddings, write_swishes
from mmm_export.exporter.trt.operators import Operators
from mmm_export.manifest import TensorInfo

HEAD_DATA = "head.data"
BLOCK_OPSET = 21


@dataclass(frozen=True)
class Lowered:
    """A lowered graph on disk.

    Attributes:
        path: the ONNX file; its weights lie beside it.
        in_place: outputs that the engine writes at the address of an input.
        head_parts: products that the LM head is cut into.
        rewritten: how many operators each pass wrote.
        inputs: of the graph, in order.
        outputs: likewise.
    """

    path: Path
    in_place: dict[str, str]
    head_parts: int
    rewritten: dict[str, int]
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()


def lower_graph(
    bundle: Path,
    name: str,
    folder: Path,
    operators: Operators,
    max_alloc_bytes: int,
    max_tokens: int | None = None,
    *,
    copy: bool = False,
) -> Lowered:
    """Write graph `name` of a bundle into `folder` for a target, with links to the weights of the bundle.

    Args:
        bundle: a bundle folder, checked by the caller.
        name: names.DECODER_FILE or names.VISION_FILE.
        folder: where to write; on the file system of the bundle no weight is copied.
        operators: what the target takes.
        max_alloc_bytes: most that one part of the LM head may take.
        max_tokens: capacity of the KV caches, at most the bundle's; None for the bundle's.
        copy: give `folder` weights of its own.

    Raises:
        EngineError: the bundle was exported with --standard-ops, or a part has a form that this version does not know.
    """
    model = ir.load(bundle / name)
    refuse_foreign_operators(model, name)
    strip_functions(model)
    path = folder / name
    try:
        if max_tokens is not None and name == names.DECODER_FILE:
            shrink_caches(model, max_tokens)
        lowered = _lower(model, path, operators, max_alloc_bytes)
    except ValueError as error:
        raise EngineError(
            f"{name} of the bundle cannot be lowered",
            found=str(error),
            wanted="a graph as this version of mmm-export writes it",
            hint="export the bundle again with this version: mmm-export onnx CHECKPOINT -o BUNDLE",
        ) from error
    link_weights(model, bundle, folder, copy=copy)
    ir.save(model, path)
    inputs, outputs = (graph_tensors(values) for values in (model.graph.inputs, model.graph.outputs))
    return dataclasses.replace(lowered, inputs=inputs, outputs=outputs)


def graph_tensors(values: Iterable[ir.Value]) -> tuple[TensorInfo, ...]:
    """Describe inputs or outputs as a manifest does."""
    return tuple(_tensor(value) for value in values)


def _tensor(value: ir.Value) -> TensorInfo:
    if value.name is None or value.dtype is None or value.shape is None:
        raise ValueError(f"graph tensor {value.name} lacks a name, type or shape")
    dtype = "bfloat16" if value.dtype == ir.DataType.BFLOAT16 else str(value.dtype.numpy())
    return TensorInfo(value.name, dtype, tuple(d if isinstance(d, int) else str(d.value) for d in value.shape))


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
    # The operators that the export uses mean the same in all of these opsets; blocks of weights that share a scale came with 21.
    blocks = any("block_size" in node.attributes for node in model.graph if node.op_type == "DequantizeLinear")
    model.opset_imports[""] = max(operators.opset, BLOCK_OPSET) if blocks else operators.opset
    return Lowered(path, in_place, parts, {name: count for name, count in rewritten.items() if count})


def refuse_foreign_operators(model: ir.Model, name: str) -> None:
    """Raise EngineError for a graph with operators that no engine is built from: what `--standard-ops` and `--fuse` write."""
    used = {node.op_type for node in model.graph}
    if names.LINEAR_OP in used:
        raise EngineError(
            f"{name} of the bundle cannot become an engine",
            found=f"{names.LINEAR_OP} nodes: the bundle was exported with --fuse, for ONNX Runtime",
            wanted="plain matrix products, which TensorRT fuses itself",
            hint="export the bundle again without --fuse",
        )
    foreign = sorted(used & {"LinearAttention", "CausalConvWithState"})
    if foreign:
        raise EngineError(
            f"{name} of the bundle cannot become an engine",
            found=f"operators {', '.join(foreign)}: the bundle was exported with --standard-ops",
            wanted=f"{names.OP_NAME} nodes, which the plugin computes",
            hint="export the bundle again without --standard-ops",
        )


def link_weights(model: ir.Model, bundle: Path, folder: Path, *, copy: bool = False) -> None:
    """Give `folder` the data files that a model of `bundle` refers to: by hard link, else or with `copy` by copy.

    A symbolic link would do for none of them: readers of external data refuse files that lie outside the model's folder.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    files = {t.location for t in tensors if isinstance(t, ir.ExternalTensor) and Path(t.base_dir) != folder}
    for file in sorted(str(name) for name in files):
        target = folder / file
        with suppress(FileExistsError):
            if copy:
                shutil.copyfile(bundle / file, target)
                continue
            try:
                os.link(bundle / file, target)
            except FileExistsError:
                raise
            except OSError:
                shutil.copyfile(bundle / file, target)
