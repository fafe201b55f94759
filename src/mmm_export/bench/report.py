"""What a benchmark writes: JSON with everything that is needed to repeat it, and a figure of latency and memory."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mmm_export import __version__
from mmm_export.bench.measurement import Measurement
from mmm_export.bench.meters import GpuFacts

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy")


@dataclass(frozen=True)
class Bench:
    """A whole benchmark.

    Attributes:
        model: name, number format, layers and bytes of the weights.
        backend: what ran it, with its kernels and threads.
        device: processor or GPU.
        gpu: what NVML tells; None on a CPU, or without NVML.
        memory_metric: of what the peaks are.
        energy_metric: likewise; None when nothing tells.
        bandwidth: bytes a second behind the roofline, and where it comes from.
        command: as it was typed.
        rows: the measurements.
    """

    model: dict[str, Any]
    backend: dict[str, Any]
    device: str
    gpu: GpuFacts | None
    memory_metric: str
    energy_metric: str | None
    bandwidth: float | None
    bandwidth_source: str
    command: tuple[str, ...]
    rows: tuple[Measurement, ...]

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["command"] = shlex.join(self.command)
        return {
            "schema": 1,
            "kind": "bench",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            **data,
        }


def versions() -> dict[str, str]:
    """Name the versions that a figure depends on."""
    found = {"mmm-export": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Name the processor of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.machine()


def draw(bench: Bench, path: Path, form: str) -> None:
    """Draw latency of a decode step and peak memory against the tokens before it, as "png", "svg" or "pdf"."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (latency, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for batch in sorted({row.batch for row in bench.rows}):
        decode, prefill = (_by_tokens(bench.rows, test, batch) for test in ("decode", "prefill"))
        tokens = [row.tokens for row in decode]
        of_rows = f", {batch} rows" if batch > 1 else ""
        latency.plot(tokens, [row.median_ms for row in decode], "o-", label=f"decode step{of_rows}")
        latency.fill_between(tokens, [row.low_ms for row in decode], [row.high_ms for row in decode], alpha=0.25)
        if batch == min(row.batch for row in bench.rows):  # prompts are read one by one, however many rows there are
            latency.plot(tokens, [row.median_ms / row.tokens for row in prefill], "s--", label="prefill, a token")
        peaks = np.array([[row.peak_bytes for row in rows] for rows in (prefill, decode)]).max(axis=0) / 2**30
        memory.plot(tokens, peaks, "o-", label=f"{batch} rows" if batch > 1 else "1 row")
    latency.set(xlabel="tokens in the context", ylabel="ms", ylim=(0, None))
    latency.legend()
    memory.set(xlabel="tokens in the context", ylabel="GiB at most", ylim=(0, None), title=bench.memory_metric)
    memory.title.set_fontsize("small")
    if any(row.batch > 1 for row in bench.rows):
        memory.legend()
    for axes in (latency, memory):
        axes.set_xscale("log")
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(f"{bench.model['name']}, {bench.model['dtype']}: {bench.device}", fontsize="medium")
    figure.savefig(path, format=form)
    pyplot.close(figure)


def _by_tokens(rows: Sequence[Measurement], test: str, batch: int) -> list[Measurement]:
    return sorted((row for row in rows if (row.test, row.batch) == (test, batch)), key=lambda row: row.tokens)
