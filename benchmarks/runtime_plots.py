"""Draws docs/<gpu>-runtime.svg from benchmarks/results/<gpu>-runtime.json: latency of a decode step and memory against tokens.

`python benchmarks/tables.py` draws it together with the tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from figures import RESULTS, new_pyplot, svg_text

Row = dict[str, Any]
SERIES = (
    ("teacher-hf-eager", "teacher, growing cache, eager attention", "v:", "tab:red"),
    ("teacher-hf-flash", "teacher, growing cache, flash attention", "^:", "tab:orange"),
    ("teacher-static-cudnn", "teacher, static cache, cuDNN, CUDA graph", "s--", "tab:purple"),
    ("triton", "linear, PyTorch, mamba-ssm's operators, CUDA graph", "D--", "tab:gray"),
    ("ours", "linear, this project", "o-", "tab:blue"),
)


def of_gpus() -> list[Path]:
    return sorted(RESULTS.glob("*-runtime.json"))


def draw(results: Path) -> str:
    """Return the figure as SVG text."""
    pyplot = new_pyplot()
    data = json.loads(results.read_text(encoding="utf-8"))
    rows = [row for row in data["rows"] if row["name"] in ("decode", "prefill") and "missing" not in row]
    figure, (latency, memory) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for contender, label, style, colour in SERIES:
        steps = {row["tokens"]: row for row in rows if _is(row, "decode", contender)}
        tokens = sorted(steps)
        options = {"color": colour, "markersize": 4, "label": label}
        latency.plot(tokens, [steps[t]["ms"] for t in tokens], style, **options)
        memory.plot(tokens, [steps[t]["device_bytes"] / 2**30 for t in tokens], style, **options)
    latency.set(xlabel="tokens in the context", ylabel="ms a decode step, batch 1", xscale="log", yscale="log")
    memory.set(xlabel="tokens in the context", ylabel="GiB while decoding", xscale="log", ylim=(0, None))
    latency.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"], minor=False)
    ticks = sorted({row["tokens"] for row in rows})
    for axes in (latency, memory):
        axes.set_xticks(ticks, [f"{t / 1000:.0f}K" for t in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    latency.legend(fontsize="x-small")
    figure.suptitle(f"2.7B parameters, bf16, random weights: {data['where']}", fontsize="medium")
    return svg_text(figure, results)


def _is(row: Row, name: str, contender: str) -> bool:
    return bool(row["name"] == name and row["contender"] == contender and row["batch"] == 1)
