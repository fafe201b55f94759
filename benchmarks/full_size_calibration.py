"""Time and peak anonymous memory of `mmm-export calibrate` on a full-size bundle with random weights.

python benchmarks/full_size_calibration.py          2.7B parameters; needs 20 GB of disk, writes results/cpu-calibration.json
python benchmarks/full_size_calibration.py --tiny   the same in seconds; writes a result only to --results
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from memory import MIB, run_sampled
from result_file import RESULTS, ROOT, write_results

# The product's promise: a model of 2.7B parameters is calibrated and quantized within this.
ANONYMOUS_LIMIT_MIB = 6 * 1000**3 / MIB
WORDS = [
    "what",
    "is",
    "the",
    "small",
    "red",
    "thing",
    "beside",
    "a",
    "large",
    "old",
    "tree",
    "and",
    "how",
    "many",
    "are",
    "there",
]


def write_prompts(folder: Path, count: int, tile_pixels: int) -> Path:
    """Write seeded prompts, every other one with a picture of one tile."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    path = folder / "prompts.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for i in range(count):
            line: dict[str, Any] = {
                "prompt": " ".join(draw.choice(WORDS, 24)),
                "answer": " ".join(draw.choice(WORDS, 6)),
            }
            if i % 2 == 0:
                coarse = draw.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(coarse).resize((tile_pixels, tile_pixels)).save(folder / f"{i}.png")
                line["images"] = [f"{i}.png"]
            stream.write(json.dumps(line) + "\n")
    return path


def make_bundle(folder: Path, kind: str, *, tiny: bool) -> Path:
    """Write and export a model unless that was done before."""
    from mmm_export.exporter.bundle import ExportOptions, export_bundle
    from mmm_export.model.testing import full_size_spec, tiny_spec, write_checkpoint
    from mmm_export.onnxruntime_support import best_body

    name = f"{kind}-{'tiny' if tiny else 'full'}"
    checkpoint, bundle = folder / name, folder / f"{name}-bundle"
    if not (bundle / "manifest.json").is_file():
        if not (checkpoint / "config.json").is_file():
            partial = checkpoint.with_name(f"{name}-partial")
            shutil.rmtree(partial, ignore_errors=True)
            write_checkpoint(partial, tiny_spec(kinds=kind) if tiny else full_size_spec(kind), dtype="bf16")
            partial.rename(checkpoint)
        export_bundle(checkpoint, bundle, ExportOptions(dtype="fp16", body=best_body()), force=True)
    return bundle


def measure(name: str, command: list[str], output: Path) -> dict[str, Any]:
    """Run one `mmm-export calibrate` and return its row."""
    wall_s, peak = run_sampled(
        [sys.executable, "-m", "mmm_export", "calibrate", *command, "-o", str(output), "--force"]
    )
    calibration = json.loads((output / "calibration.json").read_text(encoding="utf-8"))
    sizes = {path.name: path.stat().st_size for path in output.iterdir()}
    row = {
        "name": name,
        "samples": calibration["samples"],
        "tokens": sum(calibration["tokens"].values()),
        "wall_s": round(wall_s, 1),
        "peak_anonymous_mib": round(peak / MIB, 1),
        "bundle_bytes": sum(sizes.values()),
        "decoder_bytes": sizes["decoder.onnx.data"],
    }
    sys.stderr.write(f"{row}\n")
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["linear", "hybrid", "teacher"], default="linear")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmark", help="where the model is written")
    parser.add_argument("--results", type=Path, help="result file (default: benchmarks/results/cpu-calibration.json)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    bundle = make_bundle(options.folder, options.kind, tiny=options.tiny)
    data = write_prompts(options.folder / "prompts", options.samples, 56 if options.tiny else 448)
    int8, int4 = options.folder / "int8", options.folder / "int4"
    given = [str(bundle), "--data", str(data), "--samples", str(options.samples)]
    rows = [measure("measure, then write int8", [*given, "--format", "int8", "--for", "tensorrt"], int8)]
    calibration = [str(bundle), "--from", str(options.folder / "int8.calibration" / "calibration.json")]
    rows.append(measure("write int4 from it", [*calibration, "--format", "int4", "--for", "onnxruntime"], int4))
    model = f"{options.kind}, {'tiny' if options.tiny else '2.7B parameters'}, random weights, fp16"
    rows = [{"model": model, **row} for row in rows]
    for folder in (int8, int4, options.folder / "int8.calibration"):
        shutil.rmtree(folder)
    results = options.results or (None if options.tiny else RESULTS / "cpu-calibration.json")
    if results:
        write_results(results, "mmm-export calibrate: wall time and peak anonymous memory of the process", rows)
    within = all(row["peak_anonymous_mib"] <= ANONYMOUS_LIMIT_MIB for row in rows)
    if not within:
        sys.stderr.write(f"over the limit of {ANONYMOUS_LIMIT_MIB:.0f} MiB\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
