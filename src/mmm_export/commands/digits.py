"""`mmm-export digits`: the demo task as files."""

from __future__ import annotations

from pathlib import Path

import click

from mmm_export.commands.options import PATH
from mmm_export.packages import require


@click.command()
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder to write.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", help="Which samples.")
@click.option("--samples", type=click.IntRange(min=1), default=10_000, metavar="SAMPLES", help="How many.")
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="NUMBER", help="Other seed, other samples.")
@click.option("--force", is_flag=True, help="Replace a folder that this command wrote.")
def digits(output: Path, split: str, samples: int, seed: int, force: bool) -> None:
    """Write the demo task: pictures with handwritten digits, and a question with its answer about each.

    Makes data.jsonl in the form that `mmm-export evaluate --task` reads, and PNG pictures. Training and test samples share
    no handwriting, no photograph and no layout.

    \b
    Example:
      mmm-export digits -o digits-train --samples 10000
    """
    require("demo")
    from mmm_export.distillation.digits.assets import packaged_assets
    from mmm_export.distillation.digits.files import DATA_FILE, write_samples
    from mmm_export.distillation.digits.samples import samples as drawn
    from mmm_export.output import output_folder
    from mmm_export.progress import console_progress

    with output_folder(output, force=force, marker=DATA_FILE) as folder:
        progress = console_progress()
        with progress.stage(f"write {samples} samples") as advance:
            wanted = drawn("train" if split == "train" else "test", samples, seed)
            write_samples(folder, wanted, packaged_assets(), advance)
