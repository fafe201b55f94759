"""Whether a file can be given to the dynamic loader, which ends the whole process at a library that was cut off."""

from __future__ import annotations

import platform
import struct
from pathlib import Path

from mmm_export.errors import KernelError

# e_machine of an ELF header, by what platform.machine() calls the processor.
MACHINES = {"x86_64": 62, "aarch64": 183}

_REBUILD = "build one for this machine: mmm-export plugins build"
_KINDS = {1: "an object file", 2: "a program", 4: "a core dump"}
_SHARED, _LOAD = 3, 1  # e_type of a library, p_type of what the loader maps
_HEADER = "HHIQQQIHHHHHH"  # e_type, e_machine, .., e_phoff, e_shoff, .., e_phentsize, e_phnum, e_shentsize, e_shnum, ..
_SEGMENT = "IIQQQQ"  # p_type, .., p_offset, .., .., p_filesz
_IDENTITY_BYTES, _HEADER_BYTES, _SEGMENT_BYTES = 16, 64, 56


def check_library_file(path: Path) -> None:
    """Read the headers of a file that is about to be loaded.

    Raises:
        KernelError: it is not there, no 64-bit ELF library, for another processor, or shorter than its headers say.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
            if len(header) < 20 or header[:5] != b"\x7fELF\x02":
                raise _no_library(path, f"a file that begins with {header[:5]!r}" if header else "an empty file")
            order = "<" if header[5] == 1 else ">"
            kind, machine = struct.unpack_from(f"{order}HH", header, _IDENTITY_BYTES)
            _check_machine(path, machine)
            if kind != _SHARED:
                raise _no_library(path, _KINDS.get(kind, f"an ELF file of type {kind}"))
            if len(header) < _HEADER_BYTES:
                raise _cut_off(path, size, _HEADER_BYTES)
            fields = struct.unpack_from(f"{order}{_HEADER}", header, _IDENTITY_BYTES)
            segments, sections = fields[4], fields[5]
            segment_bytes, segment_count, section_bytes, section_count = fields[8:12]
            if segment_bytes != _SEGMENT_BYTES or not segment_count:
                raise _no_library(path, "an ELF file without anything to load")
            needed = max(segments + segment_bytes * segment_count, sections + section_bytes * section_count)
            if needed > size:
                raise _cut_off(path, size, needed)
            file.seek(segments)
            table = file.read(segment_bytes * segment_count)
    except FileNotFoundError:
        raise KernelError(f"there is no kernel library at {path}", hint=_REBUILD) from None
    except OSError as error:
        raise KernelError(f"{path} cannot be read", found=error.strerror, wanted="a kernel library") from error
    for number in range(segment_count):
        p_type, _, offset, _, _, length = struct.unpack_from(f"{order}{_SEGMENT}", table, number * segment_bytes)
        if p_type == _LOAD and offset + length > size:
            raise _cut_off(path, size, offset + length)


def _check_machine(path: Path, machine: int) -> None:
    here = platform.machine()
    if machine != MACHINES.get(here, machine):
        found = next((name for name, number in MACHINES.items() if number == machine), f"ELF machine {machine}")
        raise KernelError(
            f"{path} was built for another processor", found=found, wanted=here, hint="mmm-export plugins build"
        )


def _no_library(path: Path, found: str) -> KernelError:
    return KernelError(f"{path} is not a shared library", found=found, wanted="a 64-bit ELF library", hint=_REBUILD)


def _cut_off(path: Path, size: int, needed: int) -> KernelError:
    return KernelError(
        f"{path} is cut off",
        found=f"{size} bytes",
        wanted=f"at least {needed}, as its headers say",
        hint="copy it again, or build one for this machine: mmm-export plugins build",
    )
