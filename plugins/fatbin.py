"""Reads which GPUs a library has machine code for, from the container that nvcc puts it into (section .nv_fatbin).

The section is a row of containers, one for each source file: a header of 16 bytes with the bytes that follow, then entries, each
with a header of its own that states kind and architecture. The layout is not documented; it was read from files of CUDA 12 and 13.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

SECTION = ".nv_fatbin"

_MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, -, bytes of this header, bytes of code, -, -, -, -, architecture
_PTX, _MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class GpuCode:
    """Architectures in a section, sorted.

    Args:
        machine_code: those whose GPUs run it as it is.
        ptx: those whose text the driver can compile for newer GPUs.
    """

    machine_code: tuple[int, ...]
    ptx: tuple[int, ...]


def gpu_code_from_section(content: bytes) -> GpuCode:
    """Read the containers of a section; an empty one holds none.

    Raises:
        ValueError: the content is not of this layout.
    """
    found: dict[int, set[int]] = {_PTX: set(), _MACHINE_CODE: set()}
    position = 0
    while position + _CONTAINER.size <= len(content):
        magic, _, header, size = _CONTAINER.unpack_from(content, position)
        if magic != _MAGIC:
            if any(content[position : position + 8]):
                raise ValueError(f"no container at byte {position}")
            position += 8  # zeros between the containers
            continue
        entry, end = position + header, position + header + size
        if header < _CONTAINER.size or end > len(content):
            raise ValueError(f"the container at byte {position} is cut off")
        while entry + _ENTRY.size <= end:
            kind, _, entry_header, code, *_, architecture = _ENTRY.unpack_from(content, entry)
            if entry_header < _ENTRY.size or kind not in found:
                raise ValueError(f"no entry at byte {entry}")
            found[kind].add(architecture)
            entry += entry_header + code
        position = end
    return GpuCode(tuple(sorted(found[_MACHINE_CODE])), tuple(sorted(found[_PTX])))
