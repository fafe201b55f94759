"""The Python view of the C interface: equal to the header, and clear about files that are no kernel library."""

from __future__ import annotations

import ctypes
import itertools
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles.scan_operands import Sizes, draw

from mmm_export.errors import KernelError
from mmm_export.plugins import library as view
from mmm_export.plugins.library import KernelLibrary, load_library

PLUGINS = Path(__file__).parents[2] / "plugins"
HEADER = PLUGINS / "include" / "mmm" / "kernels.h"
STRUCTS = {
    "mmm_status": view.Status,
    "mmm_scan_shape": view.ScanShape,
    "mmm_scan_args": view.ScanArguments,
    "mmm_linear_shape": view.LinearShape,
    "mmm_linear_args": view.LinearArguments,
}
ENUMS = {
    "mmm_code": (view.Code, "MMM_"),
    "mmm_dtype": (view.DType, "MMM_"),
    "mmm_device": (view.Device, "MMM_"),
    "mmm_method": (view.Method, "MMM_"),
    "mmm_weight_format": (view.WeightFormat, "MMM_WEIGHT_"),
    "mmm_epilogue": (view.Epilogue, "MMM_EPILOGUE_"),
}

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def compile_and_run(folder: Path, source: str, *options: str) -> str:
    """Compile C source against the header and return what the program prints."""
    (folder / "program.c").write_text(source)
    program = folder / "program"
    subprocess.run(
        ["gcc", *options, f"-I{PLUGINS / 'include'}", str(folder / "program.c"), "-o", str(program)], check=True
    )
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


@needs_compiler
def test_structs_have_the_size_and_the_fields_of_the_header(tmp_path: Path) -> None:
    lines = []
    for name, struct in STRUCTS.items():
        lines.append(f'printf("{name} %zu", sizeof({name}));')
        lines += [f'printf(" %zu", offsetof({name}, {field[0]}));' for field in struct._fields_]
        lines.append('puts("");')
    source = "#include <stdio.h>\n#include <mmm/kernels.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    found = compile_and_run(tmp_path, source, "-std=c99", "-pedantic", *WARNINGS)
    wanted = ""
    for name, struct in STRUCTS.items():
        offsets = [getattr(struct, field[0]).offset for field in struct._fields_]
        wanted += " ".join(map(str, [name, ctypes.sizeof(struct), *offsets])) + "\n"
    assert found == wanted
    assert ctypes.sizeof(view.ScanShape) == 52  # as the header says
    assert ctypes.sizeof(view.LinearShape) == 52


def test_no_number_of_the_header_is_missing_or_different() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    for name, (enum, prefix) in ENUMS.items():
        body = re.search(rf"typedef enum {name} {{(.*?)}}", text, re.DOTALL)
        assert body, name
        found = {key: int(number) for key, number in re.findall(r"(MMM_\w+) = (\d+)", body[1])}
        assert found == {f"{prefix}{member.name.removeprefix('MMM_')}": int(member) for member in enum}
    assert f"#define MMM_ABI_VERSION {view.ABI_VERSION}\n" in text
    assert f"#define MMM_INT4_GROUP {view.INT4_GROUP} " in HEADER.read_text()
    assert f"#define MMM_STATUS_TEXT_BYTES {view.STATUS_TEXT_BYTES}\n" in text
    for name, struct in STRUCTS.items():
        body = re.search(rf"typedef struct {name} {{(.*?)}}", text, re.DOTALL)
        assert body, name
        assert re.findall(r"(\w+)(?:\[\w+\])?;", body[1]) == [field[0] for field in struct._fields_]
    assert tuple(re.findall(r"^MMM_API [^;]*?(\w+)\(", text, re.MULTILINE)) == view.FUNCTIONS


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        ("gcc", "-x", "c", "-std=c99"),
        ("gcc", "-x", "c", "-std=c17"),
        ("g++", "-x", "c++", "-std=c++17", "-Wold-style-cast"),
    ],
)
def test_the_header_compiles_without_a_warning(options: tuple[str, ...]) -> None:
    subprocess.run([*options, *WARNINGS, "-pedantic", "-fsyntax-only", str(HEADER)], check=True)


def test_the_build_is_described(kernels: KernelLibrary) -> None:
    assert kernels.build_info["abi"] == view.ABI_VERSION
    assert kernels.build_info["cuda"] is None
    assert kernels.build_info["architectures"] == []
    assert re.match(r"(gcc|clang) \d+\.\d+", kernels.build_info["compiler"])


def test_the_cpu_needs_no_workspace(kernels: KernelLibrary) -> None:
    assert kernels.workspace_bytes(view.ScanShape(view.ABI_VERSION, 0, 0, 0, 8, 4096, 16, 8, 128, 128, 2, 1e-5, 0)) == 0


