"""Ahead-of-time builds of engines with TensorRT-RTX, each batch of them in a process of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from mmm_export import names
from mmm_export.exporter.strip_functions import strip_functions
from tensorrt_tools.building import plugin_library
from tensorrt_tools.listing import Layer, layers_from_log
from tensorrt_tools.runtimes import rtx_soname_folder, run_with_runtime

Profile = dict[str, list[list[int]]]  # of each input: smallest, typical and largest shape
PREFILL_TOKENS, DECODE_TOKENS = (1, 8, 64), (1, 1, 1)


@dataclass(frozen=True)
class Engine:
    """`byte_count` is 0 when the build failed; `errors` is what the builder logged, `stderr` that of its process."""

    byte_count: int
    layers: list[Layer]
    errors: list[str]
    stderr: str


def stripped_decoder(bundle: Path, folder: Path) -> Path:
    """Write the decoder of a bundle, as TensorRT takes it, into `folder`."""
    target = folder / names.DECODER_FILE
    model = ir.load(bundle / names.DECODER_FILE)
    strip_functions(model)
    ir.save(model, target)
    shutil.copyfile(bundle / (names.DECODER_FILE + names.WEIGHTS_SUFFIX), folder / (target.name + names.WEIGHTS_SUFFIX))
    return target


def profile(model: Path, tokens: tuple[int, int, int], batch: int = 1) -> Profile:
    """Shapes of every input for smallest, typical and largest counts of tokens."""
    graph = onnx.load(model, load_external_data=False).graph
    ranges: Profile = {}
    for value in graph.input:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        ranges[value.name] = [[{"batch": batch, "tokens": count}.get(d, d) for d in dims] for count in tokens]
    return ranges


def graph_tensors(model: Path) -> list[str]:
    """Names of the inputs and outputs of a model."""
    graph = onnx.load(model, load_external_data=False).graph
    return [value.name for value in (*graph.input, *graph.output)]


def build_engines(
    folder: Path, model: Path, capabilities: list[str], profiles: list[Profile], library: Path | None = None
) -> list[Engine]:
    """Build one engine for each compute capability, such as "8.6", with the plugin of `library` or that of `plugin_library`.

    Raises:
        AssertionError: the builder process ended on its own.
    """
    jobs = [
        {"model": str(model), "capability": [int(part) for part in capability.split(".")], "profiles": profiles}
        for capability in capabilities
    ]
    (folder / "jobs.json").write_text(json.dumps({"library": str(library or plugin_library()), "jobs": jobs}))
    script = Path(__file__).with_name("rtx_builder.py")
    done = run_with_runtime("rtx", script, str(folder / "jobs.json"), library_path=rtx_soname_folder())
    assert done.returncode == 0, f"the builder ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [_engine(json.loads(line), done.stderr) for line in done.stdout.splitlines()]


def node_engine(folder: Path, model: bytes, library: Path | None = None) -> Engine:
    """Build an engine of one node whose weights are inputs."""
    path = folder / "node.onnx"
    path.write_bytes(model)
    shapes = {
        value.name: [{"B": 2, "T": 3}.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(path).graph.input
    }
    profiles = [{name: [shape] * 3 for name, shape in shapes.items()}]
    (engine,) = build_engines(folder, path, ["8.6"], profiles, library)
    return engine


def _engine(row: dict[str, Any], stderr: str) -> Engine:
    layers = [layer for message in row["listing"] for layer in layers_from_log(message)]
    return Engine(row["bytes"], layers, row["errors"], stderr)
