"""The mini host's reader of .npy files: damaged ones are refused in words, and nothing reads or writes out of bounds."""

from __future__ import annotations

import io
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from bundles.scan_node import Sizes, draw
from tensorrt_tools.building import tensorrt_headers
from tensorrt_tools.host_calls import fields, run_host, write_inputs

from mmm_export.plugins.toolchain import cuda_include

_PLUGINS = Path(__file__).parents[2] / "plugins"
_PROBE = """
#include <cstdio>
#include "host/npy.h"
int main(int count, char** paths) {  // reads every file, so that a thousand take one process
  for (int i = 1; i < count; ++i) {
    try {
      const auto array = mmm::host::read_npy(paths[i]);
      mmm::host::write_npy(std::string(paths[i]) + ".again", array);
      std::puts("read");
    } catch (const std::exception& error) {
      std::string line = error.what();
      for (char& letter : line) letter = letter == '\\n' ? ' ' : letter;
      std::puts(line.c_str());
    }
  }
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that reads files, compiled so that a fault of memory or arithmetic ends it."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(_PROBE)
    flags = ["-std=c++17", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{_PLUGINS}"]
    sources = [str(folder / "probe.cpp"), str(_PLUGINS / "host" / "npy.cpp")]
    done = subprocess.run(["g++", *flags, *sources, "-o", str(folder / "probe")], capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip(f"this compiler has no sanitizers: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder / "probe"


def read(probe: Path, *paths: Path) -> list[str]:
    done = subprocess.run([probe, *paths], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n").split("\n")  # a header may hold other line ends


def npy(array: np.ndarray) -> bytes:  # type: ignore[type-arg]
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_header(text: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + text.encode("latin1") + data


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


GOOD = npy(np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (4, 0, 2), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<i4", "<u2"])
def test_what_numpy_writes_is_read_and_written_again(
    probe: Path, tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "array.npy"
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    np.save(path, array)
    assert read(probe, path) == ["read"]
    again = np.load(f"{path}.again")
    assert again.dtype == array.dtype
    assert np.array_equal(again, array)


@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00", b"\x03\x00"], ids=["1", "2", "3"])
def test_all_versions_of_the_format_are_read(probe: Path, tmp_path: Path, version: bytes) -> None:
    (tmp_path / "array.npy").write_bytes(with_header(header(), b"\0" * 8, version))
    assert read(probe, tmp_path / "array.npy") == ["read"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "in the middle of the magic number"),
        (b"PK\x03\x04 a zip file", "no .npy file"),
        (b"\x93NUMPY\x09\x00\x10\x00", "another version"),
        (b"\x93NUMPY\x01\x00\xff", "the header's length"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "too long"),
        (with_header(header())[:40], "in the middle of the header"),
        (with_header(header(), b"\0" * 7), "7 bytes of data"),
        (with_header(header(), b"\0" * 9), "9 bytes of data"),
        (with_header(header(shape="(1000000000000,)"), b"\0" * 8), "does not hold what its header says"),
        (with_header(header(shape="(9223372036854775807,)"), b"\0" * 8), "more than 2^63 bytes"),
        (with_header(header(shape="(4294967296, 4294967296)")), "more than 2^63 bytes"),
        (with_header(header(shape="(99999999999999999999,)")), "a number above 2^63"),
        (with_header(header(shape="(-1,)")), "no number"),
        (with_header(header(shape="(1,1,1,1,1,1,1,1,1)")), "more than 8 dimensions"),
        (with_header(header(shape="(2")), "no number"),
        (with_header(header(order="True"), b"\0" * 8), "Fortran order"),
        (with_header(header(order="Maybe")), "neither False nor True"),
        (with_header(header(descr="'<f8'"), b"\0" * 16), "<f8"),
        (with_header(header(descr="'>f4'"), b"\0" * 8), ">f4"),
        (with_header(header(descr="'|O'"), b"\0" * 8), "|O"),
        (with_header(header(descr="[('a', '<f4')]")), "a structured type"),
        (with_header("{}"), "no descr, fortran_order or shape"),
        (with_header("{'descr': '<f4', 'descr': '<f4', 'shape': (2,)}"), "the key 'descr'"),
        (with_header(header() + "more"), "text after the dictionary"),
        (with_header("{'descr"), "a text without an end"),
        (with_header(""), "no '{'"),
    ],
)
def test_a_damaged_file_is_told(probe: Path, tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "damaged.npy"
    path.write_bytes(content)
    (said,) = read(probe, path)
    assert said.startswith(str(path)) or "2^63" in said
    assert words in said


def test_a_folder_in_place_of_a_file_is_told(probe: Path, tmp_path: Path) -> None:
    assert read(probe, tmp_path)[0] != "read"


def test_a_thousand_mutations_never_fault(probe: Path, tmp_path: Path) -> None:
    source = random.Random(0)
    paths = []
    for number in range(1000):
        content = bytearray(GOOD)
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(content))
            match source.randrange(3):
                case 0:
                    content[at] = source.randrange(256)
                case 1:
                    del content[at : at + source.randint(1, 8)]
                case _:
                    content[at:at] = bytes(source.choices(b"0123456789(),'{}: <f4True", k=source.randint(1, 8)))
        path = tmp_path / f"{number}.npy"
        path.write_bytes(content)
        paths.append(path)
    said = read(probe, *paths)
    assert len(said) == len(paths)
    # A mutation of padding or data may leave a good file: then NumPy must read the same.
    for path, line in zip(paths, said, strict=True):
        if line == "read":
            assert np.array_equal(np.load(path).view(np.uint8), np.load(f"{path}.again").view(np.uint8))


def test_the_mini_host_itself_exits_with_the_text(tmp_path: Path) -> None:
    sizes = Sizes()
    feeds = draw(sizes, [3], 3)
    write_inputs(tmp_path / "in", feeds)
    del feeds["projected"]  # not written again
    (tmp_path / "in" / "projected.npy").write_bytes(GOOD[:90])
    run = run_host(tmp_path, feeds, *fields(sizes))
    assert run.code == 1
    assert "projected.npy ends in the middle of the header" in run.stderr


def test_a_run_under_sanitizers_is_clean(tmp_path: Path) -> None:
    """The plugin and the mini host compiled together with the address sanitizer, over ragged rows, a split and a state in place."""
    folder = tmp_path / "build"
    folder.mkdir()
    sanitize = ["-std=c++17", "-g", "-O1", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    cuda = cuda_include(None)
    if cuda is None:
        pytest.skip("no cuda_runtime_api.h, which TensorRT's headers include")
    includes = [f"-I{_PLUGINS}", f"-I{_PLUGINS / 'include'}", f"-isystem{tensorrt_headers()}", f"-isystem{cuda}"]
    defines = ["-DMMM_WITH_CUDA=0", '-DMMM_VERSION="0"', '-DMMM_ARCHITECTURES=""']
    library = [str(p) for name in ("abi", "cpu", "tensorrt") for p in sorted((_PLUGINS / name).glob("*.cpp"))]
    host = [str(p) for p in sorted((_PLUGINS / "host").glob("*.cpp"))]
    compile_ = ["g++", *sanitize, *includes, *defines]
    subprocess.run([*compile_, "-shared", *library, "-o", str(folder / "libmmm_tensorrt.so")], check=True)
    subprocess.run([*compile_, *host, "-ldl", "-o", str(folder / "mmm_mini_host")], check=True)
    sizes = Sizes(heads=6, kv_heads=2, head_dim=48, state_dim=32, conv_width=4)
    write_inputs(tmp_path / "in", draw(sizes, [0, 7, 3], 7, "fp16"))
    (tmp_path / "out").mkdir()
    command = [folder / "mmm_mini_host", folder / "libmmm_tensorrt.so", "--inputs", tmp_path / "in"]
    command += ["--outputs", tmp_path / "out", *fields(sizes), "--split", "4,0,1,2", "--in-place-state"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
