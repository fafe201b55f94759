"""What this machine has for each step of the flow, and how to get what it lacks. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmm_export import __version__
from mmm_export.engine_manifest import FLAVORS, Flavor
from mmm_export.plugin_files import Kind, find_library
from mmm_export.tensorrt_packages import (
    CUDA_HINT,
    CUDA_MODULES,
    TENSORRT_HINTS,
    TENSORRT_MODULES,
    find_module,
)

COMMAND_TIMEOUT_S = 10  # nvidia-smi hangs on some broken drivers


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Args:
        name: what was looked for.
        found: version or description, None when it is missing.
        purpose: the step of the flow that needs it.
        hint: how to get it.
    """

    name: str
    found: str | None
    purpose: str
    hint: str = ""


def examine() -> list[Finding]:
    """Look at the machine; takes a second or two and changes nothing."""
    return [
        Finding("mmm-export", __version__, "this program"),
        Finding("Python", f"{platform.python_version()} ({sys.executable})", "everything; 3.10 to 3.13"),
        Finding("platform", _platform(), "everything; Linux"),
        Finding("onnxruntime", _onnxruntime(), "run, verify", "pip install onnxruntime"),
        Finding("operator library", _library("onnxruntime"), "run: a faster scan", "mmm-export plugins build"),
        *(_package(*row) for row in _PACKAGES),
        Finding("NVIDIA driver", _gpus(), "run on a GPU", "install the driver of the GPU; a CPU needs none"),
        Finding("nvcc", _nvcc(), "plugins build: GPU kernels", "install the CUDA toolkit"),
        Finding("cmake", _version_line("cmake"), "plugins build", "pip install cmake"),
        Finding("plugin library", _library("tensorrt"), "trt", "mmm-export plugins build"),
        *(
            Finding(flavor, _tensorrt(flavor), "trt, and run and verify of its engines", TENSORRT_HINTS[flavor])
            for flavor in FLAVORS
        ),
        Finding("cuda-bindings", _cuda_bindings(), "run, verify: engines", CUDA_HINT),
        Finding("trtexec", _trtexec(), "timing an engine by hand", "comes with JetPack and TensorRT"),
    ]


_EXPORT = 'pip install "mmm-export[export]"'
_DEMO = 'pip install "mmm-export[demo]"'
_PACKAGES = (  # import name, purpose, how to get it, distribution names
    ("torch", "onnx, verify", _EXPORT, ("torch",)),
    ("onnx", "onnx, verify", _EXPORT, ("onnx",)),
    ("onnxscript", "onnx", _EXPORT, ("onnxscript",)),
    ("sentencepiece", "run", "pip install sentencepiece", ("sentencepiece",)),
    ("skimage", "demo, digits: photographs", _DEMO, ("scikit-image",)),
    ("sklearn", "demo, digits: handwriting", _DEMO, ("scikit-learn",)),
)


def _package(module: str, purpose: str, hint: str, distributions: tuple[str, ...]) -> Finding:
    """Look a package up by its metadata: importing torch only to print its version takes seconds."""
    return Finding(distributions[0], _version(module, distributions), purpose, hint)


def _version(module: str, distributions: tuple[str, ...]) -> str | None:
    if find_spec(module) is None:
        return None
    for distribution in distributions:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return "version unknown"


def _platform() -> str:
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.platform()
    return ", ".join(filter(None, [platform.machine(), system, _jetson_linux(), f"{_cores()} cores", _memory()]))


def _jetson_linux() -> str:
    """Release of a Jetson's system, R36.4.3 of JetPack 6.2; empty elsewhere."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read("/etc/nv_tegra_release") or "")
    return f"Jetson Linux R{match[1]}.{match[2]}" if match else ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError):
        return ""


def _onnxruntime() -> str | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    providers = ", ".join(str(name).removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return f"{onnxruntime.__version__} (providers: {providers})"


def _library(kind: Kind) -> str | None:
    library = find_library(kind)
    return None if library is None else str(library)


def _tensorrt(flavor: Flavor) -> str | None:
    module = find_module(TENSORRT_MODULES[flavor])
    if module is None:
        return None
    package = module.removesuffix("_bindings")
    names = (package, *(f"{package}_cu{cuda}" for cuda in (12, 13)))
    return _version(module, (*names, *(f"{name}_bindings" for name in names)))


def _cuda_bindings() -> str | None:
    module = find_module(CUDA_MODULES)
    return None if module is None else _version(module, ("cuda-bindings", "cuda-python"))


def _trtexec() -> str | None:
    # JetPack keeps it off the PATH.
    return shutil.which("trtexec") or shutil.which("trtexec", path="/usr/src/tensorrt/bin")


def _gpus() -> str | None:
    text = _output(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    if text is None:
        jetson = _read("/etc/nv_tegra_release")  # a Jetson's driver has no nvidia-smi before JetPack 6
        return f"Jetson, {jetson.splitlines()[0].strip('# ')}" if jetson else None
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _nvcc() -> str | None:
    # The toolkit's folder is often not on the PATH.
    program = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    text = _output([program, "--version"]) if program else None
    return next((line.split(",")[1].strip() for line in (text or "").splitlines() if "release" in line), None)


def _version_line(program: str) -> str | None:
    text = _output([program, "--version"])
    return text.splitlines()[0] if text else None


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def to_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [
        {"name": f.name, "found": f.found, "purpose": f.purpose, **({} if f.found else {"hint": f.hint})}
        for f in findings
    ]
