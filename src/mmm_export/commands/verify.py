"""`mmm-export verify`: a bundle against the PyTorch model of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmm_export.commands.options import PATH, kernels_option
from mmm_export.packages import require


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--checkpoint", type=PATH, required=True, help="The checkpoint that the bundle was exported from.")
@click.option("--prompt", metavar="TEXT", show_default="a built-in one", help="Question to compare on.")
@click.option(
    "--image",
    "images",
    type=PATH,
    multiple=True,
    metavar="FILE",
    show_default="a pattern",
    help="Image to compare on; repeatable.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=8,
    metavar="TOKENS",
    help="Greedy tokens to compare after the prompt.",
)
@kernels_option
@click.option("--report", type=PATH, metavar="FILE", help="Also write the report as one HTML file, with plots.")
def verify(bundle: Path, checkpoint: Path, prompt: str | None, images: tuple[Path, ...], **rest: Any) -> int:
    """Compare a BUNDLE with the PyTorch model of its checkpoint, layer by layer.

    Compares embeddings, the output and states of every layer, logits, one long prefill against prefill and decode
    steps, and greedy tokens. Exit code 0 says that all are within their tolerances, 1 that something is not.

    \b
    Example:
      mmm-export verify build/bundle --checkpoint mmMamba-linear --report parity.html
    """
    require("export")
    from mmm_export import rendering
    from mmm_export.exporter.report import COLUMNS, html_report, table_rows, verdict_lines
    from mmm_export.exporter.verify import VerifyOptions, verify_bundle
    from mmm_export.output import output_file
    from mmm_export.progress import console_progress

    options = VerifyOptions(prompt=prompt, images=images, new_tokens=rest["new_tokens"], kernels=rest["kernels"])
    report = verify_bundle(bundle, checkpoint, options, progress=console_progress())
    click.echo(rendering.verification(COLUMNS, table_rows(report), verdict_lines(report)))
    if rest["report"]:  # after the table, which took minutes and is worth having even when the disk is full
        with output_file(rest["report"]) as path:
            path.write_text(html_report(report), encoding="utf-8")
    return 0 if report.passed else 1
