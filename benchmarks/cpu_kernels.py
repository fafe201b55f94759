"""One Mamba layer's scan on the CPU in ONNX Runtime: our operator library against the function body of the bundle.

python benchmarks/cpu_kernels.py                    writes results/cpu-kernels.json; takes a minute or two
python benchmarks/cpu_kernels.py --library FILE     another library than the one of `mmm-export plugins build`
python benchmarks/cpu_kernels.py --tiny             one head and few tokens, to try this script; writes only to --results
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from result_file import RESULTS, write_results

from mmm_export.exporter.scan_function import INPUTS, OUTPUTS, scan_function
from mmm_export.onnxruntime_support import best_body
from mmm_export.operator_library import register_library
from mmm_export.plugin_files import find_library

CONV_WIDTH = 2
OPSET = 20
TOKENS = (1, 512, 2048)
SECONDS = 4.0  # of measuring each pair, at least MOST_RUNS // 10 runs
MOST_RUNS = 200


@dataclass(frozen=True)
class Layer:
    """Sizes of the mixer; mmMamba's own by default."""

    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def channels(self) -> int:
        return (2 * self.kv_heads + self.heads) * self.head_dim

    def shapes(self, tokens: Any) -> dict[str, list[Any]]:
        states = {"conv_state": [1, self.channels, CONV_WIDTH - 1], "ssm_state": [1, self.heads, *[self.head_dim] * 2]}
        return {
            "projected": [1, tokens, self.channels + self.heads * self.head_dim + self.heads],
            "lengths": [1],
            **states,
            "conv_weight": [self.channels, CONV_WIDTH],
            "conv_bias": [self.channels],
            "dt_bias": [self.heads],
            "A_log": [self.heads],
            "norm_weight": [self.head_dim],
            "y": [1, tokens, self.heads * self.head_dim],
            **{f"{name}_out": shape for name, shape in states.items()},
        }


def node_model(layer: Layer) -> bytes:
    """Serialize one node with its function body; float32, weights as inputs."""
    shapes = layer.shapes("T")
    kinds = {"lengths": onnx.TensorProto.INT32}

    def info(name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT), shapes[name])

    sizes = {"heads": layer.heads, "kv_heads": layer.kv_heads, "head_dim": layer.head_dim, "state_dim": layer.head_dim}
    node = onnx.helper.make_node(
        "MmmSelectiveScan", INPUTS, OUTPUTS, domain="mmm", eps=1e-5, plugin_version="1", **sizes
    )
    graph = onnx.helper.make_graph([node], "scan", [info(name) for name in INPUTS], [info(name) for name in OUTPUTS])
    opsets = [onnx.helper.make_opsetid(*pair) for pair in (("", OPSET), ("mmm", 1), ("com.microsoft", 1))]
    body = scan_function(best_body(), conv_width=CONV_WIDTH, opset=OPSET)
    return bytes(
        onnx.helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10).SerializeToString()
    )


def open_model(model: bytes, threads: int, library: Path | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library is not None:
        register_library(options, library)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def draw(layer: Layer, tokens: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(layer.shapes(tokens)[name]).astype(np.float32) for name in INPUTS}
    feeds["dt_bias"] -= 3  # decays near 1, as trained ones are
    feeds["lengths"] = np.array([tokens], np.int32)
    return feeds


def measure(layer: Layer, model: bytes, library: Path, tokens: int, threads: int) -> dict[str, Any]:
    """Run both in turn, so that whatever else the machine does meets both."""
    feeds = draw(layer, tokens)
    sessions = {"ours": open_model(model, threads, library), "body": open_model(model, threads, None)}
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(None, feeds)
    begin = time.perf_counter()
    while len(taken["ours"]) < MOST_RUNS // 10 or (
        len(taken["ours"]) < MOST_RUNS and time.perf_counter() - begin < SECONDS
    ):
        for name, session in sessions.items():
            before = time.perf_counter()
            session.run(None, feeds)
            taken[name].append((time.perf_counter() - before) * 1e3)
    ours, body = (session.run(None, feeds)[0].astype(np.float64) for session in sessions.values())
    row: dict[str, Any] = {"name": "scan_node", "layer": f"{layer.heads} heads of {layer.head_dim}x{layer.head_dim}"}
    row |= {"tokens": tokens, "threads": threads, "dtype": "fp32", "runs": len(taken["ours"])}
    for name, times in taken.items():
        row[f"{name}_ms"] = round(statistics.median(times), 3)
        row[f"{name}_ms_min"] = round(min(times), 3)
        row[f"{name}_ms_max"] = round(max(times), 3)
    return row | {"difference": float(np.linalg.norm(ours - body) / np.linalg.norm(body))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="libmmm_onnxruntime.so (default: the newest build in the cache)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tiny", action="store_true", help="one head and few tokens")
    parser.add_argument("--results", type=Path, help="result file (default: benchmarks/results/cpu-kernels.json)")
    options = parser.parse_args()
    library = options.library or find_library("onnxruntime")
    if library is None:
        parser.error("no library: mmm-export plugins build, or --library FILE")
    layer, counts = (Layer(1, 1, 16), (1, 8)) if options.tiny else (Layer(), TOKENS)
    model = node_model(layer)
    rows = []
    for threads in options.threads:
        for tokens in counts:
            rows.append(measure(layer, model, library, tokens, threads))
            sys.stderr.write(f"{rows[-1]}\n")
    results = options.results or (None if options.tiny else RESULTS / "cpu-kernels.json")
    if results:
        write_results(results, f"the scan of one layer in ONNX Runtime, ours and the {best_body()} body", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
