"""Finds the TensorRT that builds: which module a user has, and its version, asked in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import mmm_export
from mmm_export.engine_manifest import FLAVORS, Flavor
from mmm_export.errors import EngineError
from mmm_export.exporter.trt.operators import Version, parse_version

# The front packages and the bindings that they import; either is enough. The lean and dispatch runtimes hold no builder.
MODULES: dict[Flavor, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
INSTALL: dict[Flavor, str] = {
    "tensorrt": "on a Jetson it comes with JetPack: make the environment with --system-site-packages; elsewhere: pip install tensorrt",
    "tensorrt-rtx": "pip install --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
}
PROGRAM = ("-m", "mmm_export.exporter.trt.build_process")
_PROBE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Library:
    """A TensorRT that can build here."""

    flavor: Flavor
    module: str
    version_text: str

    @property
    def version(self) -> Version:
        return parse_version(self.version_text)


def find_library(flavor: Flavor) -> Library | None:
    """Return the first module of this flavor that imports and can build; None where none is installed.

    Raises:
        EngineError: one is installed and does not load.
    """
    failures: list[str] = []
    for module in MODULES[flavor]:
        if find_spec(module) is None:
            continue
        done = run_build_process([module, "probe"])
        if done.returncode == 0:
            return Library(flavor, module, json.loads(done.stdout.splitlines()[-1])["version"])
        last = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
        failures.append(f"{module}: {last[0][:300]}")
    if failures:
        raise EngineError(
            f"the installed {flavor} cannot be used",
            found="; ".join(failures),
            wanted="a Python module with Builder and OnnxParser",
            hint=INSTALL[flavor],
        )
    return None


def require_library(flavor: Flavor) -> Library:
    """Return the library of a flavor. Raises EngineError where there is none."""
    found = find_library(flavor)
    if found is None:
        others = [other for other in FLAVORS if other != flavor and any(map(find_spec, MODULES[other]))]
        raise EngineError(
            f"no {flavor} was found",
            found=f"{', '.join(others)} is installed" if others else "no TensorRT for Python",
            wanted=f"the module {' or '.join(MODULES[flavor])}",
            hint=INSTALL[flavor],
        )
    return found


def process_environment(library_path: Path | None = None) -> dict[str, str]:
    """Environment of a build process: it imports this very mmm_export, and finds what lies in `library_path`."""
    environment = dict(os.environ)
    own = str(Path(mmm_export.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [own, environment.get("PYTHONPATH", "")]))
    if library_path is not None:
        paths = [str(library_path), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return environment


def run_build_process(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *PROGRAM, *arguments]
    return subprocess.run(
        command, env=process_environment(), capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
    )


def soname_folder(library: Library, scratch: Path) -> Path | None:
    """Make a folder with libtensorrt_rtx.so, the name that the ONNX parser of TensorRT-RTX looks for when it meets a plugin.

    Its wheels hold libtensorrt_rtx.so.1 alone; without the other name the parser ends the process. None where there is no such file.
    """
    if library.flavor != "tensorrt-rtx":
        return None
    spec = find_spec("tensorrt_rtx_libs")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = next((p for place in places for p in Path(place).glob("libtensorrt_rtx.so.1")), None)
    if found is None:
        return None
    scratch.mkdir(exist_ok=True)
    link = scratch.absolute() / "libtensorrt_rtx.so"
    if not link.is_symlink():
        link.symlink_to(found.resolve())
    return link.parent
