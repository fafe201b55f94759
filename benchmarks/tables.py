"""Puts the figures of benchmarks/results into the documents, between their markers, so that no number is typed by hand.

python benchmarks/tables.py            rewrites the documents, and draws the figures of GPUs (kernel_plots.py) anew
python benchmarks/tables.py --check    exit code 1 when a document or a figure and the results differ
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import figures
import kernel_plots
import runtime_plots
import runtime_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md",
    "docs/plugins.md",
    "docs/gpu-measurements.md",
    "docs/quantization.md",
    "docs/engine.md",
    "docs/distillation.md",
    "docs/how-to/distill-your-own.md",
    "demo_models/README.md",
)
BLOCK = re.compile(r"(<!-- results: ([a-z0-9-]+(?::[a-z-]+)?) -->\n).*?(<!-- end -->)", re.DOTALL)

Results = dict[str, Any]


def export_table(results: Results) -> str:
    rows = [
        (
            f"{row['model']}, {row['checkpoint_dtype']} to {row['bundle_dtype']}",
            f"{row['bundle_bytes'] / 1e9:.2f} GB",
            f"{row['wall_s']:.0f} s ({row['wall_s_min']:.0f} to {row['wall_s_max']:.0f}, {row['runs']} runs)",
            f"{row['peak_anonymous_mib'] * 2**20 / 1e9:.2f} GB",
        )
        for row in results["rows"]
    ]
    return _table(("`mmm-export onnx`", "bundle", "time", "peak memory, without page cache"), rows)


def memory_table(results: Results) -> str:
    rows = [(f"{row['tokens']:,}", f"{row['anonymous_mib']:.0f} MiB") for row in results["rows"]]
    model = results["rows"][0]["model"]
    return _table((f"tokens in the context ({model})", "memory of the process, without page cache"), rows)


def kernels_table(results: Results) -> str:
    """The rows that have a peer."""
    rows = [
        (
            f"{'decode step' if row['name'] == 'decode_mixer' else 'prefill'}, batch {row['batch']}, {row['tokens']:,} tokens",
            f"{row['ours_us']:.1f}",
            f"{row['peer_us']:.1f}",
            f"{row['peer_us'] / row['ours_us']:.1f} times",
            f"{row['floor_us']:.1f}",
        )
        for row in results["rows"]
        if row.get("peer_us")
    ]
    return _table(
        ("mixer of one layer, bf16, float32 state, \u00b5s", "ours", "mamba-ssm's kernels, summed", "faster", "floor"),
        rows,
    )


def digits_table(results: Results) -> str:
    """The shipped models."""
    models = [row for row in results["rows"] if row["name"] == "model"]
    kinds = list(models[0]["by_kind"])
    rows = [
        (
            row["model"],
            f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})",
            str(row["onnxruntime_right"]),
            str(row["other_answers"]),
            f"{row['checkpoint_bytes'] / 1e6:.1f} MB",
            *(f"{row['by_kind'][kind]:.0%}" for kind in kinds),
        )
        for row in models
    ]
    header = (
        "model",
        f"right of {models[0]['samples']:,} (95 %)",
        "right in ONNX Runtime",
        "other answers there",
        "bf16 checkpoint",
    )
    return _table((*header, *kinds), rows)


def stages_table(results: Results) -> str:
    """The shipped models at the end of each stage."""
    ends = {(row["run"], row["stage"]): row for row in results["rows"] if row["name"] == "progress"}
    rows = [(run, stage, f"{row['step']:,}", f"{row['accuracy']:.1%}") for (run, stage), row in ends.items()]
    return _table(("model", "stage", "steps", "right"), rows)


def ablations_table(results: Results) -> str:
    """Short runs, mean over their seeds."""
    groups: dict[str, list[float]] = {}
    for row in results["rows"]:
        if row["name"] == "ablation":
            groups.setdefault(row["run"], []).append(row["accuracy"])
    rows = [
        (run, f"{sum(found) / len(found):.1%}", f"{min(found):.1%} to {max(found):.1%}", str(len(found)))
        for run, found in sorted(groups.items())
    ]
    return _table(("short run", "accuracy, mean", "lowest to highest", "seeds"), rows)


def engines_table(results: Results) -> str:
    rows = [
        (
            f"{row['model']}, {row['precision']}, SM {row['compute_capability']}",
            f"{row['build_s']:.0f} s",
            f"{row['peak_gib']:.1f} GiB",
            f"{row['engine_bytes'] / 1e9:.2f} GB",
            f"{row['weights_bytes'] / 1e9:.2f} GB",
            f"{row['command_s']:.0f} s",
        )
        for row in results["rows"]
    ]
    version = results["rows"][0]["tensorrt_rtx"]
    header = ("decoder engine", "build", "peak memory of the builder", "plan", "weights in the bundle", "whole command")
    return f"TensorRT-RTX {version}, built on a CPU for a GPU that is not there:\n\n{_table(header, rows)}"


def seeding_table(results: Results) -> str:
    rows = [
        (
            row["model"],
            f"{row['student_bytes'] / 1e9:.2f} GB",
            f"{row['wall_s']:.0f} s",
            f"{row['peak_anonymous_mib'] * 2**20 / 1e9:.2f} GB",
        )
        for row in results["rows"]
    ]
    return _table(("seeding a linear student from", "written", "time", "peak memory, without page cache"), rows)


def distillation_table(results: Results) -> str:
    rows = [
        (
            row["name"],
            f"{row['trained_parameters'] / 1e6:.0f} M",
            "yes" if row["recompute"] else "no",
            f"{row['step_s']:.2f} s",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_gib']:.1f} GiB",
        )
        for row in results["rows"]
    ]
    return _table(("stage", "trained", "recompute", "optimizer step", "tokens/s", "peak memory"), rows)


def linear_table(results: Results) -> str:
    """The steps with the spreads that calls choose by themselves, and the bytes' time at the rate of a copy."""
    names = {"plain": "bf16", "int8": "INT8", "int4": "INT4, group 128"}
    peers = {row["batch"]: row["peer_ms"] for row in results["rows"] if row.get("peer_ms")}
    rows = [
        (
            f"{names[row['weight_format']]}, batch {row['batch']}",
            f"{row['products_ms']:.2f}",
            f"{row['chain_ms']:.2f}",
            f"{peers[row['batch']]:.2f}",
            f"{peers[row['batch']] / row['products_ms']:.1f} times",
            f"{row['floor_ms']:.2f}",
        )
        for row in results["rows"]
        if row["name"] == "linear_step"
    ]
    return _table(("weights, ms a step", "products", "chain", "cuBLAS, bf16", "faster", "floor"), rows)


