"""Draws docs/<gpu>-kernels.svg from benchmarks/results/<gpu>-kernels.json: latency against tokens, and fraction of the roofline.

`python benchmarks/tables.py` draws them together with the tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from figures import RESULTS, new_pyplot, svg_text

Row = dict[str, Any]
SERIES = (
    ("ours_us", "this project", "o-"),
    ("peer_us", "mamba-ssm's kernels, summed", "s-"),
    ("floor_us", "floor", "k--"),
)


def of_gpus() -> list[Path]:
    """List the result files with a roofline: those of GPUs."""
    return [path for path in sorted(RESULTS.glob("*-kernels.json")) if '"floor_us"' in path.read_text(encoding="utf-8")]


def draw(results: Path) -> str:
    """Return the figure as SVG text."""
    pyplot = new_pyplot()
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

    return svg_text(figure, results)


def _of(rows: list[Row], name: str, **values: Any) -> list[Row]:
    wanted = {"name": name, **values}
    return [row for row in rows if row.get("floor_us") and all(row.get(k) == v for k, v in wanted.items())]
