"""Builds libmmm_tensorrt.so and the mini host for tests, once for all runs of the same sources."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from unittest import mock

import pytest

from mmm_export.errors import BuildError
from mmm_export.plugin_files import CACHE_VARIABLE
from mmm_export.plugins.build import BuildOptions, build_plugins
from mmm_export.plugins.headers import find_tensorrt
from tensorrt_tools.runtimes import header_folder

FOLDER_VARIABLE = "MMM_TENSORRT_PLUGIN_DIR"
_REPOSITORY = Path(__file__).parents[2]


def plugin_folder() -> Path:
    """Return the folder of libmmm_tensorrt.so and mmm_mini_host: the one that MMM_TENSORRT_PLUGIN_DIR names, or a CPU build."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).absolute() if named else build_folder()


@functools.cache
def build_folder(architectures: tuple[int, ...] = (), cross: str | None = None) -> Path:
    """Build the plugin, the mini host and, for GPUs, the kernel library, unless an earlier run did.

    Skips where a compiler for the target or a part of CUDA that pip brings is missing, with its name; any other failure is one.
    """
    only = ("kernels", "tensorrt", "mini-host") if architectures else ("tensorrt", "mini-host")
    options = BuildOptions(architectures, cross, only=only, tensorrt_include=tensorrt_headers())
    # A cache of its own: a build for tests must not become the newest one that this user's programs find.
    with mock.patch.dict(os.environ, {CACHE_VARIABLE: str(_REPOSITORY / "build" / "test-plugins")}):
        try:
            return build_plugins(options).folder
        except BuildError as error:
            if "not found" in error.what:
                pytest.skip(f"{error.what}; {error.hint}")
            raise


def tensorrt_headers() -> Path:
    """Return the folder of NvInfer.h, or skip."""
    found = find_tensorrt(None, os.uname().machine)
    folder = found.folder if found else header_folder()
    if folder is None:
        pytest.skip("no headers of TensorRT; fetch them with: python tests/tensorrt_tools/runtimes.py")
    return folder


def plugin_library() -> Path:
    return plugin_folder() / "libmmm_tensorrt.so"


def mini_host() -> Path:
    return plugin_folder() / "mmm_mini_host"
