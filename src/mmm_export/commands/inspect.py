"""`mmm-export inspect`: what is in a checkpoint, a bundle, an engine or a state file."""

from __future__ import annotations

from pathlib import Path

import click

from mmm_export.commands.options import PATH, as_json_text


@click.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--layers", is_flag=True, help="Print every layer of an engine, by part, instead.")
def inspect(path: Path, as_json: bool, layers: bool) -> None:
    """Show what is in a checkpoint, a bundle, an engine or a state file.

    Dimensions, layer kinds, parameters, bytes of state for each sequence, files, and what is odd about a checkpoint.
    Reads no weights and needs no torch.

    \b
    Example:
      mmm-export inspect mmMamba-hybrid
    """
    from mmm_export import rendering
    from mmm_export.inspection import inspect as inspection_of

    data = inspection_of(path)
    if layers:
        from mmm_export.rendering.engine import layer_lines

        if data["kind"] != "engine":
            raise click.UsageError(f"--layers is for an engine, and {path} is a {data['kind']}")
        click.echo(layer_lines(data["layer_listing"]))
        return
    click.echo(as_json_text(data) if as_json else rendering.inspection(data))