def profile_table(results: Results) -> str:
    """Of each kind of kernel the time in which it was the last one running, in ms, and last the time in which none ran."""
    works = list(dict.fromkeys(row["work"] for row in results["rows"]))
    kinds = list(dict.fromkeys(row["kernels"] for row in results["rows"]))
    found = {(row["work"], row["kernels"]): row for row in results["rows"]}

    def cell(work: str, kind: str) -> str:
        row = found.get((work, kind))
        return f"{(row['path_us'] - row['idle_us']) / 1e3:.2f} ({row['count']})" if row else ""

    rows = [(kind, *(cell(work, kind) for work in works)) for kind in kinds]
    idle = [sum(row["idle_us"] for row in results["rows"] if row["work"] == work) for work in works]
    rows.append(("no kernel runs", *(f"{total / 1e3:.2f}" for total in idle)))
    walls = {row["work"]: row["wall_us"] for row in results["rows"]}
    rows.append(("one whole call, without the profiler", *(f"{walls[work] / 1e3:.2f}" for work in works)))
    return _table(("ms (kernels)", *works), rows)


def cpu_kernels_table(results: Results) -> str:
    rows = [
        (
            f"{row['tokens']:,} tokens, {row['threads']} threads",
            f"{row['ours_ms']:.3g} ({row['ours_ms_min']:.3g} to {row['ours_ms_max']:.3g})",
            f"{row['body_ms']:.3g} ({row['body_ms_min']:.3g} to {row['body_ms_max']:.3g})",
            f"{row['body_ms'] / row['ours_ms']:.1f} times",
        )
        for row in results["rows"]
    ]
    layer = results["rows"][0]["layer"]
    return _table(
        (f"scan of one layer in ONNX Runtime, {layer}, fp32, ms", "operator library", "function body", "faster"), rows
    )


def quantization_table(results: Results) -> str:
    rows = [
        (
            f"{row['model']}, {row['format']}",
            row["by"],
            f"{100 * row['accuracy']:.1f} %",
            f"{row['points_lost']:.1f} ({row['points_lost_low']:.1f} to {row['points_lost_high']:.1f})",
            f"{row['kl_mean']:.1e}",
            f"{row['kl_p99']:.1e}",
        )
        for row in results["rows"]
        if row["format"] != "fp32"
    ]
    header = ("model", "by", "right", "points lost (95 %)", "mean KL", "its 99th percentile")
    whole = ", ".join(f"{row['model']} {row['accuracy']:.1%}" for row in results["rows"] if row["format"] == "fp32")
    return f"{results['rows'][0]['prompts']:,} prompts; right as fp32: {whole}.\n\n" + _table(header, rows)


def drift_table(results: Results) -> str:
    rows = [
        (
            f"{row['model']}, {row['format']}",
            row["quantized"],
            f"{row['decoder_bytes'] / 1e6:.1f} MB",
            f"{row['early_error']:.1e}",
            f"{row['late_error']:.1e}",
            f"{row['growth']:.2f}",
            f"{row['late_error_over_fp16']:,.0f}",
        )
        for row in results["rows"]
    ]
    early, late = (f"error to step {results['rows'][0][key]:,}" for key in ("early_steps", "late_steps"))
    return _table(("model", "quantized", "decoder", early, late, "growth", "times fp16's"), rows)


