"""What commands share: types and options of their command lines, and how they print data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

PATH: Any = click.Path(path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any])


def kernels_option(command: Command) -> Command:
    """Give a command the option --kernels."""
    return click.option(
        "--kernels",
        default="auto",
        metavar="auto|none|FILE",
        help="What computes the scan: the library that `mmm-export plugins build` made, if it did; the function in the "
        "bundle; or this library.",
    )(command)


def max_tiles_option(command: Command) -> Command:
    """Give a command that reads images the option --max-tiles."""
    return click.option(
        "--max-tiles",
        type=click.IntRange(min=1),
        metavar="TILES",
        show_default="the model's own limit",
        help="Cut each image into at most so many.",
    )(command)


def provider_option(command: Command) -> Command:
    """Give a command the option --provider."""
    return click.option(
        "--provider",
        "providers",
        multiple=True,
        metavar="NAME",
        show_default="cpu",
        help="ONNX Runtime provider, such as cuda; repeatable.",
    )(command)


def inference_options(command: Command) -> Command:
    """Give a command the options of whatever runs a bundle: --threads, --provider and --kernels, in this order."""
    command = provider_option(kernels_option(command))
    return click.option(
        "--threads", type=click.IntRange(min=1), metavar="THREADS", show_default="all cores", help="CPU threads."
    )(command)


def as_json_text(data: object) -> str:
    """Write what a command prints with --json."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=str)
