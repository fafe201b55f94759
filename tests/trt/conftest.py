"""A TensorRT that builds here, a device that is not here, and bundles."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmm_export.exporter.trt import device, planning
from mmm_export.exporter.trt.device import LocalDevice

ORIN = LocalDevice("this Jetson", 87, 16 << 30, shared_memory=True)


@pytest.fixture(scope="session")
def tiny_bundle(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Export a tiny model of a kind and number format: into a folder of these tests, whose engines hold hard links to its weights."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str = "linear", dtype: str = "fp16") -> Path:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("bundles") / f"{kind}-{dtype}"
            shutil.copytree(make_bundle(make_checkpoint(kind), dtype=dtype), folder)
            made[kind, dtype] = folder
        return made[kind, dtype]

    return make


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the stand-in for TensorRT importable, of a version and with a failure, on a device."""
    folder = str(Path(__file__).with_name("stand_in"))

    def use(version: str = "10.3.0.30", failure: str = "", here: LocalDevice | None = ORIN) -> None:
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)
        monkeypatch.setenv("FAKE_TENSORRT", failure)
        sys.modules.pop("tensorrt", None)
        put_device(monkeypatch, here)

    return use


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    put_device(monkeypatch, None)


def put_device(monkeypatch: pytest.MonkeyPatch, here: LocalDevice | None) -> None:
    for module in (device, planning):
        monkeypatch.setattr(module, "local_device", lambda: here)
