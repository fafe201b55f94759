"""Export a checkpoint to a bundle: three ONNX graphs, their weights, the tokenizer and a manifest."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from onnxscript.optimizer import optimize_ir
from torch import Tensor

import mmm_export
from mmm_export import names
from mmm_export.errors import OptionError
from mmm_export.exporter.golden import write_golden
from mmm_export.exporter.golden_recording import golden_examples, golden_from_examples
from mmm_export.exporter.graphs import DecoderGraph, EmbeddingGraph, Graph, VisionGraph, layer_output
from mmm_export.exporter.scan_function import Body, scan_function
from mmm_export.exporter.trace import OPSET, trace
from mmm_export.exporter.weights import bind_weights, weight_bytes, write_weights
from mmm_export.fusion import fuse_products
from mmm_export.manifest import (
    DTYPES,
    Dtype,
    FileInfo,
    GraphInfo,
    Manifest,
    TensorInfo,
    file_info,
    write_manifest,
)
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.decoder import MmMamba
from mmm_export.model.rope import rope_table
from mmm_export.model.tensors import required_shapes
from mmm_export.model.weights import model_skeleton, parameter
from mmm_export.output import output_folder
from mmm_export.progress import Progress, SilentProgress
from mmm_export.spec import MOST_TOKENS, ModelSpec

IR_VERSION = 10
STANDARD_OPS_OPSET = 27
STANDARD_OPS_ENVIRONMENT = {"ALLOW_RELEASED_ONNX_OPSET_ONLY": "0"}


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        dtype: type of weights and activations; SSM states are float32 in every case.
        max_tokens: capacity of the KV caches of attention layers, in tokens; a linear model has none.
        body: how the scan is written for runtimes without our kernels, see scan_function.
        standard_ops: write operators of ONNX opset 27 instead of the custom operator; overrides `body`.
        logits: of the last valid token of each row, or of all tokens.
        rope_scaling: "ignore" as the released hybrid does, or "teacher" to honour rope_scaling of config.json.
        golden: also run PyTorch on a few prompts, and keep what it computed in the bundle.
        fuse: write the decoder's products with the norms and additions around them as MmmLinear nodes, which only our kernel library
            computes.
    """

    dtype: Dtype = "fp32"
    max_tokens: int = 4096
    body: Literal["linear-attention", "standard"] = "linear-attention"
    standard_ops: bool = False
    logits: Literal["last", "all"] = "last"
    rope_scaling: Literal["ignore", "teacher"] = "ignore"
    golden: bool = False
    fuse: bool = False

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("dtype", self.dtype, DTYPES),
            ("body", self.body, ("linear-attention", "standard")),
            ("logits", self.logits, ("last", "all")),
            ("rope_scaling", self.rope_scaling, ("ignore", "teacher")),
        ):
            if value not in allowed:
                raise OptionError(f"unknown {field}", found=repr(value), wanted=", ".join(allowed))
        if self.fuse and self.standard_ops:
            raise OptionError("fuse and standard_ops exclude each other: one needs our kernels, the other avoids them")
        if not 1 <= self.max_tokens <= MOST_TOKENS:
            raise OptionError("max_tokens is out of range", found=str(self.max_tokens), wanted=f"1 to {MOST_TOKENS}")

    @property
    def scan_body(self) -> Body:
        return "standard-ops" if self.standard_ops else self.body


