"""What a process takes of memory and a device of energy while it runs. Every meter names its metric, and none guesses."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

INTERVAL_S = 0.02
RAIL_LABELS = ("VDD_IN", "VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")  # of a Jetson Orin's power monitor


class MemoryMeter(Protocol):
    """Bytes in use now. `metric` says of what."""

    metric: str

    def read(self) -> int: ...


class EnergyMeter(Protocol):
    """Joules used since some moment, ever growing. `metric` says of what."""

    metric: str

    def read(self) -> float: ...


class AnonymousMemory:
    """Memory that this process allocated, without mapped files."""

    metric = "process memory without mapped files (RssAnon)"

    def read(self) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        return int(lines[0].split()[1]) * 1024 if lines else 0


@dataclass(frozen=True)
class GpuFacts:
    """What NVML tells of a GPU: clocks in MHz now, and the memory's peak bandwidth in bytes a second, if it tells."""

    name: str
    driver: str
    graphics_mhz: int | None
    memory_mhz: int | None
    power_limit_w: float | None
    bandwidth: float | None


class Nvml:
    """One GPU, watched through NVML (package nvidia-ml-py). Is a memory and an energy meter; changes no setting.

    Args:
        index: of the GPU, as nvidia-smi counts.
        module: `pynvml`, or a stand-in for it.
        pid: of the process whose memory counts.
    """

    metric = "GPU memory of this process (NVML)"

    def __init__(self, index: int, module: Any, pid: int) -> None:
        self._nvml = module
        self._pid = pid
        module.nvmlInit()
        self._gpu = module.nvmlDeviceGetHandleByIndex(index)

    def read(self) -> int:
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu):
            if process.pid == self._pid and process.usedGpuMemory:
                return int(process.usedGpuMemory)
        # In a container the driver knows other process ids: then all that is used counts, which is more, never less.
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._gpu).used)

    def energy(self) -> EnergyMeter | None:
        """Return the meter of the GPU's energy counter; None where it has none."""
        meter = _NvmlEnergy(self._nvml, self._gpu)
        try:
            meter.read()
        except Exception:
            return None
        return meter

    def facts(self) -> GpuFacts:
        nvml, gpu = self._nvml, self._gpu
        bits = self._ask("nvmlDeviceGetMemoryBusWidth", gpu)
        peak = self._ask("nvmlDeviceGetMaxClockInfo", gpu, nvml.NVML_CLOCK_MEM)
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit", gpu)
        return GpuFacts(
            name=_text(nvml.nvmlDeviceGetName(gpu)),
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
            graphics_mhz=self._ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_GRAPHICS),
            memory_mhz=self._ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_MEM),
            power_limit_w=None if limit is None else limit / 1000,
            # Two transfers a clock, for GDDR and HBM as NVML counts their clocks.
            bandwidth=None if not bits or not peak else 2 * peak * 1e6 * bits / 8,
        )

    def _ask(self, name: str, *arguments: Any) -> int | None:
        try:
            return int(getattr(self._nvml, name)(*arguments))
        except Exception:  # not every GPU answers every question
            return None


class _NvmlEnergy:
    metric = "energy of the whole GPU (NVML)"

    def __init__(self, module: Any, gpu: Any) -> None:
        self._nvml, self._gpu = module, gpu

    def read(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1000


class BoardPower:
    """Energy of a Jetson board: the power of one rail of its monitor, summed over time by a thread of its own.

    Args:
        volts: file with millivolts.
        amperes: file with milliamperes.
        label: of the rail.
    """

    def __init__(self, volts: Path, amperes: Path, label: str) -> None:
        self.metric = f"energy of the board's rail {label}"
        self._files = (volts, amperes)
        self._joules = 0.0
        self._lock = threading.Lock()
        self._then = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def read(self) -> float:
        self._add()
        return self._joules

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._add()

    def _add(self) -> None:
        with self._lock, suppress(OSError, ValueError):
            volts, amperes = (int(path.read_text()) / 1000 for path in self._files)
            now = time.perf_counter()
            self._joules += volts * amperes * (now - self._then)
            self._then = now


def board_power(root: Path = Path("/sys/class/hwmon")) -> BoardPower | None:
    """Find the rail that feeds a Jetson's whole module; None on other machines."""
    found: dict[str, tuple[Path, Path]] = {}
    for label in root.glob("hwmon*/in*_label"):
        number = label.name.removeprefix("in").removesuffix("_label")
        files = (label.parent / f"in{number}_input", label.parent / f"curr{number}_input")
        with suppress(OSError):
            if all(path.is_file() for path in files):
                found[label.read_text().strip()] = files
    for name in RAIL_LABELS[:1] + RAIL_LABELS[-1:]:
        if name in found:
            return BoardPower(*found[name], name)
    return None


class PeakWatch:
    """Samples a memory meter in a thread while a block runs; `peak` holds the most it saw."""

    def __init__(self, meter: MemoryMeter) -> None:
        self._meter = meter
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak = 0

    def __enter__(self) -> PeakWatch:
        self.peak = self._meter.read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._meter.read())

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.peak = max(self.peak, self._meter.read())


def nvml_of(indices: Sequence[int], pid: int) -> Nvml | None:
    """Watch the first of some GPUs; None when NVML or its package is not there."""
    try:
        import pynvml

        return Nvml(indices[0], pynvml, pid)
    except Exception:  # the package is missing, or there is no driver, or it is a Jetson's, which lacks NVML
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
