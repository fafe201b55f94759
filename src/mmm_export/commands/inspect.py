"""`mmm-export inspect`: what is in a checkpoint, a bundle or a state file."""

from __future__ import annotations

from pathlib import Path

import click

from mmm_export.commands.options import PATH, as_json_text


@click.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what is in a checkpoint, a bundle or a state file.

    Dimensions, layer kinds, parameters, bytes of state for each sequence, files, and what is odd about a checkpoint.
    Reads no weights and needs no torch.

    \b
    Example:
      mmm-export inspect mmMamba-hybrid
    """
    from mmm_export import rendering
    from mmm_export.inspection import inspect as inspection_of

    data = inspection_of(path)
    click.echo(as_json_text(data) if as_json else rendering.inspection(data))
