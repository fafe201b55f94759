"""What an engine needs of this machine, checked in the order of cost before a plan is loaded. Each refusal says what to do."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from mmm_export.engine_manifest import EngineManifest
from mmm_export.errors import EngineError, KernelError
from mmm_export.manifest import file_info
from mmm_export.plugin_files import KERNEL_ABI, read_build

_REBUILD = "build the engine again here: mmm-export trt BUNDLE -o ENGINE"
_GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What was found here: `name` of the GPU, its `compute_capability` (87 is SM 8.7) and `free_bytes` of its memory."""

    name: str
    compute_capability: int
    free_bytes: int


def check_platform(folder: Path, manifest: EngineManifest) -> None:
    """Refuse an engine for another processor or system. Raises EngineError."""
    here = f"{platform.machine()}-{platform.system().lower()}"
    if manifest.platform != here:
        raise EngineError(
            f"{folder} was built for another platform", found=here, wanted=manifest.platform, hint=_REBUILD
        )


def check_version(folder: Path, manifest: EngineManifest, installed: str) -> None:
    """Refuse a library of another version than built the plans. Raises EngineError.

    TensorRT takes only plans of its own version. TensorRT-RTX is asked itself when the plan is loaded; here only its major
    version counts.
    """
    wanted, found = _numbers(manifest.tensorrt_version), _numbers(installed)
    # Some packages state three numbers and some four: those that both have are compared.
    count = 1 if manifest.flavor == "tensorrt-rtx" else min(len(wanted), len(found), 4)
    if not found or wanted[:count] != found[:count]:
        raise EngineError(
            f"{folder} was built with another version of {manifest.flavor}",
            found=f"{manifest.flavor} {installed}",
            wanted=f"{manifest.flavor} {manifest.tensorrt_version}",
            hint=f"install that version, or {_REBUILD}",
        )


def check_device(folder: Path, manifest: EngineManifest, machine: Machine) -> None:
    """Refuse a GPU that the plans were not built for. Raises EngineError."""
    if machine.compute_capability not in manifest.compute_capabilities:
        raise EngineError(
            f"{folder} was built for another GPU",
            found=f"SM {dotted(machine.compute_capability)} ({machine.name})",
            wanted=" or ".join(f"SM {dotted(each)}" for each in manifest.compute_capabilities),
            hint=_REBUILD,
        )


def check_plugin(folder: Path, manifest: EngineManifest, machine: Machine) -> None:
    """Refuse a plugin library that was changed, speaks another interface, or has no code for this GPU. Raises KernelError."""
    plugin = manifest.plugin
    if not plugin.needed:
        return
    path = folder / (plugin.file or "decoder.plan")
    again = "build both again here: mmm-export plugins build, then mmm-export trt BUNDLE -o ENGINE"
    if not plugin.embedded:
        if not plugin.file:
            raise KernelError(
                f"{folder} names no plugin library",
                wanted="libmmm_tensorrt.so in the folder or in the plan",
                hint=again,
            )
        found = file_info(path).sha256  # whether or not hashes were wanted: this file's code will run
        if found != plugin.sha256:
            raise KernelError(
                f"{path} was changed",
                found=f"sha256 {found}",
                wanted=f"sha256 {plugin.sha256}",
                hint="copy the folder again",
            )
    if plugin.abi != KERNEL_ABI:
        raise KernelError(
            f"{path} was built for another version of mmm-export",
            found=f"kernel interface {plugin.abi}, of mmm-export {plugin.version}",
            wanted=f"kernel interface {KERNEL_ABI}",
            hint=again,
        )
    if plugin.machine != platform.machine():
        raise KernelError(
            f"{path} was built for another processor", found=plugin.machine, wanted=platform.machine(), hint=again
        )
    if not any(_runs_on(built, machine.compute_capability) for built in plugin.architectures):
        built = ", ".join(f"SM {dotted(each)}" for each in plugin.architectures)
        raise KernelError(
            f"{path} has no code for this GPU",
            found=built or "code for a CPU alone",
            wanted=f"SM {dotted(machine.compute_capability)} ({machine.name})",
            hint=again,
        )


def check_replacement(library: Path, machine: Machine) -> None:
    """Refuse a plugin library that is to be loaded instead of the engine's, if its build says that it does not fit here.

    One without a build.json beside it says nothing; TensorRT will. Raises KernelError.
    """
    build = read_build(library.parent)
    if build is not None and not any(_runs_on(built, machine.compute_capability) for built in build.architectures):
        raise KernelError(
            f"{library} has no code for this GPU",
            found=", ".join(f"SM {dotted(each)}" for each in build.architectures) or "code for a CPU alone",
            wanted=f"SM {dotted(machine.compute_capability)} ({machine.name})",
            hint="build it on this machine: mmm-export plugins build",
        )


def check_memory(folder: Path, needed_bytes: int, machine: Machine) -> None:
    """Refuse an engine that does not fit the memory that is free now. Raises EngineError."""
    if needed_bytes > machine.free_bytes:
        raise EngineError(
            f"{folder} does not fit the free memory of the GPU",
            found=f"{machine.free_bytes / _GIB:.2f} GiB free on {machine.name}",
            wanted=f"{needed_bytes / _GIB:.2f} GiB",
            hint="end other programs, or build for less: mmm-export trt with smaller --prefill-tokens, --max-tiles or --max-tokens",
        )


def dotted(compute_capability: int) -> str:
    """87 -> "8.7"."""
    return f"{compute_capability // 10}.{compute_capability % 10}"


def _runs_on(built: int, device: int) -> bool:
    """Machine code runs on its own generation, on the same or a later revision."""
    return built // 10 == device // 10 and built % 10 <= device % 10


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
