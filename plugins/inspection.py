"""What is in a plugin library, read from the file: it is never loaded, so one for a Jetson can be inspected anywhere."""

from __future__ import annotations

import json
import platform
import re
import struct
from pathlib import Path
from typing import Any

from mmm_export import __version__
from mmm_export.errors import KernelError
from mmm_export.plugins.architectures import dotted
from mmm_export.plugins.elf import SharedLibrary, read_shared_library
from mmm_export.plugins.fatbin import SECTION, GpuCode, gpu_code_from_section
from mmm_export.plugins.library import ABI_VERSION, FUNCTIONS

NOTE_SECTION = ".note.mmm"  # plugins/cmake/build_note.cpp.in writes it

EXPORTS: dict[str, frozenset[str]] = {
    "kernels": frozenset(FUNCTIONS),
    "tensorrt": frozenset({"getCreators", "setLoggerFinder"}),
    "onnxruntime": frozenset({"RegisterCustomOps"}),
}
# What the C library and its loader provide everywhere; all else must lie inside.
_SYSTEM = re.compile(r"(libc|libm|libdl|librt|libpthread|ld-linux-[a-z0-9-]+)\.so\.\d+")
_TENSORRT = re.compile(
    r"(getPluginRegistry|getLogger|getBuilderPluginRegistry|createInfer\w*|initLibNvInferPlugins|_ZT?[A-Z]*N?K?8nvinfer1\w*)$"
)
_NEWEST_GLIBC = (2, 35)  # of Ubuntu 22.04, the system of JetPack 6


def inspect_library(path: Path) -> dict[str, Any]:
    """Describe a library: kind, versions, machine, GPU code, symbols, needed libraries, and what is wrong with it.

    Keys of `facts` are absent where the library does not state them. `findings` are (severity, sentence), with severity "error"
    for what keeps the library from working.

    Raises:
        KernelError: the file is no library, or a damaged one.
    """
    library = read_shared_library(path, (NOTE_SECTION, SECTION))
    try:
        code = gpu_code_from_section(library.sections.get(SECTION, b""))
        note = _note(library.sections.get(NOTE_SECTION, b""))
    except (ValueError, struct.error, RecursionError) as error:
        raise KernelError(f"{path} is a damaged library", found=str(error), hint="build or copy it again") from error
    kind = next((kind for kind, names in EXPORTS.items() if names & set(library.exported)), "unknown")
    return {
        "kind": f"{kind} library",
        "path": str(path),
        "bytes": path.stat().st_size,
        "version": note.get("version"),
        "abi": note.get("abi"),
        "machine": library.machine,
        "cuda": note.get("cuda"),
        "compiler": note.get("compiler"),
        "headers": note.get("headers"),
        "architectures": list(code.machine_code),
        "ptx": list(code.ptx),
        "exported": list(library.exported),
        "undefined": list(library.undefined),
        "needed": list(library.needed),
        "glibc": ".".join(map(str, library.glibc)) or None,
        "findings": [list(finding) for finding in _findings(kind, library, code, note)],
    }


def has_errors(data: dict[str, Any]) -> bool:
    """Whether a library that was inspected cannot work."""
    return any(severity == "error" for severity, _ in data["findings"])


def _note(content: bytes) -> dict[str, Any]:
    """Read the JSON of the ELF note; an empty dictionary where there is none."""
    if not content:
        return {}
    name_bytes, text_bytes, _ = struct.unpack_from("<III", content)
    begin = 12 + (name_bytes + 3) // 4 * 4
    text = content[begin : begin + text_bytes].rstrip(b"\0")
    try:
        data = json.loads(text.decode("utf-8"))
    except ValueError:
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("architectures"), list):
        raise ValueError("its build note is not readable")
    return data


def _findings(kind: str, library: SharedLibrary, code: GpuCode, note: dict[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if kind == "unknown":
        found.append(("error", "it exports nothing that TensorRT, ONNX Runtime or this program looks for"))
    else:
        missing = sorted(EXPORTS[kind] - set(library.exported))
        more = [name for name in library.exported if name not in EXPORTS[kind]]
        if missing:
            found.append(("error", f"it lacks {', '.join(missing)}"))
        if more:
            shown = ", ".join(more[:5]) + (f" and {len(more) - 5} more" if len(more) > 5 else "")
            found.append(("warning", f"it exports more than it should, which can clash with other libraries: {shown}"))
    tensorrt = [name for name in library.undefined if _TENSORRT.match(name)]
    if tensorrt:
        found.append(
            (
                "error",
                f"TensorRT symbols are undefined: {', '.join(tensorrt)}; only one TensorRT version could load it, if any",
            )
        )
    foreign = [name for name in library.needed if not _SYSTEM.fullmatch(name)]
    if foreign:
        found.append(("warning", f"it loads only where these are found: {', '.join(foreign)}"))
    if library.runpaths:
        found.append(
            ("warning", f"it names folders in which the loader looks for libraries: {', '.join(library.runpaths)}")
        )
    if library.glibc > _NEWEST_GLIBC:
        version = ".".join(map(str, library.glibc))
        found.append(("warning", f"it needs glibc {version}, which JetPack 6 and Ubuntu 22.04 do not have"))
    found.extend(_disagreements(code, note))
    if library.machine != platform.machine():
        found.append(("note", f"it is for {library.machine}, and this machine is {platform.machine()}"))
    return found


def _disagreements(code: GpuCode, note: dict[str, Any]) -> list[tuple[str, str]]:
    if not note:
        return [("warning", "it carries no build note, so it was not built by mmm-export plugins build")]
    found = []
    if note.get("abi") != ABI_VERSION:
        found.append(("error", f"its interface is {note.get('abi')}, and this program speaks {ABI_VERSION}"))
    if note.get("version") != __version__:
        found.append(("note", f"it is of version {note.get('version')}, and this program is {__version__}"))
    if sorted(map(str, note["architectures"])) != sorted(map(str, code.machine_code)):
        stated = ", ".join(map(str, note["architectures"])) or "none"
        there = ", ".join(f"SM {dotted(number)}" for number in code.machine_code) or "none"
        found.append(("error", f"it says that it has machine code for {stated}, and has it for {there}"))
    if not code.machine_code:
        found.append(("note", "it has no machine code for a GPU: it computes on the CPU"))
    return found
