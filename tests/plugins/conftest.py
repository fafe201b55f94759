"""The CPU library under test, compiled once for all runs of the same sources."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from mmm_export.plugin_files import CACHE_VARIABLE
from mmm_export.plugins.build import BuildOptions, build_plugins
from mmm_export.plugins.library import KernelLibrary, load_library

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def kernel_folder() -> Path:
    """Folder of libmmm_kernels.so, without CUDA."""
    if shutil.which("cmake") is None or not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("needs cmake and a C++ compiler")
    # A cache of its own: what a test builds must not become the newest library that this user's programs find.
    with mock.patch.dict(os.environ, {CACHE_VARIABLE: str(REPOSITORY / "build" / "test-plugins")}):
        return build_plugins(BuildOptions(only=("kernels",))).folder


@pytest.fixture(scope="session")
def kernels(kernel_folder: Path) -> KernelLibrary:
    return load_library(kernel_folder / "libmmm_kernels.so")
