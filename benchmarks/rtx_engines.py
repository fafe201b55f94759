"""Time, peak memory and size of full-size engines that `mmm-export trt` builds with TensorRT-RTX on a CPU, random weights.

python benchmarks/rtx_engines.py --plugin FILE           2.7B linear and hybrid; needs 25 GB of disk and 20 GB of memory
python benchmarks/rtx_engines.py --plugin FILE --tiny    the same in a minute; writes a result only to --results

A plugin that computes on a CPU will do: nothing is run. TensorRT-RTX must be importable: docs/engine.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from result_file import RESULTS, ROOT, write_results


def program(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "mmm_export", *map(str, arguments)], check=True)


def bundle_of(folder: Path, kind: str, dtype: str, *, tiny: bool) -> Path:
    """Write a checkpoint with random weights, export it, and return the bundle; one that is there already is taken."""
    from mmm_export.model.testing import full_size_spec, tiny_spec, write_checkpoint

    name = f"{kind}-{'tiny' if tiny else 'full'}"
    bundle, checkpoint = folder / f"{name}-{dtype}", folder / name
    if not bundle.is_dir():
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_checkpoint(checkpoint, tiny_spec(kinds=kind) if tiny else full_size_spec(kind), dtype="bf16")
        program("onnx", checkpoint, "-o", bundle, "--dtype", dtype, "--max-tokens", 4096)
        shutil.rmtree(checkpoint)
    return bundle


def earlier_rows(path: Path) -> list[dict[str, Any]]:
    """Rows that are there already: those of models that this run does not build stay."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def measure(folder: Path, bundle: Path, plugin: Path, capabilities: str, *, kind: str, tiny: bool) -> dict[str, Any]:
    """Build one engine and return its row."""
    from mmm_export.engine_manifest import read_engine_manifest

    engine = folder / "engine"
    shutil.rmtree(engine, ignore_errors=True)
    program(
        *("trt", bundle, "-o", engine, "--target", "rtx", "--compute-capability", capabilities),
        *("--plugin", plugin, "--any-plugin"),
    )
    manifest = read_engine_manifest(engine)
    decoder, vision = manifest.plans["decoder.plan"], manifest.plans["vision.plan"]
    row = {
        "model": f"{kind}, {'tiny' if tiny else '2.7B parameters'}, random weights",
        "precision": manifest.dtype,
        "compute_capability": capabilities,
        "tensorrt_rtx": manifest.tensorrt_version,
        "build_s": decoder.build_seconds,
        "peak_gib": round(decoder.peak_bytes / 2**30, 2),
        "engine_bytes": manifest.files["decoder.plan"].bytes,
        "vision_build_s": vision.build_seconds,
        "vision_engine_bytes": manifest.files["vision.plan"].bytes,
        "folder_bytes": sum(info.bytes for info in manifest.files.values()),
        "weights_bytes": manifest.memory.weights_bytes,
        "command_s": manifest.build_seconds,
    }
    shutil.rmtree(engine)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin", type=Path, required=True, help="libmmm_tensorrt.so")
    parser.add_argument("--kind", choices=["linear", "hybrid", "teacher"], action="append", help="repeatable")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--compute-capability", default="8.9")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmark", help="where the model is written")
    parser.add_argument("--keep", action="store_true", help="keep the bundles for another run")
    parser.add_argument("--results", type=Path, help="result file (default: benchmarks/results/rtx-engines.json)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.results or (None if options.tiny else RESULTS / "rtx-engines.json")
    rows = []
    for kind in options.kind or ["linear", "hybrid"]:
        bundle = bundle_of(options.folder, kind, options.dtype, tiny=options.tiny)
        row = measure(options.folder, bundle, options.plugin, options.compute_capability, kind=kind, tiny=options.tiny)
        rows.append(row)
        sys.stderr.write(f"{row}\n")
        if not options.keep:
            shutil.rmtree(bundle)
        if results:  # after each model: the next one takes minutes
            kept = [old for old in earlier_rows(results) if all(row["model"] != old["model"] for row in rows)]
            what = "mmm-export trt with TensorRT-RTX on a CPU: time and peak memory of the builder, size of the plan"
            write_results(results, what, [*kept, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