def test_loading_a_library_loads_no_torch() -> None:
    code = "import sys, mmm_export.plugins.numpy_scan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def fake_library(folder: Path, body: str) -> Path:
    source, path = folder / "fake.c", folder / "libfake.so"
    source.write_text(body)
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    return path


@needs_compiler
def test_a_library_without_our_functions_is_named(tmp_path: Path) -> None:
    path = fake_library(tmp_path, "int mmm_abi_version(void) { return 1; }")
    with pytest.raises(KernelError, match="is not a kernel library of mmm-export") as error:
        load_library(path)
    assert error.value.found == "a library without " + ", ".join(view.FUNCTIONS[1:])


@needs_compiler
def test_a_library_of_another_interface_is_refused_before_anything_else_is_called(tmp_path: Path) -> None:
    crash = "".join(f"int {name}(void) {{ __builtin_trap(); }}" for name in view.FUNCTIONS[1:])
    path = fake_library(tmp_path, f"int mmm_abi_version(void) {{ return 7; }} {crash}")
    with pytest.raises(KernelError, match="another version") as error:
        load_library(path)
    assert error.value.found == "kernel interface 7"
    assert error.value.wanted == f"kernel interface {view.ABI_VERSION}"
    assert "mmm-export plugins build" in str(error.value)


@needs_compiler
def test_a_library_that_needs_another_one_says_which(tmp_path: Path) -> None:
    other = fake_library(tmp_path, "int other(void) { return 0; }").rename(tmp_path / "libother.so")
    source = tmp_path / "user.c"
    source.write_text("int other(void); int user(void) { return other(); }")
    path = tmp_path / "libuser.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), str(other), "-o", str(path)], check=True)
    other.unlink()
    with pytest.raises(KernelError, match="cannot be loaded") as error:
        load_library(path)
    assert "libother.so" in str(error.value.found)


def test_files_that_are_no_library_are_named(tmp_path: Path, kernel_folder: Path) -> None:
    whole = (kernel_folder / "libmmm_kernels.so").read_bytes()
    files: dict[str, tuple[bytes | None, str]] = {
        "absent.so": (None, "there is no kernel library at"),
        "empty.so": (b"", "is not a shared library"),
        "text.so": (b"This is a note about a shared library.", "is not a shared library"),
        "narrow.so": (whole[:4] + b"\x01" + whole[5:], "is not a shared library"),  # 32 bits
        "cut.so": (whole[:4000], "is cut off"),
        "last-byte.so": (whole[:-1], "is cut off"),
        "header.so": (whole[:64], "is cut off"),
        "half-header.so": (whole[:40], "is cut off"),
        "object.so": (whole[:16] + b"\x01" + whole[17:], "is not a shared library"),
        "short.so": (whole[:19], "is not a shared library"),
    }
    for name, (content, text) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(KernelError, match=text) as error:
            load_library(tmp_path / name)
        assert name in error.value.what
    with pytest.raises(KernelError, match="cannot be read"):
        load_library(tmp_path)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="other processors are not told apart")
def test_a_library_for_another_processor_is_named(tmp_path: Path, kernel_folder: Path) -> None:
    here = platform.machine()
    for machine, name in ((62, "x86_64"), (183, "aarch64"), (243, "ELF machine 243")):
        if name == here:
            continue
        data = bytearray((kernel_folder / "libmmm_kernels.so").read_bytes())
        data[18:20] = machine.to_bytes(2, "little")
        path = tmp_path / "other.so"
        path.write_bytes(data)
        with pytest.raises(KernelError, match="another processor") as error:
            load_library(path)
        assert (error.value.found, error.value.wanted) == (name, here)


def test_a_refusal_names_the_library_the_code_and_the_reason(kernels: KernelLibrary) -> None:
    with pytest.raises(KernelError) as error:
        kernels.workspace_bytes(view.ScanShape(view.ABI_VERSION, 0, 0, 0, 1, 1, 1, 1, 96, 200, 2, 1e-5, 0))
    assert error.value.what == (
        "libmmm_kernels.so refused a selective scan (MMM_UNSUPPORTED): "
        "state_dim 200 has no kernel; built for 16, 32, 48, 64, 80, 96, 112, 128"
    )


def test_arrays_that_do_not_fit_together_are_refused(kernels: KernelLibrary) -> None:
    wrong = draw(Sizes())
    wrong.conv_state = wrong.conv_state.astype(np.float64)
    with pytest.raises(KernelError, match="conv_state has another type"):
        wrong.run(kernels)
    wrong = draw(Sizes())
    wrong.projected = wrong.projected[:, :, ::-1]
    with pytest.raises(KernelError, match="rows of projected are not contiguous"):
        wrong.run(kernels)
    wrong = draw(Sizes())
    wrong.projected = wrong.projected[:, :, :-1].copy()
    with pytest.raises(KernelError, match="projected has the wrong shape"):
        wrong.run(kernels)
    wrong = draw(Sizes())
    wrong.ssm_state = wrong.ssm_state.astype(np.int32)
    with pytest.raises(KernelError, match="ssm_state has a type without kernels"):
        wrong.run(kernels)
    wrong = draw(Sizes())
    wrong.ssm_state = wrong.ssm_state.swapaxes(2, 3).copy().swapaxes(2, 3)
    with pytest.raises(KernelError, match="cannot be updated in place"):
        wrong.run(kernels, in_place=True)


