"""`mmm-export onnx`: from a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmm_export.commands.options import PATH
from mmm_export.packages import require
from mmm_export.spec import MOST_TOKENS


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="BUNDLE", help="Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    help="Number format of weights and activations; SSM states stay float32. Use fp32 or fp16 for a CPU.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1, max=MOST_TOKENS),
    default=4096,
    metavar="TOKENS",
    help="KV cache capacity of a model with attention layers; each step costs time by it. A linear model has none and no limit.",
)
@click.option(
    "--body",
    type=click.Choice(["linear-attention", "standard"]),
    default="linear-attention",
    help="How the scan is spelt for a runtime without our operator: around ONNX Runtime's LinearAttention, "
    "or in standard operators alone.",
)
@click.option(
    "--standard-ops",
    is_flag=True,
    help="Write opset-27 LinearAttention and CausalConvWithState nodes instead of our operator. ONNX Runtime loads "
    "them only with ALLOW_RELEASED_ONNX_OPSET_ONLY=0 in its environment; the bundle's manifest says so.",
)
@click.option(
    "--logits",
    type=click.Choice(["last", "all"]),
    default="last",
    help="Positions that the decoder gives logits for.",
)
@click.option(
    "--rope-scaling",
    type=click.Choice(["ignore", "teacher"]),
    default="ignore",
    help="Rotary scaling of attention layers: none, as the released hybrid computes, or what config.json asks for.",
)
@click.option(
    "--golden",
    is_flag=True,
    help="Also run PyTorch on two prompts and keep what it computed, so that a device without PyTorch can verify against it.",
)
@click.option(
    "--fuse",
    is_flag=True,
    help="Write the decoder's products, with norms, SiLU and additions inside, as operators of our kernel library, which then must "
    "be there (mmm-export plugins build): fewer and faster kernels in a decode step.",
)
@click.option("--force", is_flag=True, help="Replace BUNDLE if it is a bundle already.")
def onnx(checkpoint: Path, output: Path, force: bool, **options: Any) -> None:
    """Export a CHECKPOINT folder to a BUNDLE of ONNX graphs.

    The bundle holds vision, embedding and decoder graphs, their weights, the tokenizer and a manifest with the hash of
    every file. It is written under a temporary name and renamed when complete.

    \b
    Example:
      mmm-export onnx mmMamba-linear -o build/bundle --dtype fp16
    """
    require("export")
    from mmm_export import rendering
    from mmm_export.exporter.bundle import ExportOptions, export_bundle
    from mmm_export.progress import console_progress

    manifest = export_bundle(checkpoint, output, ExportOptions(**options), force=force, progress=console_progress())
    click.echo(rendering.export_summary(output, manifest), err=True)
