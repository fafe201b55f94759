"""What a benchmark prints: a table as llama-bench has it, with latency, memory and roofline beside the rate."""

from __future__ import annotations

from mmm_export.bench.measurement import Measurement
from mmm_export.bench.report import Bench
from mmm_export.rendering.text import printable, size

FIRST, BATCH = ("model", "size", "backend", "test"), ("batch", "t/s each")
LAST = ("t/s", "ms", "10 % to 90 %", "peak memory", "J/token", "roofline")


def bench_table(bench: Bench) -> str:
    """Render the rows as a Markdown table, and below it what the columns mean and how to repeat it."""
    has_batches = any(row.batch > 1 for row in bench.rows)
    header = (*FIRST, *(BATCH if has_batches else ()), *LAST)
    model = f"{bench.model['name']} {bench.model['dtype']}"
    rows = [
        (
            *(model, size(bench.model["bytes"]), bench.backend["name"], _test(row, bench.model["new_tokens"])),
            *((str(row.batch), f"{row.tokens_per_s_each:,.1f}") if has_batches else ()),
            *_cells(row),
        )
        for row in bench.rows
    ]
    widths = [max(len(printable(row[i])) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "| " + " | ".join(printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, tuple("-" * width for width in widths), *rows)
    ]
    notes = [f"device: {bench.device}", f"memory: {bench.memory_metric}"]
    notes.append("ms: of pp, the time to the first token; of tg, of a decode step")
    if has_batches:
        notes.append("batch: sequences decoded in one step; t/s of all, and of each; prompts (pp) are read one by one")
    if bench.energy_metric:
        notes.append(f"energy: {bench.energy_metric}")
    if bench.bandwidth:
        notes.append(f"roofline: of {bench.bandwidth / 1e9:,.0f} GB/s, {bench.bandwidth_source}")
    return "\n".join([*lines, "", *map(printable, notes)])


def _test(row: Measurement, new_tokens: int) -> str:
    return f"pp{row.tokens}" if row.test == "prefill" else f"tg{new_tokens} @ {row.tokens}"


def _cells(row: Measurement) -> tuple[str, ...]:
    return (
        f"{row.tokens_per_s:,.1f}",
        f"{row.median_ms:,.2f}",
        f"{row.low_ms:,.2f} to {row.high_ms:,.2f}",
        size(row.peak_bytes),
        "" if row.joules_per_token is None else f"{row.joules_per_token:.3f}",
        "" if row.roofline is None else f"{row.roofline:.0%}".replace("%", " %"),
    )
