"""Shared fixtures. Every test can import `oracle`; nothing heavy is imported before a fixture is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _no_library_of_this_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test computes must not depend on the libraries that a developer has built."""
    before = os.environ.get("MMM_EXPORT_CACHE")
    os.environ["MMM_EXPORT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MMM_EXPORT_CACHE"]
    else:
        os.environ["MMM_EXPORT_CACHE"] = before


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a seeded checkpoint, once per session and set of arguments.

    `make_checkpoint("hybrid", dtype="fp32", seed=3)`: the first argument is a ModelSpec, or the kind of a tiny one
    ("linear", the default, "hybrid" or "teacher"); the others go to `write_checkpoint`. The folder is shared: copy it
    before changing it.
    """
    made: dict[str, Path] = {}

    def make(spec: Any = "linear", **options: Any) -> Path:
        from mmm_export.model.testing import tiny_spec, write_checkpoint

        if isinstance(spec, str):
            spec = tiny_spec(kinds=spec)
        key = repr((spec, sorted(options.items())))
        if key not in made or "extra" in options:  # repr shortens the arrays in `extra`
            folder = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
            write_checkpoint(folder, spec, **options)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_bundle(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a checkpoint, once per session and set of arguments.

    `make_bundle(checkpoint_folder, dtype="fp16")`: the keywords are fields of ExportOptions. The folder is shared: copy it
    before changing it.
    """
    made: dict[str, Path] = {}

    def make(checkpoint: Path, **options: Any) -> Path:
        from mmm_export.exporter.bundle import ExportOptions, export_bundle
        from mmm_export.onnxruntime_support import best_body

        options.setdefault("body", best_body())
        key = repr((checkpoint, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("bundle") / "bundle"
            export_bundle(checkpoint, folder, ExportOptions(**options))
            made[key] = folder
        return made[key]

    return make
