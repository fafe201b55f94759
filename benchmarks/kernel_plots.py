"""Draws docs/<gpu>-kernels.svg from benchmarks/results/<gpu>-kernels.json: latency against tokens, and fraction of the roofline.

python benchmarks/kernel_plots.py            draws the figure of every such result file
python benchmarks/kernel_plots.py --check    exit code 1 when a figure was drawn from other results than those at hand
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs"

Row = dict[str, Any]
SERIES = (
    ("ours_us", "this project", "o-"),
    ("peer_us", "mamba-ssm's kernels, summed", "s-"),
    ("floor_us", "floor", "k--"),
)


def of_gpus() -> list[Path]:
    """List the result files with a roofline: those of GPUs."""
    return [path for path in sorted(RESULTS.glob("*-kernels.json")) if '"floor_us"' in path.read_text(encoding="utf-8")]


def digest(results: Path) -> str:
    return hashlib.sha256(results.read_bytes()).hexdigest()


def figure_of(results: Path) -> Path:
    return FIGURES / f"{results.stem}.svg"


def is_current(results: Path) -> bool:
    """Whether the figure was drawn from these results; it carries their hash, since drawings differ between versions."""
    figure = figure_of(results)
    return figure.is_file() and digest(results) in figure.read_text(encoding="utf-8")


def draw(results: Path) -> str:
    """Return the figure as SVG text."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mmm-export"  # the same results give the same file
    from matplotlib import pyplot

    data = json.loads(results.read_text(encoding="utf-8"))
    rows = [row for row in data["rows"] if row.get("dtype") == "bf16" and row.get("state_dtype") == "fp32"]
    prefill = sorted(_of(rows, "prefill_mixer", batch=1), key=lambda row: row["tokens"])
    decode = sorted(_of(rows, "decode_mixer"), key=lambda row: row["batch"])

    figure, (latency, step, fraction) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axes, points, key in ((latency, prefill, "tokens"), (step, decode, "batch")):
        for name, label, style in SERIES:
            drawn = [row for row in points if row.get(name)]
            axes.plot([row[key] for row in drawn], [row[name] for row in drawn], style, markersize=3, label=label)
        axes.set(xscale="log", yscale="log")
    latency.set(xlabel="tokens of a prefill", ylabel="µs a layer")
    step.set(xlabel="batch of a decode step", ylabel="µs a layer")
    step.set_xticks([row["batch"] for row in decode], [str(row["batch"]) for row in decode], minor=False)
    step.minorticks_off()
    step.set_ylim(bottom=min(row["floor_us"] for row in decode) / 1.5)

    for name, label, style in SERIES[:2]:
        drawn = [row for row in prefill if row.get(name)]
        fraction.plot(
            [row["tokens"] for row in drawn],
            [row["floor_us"] / row[name] for row in drawn],
            style,
            markersize=3,
            label=label,
        )
    fraction.set(xscale="log", xlabel="tokens of a prefill", ylabel="fraction of the roofline", ylim=(0, 1))
    for axes in (latency, step, fraction):
        axes.grid(visible=True, alpha=0.3)
    latency.legend(fontsize="small")
    figure.suptitle(f"Mixer of one layer, bf16, float32 state: {data['where']}", fontsize="medium")

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": f"{results.name} {digest(results)}"})
    pyplot.close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _of(rows: list[Row], name: str, **values: Any) -> list[Row]:
    wanted = {"name": name, **values}
    return [row for row in rows if row.get("floor_us") and all(row.get(k) == v for k, v in wanted.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = [results for results in of_gpus() if not is_current(results)]
    for results in stale:
        if options.check:
            sys.stderr.write(f"{figure_of(results).relative_to(ROOT)} is not drawn from {results.name}\n")
        else:
            figure_of(results).write_text(draw(results), encoding="utf-8")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
