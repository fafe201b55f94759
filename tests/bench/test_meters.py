"""Meters read what they say they read, and give up quietly where a machine tells nothing."""

from __future__ import annotations

import inspect
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmm_export.bench.device import meters_for
from mmm_export.bench.meters import AnonymousMemory, Nvml, PeakWatch, board_power
from mmm_export.bench.roofline import host_bandwidth

H100 = {"bus": 5120, "mhz": 2619}


class FakeNvml:
    """Answers as the driver of an H100 does."""

    NVML_CLOCK_MEM = 2
    NVML_CLOCK_GRAPHICS = 0

    def __init__(self, processes: list[tuple[int, int | None]], *, silent: tuple[str, ...] = ()) -> None:
        self.processes = processes
        self.silent = silent
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByIndex": "gpu",
            "nvmlDeviceGetComputeRunningProcesses": [
                SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes
            ],
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=7 << 30),
            "nvmlDeviceGetTotalEnergyConsumption": 12_345,
            "nvmlDeviceGetMemoryBusWidth": H100["bus"],
            "nvmlDeviceGetMaxClockInfo": H100["mhz"],
            "nvmlDeviceGetClockInfo": 1980,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetName": b"NVIDIA H100 80GB HBM3",
            "nvmlSystemGetDriverVersion": "580.1",
        }

        def call(*arguments: Any) -> Any:
            self.asked.append(name)
            if name in self.silent:
                raise RuntimeError("Not Supported")
            return answers[name]

        if name not in answers:
            raise AttributeError(name)
        return call


def test_gpu_memory_is_that_of_the_process() -> None:
    assert Nvml(0, FakeNvml([(1, 5), (42, 3 << 30)]), 42).read() == 3 << 30


@pytest.mark.parametrize("processes", [[(1, 5)], [(42, None)], []])
def test_gpu_memory_in_a_container_is_all_that_is_used(processes: list[tuple[int, int | None]]) -> None:
    assert Nvml(0, FakeNvml(processes), 42).read() == 7 << 30


def test_facts_of_a_gpu_give_its_bandwidth() -> None:
    facts = Nvml(0, FakeNvml([]), 42).facts()
    assert facts.name == "NVIDIA H100 80GB HBM3"
    assert facts.bandwidth == pytest.approx(3.352e12, rel=1e-3)  # 3.35 TB/s, as its data sheet says
    assert facts.power_limit_w == 700


def test_a_gpu_that_does_not_tell_is_described_without() -> None:
    nvml = Nvml(0, FakeNvml([], silent=("nvmlDeviceGetMemoryBusWidth", "nvmlDeviceGetTotalEnergyConsumption")), 42)
    assert nvml.facts().bandwidth is None
    assert nvml.energy() is None
    energy = Nvml(0, FakeNvml([]), 42).energy()
    assert energy is not None
    assert energy.read() == pytest.approx(12.345)


def test_every_function_that_is_asked_for_exists_in_nvml() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py: pip install mmm-export[bench]")
    fake = FakeNvml([])
    nvml = Nvml(0, fake, 42)
    nvml.facts()
    nvml.read()
    energy = nvml.energy()
    assert energy is not None
    assert len(set(fake.asked)) == 11
    assert [name for name in fake.asked if not inspect.isfunction(getattr(pynvml, name, None))] == []
    assert pynvml.NVML_CLOCK_MEM == FakeNvml.NVML_CLOCK_MEM
    assert pynvml.NVML_CLOCK_GRAPHICS == FakeNvml.NVML_CLOCK_GRAPHICS


def rail(folder: Path, number: int, label: str, milliamperes: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"in{number}_label").write_text(f"{label}\n")
    (folder / f"in{number}_input").write_text("5000\n")
    (folder / f"curr{number}_input").write_text(f"{milliamperes}\n")


def test_the_rail_of_the_whole_module_is_summed_over_time(tmp_path: Path) -> None:
    rail(tmp_path / "hwmon3", 1, "VDD_IN", 2000)
    rail(tmp_path / "hwmon3", 2, "VDD_CPU_CV", 100)
    meter = board_power(tmp_path)
    assert meter is not None
    assert "VDD_IN" in meter.metric
    begin, before = time.perf_counter(), meter.read()
    time.sleep(0.2)
    joules, seconds = meter.read() - before, time.perf_counter() - begin
    meter.close()
    assert joules == pytest.approx(10 * seconds, rel=0.1)  # 5 V times 2 A


@pytest.mark.parametrize("label", ["VDD_CPU_CV", "+12V"])
def test_other_rails_and_machines_without_rails_have_no_meter(tmp_path: Path, label: str) -> None:
    assert board_power(tmp_path) is None
    rail(tmp_path / "hwmon0", 1, label, 100)
    assert board_power(tmp_path) is None


def test_a_peak_between_the_ends_is_seen() -> None:
    with PeakWatch(AnonymousMemory()) as watch:
        block = np.ones(32 << 20, np.uint8)
        time.sleep(0.2)
        del block
    assert watch.peak >= AnonymousMemory().read() + (30 << 20)


def test_a_cpu_is_measured_by_its_own_memory() -> None:
    with meters_for([], None, os.getpid()) as meters:
        assert meters.gpu is None
        assert meters.memory.read() > 1 << 20
        assert meters.bandwidth is not None
        assert 1e8 < meters.bandwidth < 1e13
    with meters_for(["cpu"], 100.0, os.getpid()) as meters:
        assert (meters.bandwidth, meters.bandwidth_source) == (100e9, "as given")


def test_a_copy_is_counted_as_read_and_written() -> None:
    size = 8 << 20
    assert host_bandwidth(size, repeats=1) > size / 1.0  # even a slow machine copies 8 MiB within a second
