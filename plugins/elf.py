"""What the format of a shared library says about it, without loading it: so it may be damaged, hostile, or for another machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

from mmm_export.errors import KernelError

MOST_BYTES = 2 << 30  # a library of all architectures has some MiB; more would only fill the memory
# Counts in a damaged file may be anything, and its entries may lie over each other: without limits, reading them takes hours.
MOST_SYMBOLS = 100_000
MOST_ENTRIES = 5_000  # sections, dynamic tags, version names
_SECTION_HEADER_BYTES, _SYMBOL_BYTES = 64, 24
MACHINES = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}  # as `platform.machine()` spells them


@dataclass(frozen=True)
class SharedLibrary:
    """The facts of an ELF file.

    Args:
        machine: processor, as `platform.machine()` spells it where known.
        exported: functions and variables that others can use.
        undefined: those that others must provide; without the weak ones, which may stay absent.
        needed: libraries that the loader looks for.
        runpaths: folders that the loader is told to look into.
        glibc: newest version of glibc that a symbol asks for, such as (2, 34).
        sections: content of the sections that were asked for, by name; absent ones are left out.
    """

    machine: str
    exported: tuple[str, ...]
    undefined: tuple[str, ...]
    needed: tuple[str, ...]
    runpaths: tuple[str, ...]
    glibc: tuple[int, ...]
    sections: dict[str, bytes]


def read_shared_library(path: Path, sections: Iterable[str]) -> SharedLibrary:
    """Read a 64-bit ELF file; keeps the content of the named sections.

    Raises:
        KernelError: the file cannot be read, is no ELF file, or is damaged.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise KernelError(
                f"{path} is no plugin library",
                found=f"a file of {path.stat().st_size} bytes",
                wanted="a library of some MiB",
            )
        with path.open("rb") as stream:
            start = stream.read(4)
            if start != b"\x7fELF":
                raise KernelError(
                    f"{path} is no shared library",
                    found=f"a file that begins with {start!r}" if start else "an empty file",
                    wanted="an ELF file, such as libmmm_tensorrt.so",
                )
            stream.seek(0)
            return _read(ELFFile(stream), sections)
    except KernelError:
        raise
    except OSError as error:
        raise KernelError(
            f"{path} cannot be read", found=error.strerror or str(error), wanted="the file of a library"
        ) from error
    except Exception as error:  # the reader trusts the offsets of the file, so damage shows as any exception
        raise KernelError(
            f"{path} is a damaged library",
            found=f"{type(error).__name__}: {str(error)[:200] or 'an offset outside the file'}".replace("\n", " "),
            wanted="a whole ELF file",
            hint="build or copy it again",
        ) from error


def _read(elf: Any, sections: Iterable[str]) -> SharedLibrary:
    if elf.elfclass != 64:
        raise ValueError("a 32-bit library")
    if elf["e_shentsize"] != _SECTION_HEADER_BYTES or elf.num_sections() > MOST_ENTRIES:
        raise ValueError(f"{elf.num_sections()} sections with headers of {elf['e_shentsize']} bytes")
    exported: set[str] = set()
    undefined: set[str] = set()
    symbols = elf.get_section_by_name(".dynsym")
    if isinstance(symbols, SymbolTableSection):
        if symbols["sh_entsize"] != _SYMBOL_BYTES or symbols.num_symbols() > MOST_SYMBOLS:
            raise ValueError(f"{symbols['sh_size']} bytes of symbols, {symbols['sh_entsize']} bytes each")
        for symbol in symbols.iter_symbols():
            is_global = symbol["st_info"]["bind"] == "STB_GLOBAL"
            if symbol.name and symbol["st_shndx"] == "SHN_UNDEF":
                undefined.update([symbol.name] if is_global else [])
            elif symbol.name and symbol["st_info"]["bind"] != "STB_LOCAL":
                exported.add(symbol.name)
    needed, runpaths = [], []
    dynamic = elf.get_section_by_name(".dynamic")
    if isinstance(dynamic, DynamicSection):
        tag: Any  # has a field of its own for each kind
        for tag in islice(dynamic.iter_tags(), MOST_ENTRIES):
            if tag.entry.d_tag == "DT_NEEDED":
                needed.append(str(tag.needed))
            elif tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                runpaths.append(str(tag.rpath if tag.entry.d_tag == "DT_RPATH" else tag.runpath))
    kept = {}
    for name in sections:
        section = elf.get_section_by_name(name)
        if section is not None:
            if section["sh_offset"] + section["sh_size"] > elf.stream_len:
                raise ValueError(f"section {name} reaches beyond the end of the file")
            kept[name] = section.data()
    machine = elf["e_machine"]
    return SharedLibrary(
        machine=MACHINES.get(machine, str(machine).removeprefix("EM_").lower()),
        exported=tuple(sorted(exported)),
        undefined=tuple(sorted(undefined)),
        needed=tuple(needed),
        runpaths=tuple(runpaths),
        glibc=_newest_glibc(elf),
        sections=kept,
    )


def _newest_glibc(elf: Any) -> tuple[int, ...]:
    section = elf.get_section_by_name(".gnu.version_r")
    found: list[tuple[int, ...]] = [()]
    if isinstance(section, GNUVerNeedSection):
        for _, versions in islice(section.iter_versions(), 100):
            for version in islice(versions, 100):  # of one library
                numbers = version.name.removeprefix("GLIBC_").split(".")
                if version.name.startswith("GLIBC_") and all(part.isdigit() for part in numbers):
                    found.append(tuple(map(int, numbers)))
    return max(found)
