"""The programs that compile: cmake, a build program, a C++ compiler and nvcc. Each one missing is one clear error."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mmm_export.errors import BuildError
from mmm_export.plugins.architectures import OLDEST_CUDA, dotted

_CMAKE_OLDEST = (3, 20)
_CUDA_OLDEST = (12, 0)
_TIMEOUT_S = 60  # for a program to say its version, from a cold disk
_PACKAGES = 'pip install "mmm-export[plugins]"'
_NVCC_PACKAGES = 'pip install "mmm-export[nvcc]" brings CUDA 13.0 without a toolkit, or install the CUDA toolkit'
_SYSTEM_CUDA = Path("/usr/local/cuda")
_CROSS_NAMES = ("aarch64-linux-gnu-g++", *(f"aarch64-linux-gnu-g++-{release}" for release in range(15, 9, -1)))


@dataclass(frozen=True)
class Tool:
    """A program and the version that it states."""

    path: Path
    version: str


@dataclass(frozen=True)
class Toolchain:
    """What compiles one build.

    Args:
        cmake: at least 3.20.
        generator: "Ninja" or "Unix Makefiles".
        generator_program: ninja or make.
        compiler: C++ compiler for the target machine.
        nvcc: None for a build without CUDA.
    """

    cmake: Tool
    generator: str
    generator_program: Path
    compiler: Tool
    nvcc: Tool | None


def find_toolchain(architectures: Sequence[int], cross: str | None) -> Toolchain:
    """Look for all programs, and ask nvcc whether it has the architectures.

    Args:
        architectures: compute capabilities; nvcc is needed only if there are any.
        cross: "aarch64" to compile for that machine on another one.

    Raises:
        BuildError: one is missing or too old.
    """
    cmake = _find_cmake()
    generator, program = _find_generator()
    compiler = _find_compiler(cross)
    return Toolchain(cmake, generator, program, compiler, _find_nvcc(architectures) if architectures else None)


def release_of(version: str) -> tuple[int, int]:
    """Return major and minor of a version: "13.0.88" is (13, 0)."""
    numbers = re.findall(r"\d+", version)
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


def cuda_include(nvcc: Tool | None) -> Path | None:
    """Find cuda_runtime_api.h, which TensorRT's headers include even where no kernel is compiled."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += [nvcc.path.parent.parent] if nvcc else []
    roots += [_SYSTEM_CUDA, *_package_toolkits()]
    folders = [*(root / "include" for root in roots), Path("/usr/include")]
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()), None)


def _find_cmake() -> Tool:
    path = _which("cmake")
    if path is None:
        raise BuildError("cmake was not found", wanted="3.20 or newer", hint=_PACKAGES)
    version = _version(path, ["--version"], r"version (\d+(?:\.\d+)+)")
    if release_of(version) < _CMAKE_OLDEST:
        raise BuildError("cmake is too old", found=f"{version} at {path}", wanted="3.20 or newer", hint=_PACKAGES)
    return Tool(path, version)


def _find_generator() -> tuple[str, Path]:
    ninja = _which("ninja")
    if ninja is not None:
        return "Ninja", ninja
    make = _which("make") or _which("gmake")
    if make is not None:
        return "Unix Makefiles", make
    raise BuildError("neither ninja nor make was found", wanted="one of them", hint=_PACKAGES)


def _find_compiler(cross: str | None) -> Tool:
    if cross:
        path = next(filter(None, map(_which, _CROSS_NAMES)), None)
        if path is None:
            raise BuildError(
                f"no C++ compiler for {cross} was found",
                found="none of " + ", ".join(_CROSS_NAMES[:2]) + " and so on",
                wanted="GCC 10 or newer that compiles for it",
                hint="apt-get install g++-aarch64-linux-gnu",
            )
    else:
        chosen = os.environ.get("CXX")
        path = _which(chosen) if chosen else _which("g++") or _which("c++") or _which("clang++")
        if path is None:
            raise BuildError(
                "no C++ compiler was found",
                found=f"CXX={chosen}, which is no program" if chosen else "none of g++, c++, clang++",
                wanted="GCC 10 or newer, or clang",
                hint="apt-get install g++",
            )
    return Tool(path, _version(path, ["-dumpfullversion", "-dumpversion"], r"(\d+(?:\.\d+)*)"))


def _find_nvcc(architectures: Sequence[int]) -> Tool:
    path = _nvcc_path()
    if path is None:
        raise BuildError(
            "nvcc, the CUDA compiler, was not found",
            found="none in CUDA_HOME, on the PATH, in /usr/local/cuda or among the Python packages",
            wanted=_oldest_in_words(architectures),
            hint=f"{_NVCC_PACKAGES}; the CPU reference builds without it: --cuda-arch none",
        )
    version = _version(path, ["--version"], r"release (\d+\.\d+)")
    listed = _output([str(path), "--list-gpu-code"])
    known = {int(number) for number in re.findall(r"sm_(\d+)", listed)}
    missing = [number for number in architectures if number not in known]
    if missing or release_of(version) < _CUDA_OLDEST:
        names = ", ".join(f"SM {dotted(number)}" for number in missing)
        raise BuildError(
            f"nvcc is too old for {names}" if missing else "nvcc is too old",
            found=f"CUDA {version} at {path}",
            wanted=_oldest_in_words(architectures),
            hint=f"{_NVCC_PACKAGES}, and set CUDA_HOME if several are installed",
        )
    return Tool(path, version)


def _oldest_in_words(architectures: Sequence[int]) -> str:
    oldest = max([_CUDA_OLDEST, *(OLDEST_CUDA[number] for number in architectures)])
    return f"CUDA {oldest[0]}.{oldest[1]} or newer for {', '.join(f'SM {dotted(number)}' for number in architectures)}"


def _nvcc_path() -> Path | None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        root = os.environ.get(name)
        if root and (Path(root) / "bin" / "nvcc").is_file():
            return (Path(root) / "bin" / "nvcc").absolute()
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(_SYSTEM_CUDA / "bin"))
    if found:
        return Path(found).absolute()
    candidates = (root / "bin" / "nvcc" for root in _package_toolkits())
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _package_toolkits() -> list[Path]:
    """Folders in which NVIDIA's Python packages put together a toolkit: nvidia/cu13 and newer."""
    spec = find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return [folder for place in places for folder in sorted(Path(place).glob("cu[0-9]*"), reverse=True)]


def _which(program: str) -> Path | None:
    # Python packages put their programs beside the interpreter, which is on the PATH only in an activated environment.
    found = shutil.which(program) or shutil.which(program, path=sysconfig.get_path("scripts"))
    return Path(found).absolute() if found else None


def _version(path: Path, arguments: Sequence[str], pattern: str) -> str:
    said = _output([str(path), *arguments])
    match = re.search(pattern, said)
    if match is None:
        raise BuildError(
            f"{path} does not run",
            found=(said.strip().splitlines() or ["nothing"])[0][:200],
            wanted="a program that states its version",
            hint="repair or remove it, or put another one before it on the PATH",
        )
    return match[1]


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT_S} s"
    except OSError as error:
        return error.strerror or str(error)
    return done.stdout if done.returncode == 0 else done.stderr or done.stdout
