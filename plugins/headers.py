"""Other people's headers that the adapters are compiled with: where they lie, and of which version they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mmm_export.errors import BuildError
from mmm_export.plugins import onnxruntime_headers

TENSORRT_VARIABLE = "TENSORRT_INCLUDE_DIR"
KERNEL_LENS = "kernel-lens==2.0.1"  # its headers are TensorRT's own, 10.14.1, under Apache-2.0

_TENSORRT_OLDEST = (10, 3)  # the first whose IPluginV3 is the one of today


@dataclass(frozen=True)
class Headers:
    """Headers that were found.

    Args:
        name: whose they are.
        folder: what goes behind -I.
        version: as they state it themselves.
        origin: why this folder was taken, for people.
    """

    name: str
    folder: Path
    version: str
    origin: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find_tensorrt(chosen: Path | None, machine: str) -> Headers | None:
    """Find NvInfer.h: the option, then $TENSORRT_INCLUDE_DIR, the system, the package kernel-lens; None if nowhere.

    Args:
        chosen: folder that the user named.
        machine: processor to compile for, as in `platform.machine()`; chooses among the folders of the system.

    Raises:
        BuildError: a folder that the user named holds no headers, or too old ones.
    """
    named = os.environ.get(TENSORRT_VARIABLE)
    candidates: Iterable[tuple[Path, str]] = _tensorrt_folders(machine)
    if chosen is not None or named:
        candidates = [(chosen, "--tensorrt-include") if chosen is not None else (Path(str(named)), TENSORRT_VARIABLE)]
    for candidate, origin in candidates:
        folder = candidate.absolute()
        if (folder / "NvInfer.h").is_file():
            version = _tensorrt_version(folder)
            if version is None or version[:2] < _TENSORRT_OLDEST:
                raise BuildError(
                    "the TensorRT headers are too old" if version else "the TensorRT headers state no version",
                    found=f"{_dotted(version) if version else 'no NvInferVersion.h that says it'} in {folder}",
                    wanted=f"{_dotted(_TENSORRT_OLDEST)} or newer",
                    hint=tensorrt_hint(),
                )
            return Headers("TensorRT", folder, _dotted(version), origin)
        if origin in ("--tensorrt-include", TENSORRT_VARIABLE):
            raise _not_there(folder, origin, "NvInfer.h", tensorrt_hint())
    return None


def find_onnxruntime(chosen: Path | None) -> Headers | None:
    """Find onnxruntime_c_api.h: the option, else where `onnxruntime_headers.find_headers` looks; None if nowhere.

    Raises:
        MmmError: a folder that the user named holds no headers.
    """
    if chosen is not None:
        if not (chosen / onnxruntime_headers.HEADER).is_file():
            wanted = onnxruntime_headers.HEADER
            raise _not_there(
                chosen.absolute(), "--onnxruntime-include", wanted, "name the folder that holds the file itself"
            )
        folder, origin = chosen.absolute(), "--onnxruntime-include"
    else:
        found = onnxruntime_headers.find_headers()
        if found is None:
            return None
        variable = onnxruntime_headers.FOLDER_VARIABLE
        folder, origin = found.absolute(), variable if os.environ.get(variable) else "system"
    stated = re.search(r"^#define ORT_API_VERSION (\d+)", _text(folder / onnxruntime_headers.HEADER), re.MULTILINE)
    return Headers("ONNX Runtime", folder, f"1.{stated[1]}" if stated else "of unknown version", origin)


def tensorrt_hint() -> str:
    """How to get TensorRT's headers."""
    return (
        f"pip install {KERNEL_LENS} --no-deps brings them; or name a TensorRT's own with "
        f"--tensorrt-include DIR or {TENSORRT_VARIABLE}"
    )


def _tensorrt_folders(machine: str) -> Iterable[tuple[Path, str]]:
    include = Path("/usr/include")
    yield include / f"{machine}-linux-gnu", "system"
    yield include, "system"
    unpacked = [*Path("/usr/local").glob("tensorrt*/include"), *Path("/usr/local").glob("TensorRT*/include")]
    for folder in sorted(unpacked, reverse=True):  # the newest first
        yield folder, "system"
    spec = find_spec("kernel_lens")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(place) / "include" / "tensorrt", "package kernel-lens"


def _tensorrt_version(folder: Path) -> tuple[int, ...] | None:
    text = _text(folder / "NvInferVersion.h")
    # Since 10.13 the public names are defined by way of others: NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE.
    defined: dict[str, str] = dict(re.findall(r"^#define[ \t]+(\w+)[ \t]+(\w+)", text, re.MULTILINE))
    numbers = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        value = defined.get(f"NV_TENSORRT_{part}", "")
        value = defined.get(value, value)
        if not value.isdigit():
            return None
        numbers.append(int(value))
    return tuple(numbers)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _not_there(folder: Path, origin: str, file: str, hint: str) -> BuildError:
    return BuildError(
        f"{origin} names a folder without {file}",
        found=f"{folder}{'' if folder.is_dir() else ', which is no folder'}",
        wanted=f"the folder that holds {file}",
        hint=hint,
    )
