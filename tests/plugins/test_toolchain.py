"""Programs that compile: what is missing, too old or broken is one clear error, before anything is compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mmm_export.errors import BuildError, OptionError
from mmm_export.plugins import architectures, cudart, toolchain
from mmm_export.plugins.architectures import OLDEST_CUDA, native_architectures, parse_architectures
from mmm_export.plugins.toolchain import Tool, cuda_include, find_toolchain

Tools = Callable[..., Path]
NVCC = 'case "$1" in --version) echo "release {release}, V{release}.1";; *) echo "{codes}";; esac'


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """A machine without any program but those that a test writes: `tools(cmake="echo cmake version 3.31.0")`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    monkeypatch.setattr(toolchain, "_SYSTEM_CUDA", tmp_path / "no-toolkit")
    monkeypatch.setattr(toolchain, "_package_toolkits", list)

    def write(**scripts: str) -> Path:
        for name, body in scripts.items():
            path = folder / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        return folder

    return write


def complete(tools: Tools, **changes: str) -> None:
    whole = {"cmake": "echo cmake version 3.31.0", "ninja": "echo 1.13", "g__": "echo 12.2.0"} | changes
    folder = tools(**{name: body for name, body in whole.items() if body})
    if (folder / "g--").exists():
        (folder / "g--").rename(folder / "g++")


def refusal(*numbers: int, cross: str | None = None) -> BuildError:
    with pytest.raises(BuildError) as caught:
        find_toolchain(numbers, cross)
    return caught.value


def test_a_complete_machine_is_taken(tools: Tools) -> None:
    complete(tools, nvcc=NVCC.format(release="13.0", codes="sm_87 sm_90"))
    found = find_toolchain((87, 90), None)
    assert (found.cmake.version, found.generator, found.compiler.version) == ("3.31.0", "Ninja", "12.2.0")
    assert found.nvcc is not None
    assert found.nvcc.version == "13.0"


def test_make_stands_in_for_ninja(tools: Tools) -> None:
    complete(tools, ninja="", make="echo GNU Make 4.4")
    assert find_toolchain((), None).generator == "Unix Makefiles"


def test_no_nvcc_is_looked_for_without_a_gpu(tools: Tools) -> None:
    complete(tools)
    assert find_toolchain((), None).nvcc is None


@pytest.mark.parametrize(
    ("changes", "what", "hint"),
    [
        ({"cmake": ""}, "cmake was not found", 'pip install "mmm-export[plugins]"'),
        ({"cmake": "echo cmake version 3.10.2"}, "cmake is too old", 'pip install "mmm-export[plugins]"'),
        ({"ninja": ""}, "neither ninja nor make was found", 'pip install "mmm-export[plugins]"'),
        ({"g__": ""}, "no C++ compiler was found", "apt-get install g++"),
    ],
    ids=["no cmake", "old cmake", "no ninja", "no compiler"],
)
def test_what_is_missing_is_named_with_how_to_get_it(
    tools: Tools, changes: dict[str, str], what: str, hint: str
) -> None:
    complete(tools, **changes)
    error = refusal()
    assert (error.what, error.hint) == (what, hint)


