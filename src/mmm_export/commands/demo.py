"""`mmm-export demo`: the whole flow on a small trained model."""

from __future__ import annotations

from pathlib import Path

import click

from mmm_export.command_line import run
from mmm_export.commands.options import PATH
from mmm_export.packages import require


@click.command()
@click.option("-o", "--output", type=PATH, default="demo-output", metavar="DIR", help="Folder to write.")
@click.option(
    "--model", type=click.Choice(["linear", "hybrid", "teacher"]), default="linear", help="Which of the trained models."
)
@click.pass_context
def demo(ctx: click.Context, output: Path, model: str) -> None:
    """Run the whole flow on a small trained model, in about a minute.

    Exports the checkpoint, verifies the bundle, counts right answers, and asks about pictures of handwritten digits that the
    model has never seen. The terminal shows question, answer and truth; DIR/demo.html shows the pictures too.

    \b
    Example:
      mmm-export demo --output demo-output
    """
    require("export")
    require("demo")
    from mmm_export.demo import run_demo

    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    run_demo(output, model, lambda arguments: run(group, arguments))
