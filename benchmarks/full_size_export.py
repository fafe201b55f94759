"""Time and peak anonymous memory of `mmm-export onnx` on a full-size checkpoint with random weights.

python benchmarks/full_size_export.py            2.7B parameters; needs 12 GB of disk, writes results/cpu-export.json
python benchmarks/full_size_export.py --tiny     the same in seconds; writes a result only to --results
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from memory import MIB, run_sampled
from result_file import RESULTS, ROOT, write_results

# The product's promise: see README.md, "What it costs".
WALL_LIMIT_S = 150.0
ANONYMOUS_LIMIT_MIB = 1.5 * 1000**3 / MIB


def measure(checkpoint: Path, bundle: Path, *, kind: str, dtype: str, tiny: bool) -> dict[str, Any]:
    """Write the checkpoint unless it is there, export it once, and return the row of the measurement."""
    from mmm_export.model.testing import full_size_spec, tiny_spec, write_checkpoint

    begin = time.perf_counter()
    if not (checkpoint / "config.json").is_file():
        partial = checkpoint.with_name(f"{checkpoint.name}-partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(partial, tiny_spec(kinds=kind) if tiny else full_size_spec(kind), dtype="bf16")
        partial.rename(checkpoint)
    write_s = time.perf_counter() - begin
    command = [
        sys.executable,
        "-m",
        "mmm_export",
        "onnx",
        str(checkpoint),
        "-o",
        str(bundle),
        "--dtype",
        dtype,
        "--force",
    ]
    wall_s, peak = run_sampled(command)
    sizes = {path.name: path.stat().st_size for path in bundle.iterdir()}
    shutil.rmtree(bundle)
    return {
        "name": "export",
        "model": f"{kind}, {'tiny' if tiny else '2.7B parameters'}, random weights",
        "checkpoint_dtype": "bf16",
        "bundle_dtype": dtype,
        "wall_s": round(wall_s, 1),
        "peak_anonymous_mib": round(peak / MIB, 1),
        "bundle_bytes": sum(sizes.values()),
        "write_checkpoint_s": round(write_s, 1),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for all runs: median and spread of the time, the highest peak of memory."""
    walls = [run["wall_s"] for run in runs]
    return {
        **runs[0],
        "runs": len(runs),
        "wall_s": statistics.median(walls),
        "wall_s_min": min(walls),
        "wall_s_max": max(walls),
        "peak_anonymous_mib": max(run["peak_anonymous_mib"] for run in runs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["linear", "hybrid", "teacher"]
    parser.add_argument("--kind", choices=kinds, action="append", help="repeatable (default: linear)")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--runs", type=int, default=1, help="exports to measure (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmark", help="where the model is written")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for another run")
    parser.add_argument("--results", type=Path, help="result file (default: benchmarks/results/cpu-export.json)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in options.kind or ["linear"]:
        checkpoint = options.folder / f"{kind}-{'tiny' if options.tiny else 'full'}"
        runs = []
        for _ in range(options.runs):
            runs.append(
                measure(checkpoint, options.folder / "bundle", kind=kind, dtype=options.dtype, tiny=options.tiny)
            )
            sys.stderr.write(f"{runs[-1]}\n")
        rows.append(summary(runs))
        if not options.keep:
            shutil.rmtree(checkpoint)
    results = options.results or (None if options.tiny else RESULTS / "cpu-export.json")
    if results:
        write_results(results, "mmm-export onnx: wall time and peak anonymous memory of the process", rows)
    within = all(r["wall_s_max"] <= WALL_LIMIT_S and r["peak_anonymous_mib"] <= ANONYMOUS_LIMIT_MIB for r in rows)
    if not within:
        sys.stderr.write(f"over the limits of {WALL_LIMIT_S} s and {ANONYMOUS_LIMIT_MIB:.0f} MiB\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
