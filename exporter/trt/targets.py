"""Devices that an engine can be built for, by the names of `mmm-export trt --target`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmm_export.engine_manifest import Flavor
from mmm_export.errors import OptionError
from mmm_export.exporter.trt.operators import Version

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """A board or card: its compute capability (87 is SM 8.7), memory, and what its memory moves, by NVIDIA's data sheets."""

    name: str
    capability: int
    memory_bytes: int
    bandwidth_gb_s: float
    shared_memory: bool = False  # with the processor and everything else that runs there


@dataclass(frozen=True)
class Target:
    """A family of devices with one library.

    Attributes:
        name: as it is typed.
        flavor: library that builds and runs the engine.
        oldest: first and `newest` last version (major, minor) that the family runs; a plan without a library assumes the oldest.
        capabilities: default compute capabilities of the engine; with "tensorrt" the device decides, and it is one of these.
        machine: processor of the device, as `platform.machine()` spells it; "" for any.
        max_alloc_mib: default limit of one allocation, 0 for none.
        devices: the family's members that a plan is shown for.
    """

    name: str
    flavor: Flavor
    oldest: Version
    newest: Version
    capabilities: tuple[int, ...]
    machine: str
    max_alloc_mib: int
    devices: tuple[Device, ...]


def _orin(*, super_mode: bool) -> tuple[Device, ...]:
    nano = 102.0 if super_mode else 68.0
    return (
        Device("Jetson Orin Nano 8GB", 87, 8 * GIB, nano, shared_memory=True),
        Device("Jetson Orin NX 16GB", 87, 16 * GIB, 102.4, shared_memory=True),
        Device("Jetson AGX Orin 64GB", 87, 64 * GIB, 204.8, shared_memory=True),
    )


_THOR = (Device("Jetson AGX Thor", 110, 128 * GIB, 273.0, shared_memory=True),)
_RTX = (
    Device("GeForce RTX 3060", 86, 12 * GIB, 360.0),
    Device("GeForce RTX 3090", 86, 24 * GIB, 936.0),
    Device("GeForce RTX 4090", 89, 24 * GIB, 1008.0),
    Device("GeForce RTX 5090", 120, 32 * GIB, 1792.0),
)
_DATACENTER = (
    Device("A100 80GB", 80, 80 * GIB, 2039.0),
    Device("L4", 89, 24 * GIB, 300.0),
    Device("H100 SXM", 90, 80 * GIB, 3350.0),
    Device("H200 SXM", 90, 141 * GIB, 4800.0),
    Device("B200", 100, 180 * GIB, 8000.0),
)

TARGETS: tuple[Target, ...] = (
    Target("orin-jp62", "tensorrt", (10, 3), (10, 7), (87,), "aarch64", 512, _orin(super_mode=True)),
    Target("orin-jp72", "tensorrt", (10, 16), (11, 99), (87,), "aarch64", 512, _orin(super_mode=True)),
    Target("thor", "tensorrt", (10, 16), (11, 99), (110,), "aarch64", 0, _THOR),
    Target("rtx", "tensorrt-rtx", (1, 5), (1, 99), (80, 86, 89, 120), "", 0, _RTX),
    Target("datacenter", "tensorrt", (10, 3), (11, 99), (80, 89, 90, 100), "", 0, _DATACENTER),
)
NAMES = tuple(target.name for target in TARGETS)
RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)  # what TensorRT-RTX 1.7 builds for


def target_named(name: str) -> Target:
    """Return the target of this name. Raises OptionError."""
    for target in TARGETS:
        if target.name == name:
            return target
    raise OptionError("unknown target", found=repr(name), wanted=f"{', '.join(NAMES)}, or auto")


def parse_capabilities(text: str) -> tuple[int, ...]:
    """Turn "8.6,8.9" into (86, 89). Raises OptionError."""
    found: list[int] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(?:sm_?)?([0-9]{1,2})\.([0-9])|(?:sm_?)?([0-9]{2,3})", word.lower())
        if match is None:
            raise OptionError("--compute-capability cannot be read", found=repr(word), wanted="such as 8.6, or 8.6,8.9")
        found.append(int(match[3] or match[1] + match[2]))
    if not found:
        raise OptionError("--compute-capability is empty", wanted="such as 8.6, or 8.6,8.9")
    return tuple(sorted(set(found)))


def dotted(capability: int) -> str:
    """Spell 87 as "8.7"."""
    return f"{capability // 10}.{capability % 10}"
