"""`mmm-export trt`: from a bundle to an engine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import click

from mmm_export.commands.options import PATH
from mmm_export.packages import require


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, metavar="ENGINE", help="Folder to write; not needed for --dry-run.")
@click.option(
    "--target",
    default="auto",
    metavar="NAME",
    help="orin-jp62, orin-jp72, thor, rtx or datacenter; auto takes what this machine has.",
)
@click.option(
    "--flavor",
    type=click.Choice(["tensorrt", "tensorrt-rtx", "auto"]),
    default="auto",
    help="Library that builds and runs the engine; auto takes the target's.",
)
@click.option("--max-batch", type=click.IntRange(min=1, max=1024), default=1, metavar="ROWS", help="Rows at a time.")
@click.option(
    "--prefill-tokens",
    default="1,512,2048",
    metavar="MIN,OPT,MAX",
    help="Prompt tokens of one call: least, typical, most. Longer prompts are read in several calls.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    show_default="the bundle's",
    help="Capacity of the KV caches of attention layers, at most the bundle's. A linear model has none.",
)
@click.option(
    "--max-tiles", type=click.IntRange(min=1, max=1024), default=13, metavar="TILES", help="Image tiles of one call."
)
@click.option(
    "--workspace", type=click.IntRange(min=16), default=2048, metavar="MIB", help="Most scratch memory of the builder."
)
@click.option(
    "--max-alloc-mib",
    type=click.IntRange(min=0),
    metavar="MIB",
    show_default="512 for Jetson Orin, else none",
    help="Cut the LM head along the vocabulary into parts of at most this; 0 leaves it whole.",
)
@click.option(
    "--compute-capability",
    metavar="NUMBER,..",
    show_default="the device's; 8.0,8.6,8.9,12.0 for rtx",
    help="Devices that a TensorRT-RTX engine runs on.",
)
@click.option(
    "--device-memory",
    type=click.IntRange(min=1),
    metavar="MIB",
    show_default="detected",
    help="Memory of the device; what does not fit is refused before the build.",
)
@click.option(
    "--plugin", type=PATH, metavar="FILE", show_default="the one built here", help="libmmm_tensorrt.so to use."
)
@click.option(
    "--any-plugin", is_flag=True, help="Take a plugin without machine code for the device, to be replaced there."
)
@click.option(
    "--embed-plugin", is_flag=True, help="Put the plugin into the plan; whoever loads it must allow host code."
)
@click.option("--timing-cache", type=PATH, metavar="FILE", help="Read and write tactic timings; not with TensorRT-RTX.")
@click.option(
    "--dry-run", is_flag=True, help="Print the plan and build nothing; needs no TensorRT if a target is named."
)
@click.option(
    "--onnx-only",
    is_flag=True,
    help="Write the lowered graphs instead of engines: for trtexec, Polygraphy and ONNX Runtime. Needs no TensorRT if a "
    "target is named.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--force", is_flag=True, help="Replace ENGINE if it is an engine already.")
def trt(
    bundle: Path, output: Path | None, dry_run: bool, onnx_only: bool, as_json: bool, force: bool, **rest: Any
) -> None:
    """Build TensorRT engines from a BUNDLE.

    One decoder engine with two profiles, prefill and decode, and one copy of the weights; a vision engine; the text embedding as a
    file to be mapped. The plan comes first: memory by part, the largest allocation, and how fast decoding can be at best.

    TensorRT builds on the device that runs the engine. TensorRT-RTX builds anywhere, for several devices at a time.

    \b
    Examples:
      mmm-export trt build/bundle --target orin-jp62 --dry-run
      mmm-export trt build/bundle -o build/engine --max-batch 2 --prefill-tokens 1,256,1024
      mmm-export trt build/bundle -o build/rtx --target rtx --compute-capability 8.6,8.9
    """
    if output is None and not dry_run:
        raise click.UsageError("give -o ENGINE, or --dry-run")
    require("trt")
    from mmm_export.commands.options import as_json_text
    from mmm_export.engine_plugin import choose_plugin
    from mmm_export.exporter.trt.engine import build_engine
    from mmm_export.exporter.trt.planning import EngineOptions, plan_engine
    from mmm_export.exporter.trt.profiles import ProfileOptions, parse_range
    from mmm_export.exporter.trt.targets import parse_capabilities
    from mmm_export.progress import console_progress
    from mmm_export.rendering.engine import engine_summary, plan_as_json, plan_text

    capabilities = rest["compute_capability"]
    options = EngineOptions(
        target=rest["target"],
        flavor=rest["flavor"],
        profiles=ProfileOptions(parse_range(rest["prefill_tokens"]), rest["max_batch"], rest["max_tiles"]),
        max_tokens=rest["max_tokens"],
        workspace_mib=rest["workspace"],
        capabilities=None if capabilities is None else parse_capabilities(capabilities),
        embed_plugin=rest["embed_plugin"],
        timing_cache=rest["timing_cache"],
        max_alloc_mib=rest["max_alloc_mib"],
        device_memory_mib=rest["device_memory"],
    )
    plan = plan_engine(bundle, options, dry_run=dry_run or onnx_only)
    click.echo(as_json_text(plan_as_json(plan)) if as_json else plan_text(plan), err=not (dry_run or as_json))
    if dry_run or output is None:
        return
    if onnx_only:
        from mmm_export.exporter.trt.lowered_folder import write_lowered_graphs

        write_lowered_graphs(plan, output, force=force, progress=console_progress())
        click.echo(f"wrote {output}: the graphs for {plan.target.name}, and the decoder for ONNX Runtime", err=True)
        return
    plugin = None
    if plan.manifest.model.mamba_layers:
        machine = platform.machine()
        plugin = choose_plugin(rest["plugin"], plan.capabilities, plan.flavor, machine, any_device=rest["any_plugin"])
    manifest = build_engine(plan, output, plugin, force=force, progress=console_progress())
    click.echo(engine_summary(output, manifest), err=True)
