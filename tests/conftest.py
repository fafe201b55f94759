"""Shared fixtures. Every test can import `oracle`; nothing heavy is imported before a fixture is asked for."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

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
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same for all its worker processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Let the first worker that comes make `folder`; the others wait for it and take it."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            make(partial)
            partial.rename(folder)
    return folder


def key_of(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, shared_folder: Path) -> Callable[..., Path]:
    """Write a seeded checkpoint, once per run and set of arguments.

    `make_checkpoint("hybrid", dtype="fp32", seed=3)`: the first argument is a ModelSpec, or the kind of a tiny one
    ("linear", the default, "hybrid" or "teacher"); the others go to `write_checkpoint`. The folder is shared: copy it
    before changing it.
    """

    def make(spec: Any = "linear", **options: Any) -> Path:
        from mmm_export.model.testing import tiny_spec, write_checkpoint

        if isinstance(spec, str):
            spec = tiny_spec(kinds=spec)

        def write(folder: Path) -> None:
            write_checkpoint(folder, spec, **options)

        if "extra" in options:  # repr shortens the arrays in it
            write(folder := tmp_path_factory.mktemp("checkpoint") / "checkpoint")
            return folder
        return make_once(shared_folder / f"checkpoint-{key_of(spec, sorted(options.items()))}", write)

    return make


@pytest.fixture(scope="session")
def quick_exports() -> Iterator[None]:
    """Let PyTorch's exporter read its table of operators once: reading it anew for every graph takes a fifth of a tiny export."""
    import torch.onnx  # noqa: F401 - the module below needs it
    from onnxscript._framework_apis import torch_2_5

    with mock.patch.object(torch_2_5, "get_torchlib_ops", functools.cache(torch_2_5.get_torchlib_ops)):
        yield


@pytest.fixture(scope="session")
def make_bundle(make_checkpoint: Callable[..., Path], shared_folder: Path, quick_exports: None) -> Callable[..., Path]:
    """Export a checkpoint, once per run and set of arguments.

    `make_bundle(checkpoint_folder, dtype="fp16")`: the keywords are fields of ExportOptions. The folder is shared: copy it
    before changing it.
    """

    def make(checkpoint: Path, **options: Any) -> Path:
        from mmm_export.exporter.bundle import ExportOptions, export_bundle
        from mmm_export.onnxruntime_support import best_body

        options.setdefault("body", best_body())

        def export(folder: Path) -> None:
            export_bundle(checkpoint, folder, ExportOptions(**options))

        return make_once(shared_folder / f"bundle-{key_of(str(checkpoint), sorted(options.items()))}", export)

    return make
