"""Chooses the plugin library that an engine is built with, and refuses one that its devices could not run."""

from __future__ import annotations

from pathlib import Path

from mmm_export.engine_manifest import Flavor, PluginInfo
from mmm_export.errors import EngineError
from mmm_export.exporter.trt.engine import PluginChoice
from mmm_export.exporter.trt.targets import dotted
from mmm_export.manifest import file_info
from mmm_export.plugin_files import find_library


def choose_plugin(
    named: Path | None, capabilities: tuple[int, ...], flavor: Flavor, machine: str, *, any_device: bool = False
) -> PluginChoice:
    """Return the library to build with.

    Args:
        named: the file that the user named; None for the newest one that was built here.
        capabilities: compute capabilities of the engine, 87 for SM 8.7.
        flavor: library that will load it.
        machine: processor that builds.
        any_device: take one without machine code for these devices.

    Raises:
        EngineError: there is none, it is no such library, of another interface, or for other devices.
    """
    from mmm_export.plugins.inspection import has_errors, inspect_library

    architectures = ",".join(map(str, capabilities))
    build = f"mmm-export plugins build --cuda-arch {architectures}"
    path = named or find_library("tensorrt")
    if path is None or not path.is_file():
        raise EngineError(
            "no plugin library was found" if named is None else f"{named} is no file",
            wanted="libmmm_tensorrt.so, the operator of the Mamba layers",
            hint=build if named is None else "mmm-export plugins build makes one, or name another --plugin FILE",
        )
    data = inspect_library(path)
    errors = [text for severity, text in data["findings"] if severity == "error"]
    if data["kind"] != "tensorrt library" or has_errors(data):
        raise EngineError(
            f"{path} cannot be the plugin of an engine",
            found="; ".join(errors) or data["kind"],
            wanted="libmmm_tensorrt.so of this version",
            hint=build,
        )
    if data["machine"] != machine:
        raise EngineError(
            f"{path} is for another processor",
            found=data["machine"],
            wanted=f"{machine}, since {flavor} loads it while it builds",
            hint=build,
        )
    lacking = [number for number in capabilities if not _runs_on(data, number)]
    if lacking and not any_device:
        there = ", ".join(f"SM {dotted(number)}" for number in data["architectures"])
        raise EngineError(
            f"{path} cannot run on {', '.join(f'SM {dotted(number)}' for number in lacking)}",
            found=f"machine code for {there}" if there else "a library that computes on the CPU",
            wanted=", ".join(f"SM {dotted(number)}" for number in capabilities),
            hint=f"{build}; --any-plugin builds with it nevertheless, for a library that will be replaced on the device",
        )
    return PluginChoice(path, _info(path, data))


def _runs_on(data: dict[str, object], capability: int) -> bool:
    """Whether a library has machine code for a device: its own, or of the same major version and a lower minor one."""
    numbers = data["architectures"]
    assert isinstance(numbers, list)
    return any(number // 10 == capability // 10 and number <= capability for number in numbers)


def _info(path: Path, data: dict[str, object]) -> PluginInfo:
    numbers = data["architectures"]
    assert isinstance(numbers, list)
    return PluginInfo(
        file="",
        embedded=False,
        needed=True,
        sha256=file_info(path).sha256,
        abi=int(str(data["abi"])),
        version=str(data["version"]),
        machine=str(data["machine"]),
        architectures=tuple(numbers),
    )
