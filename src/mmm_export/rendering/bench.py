"""What a benchmark prints: a table as llama-bench has it, with latency, memory and roofline beside the rate."""

from __future__ import annotations

from mmm_export.bench.measurement import Measurement
from mmm_export.bench.report import Bench
from mmm_export.rendering.text import printable, size

HEADER = ("model", "size", "backend", "test", "t/s", "ms", "10 % to 90 %", "peak memory", "J/token", "roofline")


def bench_table(bench: Bench) -> str:
    """Render the rows as a Markdown table, and below it what the columns mean and how to repeat it."""
    model = f"{bench.model['name']} {bench.model['dtype']}"
    rows = [
        (model, size(bench.model["bytes"]), bench.backend["name"], *_cells(row, bench.model["new_tokens"]))
        for row in bench.rows
    ]
    widths = [max(len(printable(row[i])) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    lines = [
        "| " + " | ".join(printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (HEADER, tuple("-" * width for width in widths), *rows)
    ]
    notes = [f"device: {bench.device}", f"memory: {bench.memory_metric}"]
    if bench.energy_metric:
        notes.append(f"energy: {bench.energy_metric}")
    if bench.bandwidth:
        notes.append(f"roofline: of {bench.bandwidth / 1e9:,.0f} GB/s, {bench.bandwidth_source}")
    return "\n".join([*lines, "", *map(printable, notes)])


def _cells(row: Measurement, new_tokens: int) -> tuple[str, ...]:
    test = f"pp{row.tokens}" if row.test == "prefill" else f"tg{new_tokens} @ {row.tokens}"
    return (
        test,
        f"{row.tokens_per_s:,.1f}",
        f"{row.median_ms:,.2f}",
        f"{row.low_ms:,.2f} to {row.high_ms:,.2f}",
        size(row.peak_bytes),
        "" if row.joules_per_token is None else f"{row.joules_per_token:.3f}",
        "" if row.roofline is None else f"{row.roofline:.0%}".replace("%", " %"),
    )
