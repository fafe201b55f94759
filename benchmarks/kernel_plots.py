"""Draws docs/<gpu>-kernels.svg from benchmarks/results/<gpu>-kernels.json: latency against tokens, and fraction of the roofline.

`python benchmarks/tables.py` draws them together with the tables. A figure carries the hash of its results.
"""

from __future__ import annotations

import hashlib
import io
import json
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


def stale() -> list[Path]:
    """List the result files whose figure was drawn from others, or not at all."""
    return [results for results in of_gpus() if not is_current(results)]


def draw_stale() -> None:
    """Draw the figures of these, and remove those of results that are no longer there."""
    for results in stale():
        figure_of(results).write_text(draw(results), encoding="utf-8")
    wanted = {figure_of(results) for results in of_gpus()}
    for left_over in set(FIGURES.glob("*-kernels.svg")) - wanted:
        left_over.unlink()