def test_a_compiler_that_is_none_is_told_by_its_variable(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(tools)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert refusal().found == "CXX=no-such-compiler, which is no program"


def test_a_program_that_does_not_run_is_told_with_what_it_says(tools: Tools) -> None:
    complete(tools, cmake='echo "cannot open shared object file" >&2; exit 127')
    error = refusal()
    assert error.what.endswith("cmake does not run")
    assert error.found == "cannot open shared object file"


def test_a_missing_cross_compiler_is_named_with_its_package(tools: Tools) -> None:
    complete(tools)
    error = refusal(cross="aarch64")
    assert error.what == "no C++ compiler for aarch64 was found"
    assert error.hint == "apt-get install g++-aarch64-linux-gnu"


def test_a_missing_nvcc_is_told_with_the_release_that_the_gpu_needs(tools: Tools) -> None:
    complete(tools)
    error = refusal(87, 110)
    assert error.what == "nvcc, the CUDA compiler, was not found"
    assert error.wanted == "CUDA 13.0 or newer for SM 8.7, SM 11.0"
    assert 'pip install "mmm-export[nvcc]"' in str(error.hint)
    assert "--cuda-arch none" in str(error.hint)


@pytest.mark.parametrize(
    ("release", "codes", "what"),
    [("12.6", "sm_80 sm_87 sm_90", "nvcc is too old for SM 12.0"), ("11.8", "sm_87 sm_120", "nvcc is too old")],
    ids=["architecture", "release"],
)
def test_an_old_nvcc_is_told_with_the_release_that_is_wanted(tools: Tools, release: str, codes: str, what: str) -> None:
    complete(tools, nvcc=NVCC.format(release=release, codes=codes))
    error = refusal(87, 120)
    assert error.what == what
    assert str(error.found).startswith(f"CUDA {release} at /")
    assert error.wanted == "CUDA 12.8 or newer for SM 8.7, SM 12.0"


def test_cuda_home_comes_before_the_path(tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(tools, nvcc=NVCC.format(release="12.0", codes="sm_87"))
    home = tmp_path / "cuda-13.0"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime_api.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + NVCC.format(release="13.0", codes="sm_87") + "\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    found = find_toolchain((87,), None).nvcc
    assert found == Tool(nvcc, "13.0")
    assert cuda_include(found) == home / "include"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("orin,hopper", (87, 90)), ("sm_90, 8.7,87", (87, 90)), ("compute_120", (120,)), ("none", ()), ("12.0", (120,))],
)
def test_architectures_are_read_in_every_spelling(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_architectures(text) == numbers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no architecture"),
        ("none,87", 'mixes "none" with architectures'),
        ("sm_75", "need SM 8.0 or newer"),
        ("101", "it is called 110 since CUDA 13"),
        ("orinn", "did you mean orin?"),
        ("87;90", "no architecture '87;90'"),
        ("-1", "no architecture '-1'"),
    ],
)
def test_a_word_that_is_no_architecture_is_refused(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        parse_architectures(text)


@pytest.mark.parametrize(
    ("said", "numbers"), [("8.7\n", (87,)), ("9.0\n9.0\n8.9\n", (89, 90)), (" 12.0 \n", (120,))], ids=repr
)
def test_native_is_what_the_driver_says(tools: Tools, said: str, numbers: tuple[int, ...]) -> None:
    tools(nvidia_smi=f"printf '{said}'")
    assert native_architectures() == numbers


def test_a_jetson_is_known_without_its_driver(tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compatible").write_bytes(b"nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0")
    monkeypatch.setattr(architectures, "_COMPATIBLE", tmp_path / "compatible")
    tools(nvidia_smi="echo '[N/A]'")
    assert native_architectures() == (87,)


@pytest.mark.parametrize(
    ("script", "what", "found"),
    [
        ("", "this machine shows no GPU to compile for", "no answer from nvidia-smi"),
        ("echo driver not loaded; exit 9", "this machine shows no GPU to compile for", "driver not loaded"),
        ("echo 7.5", "the GPU of this machine is one that the kernels were not written for", "SM 7.5"),
    ],
    ids=["none", "no driver", "old"],
)
def test_no_fitting_gpu_is_told_with_the_way_out(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, what: str, found: str
) -> None:
    monkeypatch.setattr(architectures, "_COMPATIBLE", tmp_path / "absent")
    if script:
        tools(nvidia_smi=script)
    with pytest.raises(BuildError) as caught:
        native_architectures()
    assert (caught.value.what, caught.value.found) == (what, found)
    assert "--cuda-arch" in str(caught.value.hint)


def test_every_architecture_name_is_one_that_can_be_compiled() -> None:
    assert set(architectures.NAMES.values()) <= set(OLDEST_CUDA)


def test_a_cuda_runtime_that_is_not_where_it_was_named_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cudart.VARIABLE, str(tmp_path))
    with pytest.raises(BuildError, match="MMM_AARCH64_CUDART names no file") as caught:
        cudart.aarch64_cudart(Tool(tmp_path / "nvcc", "13.0"), tmp_path)
    assert "targets/aarch64-linux/lib of the Jetson" in str(caught.value.hint)
    (tmp_path / "libcudart_static.a").touch()
    assert cudart.aarch64_cudart(Tool(tmp_path / "nvcc", "13.0"), tmp_path) == tmp_path / "libcudart_static.a"


def test_a_cuda_runtime_that_no_index_has_is_told_with_pips_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cudart.VARIABLE, raising=False)
    pip = tmp_path / "python"
    pip.write_text(
        "#!/bin/sh\necho 'ERROR: No matching distribution found for nvidia-cuda-runtime==13.9.*' >&2; exit 1\n"
    )
    pip.chmod(0o755)
    monkeypatch.setattr(cudart.sys, "executable", str(pip))
    with pytest.raises(BuildError, match=r"static CUDA runtime 13\.9 for aarch64 was not found") as caught:
        cudart.aarch64_cudart(Tool(tmp_path / "toolkit" / "bin" / "nvcc", "13.9"), tmp_path / "cache")
    assert caught.value.found == "No matching distribution found for nvidia-cuda-runtime==13.9.*"
    assert not list((tmp_path / "cache").rglob("*.a"))
