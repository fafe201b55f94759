"""A TensorRT that builds here, a device that is not here, and bundles."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmm_export.exporter.trt import device, planning
from mmm_export.exporter.trt.device import LocalDevice

ORIN = LocalDevice("this Jetson", 87, 16 << 30, shared_memory=True)


@pytest.fixture(scope="session")
def tiny_bundle(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """Export a tiny model of a kind and number format."""
    return lambda kind="linear", dtype="fp16": make_bundle(make_checkpoint(kind), dtype=dtype)


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