def calibration_table(results: Results) -> str:
    rows = [
        (
            f"{row['name']}, {row['samples']} prompts of {row['tokens']:,} tokens in all",
            f"{row['bundle_bytes'] / 1e9:.2f} GB",
            f"{row['wall_s']:.0f} s",
            f"{row['peak_anonymous_mib'] * 2**20 / 1e9:.2f} GB",
        )
        for row in results["rows"]
    ]
    return _table((results["rows"][0]["model"], "bundle", "time", "peak memory, without page cache"), rows)


RENDERERS: dict[str, Callable[[Results], str]] = {
    "cpu-export": export_table,
    "cpu-kernels": cpu_kernels_table,
    "cpu-runtime-memory": memory_table,
    "digits-distillation": digits_table,
    "digits-quantization": quantization_table,
    "digits-state-drift": drift_table,
    "cpu-calibration": calibration_table,
    "digits-distillation:stages": stages_table,
    "digits-distillation:ablations": ablations_table,
    "rtx-engines": engines_table,
    "cpu-seeding": seeding_table,
    "h100-full-size-distillation": distillation_table,
    "h100-linear": linear_table,
    "h100-runtime-profile": profile_table,
}
GPU_KERNELS = "gpu-kernels"  # stands for the result files of all GPUs
KERNELS_FIGURE = "Latency of prefill and decode step beside the peers and the floor, and the fraction of the roofline"
GPU_FIGURE = "gpu-runtime:figure"
# The same for runs of whole models: by which files, and how.
OF_GPUS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "gpu-runtime": ("*-runtime.json", runtime_tables.runtime_table),
    "gpu-runtime:short": ("*-runtime.json", runtime_tables.short_table),
    "gpu-runtime:ratios": ("*-runtime.json", runtime_tables.ratios_table),
    "gpu-runtime:roofline": ("*-runtime.json", runtime_tables.roofline_table),
    "gpu-runtime:memory": ("*-runtime.json", runtime_tables.memory_table),
    "gpu-runtime:targets": ("*-runtime.json", runtime_tables.targets_table),
    "gpu-runtime:agreement": ("*-runtime.json", runtime_tables.agreement_table),
    "gpu-long-runs": ("*-long-runs.json", runtime_tables.long_runs_table),
}


def rendered(document: str, folder: Path = ROOT) -> str:
    """Return a document, which lies in `folder`, with its blocks as the result files have them; without results they say so."""

    def block(match: re.Match[str]) -> str:
        if match[2] == GPU_KERNELS:
            parts = [f"{rendered_file(path, kernels_table)}\n\n{figure(path)}" for path in kernel_plots.of_gpus()]
        elif match[2] == GPU_FIGURE:
            text = "Milliseconds of a decode step and memory against the tokens before it, of this project, PyTorch and the teacher"
            parts = [figure(path, text) for path in runtime_plots.of_gpus()]
        elif match[2] in OF_GPUS:
            pattern, render = OF_GPUS[match[2]]
            parts = [rendered_file(path, render) for path in sorted(RESULTS.glob(pattern))]
        else:
            path = RESULTS / (match[2].partition(":")[0] + ".json")
            parts = [rendered_file(path, RENDERERS[match[2]])] if path.is_file() else []
        return f"{match[1]}{chr(10).join(parts) or 'Not measured yet.'}\n{match[3]}"

    def rendered_file(path: Path, render: Callable[[Results], str]) -> str:
        results = json.loads(path.read_text(encoding="utf-8"))
        source = f"{results['where']}; `{results['command']}`; [{path.name}]({os.path.relpath(path, folder)})"
        return f"{render(results)}\n\n{source}"

    def figure(path: Path, text: str = KERNELS_FIGURE) -> str:
        return f"![{text}]({os.path.relpath(figures.figure_of(path), folder)})\n"

    return BLOCK.sub(block, document)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    differ = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if rendered(text, path.parent) != text:
            differ.append(name)
            if not options.check:
                path.write_text(rendered(text, path.parent), encoding="utf-8")
    if not options.check:
        figures.draw_stale(kernel_plots.of_gpus(), kernel_plots.draw, "*-kernels.svg")
        figures.draw_stale(runtime_plots.of_gpus(), runtime_plots.draw, "*-runtime.svg")
    undrawn = figures.stale([*kernel_plots.of_gpus(), *runtime_plots.of_gpus()])
    differ += [str(figures.figure_of(path).relative_to(ROOT)) for path in undrawn]
    if differ and options.check:
        sys.stderr.write(f"{', '.join(differ)} differ from benchmarks/results; run python benchmarks/tables.py\n")
    return 1 if differ and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
