"""`mmm-export demo`: the whole flow on a tiny model."""

from __future__ import annotations

from pathlib import Path

import click

from mmm_export.command_line import run
from mmm_export.commands.options import PATH
from mmm_export.packages import require


@click.command()
@click.option("-o", "--output", type=PATH, default="demo-output", metavar="DIR", help="Folder to write.")
@click.pass_context
def demo(ctx: click.Context, output: Path) -> None:
    """Run the whole flow on a tiny random model and a photograph, in about a minute.

    Writes a checkpoint, exports it, verifies the bundle, and asks it about a picture. The weights are random, so the
    answer is nonsense; everything else is as with a trained model.

    \b
    Example:
      mmm-export demo --output demo-output
    """
    require("export")
    require("demo")
    from mmm_export.demo import run_demo

    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    run_demo(output, lambda arguments: run(group, arguments))
