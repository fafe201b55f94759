"""NVIDIA's TensorRT libraries that run without a GPU, as far as these tests need: parsing, building, registering.

Run this file to fetch them (about 220 MB; 670 MB unpacked) into build/tensorrt/<name>, as `make test` does. They are no
dependencies of the project: two of them hold modules of one name, so each has a folder of its own, and a test gives one of them
to a Python of its own. What the package index does not offer is told once, and its tests skip with that reason.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

PACKAGES: dict[str, tuple[str, ...]] = {
    "headers": ("kernel-lens==2.0.1",),  # carries TensorRT 10.14's own headers
    "lean-10": ("tensorrt-lean-cu12-libs==10.16.1.11", "tensorrt-lean-cu12-bindings==10.16.1.11"),
    "lean-11": ("tensorrt-lean-cu12-libs==11.4.0.106", "tensorrt-lean-cu12-bindings==11.4.0.106"),
    # CUDA's driver interface in Python, for JetPack 6 and for CUDA 13
    "cuda-12": ("cuda-bindings==12.9.4", "cuda-pathfinder==1.3.3"),
    "cuda-13": ("cuda-bindings==13.0.3", "cuda-pathfinder==1.3.3"),
    "rtx": ("tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13-bindings==1.7.1.116"),
}
ROOT_VARIABLE = "MMM_TENSORRT_RUNTIMES"
ROOT = Path(os.environ.get(ROOT_VARIABLE) or Path(__file__).parents[2] / "build" / "tensorrt")
_INSTALLED = "installed.txt"  # written last, so that an interrupted fetch is none
_UNAVAILABLE = "unavailable.txt"
_TIMEOUT_S = 900  # for 230 MB over a slow line


def runtime_folder(name: str) -> Path | None:
    """Return the folder to put on PYTHONPATH, or None when it was not fetched, or in another version."""
    note = ROOT / name / _INSTALLED
    return note.parent if note.is_file() and note.read_text().split() == list(PACKAGES[name]) else None


def require_runtime(name: str) -> Path:
    """Return the folder of a runtime, or skip with the command that fetches it."""
    import pytest

    folder = runtime_folder(name)
    if folder is None:
        note = ROOT / name / _UNAVAILABLE
        reason = (
            note.read_text().strip() if note.is_file() else "fetch them with: python tests/tensorrt_tools/runtimes.py"
        )
        pytest.skip(f"{' '.join(PACKAGES[name])} not there: {reason}")
    return folder


def header_folder() -> Path | None:
    folder = runtime_folder("headers")
    return None if folder is None else folder / "kernel_lens" / "include" / "tensorrt"


def run_with_runtime(
    name: str, script: Path, *arguments: str, library_path: Path | None = None, timeout_s: int = 600
) -> subprocess.CompletedProcess[str]:
    """Run a Python script that imports the runtime, in a process of its own: a fault in native code must fail one test only."""
    environment = dict(os.environ)
    folders = [str(require_runtime(name)), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    if library_path is not None:
        environment["LD_LIBRARY_PATH"] = str(library_path)
    return subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s
    )


@functools.cache
def rtx_soname_folder() -> Path:
    """Return a folder with libtensorrt_rtx.so, the name under which the ONNX parser looks for the library.

    The wheel holds libtensorrt_rtx.so.1 alone; without the other name the parser ends the process at the first plugin node.
    """
    libraries = require_runtime("rtx") / "tensorrt_rtx_libs"
    folder = libraries.parent / "soname"
    folder.mkdir(exist_ok=True)
    link = folder / "libtensorrt_rtx.so"
    if not link.is_symlink():
        with contextlib.suppress(FileExistsError):  # another test process was first
            link.symlink_to(libraries / "libtensorrt_rtx.so.1")
    return folder


def fetch(name: str) -> str | None:
    """Install the packages of `name` into a folder of its own, without what they depend on; return why it failed, if it did."""
    folder = ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--upgrade"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--target", str(folder), *PACKAGES[name]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        failed = done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or [f"pip gave {done.returncode}"]
    except subprocess.TimeoutExpired:
        failed, lines = True, [f"pip took longer than {_TIMEOUT_S} s"]
    if failed:
        (folder / _UNAVAILABLE).write_text(lines[-1] + "\n")
        return lines[-1]
    (folder / _UNAVAILABLE).unlink(missing_ok=True)
    (folder / _INSTALLED).write_text("\n".join(PACKAGES[name]) + "\n")
    return None


def main() -> None:
    """Fetch what is not there yet; a failure is a note, since most tests need none of this."""
    missing = [name for name in PACKAGES if runtime_folder(name) is None]
    if missing:
        sys.stderr.write(f"Fetching TensorRT's runtimes for tests into {ROOT} (once; about 190 MB)\n")
    for name in missing:
        reason = fetch(name)
        if reason:
            sys.stderr.write(f"note: {' '.join(PACKAGES[name])} not fetched, so their tests will skip: {reason}\n")


if __name__ == "__main__":
    main()
