"""Chooses the meters that fit what runs the model, and describes model, backend and device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmm_export.bench.measurement import BenchOptions
from mmm_export.bench.meters import AnonymousMemory, EnergyMeter, GpuFacts, MemoryMeter, board_power, nvml_of
from mmm_export.bench.report import cpu_name
from mmm_export.bench.roofline import host_bandwidth
from mmm_export.engine_manifest import EngineManifest
from mmm_export.runtime import BatchSession, Session


@dataclass(frozen=True)
class Meters:
    """What watches a benchmark. `bandwidth` is in bytes a second, None when nothing tells."""

    memory: MemoryMeter
    energy: EnergyMeter | None
    device: str
    gpu: GpuFacts | None
    bandwidth: float | None
    bandwidth_source: str


@contextmanager
def meters_for(providers: Sequence[str], bandwidth_gb_s: float | None, pid: int) -> Iterator[Meters]:
    """Yield the meters of what the named providers run on: a GPU's if the first is one, and NVML is there.

    Args:
        providers: names as given to `Session.open`; none for the CPU.
        bandwidth_gb_s: of the memory, in GB/s; None asks the GPU, or copies memory of this machine to and fro.
        pid: of the process that runs the model.
    """
    is_gpu = bool(providers) and not providers[0].lower().startswith("cpu")
    nvml = nvml_of((0,), pid) if is_gpu else None
    board = board_power()
    try:
        if nvml is not None:
            facts = nvml.facts()
            bandwidth, source = facts.bandwidth, "memory clock and bus of the GPU"
            memory: MemoryMeter = nvml
            energy, device = nvml.energy() or board, facts.name
        else:
            facts = None
            bandwidth = None if is_gpu or bandwidth_gb_s else host_bandwidth()
            source = "measured by copying memory"
            memory, energy, device = AnonymousMemory(), board, f"{cpu_name()}, {os.cpu_count()} cores"
        if bandwidth_gb_s:
            bandwidth, source = bandwidth_gb_s * 1e9, "as given"
        yield Meters(memory, energy, device, facts, bandwidth, source)
    finally:
        if board is not None:
            board.close()


def runs_on(session: Session | BatchSession, providers: Sequence[str]) -> Sequence[str]:
    """Return what `meters_for` must watch: the providers asked for, or the GPU that an engine always runs on."""
    return [session.manifest.flavor] if isinstance(session.manifest, EngineManifest) else providers


def describe(
    session: Session | BatchSession, options: BenchOptions, providers: Sequence[str], threads: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe the model and the backend of a session, as they stand in the JSON."""
    manifest = session.manifest
    model = {
        "name": manifest.source,
        "dtype": manifest.dtype,
        "layers": manifest.model.layers,
        "attention_layers": len(manifest.model.attention_layers),
        "bytes": sum(info.bytes for info in manifest.files.values()),
        "state_bytes": session.state_bytes,
        "model_sha256": manifest.model_sha256,
        "new_tokens": options.new_tokens,
    }
    if isinstance(manifest, EngineManifest):
        name = f"{manifest.flavor} {manifest.tensorrt_version}"
    else:
        provider = providers[0].lower().removesuffix("executionprovider") if providers else "cpu"
        name = f"onnxruntime {provider}{' + kernels' if session.kernels else ''}"
    backend = {
        "name": name,
        "kernels": session.kernels.name if session.kernels else None,
        "threads": threads or len(os.sched_getaffinity(0)),
    }
    return model, backend
