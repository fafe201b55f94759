"""Finds onnxruntime_c_api.h, which ONNX Runtime's Python packages do not bring, or fetches it where Debian's package is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from mmm_export.errors import MissingPackageError, OptionError
from mmm_export.plugin_files import plugin_cache_dir

HEADER = "onnxruntime_c_api.h"
FOLDER_VARIABLE = "ONNXRUNTIME_INCLUDE_DIR"

_SYSTEM = ("/usr/include", "/usr/local/include", "/opt/onnxruntime/include")
_INSIDE = ("", "onnxruntime", "onnxruntime/core/session", "include")
_PACKAGE = "libonnxruntime-dev"
_SUITE = "trixie"  # the oldest Debian release that has it
_TIMEOUT_S = 120


def find_headers() -> Path | None:
    """Return the folder of onnxruntime_c_api.h: $ONNXRUNTIME_INCLUDE_DIR, the system's, or one fetched before.

    Any version from 1.17 on compiles, and what it compiles runs in every ONNX Runtime from 1.17 on.

    Raises:
        OptionError: the variable is set and the folder has no such file.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        found = _folder_with_header(Path(chosen))
        if found is None:
            raise OptionError(
                f"{FOLDER_VARIABLE} is not the folder of ONNX Runtime's headers",
                found=f"{chosen} without {HEADER}",
                wanted=f"the folder that holds {HEADER}",
            )
        return found
    for folder in (*map(Path, _SYSTEM), _fetched()):
        found = _folder_with_header(folder)
        if found is not None:
            return found
    return None


def require_headers() -> Path:
    """Like `find_headers`; raises MissingPackageError, which says how to get them, when there are none."""
    found = find_headers()
    if found is None:
        raise MissingPackageError(
            "ONNX Runtime's C header is needed to compile its operator library",
            found=f"no {HEADER} in {', '.join(_SYSTEM)}",
            wanted=f"any version from 1.17 on, in the system or in the folder that {FOLDER_VARIABLE} names",
            hint=f"apt-get install {_PACKAGE} (Debian 13, Ubuntu 25.04), or unpack a release archive of ONNX Runtime, "
            f"whose include folder has it, and set {FOLDER_VARIABLE}",
        )
    return found


def fetch_headers() -> Path:
    """Download Debian's package of the headers with apt and unpack it beside the plugin cache; changes nothing in the system.

    For tests: on a Debian older than the package it asks the same mirror for a newer release, through a source list of its own.

    Returns: the folder of onnxruntime_c_api.h.

    Raises:
        MissingPackageError: no apt, no network, or no such package.
    """
    target = _fetched()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        package = _download(folder)
        _run(["dpkg-deb", "-x", package.name, "unpacked"], folder)
        found = _folder_with_header(folder / "unpacked" / "usr" / "include")
        if found is None:
            raise _unavailable(f"{package.name} has no {HEADER}")
        shutil.rmtree(target, ignore_errors=True)
        found.replace(target)
    return target


def _fetched() -> Path:
    return plugin_cache_dir().parent / "headers" / "onnxruntime"


def _folder_with_header(folder: Path) -> Path | None:
    return next((folder / inside for inside in _INSIDE if (folder / inside / HEADER).is_file()), None)


def _download(folder: Path) -> Path:
    """Fetch the package into `folder`, from the system's own sources or else from a newer release on their mirror."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise _unavailable("no apt-get")
    try:
        _run(["apt-get", "download", _PACKAGE], folder)
    except MissingPackageError:
        options = _private_sources(folder)
        _run(["apt-get", *options, "update"], folder)
        _run(["apt-get", *options, "download", _PACKAGE], folder)
    packages = sorted(folder.glob(f"{_PACKAGE}_*.deb"))
    if not packages:
        raise _unavailable(f"apt-get downloaded no {_PACKAGE}")
    return packages[-1]


def _private_sources(folder: Path) -> list[str]:
    """Write a source list of the newer release; returns the options that make apt-get use it and nothing else."""
    listing = _run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"], folder
    )
    codename = _codename()
    mirrors = [line.split()[0] for line in listing.splitlines() if line.split()[1:] == [codename, "main"]]
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not mirrors or not keys.is_file():
        raise _unavailable(f"{_PACKAGE} is not among this machine's sources, which are no Debian's")
    (folder / "sources.list").write_text(f"deb [signed-by={keys}] {mirrors[0]} {_SUITE} main\n", encoding="utf-8")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    return [
        "-oDir::Etc::sourcelist=" + str(folder / "sources.list"),
        "-oDir::Etc::sourceparts=-",
        "-oDir::State::lists=" + str(folder / "lists"),
        "-oDir::Cache=" + str(folder / "cache"),
    ]


def _codename() -> str:
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition("=")[2].strip('"') for line in lines if line.startswith("VERSION_CODENAME=")), "")


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unavailable(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise _unavailable(f"{command[0]}: {lines[-1]}")
    return done.stdout


def _unavailable(found: str) -> MissingPackageError:
    return MissingPackageError(
        "ONNX Runtime's C header cannot be fetched",
        found=found,
        hint=f"set {FOLDER_VARIABLE} to a folder that holds {HEADER}",
    )
