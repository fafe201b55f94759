"""`mmm-export doctor`: what this machine has and lacks."""

from __future__ import annotations

import click

from mmm_export.commands.options import as_json_text


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show what this machine has for each step, and how to get what it lacks.

    \b
    Example:
      mmm-export doctor
    """
    from mmm_export import rendering
    from mmm_export.doctor import examine, to_json

    found = examine()
    click.echo(as_json_text(to_json(found)) if as_json else rendering.findings(found))
