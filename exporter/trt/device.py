"""The GPU and memory of the machine that builds: asked of the driver, never assumed."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mmm_export.exporter.trt.operators import parse_version

_TIMEOUT_S = 10  # nvidia-smi hangs on some broken drivers
_TEGRA = {"nvidia,tegra234": 87, "nvidia,tegra264": 110}
_COMPATIBLE = Path("/proc/device-tree/compatible")
_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class LocalDevice:
    """The GPU here. `shared_memory`: of a Jetson, whose processor uses the same memory."""

    name: str
    capability: int
    memory_bytes: int
    shared_memory: bool


def local_device() -> LocalDevice | None:
    """Return the first GPU that the driver shows, or the Jetson this is; None without either."""
    jetson = _jetson_capability()
    if jetson:
        return LocalDevice("this Jetson", jetson, machine_memory()[0], shared_memory=True)
    for line in _nvidia_smi().splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and len(parse_version(parts[1])) == 2 and parts[2].split(" ")[0].isdigit():
            major, minor = parse_version(parts[1])
            return LocalDevice(parts[0], major * 10 + minor, int(parts[2].split(" ")[0]) << 20, shared_memory=False)
    return None


def machine_memory() -> tuple[int, int]:
    """Return all memory of this machine with its swap, and what of that is free, in bytes; zeros where the system does not say."""
    try:
        lines = (line.split() for line in _MEMORY.read_text(encoding="utf-8").splitlines())
        kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
    except OSError:
        return 0, 0
    total = kib.get("MemTotal", 0) + kib.get("SwapTotal", 0)
    return total << 10, (kib.get("MemAvailable", 0) + kib.get("SwapFree", 0)) << 10


def platform_name() -> str:
    """Machine and system, "aarch64-linux"."""
    about = os.uname()
    return f"{about.machine}-{about.sysname.lower()}"


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _jetson_capability() -> int | None:
    try:
        found = _COMPATIBLE.read_text(encoding="utf-8").split("\0")
    except OSError:
        return None
    return next((_TEGRA[name] for name in found if name in _TEGRA), None)
