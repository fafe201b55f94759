"""Where the time of a decode step and of prefills goes on a GPU, by kernel: each is charged what it adds to the end of the work.

python benchmarks/runtime_profile.py BUNDLE LIBRARY          needs onnxruntime-gpu and torch; writes results/h100-runtime-profile.json
python benchmarks/runtime_profile.py BUNDLE LIBRARY --results DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from result_file import RESULTS, write_results

RECORDED = 3  # runs under the profiler, of which the last counts
# What a kernel's name holds, and what it is called in the table; the first that fits.
KINDS = (
    ("linear_vector_kept", "products, few tokens"),
    ("linear_vector", "products, few tokens"),
    ("linear_matrix", "products, tiled"),
    ("linear_norm", "RMS norm"),
    ("linear_silu", "SiLU of gate, times up"),
    ("linear_widen", "integer weights written in 16 bits"),
    ("step_kernel", "scan, one token"),
    ("chunked", "scan, chunks"),
    ("start_states", "scan, chunks"),
    ("nvjet", "products, cuBLAS"),
    ("cublas", "products, cuBLAS"),
    ("gemm", "products, cuBLAS"),
    ("Memset", "memory set for cuBLAS"),
    ("Memcpy", "copies"),
    ("onnxruntime", "ONNX Runtime's own: embedding, last token"),
)


def kind_of(kernel: str) -> str:
    """What a kernel is called in the table."""
    return next((kind for part, kind in KINDS if part in kernel), "other")


def charged(events: Iterable[tuple[str, float, float]]) -> dict[str, dict[str, float]]:
    """Charge kernels, (name, begin, end) in us, by kind: `path_us` from the end of all before to their own, `idle_us` of it in which
    none ran, `count`.

    Kernels that overlap share the time so: that in which the one before still runs is that one's.
    """
    kinds: dict[str, dict[str, float]] = {}
    last: float | None = None
    for name, begin, end in sorted(events, key=lambda event: event[2]):
        row = kinds.setdefault(kind_of(name), {"count": 0, "path_us": 0.0, "idle_us": 0.0})
        last = begin if last is None else last
        row["count"] += 1
        row["path_us"] += max(0.0, end - last)
        row["idle_us"] += max(0.0, begin - last)
        last = max(last, end)
    return kinds


def recorded(work: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """Run under PyTorch's profiler, which sees the kernels of the whole process, and return those of the last run."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(RECORDED):
            work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kernels = [event for event in trace if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels.sort(key=lambda event: event["ts"] + event["dur"])
    once = len(kernels) // RECORDED
    return [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in kernels[-once:]]


def rows_of(name: str, work: Callable[[], Any], warm_up: int) -> list[dict[str, Any]]:
    """Run, time and record one kind of work; one row for each kind of kernel."""
    for _ in range(warm_up):
        work()
    begin = time.perf_counter()
    work()
    wall_us = (time.perf_counter() - begin) * 1e6
    kinds = charged(recorded(work))
    return [
        {"name": "runtime_profile", "work": name, "wall_us": round(wall_us), "kernels": kind}
        | {key: round(value, 1) for key, value in row.items()}
        for kind, row in sorted(kinds.items(), key=lambda item: -item[1]["path_us"])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("library", type=Path)
    parser.add_argument("--lengths", default="1024,8192", help="Prompts, each read as one chunk.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    import numpy as np
    import torch

    from mmm_export.manifest import read_manifest
    from mmm_export.runtime.onnxruntime_cuda_backend import OnnxRuntimeCudaBackend

    torch.zeros(1, device="cuda")  # the CUDA libraries are loaded now
    manifest = read_manifest(options.bundle)
    backend = OnnxRuntimeCudaBackend(options.bundle, manifest, library=options.library)
    ids = np.random.default_rng(0).integers(3, manifest.model.vocab_size - 20, 1 << 17)
    backend.advance(ids[:2], None)
    rows = rows_of("decode step", lambda: backend.advance(ids[:1], None), 30)
    for length in map(int, options.lengths.split(",")):
        rows += rows_of(f"prefill of {length:,} tokens", lambda length=length: backend.advance(ids[:length], None), 8)
    backend.close()
    what = f"Where the time goes, by kernel: {manifest.source}, {manifest.dtype}, ONNX Runtime CUDA with our operators"
    path = options.results / "h100-runtime-profile.json"
    write_results(path, what, rows, where=torch.cuda.get_device_name())
    return 0


if __name__ == "__main__":
    sys.exit(main())
