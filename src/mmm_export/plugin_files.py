"""Where built plugin libraries lie, and which of them this program may load. Imports nothing heavy.

    <cache>/plugins/<one folder a build>/build.json              what was built, see `PluginBuild`
                                         libmmm_kernels.so       the C interface of plugins/include/mmm/kernels.h
                                         libmmm_onnxruntime.so   the operator for ONNX Runtime
                                         libmmm_tensorrt.so      the operator for TensorRT

A folder without a readable build.json is no build: it is written last, so an interrupted build is never found.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mmm_export import __version__

Kind = Literal["kernels", "onnxruntime", "tensorrt"]
KINDS: tuple[Kind, ...] = ("kernels", "onnxruntime", "tensorrt")

KERNEL_ABI = 3  # MMM_ABI_VERSION of plugins/include/mmm/kernels.h: what this program speaks
BUILD_FILE = "build.json"
CACHE_VARIABLE = "MMM_EXPORT_CACHE"


@dataclass(frozen=True)
class PluginBuild:
    """What lies in one folder of the cache; the fields of its build.json.

    Attributes:
        version: of mmm-export whose sources were compiled.
        machine: processor that it runs on, as `platform.machine()` spells it.
        cuda: release of the CUDA toolkit, "13.0"; None for a build that computes on the CPU alone.
        architectures: GPU architectures with machine code, 87 for SM 8.7.
    """

    version: str
    machine: str
    cuda: str | None
    architectures: tuple[int, ...]


def plugin_cache_dir() -> Path:
    """Return the folder of all builds, which need not exist: $MMM_EXPORT_CACHE, else the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen) / "plugins"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmm-export" / "plugins"


def library_file(kind: Kind, folder: Path) -> Path:
    """Return the path of one library in the folder of a build."""
    return folder / f"libmmm_{kind}.so"


def write_build(folder: Path, build: PluginBuild, **more: Any) -> None:
    """Write the build.json of a complete build; `more` is for people and is not read back."""
    text = json.dumps({**asdict(build), **more}, indent=2) + "\n"
    (folder / BUILD_FILE).write_text(text, encoding="utf-8")


def read_build(folder: Path) -> PluginBuild | None:
    """Read the build.json of a folder; None when there is none or it is not of this form."""
    try:
        data = json.loads((folder / BUILD_FILE).read_text(encoding="utf-8"))
        cuda = data["cuda"]
        architectures = tuple(int(number) for number in data["architectures"])
        return PluginBuild(
            str(data["version"]), str(data["machine"]), None if cuda is None else str(cuda), architectures
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_library(kind: Kind, *, cuda: bool = False) -> Path | None:
    """Return the newest built library that this program can load here, or None.

    Args:
        kind: which one.
        cuda: only one that computes on a GPU; such a library computes on the CPU too.
    """
    found = []
    for description in plugin_cache_dir().glob(f"*/{BUILD_FILE}"):
        build, library = read_build(description.parent), library_file(kind, description.parent)
        if build is None or build.version != __version__ or build.machine != platform.machine():
            continue
        if (build.cuda is not None or not cuda) and library.is_file():
            found.append((description.stat().st_mtime_ns, library))
    return max(found, default=(0, None))[1]
