"""`mmm-export plugins inspect`: what is read from the file of a library, what is found wrong with it, and damaged files."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorrt_tools.building import plugin_library

from mmm_export import __version__
from mmm_export.cli import cli
from mmm_export.command_line import run
from mmm_export.errors import KernelError
from mmm_export.plugins import inspection
from mmm_export.plugins.fatbin import gpu_code_from_section
from mmm_export.plugins.inspection import has_errors, inspect_library
from mmm_export.plugins.library import ABI_VERSION

GOLDEN = Path(__file__).parent / "golden" / "inspect-kernels.txt"
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@pytest.fixture(scope="session")
def library(kernel_folder: Path) -> Path:
    return kernel_folder / "libmmm_kernels.so"


def compiled(folder: Path, source: str, *options: str, name: str = "libother.so") -> Path:
    (folder / "source.c").write_text(source)
    command = ["gcc", "-shared", "-fPIC", str(folder / "source.c"), "-o", str(folder / name), *options]
    subprocess.run(command, check=True)
    return folder / name


def findings(path: Path) -> list[str]:
    return [f"{severity}: {text}" for severity, text in inspect_library(path)["findings"]]


def test_the_kernel_library_is_described_and_nothing_is_wrong_with_it(library: Path) -> None:
    data = inspect_library(library)
    assert data["kind"] == "kernels library"
    assert (data["version"], data["abi"], data["machine"]) == (__version__, ABI_VERSION, platform.machine())
    assert (data["cuda"], data["architectures"], data["ptx"]) == (None, [], [])
    assert data["exported"] == sorted(inspection.EXPORTS["kernels"])
    assert data["bytes"] == library.stat().st_size
    assert not has_errors(data)
    assert [severity for severity, _ in data["findings"]] == ["note"]  # that it is for the CPU


def test_the_tensorrt_library_names_the_headers_it_was_compiled_with() -> None:
    data = inspect_library(plugin_library())
    assert data["kind"] == "tensorrt library"
    assert data["headers"].startswith("TensorRT 10.")
    assert data["exported"] == ["getCreators", "setLoggerFinder"]
    assert not has_errors(data)


def test_what_is_printed_reads_as_stored(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["plugins", "inspect", str(library)]) == 0
    text = capsys.readouterr().out.replace(str(library), "FILE").replace(__version__, "VERSION")
    for row, value in (("size", "SIZE"), ("machine", "MACHINE"), ("compiler", "COMPILER"), ("glibc", "GLIBC")):
        text = re.sub(rf"^(  {row} +).*$", rf"\1{value}", text, flags=re.MULTILINE)
    text = re.sub(r"^(  needed +).*$", r"\1LIBRARIES", text, flags=re.MULTILINE)
    text = re.sub(r"\d+ symbols", "N symbols", text)
    if os.environ.get("UPDATE_SNAPSHOTS") == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_json_holds_what_the_inspection_found(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["plugins", "inspect", str(library), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect_library(library)


@needs_compiler
def test_a_library_of_others_is_an_error_and_gives_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = compiled(tmp_path, "int other(void) { return 0; }")
    assert run(cli, ["plugins", "inspect", str(path)]) == 1
    said = capsys.readouterr().out
    assert "error: it exports nothing that TensorRT, ONNX Runtime or this program looks for" in said
    assert "warning: it carries no build note" in said


@needs_compiler
@pytest.mark.parametrize(
    ("source", "options", "wanted"),
    [
        (
            "int getPluginRegistry(void); int getCreators(void) { return getPluginRegistry(); } int setLoggerFinder;",
            (),
            "error: TensorRT symbols are undefined: getPluginRegistry; only one TensorRT version could load it, if any",
        ),
        ("int getCreators(void) { return 0; }", (), "error: it lacks setLoggerFinder"),
        (
            "int RegisterCustomOps; int mine;",
            (),
            "warning: it exports more than it should, which can clash with other libraries: mine",
        ),
        (
            "int RegisterCustomOps;",
            ("-Wl,-rpath,/opt/elsewhere/lib",),
            "warning: it names folders in which the loader looks for libraries: /opt/elsewhere/lib",
        ),
    ],
    ids=["undefined", "incomplete", "too much", "runpath"],
)
def test_what_keeps_a_library_from_working_is_found(
    tmp_path: Path, source: str, options: tuple[str, ...], wanted: str
) -> None:
    assert wanted in findings(compiled(tmp_path, source, *options))


@needs_compiler
def test_a_library_that_needs_others_names_them(tmp_path: Path) -> None:
    other = compiled(tmp_path, "int other(void) { return 0; }", "-Wl,-soname,libnvinfer.so.10", name="libnvinfer.so")
    path = compiled(
        tmp_path, "int other(void); int RegisterCustomOps(void) { return other(); }", str(other), name="a.so"
    )
    assert "warning: it loads only where these are found: libnvinfer.so.10" in findings(path)


def patched(library: Path, target: Path, old: bytes, new: bytes) -> Path:
    content = library.read_bytes()
    assert content.count(old) >= 1
    assert len(old) == len(new)
    target.write_bytes(content.replace(old, new))
    return target


def test_a_library_of_another_interface_version_or_machine_is_told(library: Path, tmp_path: Path) -> None:
    newer = patched(library, tmp_path / "newer.so", b'"abi": 3, "cuda"', b'"abi": 7, "cuda"')
    assert f"error: its interface is 7, and this program speaks {ABI_VERSION}" in findings(newer)
    note = f'"version": "{__version__}", "abi"'.encode()
    old = patched(library, tmp_path / "old.so", note, note.replace(__version__.encode(), b"9" * len(__version__)))
    assert any("note: it is of version 9" in text for text in findings(old))
    content = bytearray(library.read_bytes())
    content[18:20] = (243).to_bytes(2, "little")
    (tmp_path / "riscv.so").write_bytes(content)
    assert f"note: it is for riscv, and this machine is {platform.machine()}" in findings(tmp_path / "riscv.so")


def test_a_note_that_says_more_than_the_machine_code_is_an_error(library: Path, tmp_path: Path) -> None:
    claims = patched(library, tmp_path / "claims.so", b'"architectures": [], "co', b'"architectures":[90],"co')
    assert "error: it says that it has machine code for 90, and has it for none" in findings(claims)


def test_a_note_that_is_no_json_is_a_damaged_library(library: Path, tmp_path: Path) -> None:
    broken = patched(library, tmp_path / "broken.so", b'{"version": "', b'["version": "')
    with pytest.raises(KernelError, match="damaged library") as caught:
        inspect_library(broken)
    assert caught.value.found == "its build note is not readable"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("empty", b"", "is no shared library"),
        ("text", b"a note about libraries", "is no shared library"),
        ("start", b"\x7fELF", "is a damaged library"),
        ("32 bits", b"\x7fELF\x01\x01\x01" + bytes(200), "is a damaged library"),
    ],
)
def test_files_that_are_no_library_are_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(KernelError, match=what) as caught:
        inspect_library(path)
    assert str(path) in caught.value.what


def test_a_library_cut_off_anywhere_is_refused(library: Path, tmp_path: Path) -> None:
    whole = library.read_bytes()
    for end in (16, 64, 4000, len(whole) // 2, len(whole) - 64, len(whole) - 1):
        path = tmp_path / "cut.so"
        path.write_bytes(whole[:end])
        with pytest.raises(KernelError):
            inspect_library(path)


def test_folders_and_absent_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.so"):
        with pytest.raises(KernelError, match="cannot be read"):
            inspect_library(path)


def told_regions(content: bytes) -> list[tuple[int, int]]:
    """Where damage matters: the ELF header, the section headers, and the sections that are read."""
    import io

    elf = ELFFile(io.BytesIO(content))
    read = (".dynsym", ".dynstr", ".dynamic", ".gnu.version_r", ".note.mmm", ".shstrtab")
    sections = [section for section in elf.iter_sections() if section.name in read]
    headers = (elf["e_shoff"], elf["e_shoff"] + elf.num_sections() * elf["e_shentsize"])
    return [(0, 64), headers, *((s["sh_offset"], s["sh_offset"] + s["sh_size"]) for s in sections)]


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_library_is_described_or_refused_and_never_more(library: Path, tmp_path: Path, data: Any) -> None:
    content = bytearray(library.read_bytes())
    regions = told_regions(bytes(content))
    for _ in range(data.draw(st.integers(1, 4))):
        begin, end = data.draw(st.sampled_from(regions))
        place = data.draw(st.integers(begin, end - 1))
        value = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8), st.just(bytes(8))))
        content[place : place + len(value)] = value
    path = tmp_path / "damaged.so"
    path.write_bytes(content)
    refusal = None
    try:
        json.dumps(inspect_library(path))
    except KernelError as error:
        refusal = error.what
    assert refusal is None or str(path) in refusal


def container(*entries: tuple[int, int, int]) -> bytes:
    """A container of GPU code: (kind, architecture, bytes of code) for each entry."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0, 64, size, 0, 0, 0, 0, architecture) + bytes(64 - 32 + size)
        for kind, architecture, size in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_architectures_are_those_of_all_containers() -> None:
    content = container((2, 90, 40), (2, 87, 8)) + bytes(24) + container((1, 90, 16))
    found = gpu_code_from_section(content)
    assert (found.machine_code, found.ptx) == ((87, 90), (90,))
    assert gpu_code_from_section(b"").machine_code == ()


@settings(max_examples=300, deadline=2000)
@given(st.data())
def test_damaged_gpu_code_gives_architectures_or_a_value_error(data: Any) -> None:
    content = bytearray(container((2, 90, 40), (2, 87, 8)) + bytes(24) + container((1, 90, 16)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 8))
        content[place : place + 8] = data.draw(st.binary(min_size=8, max_size=8))
    try:
        found = gpu_code_from_section(bytes(content))
    except (ValueError, struct.error):
        return
    assert all(isinstance(number, int) for number in (*found.machine_code, *found.ptx))
