"""`mmm-export plugins`: build the libraries of kernels, and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmm_export.commands.options import PATH, as_json_text
from mmm_export.packages import require


@click.group()
def plugins() -> None:
    """Build the kernels and the libraries that carry them into TensorRT and ONNX Runtime.

    \b
    Examples:
      mmm-export plugins build
      mmm-export plugins inspect build/orin/libmmm_tensorrt.so
    """


@plugins.command(name="build")
@click.option(
    "--cuda-arch",
    default="native",
    metavar="ARCH,..",
    help="GPU architectures: 87 or orin, 90 or hopper, ..; native asks the driver; none builds for the CPU alone.",
)
@click.option("--cross", type=click.Choice(["aarch64"]), help="Compile for a Jetson's processor on another machine.")
@click.option("--out", type=PATH, metavar="DIR", show_default="the cache", help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace DIR if it holds a build already.")
@click.option("--only", metavar="TARGET,..", help="kernels, tensorrt, onnxruntime, mini-host.")
@click.option("--tensorrt-include", type=PATH, metavar="DIR", help="Folder of NvInfer.h.")
@click.option("--onnxruntime-include", type=PATH, metavar="DIR", help="Folder of onnxruntime_c_api.h.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", show_default="all cores", help="Compilers at a time.")
@click.option("--verbose", "echo", is_flag=True, help="Print what cmake and the compilers say, on stderr.")
def build_libraries(cuda_arch: str, only: str | None, **rest: Any) -> None:
    """Compile the kernels and their libraries for TensorRT and ONNX Runtime.

    Needs cmake, a C++ compiler and, for a GPU, nvcc. A library whose headers are missing is left out with a note. The result
    lies in a cache, where `run` and `verify` find it, or in DIR.

    \b
    Examples:
      mmm-export plugins build
      mmm-export plugins build --cuda-arch orin --cross aarch64 --out build/orin
    """
    from mmm_export.plugins.architectures import parse_architectures
    from mmm_export.plugins.build import BuildOptions, build_plugins, parse_targets
    from mmm_export.progress import console_progress
    from mmm_export.rendering.plugins import plugin_build

    options = BuildOptions(
        architectures=parse_architectures(cuda_arch), only=parse_targets(only) if only is not None else None, **rest
    )
    click.echo(plugin_build(build_plugins(options, progress=console_progress())))


@plugins.command(name="inspect")
@click.argument("file", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_plugin(file: Path, as_json: bool) -> int:
    """Show what is in the FILE of a plugin library, and what would keep it from working.

    Versions, processor, GPU architectures, exported and needed symbols. The file is read and never loaded, so one for a Jetson
    can be inspected anywhere. Exit code 1 says that it cannot work.

    \b
    Example:
      mmm-export plugins inspect build/orin/libmmm_tensorrt.so
    """
    require("plugins")
    from mmm_export.plugins.inspection import has_errors, inspect_library
    from mmm_export.rendering.plugins import plugin_inspection

    data = inspect_library(file)
    click.echo(as_json_text(data) if as_json else plugin_inspection(data))
    return 1 if has_errors(data) else 0
