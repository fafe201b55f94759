"""Builds engines with TensorRT-RTX on a CPU and prints how; a script for a Python that has the bindings.

Argument: a file of JSON {"library": plugin, "jobs": [{"model": file, "capability": [8, 6], "profiles": [{input: [min, opt, max]}]}]}.
Prints one line of JSON a job: {"bytes": of the engine or 0, "listing": the layers as the builder logs them, "errors": [...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx_bindings as trt


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors, and the listing that the builder logs for every profile."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.listing: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)
        if "Layers:" in message:
            self.listing.append(message)


def build(job: dict[str, Any], log: Log) -> int:
    """Return the bytes of the engine, 0 when there is none."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["model"]):
        log.errors += [str(parser.get_error(i)) for i in range(parser.num_errors)]
        return 0
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, "SM{}{}".format(*job["capability"])), 0)
    for ranges in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *map(tuple, shapes))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return 0 if engine is None else int(engine.nbytes)


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    log = Log()
    registry = trt.get_plugin_registry()
    if registry.load_library(given["library"]) is None:
        raise SystemExit(f"cannot load {given['library']}")
    for job in given["jobs"]:
        log.errors, log.listing = [], []
        size = build(job, log)
        print(json.dumps({"bytes": size, "listing": log.listing, "errors": log.errors}), flush=True)


if __name__ == "__main__":
    main()