def test_a_strided_view_of_projected_gives_the_bits_of_its_copy(kernels: KernelLibrary) -> None:
    operands = draw(Sizes())
    wanted = operands.run(kernels)
    B, T, W = operands.projected.shape
    room = np.full((T + 2, B + 1, W + 12), np.nan, np.float32)
    room[1:-1, :B, 4:-8] = operands.projected.swapaxes(0, 1)
    operands.projected = room[1:-1, :B, 4:-8].swapaxes(0, 1)  # token by token, batch within, a margin around each row
    for one, other in zip(operands.run(kernels), wanted, strict=True):
        assert np.array_equal(one, other)


def test_bfloat16_as_bits_gives_the_bits_of_bfloat16(kernels: KernelLibrary) -> None:
    operands = draw(Sizes(), "bf16")
    wanted = operands.run(kernels)
    operands.projected, operands.conv_state = operands.projected.view(np.uint16), operands.conv_state.view(np.uint16)
    found = operands.run(kernels)
    assert found.y.dtype == np.uint16
    assert np.array_equal(found.y, wanted.y.view(np.uint16))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "calls"),
    [
        ("odd_shapes.cpp", len(list(itertools.product(range(4), range(4), range(2), range(7), range(2))))),
        # Epilogues and kept rows, widths: a plain weight keeps no row, nor does [gate | up]; two of four widths are whole INT4 groups.
        ("odd_products.cpp", 3 * 2 * 4 * 3 * (3 * 4 + 5 * 4 + 5 * 2)),
    ],
)
def test_no_access_leaves_its_array_and_nothing_is_undefined(tmp_path: Path, source: str, calls: int) -> None:
    sources = [*sorted(PLUGINS.glob("abi/*.cpp")), *sorted(PLUGINS.glob("cpu/*.cpp"))]
    program = tmp_path / "odd"
    subprocess.run(
        [
            *("g++", "-std=c++17", "-O1", "-g", *WARNINGS, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *(f"-I{PLUGINS}", f"-I{PLUGINS / 'include'}", str(Path(__file__).parent / source)),
            *(*map(str, sources), "-o", str(program)),
        ],
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["calls"] == calls


HALF = r"""
#include <cstdio>
#include <initializer_list>
#include "cpu/number_formats.h"
int main() {
  for (unsigned h = 0; h < 65536; ++h) {
    const float parts[] = {mmm::float_from_float16(h), mmm::float_from_bfloat16(h)};
    std::fwrite(parts, sizeof(float), 2, stdout);
  }
  // Every exponent and sign, with fractions at, beside and between ties of both formats.
  for (unsigned high = 0; high < 65536; ++high) {
    for (unsigned low : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xefffu, 0xf000u, 0xffffu}) {
      const float x = mmm::float_from_bits(high << 16 | low);
      const unsigned short out[] = {mmm::float16_from_float(x), mmm::bfloat16_from_float(x)};
      std::fwrite(out, 2, 2, stdout);
    }
  }
}
"""


@needs_compiler
@pytest.mark.parametrize("optimise", ["-O0", "-O3"])
def test_half_precision_numbers_convert_as_numpy_converts_them(tmp_path: Path, optimise: str) -> None:
    import ml_dtypes

    (tmp_path / "half.cpp").write_text(HALF)
    program = tmp_path / "half"
    subprocess.run(
        ["g++", "-std=c++17", optimise, *WARNINGS, f"-I{PLUGINS}", str(tmp_path / "half.cpp"), "-o", str(program)],
        check=True,
    )
    out = subprocess.run([str(program)], check=True, capture_output=True).stdout
    widened = np.frombuffer(out, np.float32, 2 * 65536).reshape(-1, 2)
    rounded = np.frombuffer(out, np.uint16, offset=widened.nbytes).reshape(-1, 2)
    every = np.arange(65536, dtype=np.uint16)
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xFFFF], np.uint32)
    floats = ((np.arange(65536, dtype=np.uint32) << 16)[:, None] | low).reshape(-1).view(np.float32)
    for column, dtype in enumerate((np.float16, ml_dtypes.bfloat16)):
        assert np.array_equal(widened[:, column], every.view(dtype).astype(np.float32), equal_nan=True)
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = floats.astype(dtype)
        found = rounded[:, column].copy().view(dtype)
        nan = np.isnan(floats)
        assert np.isnan(found[nan].astype(np.float32)).all()
        assert np.array_equal(found[~nan].view(np.uint16), wanted[~nan].view(np.uint16))
