"""The static CUDA runtime for aarch64, which the CUDA toolkit of another machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mmm_export.errors import BuildError
from mmm_export.output import output_file
from mmm_export.plugins.toolchain import Tool, release_of

VARIABLE = "MMM_AARCH64_CUDART"
_FILE = "libcudart_static.a"
_DOWNLOAD_TIMEOUT_S = 300


def aarch64_cudart(nvcc: Tool, cache: Path) -> Path:
    """Return libcudart_static.a for aarch64, of the release of `nvcc`.

    Taken from $MMM_AARCH64_CUDART, else from the toolkit, else from `cache`, else from the Python package of the runtime, which
    is downloaded with pip and unpacked into `cache`.

    Raises:
        BuildError: none of these has it.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        path = Path(chosen).absolute()
        if path.is_dir():
            path /= _FILE
        if not path.is_file():
            raise BuildError(f"{VARIABLE} names no file", found=str(path), wanted=f"{_FILE} for aarch64", hint=_hint())
        return path
    toolkit = nvcc.path.resolve().parent.parent
    for target in ("aarch64-linux", "sbsa-linux"):
        path = toolkit / "targets" / target / "lib" / _FILE
        if path.is_file():
            return path
    major, minor = release_of(nvcc.version)
    path = cache / f"cudart-aarch64-{major}.{minor}" / _FILE
    if not path.is_file():
        _download(major, minor, path)
    return path


def _download(major: int, minor: int, target: Path) -> None:
    package = "nvidia-cuda-runtime" if major >= 13 else f"nvidia-cuda-runtime-cu{major}"
    with tempfile.TemporaryDirectory(prefix="mmm-export-") as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--platform", "manylinux2014_aarch64", "--dest", folder]
        command.append(f"{package}=={major}.{minor}.*")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise _nowhere(major, minor, f"pip did not answer within {_DOWNLOAD_TIMEOUT_S} s") from None
        if done.returncode != 0:
            said = [
                line for line in (done.stderr or done.stdout).splitlines() if "ERROR" in line or "No module" in line
            ]
            raise _nowhere(major, minor, said[-1] if said else f"pip failed with exit code {done.returncode}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            name = next((name for name in archive.namelist() if name.endswith(f"/{_FILE}")), None)
            if name is None:
                raise _nowhere(major, minor, f"{wheel.name} holds the shared library alone")
            with output_file(target) as path:
                path.write_bytes(archive.read(name))


def _nowhere(major: int, minor: int, found: str) -> BuildError:
    return BuildError(
        f"the static CUDA runtime {major}.{minor} for aarch64 was not found",
        found=found.removeprefix("ERROR: "),
        wanted=f"{_FILE} of CUDA {major}.{minor} for aarch64",
        hint=_hint(),
    )


def _hint() -> str:
    return (
        f"copy {_FILE} from /usr/local/cuda/targets/aarch64-linux/lib of the Jetson and name it with {VARIABLE}, "
        "or compile on the Jetson itself"
    )
