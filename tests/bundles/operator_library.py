"""Builds libmmm_onnxruntime.so for tests, once in a run."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import pytest

from mmm_export.errors import MissingPackageError
from mmm_export.plugins.build import BuildOptions, build_plugins
from mmm_export.plugins.onnxruntime_headers import fetch_headers, find_headers

LIBRARY_VARIABLE = "MMM_ONNXRUNTIME_LIBRARY"


@functools.cache
def operator_library() -> Path:
    """Return the library that MMM_ONNXRUNTIME_LIBRARY names, or build it for the CPU; skip where its header cannot be had."""
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named).absolute()
    try:
        headers = find_headers() or fetch_headers()
    except MissingPackageError as error:
        pytest.skip(f"no header of ONNX Runtime to compile with: {error.found}")
    folder = Path(tempfile.mkdtemp()) / "build"
    options = BuildOptions(only=("onnxruntime",), onnxruntime_include=headers, out=folder)
    return build_plugins(options).folder / "libmmm_onnxruntime.so"
