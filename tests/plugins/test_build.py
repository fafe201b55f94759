"""`mmm-export plugins build` around the compilers: headers, the cache, and failures. cmake is a script here; others compile."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mmm_export import __version__
from mmm_export.errors import BuildError, MissingPackageError, OptionError, OutputError
from mmm_export.plugin_files import CACHE_VARIABLE, find_library, plugin_cache_dir
from mmm_export.plugins import build as building
from mmm_export.plugins import headers, onnxruntime_headers
from mmm_export.plugins.build import BuildOptions, build_plugins, parse_targets
from mmm_export.plugins.compilation import relevant_lines, run_logged
from mmm_export.plugins.headers import find_tensorrt

# As much of cmake as a build asks for: "cmake -S .. -B TREE .." and "cmake --build TREE .. --target NAME..".
CMAKE = r"""#!/bin/sh
if [ "$1" = --version ]; then echo cmake version 3.31.0; exit; fi
echo "$@" >>"$CALLS"
if [ "$1" = --build ]; then
  tree=$2; shift 5
  for name; do
    echo "[1/1] Linking $name"
    case $name in mmm_mini_host) echo host >"$tree/$name";; *) echo "$name" >"$tree/lib$name.so";; esac
  done
else
  mkdir -p "$4"
fi
"""
VERSION_H = "#define NV_TENSORRT_MAJOR {}\n#define NV_TENSORRT_MINOR {}\n#define NV_TENSORRT_PATCH {}\n"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A cache of its own, no foreign headers, and a cmake that compiles nothing; returns what it was called with."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in (headers.TENSORRT_VARIABLE, onnxruntime_headers.FOLDER_VARIABLE, "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(headers, "_tensorrt_folders", lambda machine: [])
    monkeypatch.setattr(onnxruntime_headers, "_SYSTEM", ())
    write_cmake(tmp_path, CMAKE)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


def write_cmake(tmp_path: Path, script: str) -> None:
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "cmake").write_text(script)
    (tmp_path / "bin" / "cmake").chmod(0o755)


def tensorrt_headers(folder: Path, *version: int) -> Path:
    folder.mkdir()
    (folder / "NvInfer.h").touch()
    if version:
        (folder / "NvInferVersion.h").write_text(VERSION_H.format(*version))
    return folder


def test_a_build_lies_in_the_cache_and_is_found_again(calls: Callable[[], list[str]]) -> None:
    first = build_plugins(BuildOptions(only=("kernels",)))
    assert (first.reused, first.file_bytes) == (False, {"libmmm_kernels.so": 12})
    assert find_library("kernels") == first.folder / "libmmm_kernels.so"
    assert len(calls()) == 2
    again = build_plugins(BuildOptions(only=("kernels",)))
    assert (again.reused, again.folder) == (True, first.folder)
    assert len(calls()) == 2


def test_a_build_is_not_reused_when_a_file_of_it_was_changed(calls: Callable[[], list[str]]) -> None:
    report = build_plugins(BuildOptions(only=("kernels",)))
    (report.folder / "libmmm_kernels.so").write_text("damaged")
    assert not build_plugins(BuildOptions(only=("kernels",))).reused
    assert (report.folder / "libmmm_kernels.so").read_text() == "mmm_kernels\n"


def test_other_headers_give_another_build(calls: Callable[[], list[str]], tmp_path: Path) -> None:
    found = {
        build_plugins(BuildOptions(only=("tensorrt",), tensorrt_include=folder)).folder
        for folder in (tensorrt_headers(tmp_path / "a", 10, 3, 0), tensorrt_headers(tmp_path / "b", 11, 1, 0))
    }
    assert len(found) == 2


def test_the_manifest_says_what_was_built_with_what(calls: Callable[[], list[str]], tmp_path: Path) -> None:
    include = tensorrt_headers(tmp_path / "include", 10, 3, 0)
    report = build_plugins(BuildOptions(out=tmp_path / "out", tensorrt_include=include))
    told = json.loads((tmp_path / "out" / "build.json").read_text())
    assert (told["version"], told["cuda"], told["architectures"]) == (__version__, None, [])
    assert told["targets"] == ["kernels", "tensorrt"]
    assert told["headers"]["TensorRT"]["version"] == "10.3.0"
    assert sorted(told["files"]) == ["libmmm_kernels.so", "libmmm_tensorrt.so"] == sorted(report.file_bytes)
    assert not (tmp_path / "out" / ".build").exists()


def test_what_lacks_headers_is_left_out_with_a_note(calls: Callable[[], list[str]]) -> None:
    report = build_plugins(BuildOptions())
    assert list(report.file_bytes) == ["libmmm_kernels.so"]
    assert report.notes[0].startswith("left out the TensorRT plugin: no TensorRT's headers; pip install kernel-lens")
    assert report.notes[1].startswith("left out the library for ONNX Runtime")


def test_headers_that_a_named_target_lacks_are_an_error(calls: Callable[[], list[str]]) -> None:
    with pytest.raises(BuildError, match="TensorRT's headers were not found") as caught:
        build_plugins(BuildOptions(only=("tensorrt",)))
    assert "pip install kernel-lens==2.0.1 --no-deps" in str(caught.value.hint)
    with pytest.raises(MissingPackageError, match="ONNX Runtime's C header is needed") as missing:
        build_plugins(BuildOptions(only=("onnxruntime",)))
    assert "apt-get install" in str(missing.value.hint)
    assert calls() == []


@pytest.mark.usefixtures("calls")
def test_tensorrts_headers_without_cudas_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "cuda_include", lambda nvcc: None)
    include = tensorrt_headers(tmp_path / "include", 10, 3, 0)
    with pytest.raises(BuildError, match=r"cuda_runtime_api\.h, which TensorRT's headers include, was not found") as e:
        build_plugins(BuildOptions(tensorrt_include=include))
    assert "CUDA_HOME" in str(e.value.hint)


@pytest.mark.usefixtures("calls")
def test_a_named_folder_without_headers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=r"--tensorrt-include names a folder without NvInfer\.h"):
        build_plugins(BuildOptions(tensorrt_include=tmp_path))
    with pytest.raises(BuildError, match="--onnxruntime-include names a folder without onnxruntime_c_api") as caught:
        build_plugins(BuildOptions(onnxruntime_include=tmp_path / "none"))
    assert str(caught.value.found).endswith("none, which is no folder")
    monkeypatch.setenv(headers.TENSORRT_VARIABLE, str(tmp_path))
    with pytest.raises(BuildError, match="TENSORRT_INCLUDE_DIR names a folder without"):
        find_tensorrt(None, "x86_64")


@pytest.mark.parametrize(
    ("version", "what", "found"),
    [
        ((8, 6, 1), "are too old", "8.6.1"),
        ((10, 2, 0), "are too old", "10.2.0"),
        ((), "state no version", "no NvInfer"),
    ],
    ids=["8.6", "10.2", "none"],
)
def test_old_headers_are_told_with_the_oldest_that_will_do(
    tmp_path: Path, version: tuple[int, ...], what: str, found: str
) -> None:
    with pytest.raises(BuildError, match=f"the TensorRT headers {what}") as caught:
        find_tensorrt(tensorrt_headers(tmp_path / "include", *version), "x86_64")
    assert str(caught.value.found).startswith(found)
    assert caught.value.wanted == "10.3 or newer"


def test_a_folder_that_holds_something_else_is_not_overwritten(calls: Callable[[], list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError):
            build_plugins(BuildOptions(only=("kernels",), out=out, force=force))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("calls")
def test_a_failed_compilation_shows_its_errors_keeps_the_log_and_leaves_no_build(tmp_path: Path) -> None:
    failing = CMAKE.replace("  tree=$2;", "  echo 'kernels/scan.cu(7): error: expected a ;'; exit 2; tree=$2;")
    write_cmake(tmp_path, failing)
    with pytest.raises(BuildError, match="compiling the plugins failed with exit code 2") as caught:
        build_plugins(BuildOptions(only=("kernels",)))
    assert "kernels/scan.cu(7): error: expected a ;" in str(caught.value.found)
    log = Path(str(caught.value.hint).removeprefix("the full log is "))
    assert "scan.cu(7)" in log.read_text()
    log.unlink()
    assert find_library("kernels") is None
    assert [path.name for path in plugin_cache_dir().iterdir() if not path.name.startswith(".")] == []


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log, pytest.raises(OSError, match="No space left on device"):
        run_logged(["sh", "-c", "echo cc: No space left on device; exit 1"], log, doing="x", advance=lambda share: None)


def test_progress_is_what_ninja_and_make_say(tmp_path: Path) -> None:
    told: list[float] = []
    with (tmp_path / "log").open("w") as log:
        run_logged(["printf", "[1/4] a\\n[ 75%%] b\\nnoise\\n"], log, doing="x", advance=told.append)
    assert told == [0.25, 0.75]


def test_the_lines_that_are_shown_are_the_errors_or_else_the_last_ones() -> None:
    noise = "\n".join(f"[{n}/99] Compiling" for n in range(99))
    text = f"{noise}\nscan.cu(3): error: no such thing\n  int x\nFAILED: scan.o\nninja: build stopped: error\n"
    assert relevant_lines(text) == ["scan.cu(3): error: no such thing", "  int x"]
    assert relevant_lines(noise)[-1] == "[98/99] Compiling"
    assert relevant_lines("") == []
    assert len(io.StringIO("\n".join(relevant_lines("x error\n" * 500))).readlines()) <= 12


@pytest.mark.parametrize("text", ["", " , ", "kernels,tensor"])
def test_targets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--only has no target") as caught:
        parse_targets(text)
    assert caught.value.wanted == "kernels, tensorrt, onnxruntime, mini-host"
