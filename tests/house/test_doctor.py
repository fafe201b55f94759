"""`mmm-export doctor` finds what engines need under the names that they have on devices."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmm_export import doctor


def found(name: str) -> str | None:
    return next(finding.found for finding in doctor.examine() if finding.name == name)


def package(folder: Path, module: str, distribution: str, version: str) -> None:
    place = folder.joinpath(*module.split("."))
    place.mkdir(parents=True)
    for each in (place, *place.parents):
        if each == folder:
            break
        (each / "__init__.py").write_text("raise ImportError('never imported')" if each == place else "")
    info = folder / f"{distribution}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("name", "module", "distribution"),
    [
        ("tensorrt", "tensorrt", "tensorrt"),
        ("tensorrt", "tensorrt", "tensorrt_cu12"),
        ("tensorrt-rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_cu13_bindings"),
        ("cuda-bindings", "cuda.bindings.driver", "cuda_bindings"),
    ],
)
def test_package_is_found_without_importing_it(
    name: str, module: str, distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, module, distribution, "10.3.0")
    monkeypatch.syspath_prepend(tmp_path)
    for loaded in [m for m in sys.modules if m.split(".")[0] in ("tensorrt", "tensorrt_rtx", "cuda")]:
        monkeypatch.delitem(sys.modules, loaded)
    assert found(name) == "10.3.0"


def test_system_of_a_jetson_is_told_with_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64"
    monkeypatch.setattr(doctor, "_read", lambda path: text if path == "/etc/nv_tegra_release" else None)
    assert "Jetson Linux R36.4.3" in (found("platform") or "")