def export_bundle(
    checkpoint: Path | str,
    output: Path | str,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Export a checkpoint folder to a bundle folder.

    The bundle appears under its name only when it is complete. Weights are streamed: memory stays far below their size.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its weights do not fit the type asked for.
        OutputError: `output` exists and `force` is not set, or the disk is too small.
        PromptError: the KV cache is too small for the golden prompts.
    """
    options = options or ExportOptions()
    progress = progress or SilentProgress()
    source = Checkpoint.open(Path(checkpoint), rope_scaling=options.rope_scaling)
    max_tokens = options.max_tokens if source.spec.attention_layers else 0
    item_bytes = 4 if options.dtype == "fp32" else 2
    needed = sum(math.prod(shape) for shape in required_shapes(source.spec).values()) * item_bytes
    needed *= 2 if options.fuse else 1  # the decoder is written twice
    needed += 2 * 2 * max_tokens * source.spec.head_dim // 2 * 4  # cosine and sine of both stacks
    with output_folder(Path(output), force=force, needed_bytes=needed, protect=(source.folder,)) as folder:
        identity = _in_background(source.sha256)  # hashing releases the interpreter lock: it runs beside the trace
        writer = _BundleWriter(source, folder, options, max_tokens, progress)
        graphs, files = writer.write()
        source_sha256 = identity.result()
        if options.golden:
            examples = golden_examples(folder, source.spec, max_tokens)
            golden = golden_from_examples(source, source_sha256, examples, progress=progress)
            write_golden(folder / names.GOLDEN_FILE, golden)
            files[names.GOLDEN_FILE] = file_info(folder / names.GOLDEN_FILE)
        manifest = Manifest(
            model=source.spec,
            source=source.folder.resolve().name,
            source_sha256=source_sha256,
            dtype=options.dtype,
            opset=STANDARD_OPS_OPSET if options.standard_ops else OPSET,
            body=options.scan_body,
            logits=options.logits,
            max_tokens=max_tokens,
            graphs=graphs,
            files=files,
            tools=_tool_versions(),
            environment=STANDARD_OPS_ENVIRONMENT if options.standard_ops else {},
            findings=source.findings,
            needs_kernels=options.fuse,
        )
        write_manifest(folder, manifest)
    return manifest


def _in_background(work: Callable[[], str]) -> Future[str]:
    """Run `work` in a thread that nobody waits for when the export ends early: Ctrl-C must not wait for gigabytes."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class _BundleWriter:
    """Writes the files of one bundle into a folder."""

    def __init__(
        self, source: Checkpoint, folder: Path, options: ExportOptions, max_tokens: int, progress: Progress
    ) -> None:
        self.source = source
        self.folder = folder
        self.options = options
        self.max_tokens = max_tokens
        self.progress = progress
        self.skeleton = model_skeleton(source.spec)

    def write(self) -> tuple[dict[str, GraphInfo], dict[str, FileInfo]]:
        """Write all but the manifest; return what it must say of graphs and files."""
        decoder = functools.partial(DecoderGraph, logits=self.options.logits, max_tokens=self.max_tokens)
        makers: dict[str, Callable[[MmMamba], Graph]] = {
            names.VISION_FILE: VisionGraph,
            names.EMBEDDING_FILE: EmbeddingGraph,
            names.DECODER_FILE: decoder,
        }
        graphs: dict[str, GraphInfo] = {}
        files: dict[str, FileInfo] = {}
        for name, make in makers.items():
            with self.progress.stage(f"trace {name}"):
                model = trace(self.source.spec, self.options.dtype, self.max_tokens, make)
            data = self.folder / (name + names.WEIGHTS_SUFFIX)
            fuses = self.options.fuse and name == names.DECODER_FILE
            first = data.with_suffix(".unfused") if fuses else data
            with self.progress.stage(f"write weights of {name}", weight_bytes(model)) as advance:
                files[data.name] = bind_weights(model, first, self._parameter, advance)
            with self.progress.stage(f"optimise and check {name}"):
                self._finish(model, self.folder / name)
            if fuses:
                with self.progress.stage(f"fuse {name}", weight_bytes(model)) as advance:
                    fuse_products(model)
                    files[data.name] = write_weights(model, data, advance)
                    ir.save(model, self.folder / name)
                    onnx.checker.check_model(self.folder / name, full_check=False)
                first.unlink()
            files[name] = file_info(self.folder / name)
            graphs[name] = GraphInfo(_tensors(model.graph.inputs), _tensors(model.graph.outputs))
        for name in names.TOKENIZER_FILES:
            if (self.source.folder / name).is_file():
                shutil.copyfile(self.source.folder / name, self.folder / name)
                files[name] = file_info(self.folder / name)
        return graphs, files

    def _parameter(self, name: str) -> Tensor:
        if name.startswith("ropes."):
            return _rope_parameter(self.source.spec, name, self.max_tokens)
        return parameter(self.source, self.skeleton, name)

    def _finish(self, model: ir.Model, path: Path) -> None:
        """Optimise the graph, give it the function body, and save it."""
        optimize_ir(model)
        debug = {layer_output(i) for i in range(self.source.spec.layers)}
        for output in [o for o in model.graph.outputs if o.name in debug]:
            model.graph.outputs.remove(output)
        model.ir_version = IR_VERSION
        model.producer_name = "mmm-export"
        model.producer_version = mmm_export.__version__
        if any(node.domain == names.OP_DOMAIN for node in model.graph):
            self._attach_scan(model)
        else:
            model.opset_imports.pop(names.OP_DOMAIN, None)
        ir.save(model, path)
        onnx.checker.check_model(path, full_check=False)

    def _attach_scan(self, model: ir.Model) -> None:
        body = self.options.scan_body
        if body == "standard-ops":
            # The operators in use mean the same in opsets 20 and 27; the tracer itself cannot write 27.
            model.opset_imports[""] = STANDARD_OPS_OPSET
        elif body == "linear-attention":
            model.opset_imports["com.microsoft"] = 1
        opset = model.opset_imports[""]
        proto = scan_function(body, conv_width=self.source.spec.conv_width, opset=opset)
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
        if body == "standard-ops":
            InlinePass()(model)
            model.opset_imports.pop(names.OP_DOMAIN, None)


def _rope_parameter(spec: ModelSpec, name: str, max_tokens: int) -> Tensor:
    """Rotary tables, and the frequencies of a dynamically scaled rope, by initializer name `ropes.<stack>.<buffer>`."""
    _, stack, buffer = name.split(".")
    rope = spec.embedding.rope if stack == "embedding" else spec.llm.rope
    if buffer in ("cos", "sin"):
        return rope_table(rope, spec.head_dim, max_tokens)[buffer == "sin"]
    value: Tensor = getattr(MmMamba.make_ropes(spec)[stack], buffer)
    return value


def _tensors(values: Iterable[ir.Value]) -> tuple[TensorInfo, ...]:
    return tuple(_tensor_info(value) for value in values)


def _tensor_info(value: ir.Value) -> TensorInfo:
    if value.name is None or value.dtype is None or value.shape is None:
        raise ValueError(f"graph tensor {value.name} lacks a name, type or shape")
    dtype = "bfloat16" if value.dtype == ir.DataType.BFLOAT16 else str(value.dtype.numpy())
    return TensorInfo(value.name, dtype, tuple(d if isinstance(d, int) else str(d.value) for d in value.shape))


def _tool_versions() -> dict[str, str]:
    packages = ("torch", "onnx", "onnx-ir", "onnxscript")
    return {"mmm-export": mmm_export.__version__, **{p: importlib.metadata.version(p) for p in packages}}
