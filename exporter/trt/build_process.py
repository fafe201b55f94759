"""Builds one plan; a program of its own, so that a fault or an abort inside TensorRT cannot take `mmm-export` with it.

Arguments: the TensorRT module, then "probe" (prints its version) or a file of JSON as `builder.Job` writes it. Prints one JSON object
a line: {"event": "stage" | "error" | "listing" | "done", ...}. It imports nothing of mmm_export but what needs no other package.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def tell(event: str, **more: Any) -> None:
    """Print one event."""
    sys.stdout.write(json.dumps({"event": event, **more}) + "\n")
    sys.stdout.flush()


def make_log(trt: Any) -> Any:
    """Return a logger that keeps errors and warnings, and passes on the list of layers that RTX logs when it is verbose."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif "Layers:" in message and "I/O Tensors:" in message:
                tell("listing", form="log", text=message)

    return Log()


class RefusedError(Exception):
    """What the parent tells the user; `data` are the fields of the event."""

    def __init__(self, **data: Any) -> None:
        super().__init__(data.get("message", ""))
        self.data = data


def build(trt: Any, job: dict[str, Any]) -> None:
    begin = time.monotonic()
    log = make_log(trt)
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(log, "")
    registry = trt.get_plugin_registry()
    if job["plugin"] and registry.load_library(job["plugin"]) is None:
        raise RefusedError(kind="plugin", message=f"TensorRT does not load {job['plugin']}", logged=log.errors)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    tell("stage", title="parse")
    parse(trt, network, job["onnx"], log)
    config = configure(trt, builder, job)
    tell("stage", title="build")
    try:
        size = write_plan(trt, builder, network, config, Path(job["plan"]))
    except OSError as error:
        raise RefusedError(kind="disk", errno=error.errno, message=str(error)) from error
    if not size:
        raise RefusedError(kind="build", message="the builder made no engine", logged=log.errors)
    save_timing_cache(config, job)
    if job["inspect"]:
        inspect_plan(trt, Path(job["plan"]), log)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    tell("done", bytes=size, seconds=round(time.monotonic() - begin, 2), peak_bytes=peak)


def parse(trt: Any, network: Any, path: str, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    flag = getattr(getattr(trt, "OnnxParserFlag", None), "ENABLE_PLUGIN_OVERRIDE", None)
    if flag is not None:
        parser.set_flag(flag)
    if parser.parse_from_file(path):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    told = [
        {
            "message": str(call(error, "desc")),
            "node": str(call(error, "node_name") or ""),
            "operator": str(call(error, "node_operator") or ""),
        }
        for error in errors
    ]
    raise RefusedError(kind="parse", message="the parser refuses the graph", errors=told, logged=log.errors)


def call(owner: Any, name: str) -> Any:
    """Call a method that older versions lack."""
    method = getattr(owner, name, None)
    return method() if method is not None else None


def configure(trt: Any, builder: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    tf32 = getattr(trt.BuilderFlag, "TF32", None)
    if tf32 is not None:  # on by default, and it rounds the inputs of fp32 products to 10 bits
        config.clear_flag(tf32)
    if job["workspace_bytes"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    if job["capabilities"]:  # TensorRT-RTX builds for devices that are not here
        config.num_compute_capabilities = len(job["capabilities"])
        for place, number in enumerate(job["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), place)
    if job["embed_plugin"]:
        config.plugins_to_serialize = [job["plugin"]]
    if job["timing_cache"]:
        file = Path(job["timing_cache"])
        cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise RefusedError(
                kind="timing cache", message=f"{file} was made by another TensorRT or for another GPU", logged=[]
            )
    for ranges in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *(tuple(shape) for shape in shapes))
        if config.add_optimization_profile(profile) < 0:
            raise RefusedError(kind="build", message="the builder refuses a profile", logged=[])
    return config


def write_plan(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> int:
    """Build and write the plan; as a stream where the library can, which halves the memory. Returns its bytes, 0 on failure."""
    with path.open("wb") as stream:
        if hasattr(builder, "build_serialized_network_to_stream") and hasattr(trt, "IStreamWriter"):
            failed: list[OSError] = []

            class Writer(trt.IStreamWriter):  # type: ignore[misc]
                def __init__(self) -> None:
                    trt.IStreamWriter.__init__(self)

                def write(self, data: Any) -> int:
                    try:
                        return int(stream.write(data))
                    except OSError as error:  # an exception must not cross the library
                        failed.append(error)
                        return 0

            done = builder.build_serialized_network_to_stream(network, config, Writer())
            if failed:
                raise failed[0]
            return stream.tell() if done else 0
        plan = builder.build_serialized_network(network, config)
        return 0 if plan is None else int(stream.write(plan))


def save_timing_cache(config: Any, job: dict[str, Any]) -> None:
    if job["timing_cache"]:
        file = Path(job["timing_cache"])
        partial = file.with_name(file.name + ".partial")
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))
        partial.replace(file)


def inspect_plan(trt: Any, path: Path, log: Any) -> None:
    """Ask the engine for its layers, where it can be loaded: on a device."""
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        tell("listing", form="none", text="; ".join(log.errors[-2:]))
        return
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    tell("listing", form="inspector", text=str(text))


def main(arguments: Sequence[str]) -> int:
    module, what = arguments
    trt = importlib.import_module(module)
    if not hasattr(trt, "Builder") or not hasattr(trt, "OnnxParser"):
        sys.stderr.write(f"{module} has no Builder: it is a runtime only\n")
        return 1
    if what == "probe":
        tell("version", version=str(trt.__version__))
        return 0
    job = json.loads(Path(what).read_text(encoding="utf-8"))
    try:
        build(trt, job)
    except RefusedError as failure:
        tell("error", **failure.data)
        return 1
    except OSError as error:
        tell("error", kind="disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "file", message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # some versions fault while their objects are taken down, after all is written
