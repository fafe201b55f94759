"""`mmm-export bench`: how fast a model reads and writes, and what that takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from mmm_export.command_line import PROGRAM
from mmm_export.commands.options import PATH, as_json_text, inference_options
from mmm_export.packages import require

FORMATS = (".png", ".svg", ".pdf")


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--lengths",
    default="512,1K,8K",
    metavar="TOKENS,..",
    help="Prompt lengths; K is 1,000 and M 1,000,000.",
)
@click.option(
    "--batch",
    default="1",
    metavar="ROWS,..",
    help="Sequences decoded at once, each measured on its own; a bundle's only.",
)
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=64, metavar="TOKENS", help="Decode steps after each prompt."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, metavar="RUNS", help="Prefills of each length.")
@click.option(
    "--budget",
    "budget_s",
    type=float,
    default=60.0,
    metavar="SECONDS",
    help="Fewer prefills of a length where they would take longer than this; one at least.",
)
@click.option(
    "--chunk-tokens",
    type=click.IntRange(min=1),
    show_default="512, on a CUDA GPU 4096",
    metavar="TOKENS",
    help="Prompt tokens read at once.",
)
@inference_options
@click.option(
    "--bandwidth",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/S",
    show_default="asked of the GPU, or measured",
    help="Of the memory that holds the weights, for the roofline.",
)
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Also write everything as JSON.")
@click.option(
    "--plot", type=PATH, metavar="FILE", help="Also draw latency and memory against tokens: .png, .svg or .pdf."
)
@click.option("--no-check", is_flag=True, help="Skip comparing the files with their hashes: starts faster.")
def bench(bundle: Path, lengths: str, batch: str, **rest: Any) -> None:
    """Time a BUNDLE, or an engine: prefill and decode apart, with memory, energy and the roofline.

    Prompts are random tokens, and a prefill ends with its first token: its ms is the time to the first token. Times are medians, with
    what 10 and 90 percent of the runs took. The roofline is the least time in which the memory can deliver weights and state for a
    decode step, as a share of the time it took.

    With --batch 8 a decode step gives each of 8 sequences a token, which hold the same prompt; prompts are read one by one.

    \b
    Examples:
      mmm-export bench build/bundle --lengths 1K,8K,32K,103K --json bench.json --plot bench.svg
      mmm-export bench build/bundle --lengths 1K --batch 1,8 --provider cuda
    """
    from mmm_export.bench.device import describe, meters_for, runs_on
    from mmm_export.bench.measurement import BenchOptions, Measurement, batches_from_text, lengths_from_text, measure
    from mmm_export.bench.report import Bench, draw
    from mmm_export.errors import OptionError
    from mmm_export.output import output_file
    from mmm_export.progress import console_progress
    from mmm_export.rendering.bench import bench_table
    from mmm_export.runtime import BatchSession

    plot, json_file = rest["plot"], rest["json_file"]
    if plot is not None:
        require("bench")
        if plot.suffix not in FORMATS:
            raise OptionError(
                "the figure has no known format", found=plot.name, wanted=f"a name with {', '.join(FORMATS)}"
            )
    options = BenchOptions(lengths_from_text(lengths), rest["new_tokens"], rest["repeats"], rest["budget_s"])
    rows: list[Measurement] = []
    for number, count in enumerate(batches_from_text(batch)):  # each opened anew: memory is that of so many rows
        with (
            BatchSession.open(
                bundle,
                rows=count,
                providers=list(rest["providers"]) or None,
                chunk_tokens=rest["chunk_tokens"],
                threads=rest["threads"],
                check_content=number == 0 and not rest["no_check"],
                kernels=rest["kernels"],
            ) as session,
            meters_for(runs_on(session, rest["providers"]), rest["bandwidth"], os.getpid()) as meters,
        ):
            rows += measure(
                session,
                options,
                memory=meters.memory,
                energy=meters.energy,
                bandwidth=meters.bandwidth,
                progress=console_progress(),
            )
            model, backend = describe(session, options, rest["providers"], rest["threads"])
    result = Bench(
        model=model,
        backend=backend,
        device=meters.device,
        gpu=meters.gpu,
        memory_metric=meters.memory.metric,
        energy_metric=meters.energy.metric if meters.energy else None,
        bandwidth=meters.bandwidth,
        bandwidth_source=meters.bandwidth_source,
        command=(PROGRAM, *sys.argv[1:]),
        rows=tuple(rows),
    )
    click.echo(bench_table(result))
    if json_file is not None:
        with output_file(json_file) as path:
            path.write_text(as_json_text(result.to_json()) + "\n", encoding="utf-8")
    if plot is not None:
        with output_file(plot) as path:
            draw(result, path, plot.suffix.removeprefix("."))
