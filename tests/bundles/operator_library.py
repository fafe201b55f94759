"""Builds libmmm_onnxruntime.so for tests, once in a run."""

from __future__ import annotations

import fcntl
import functools
import os
from pathlib import Path
from unittest import mock

import pytest

from mmm_export.errors import MissingPackageError
from mmm_export.plugin_files import CACHE_VARIABLE
from mmm_export.plugins.build import BuildOptions, build_plugins
from mmm_export.plugins.onnxruntime_headers import fetch_headers, find_headers

LIBRARY_VARIABLE = "MMM_ONNXRUNTIME_LIBRARY"
_REPOSITORY = Path(__file__).parents[2]


@functools.cache
def operator_library() -> Path:
    """Return the library that MMM_ONNXRUNTIME_LIBRARY names, or build it for the CPU; skip where its header cannot be had."""
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named).absolute()
    # A cache of its own, kept between runs: compiling takes ten seconds, and fetching the header asks a mirror.
    cache = _REPOSITORY / "build" / "test-plugins"
    cache.mkdir(parents=True, exist_ok=True)
    with mock.patch.dict(os.environ, {CACHE_VARIABLE: str(cache)}), (cache / "headers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of a run must not unpack into one folder
        try:
            headers = find_headers() or fetch_headers()
        except MissingPackageError as error:
            pytest.skip(f"no header of ONNX Runtime to compile with: {error.found}")
        folder = build_plugins(BuildOptions(only=("onnxruntime",), onnxruntime_include=headers)).folder
    return folder / "libmmm_onnxruntime.so"
