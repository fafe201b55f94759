"""Writes benchmarks/results/WHERE-WHAT.json: what was measured, where, by which command, with which versions."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import mmm_export

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "safetensors",
)


def write_results(
    path: Path, what: str, rows: Sequence[dict[str, Any]], *, where: str | None = None, command: str | None = None
) -> None:
    """Write one result file.

    Args:
        path: the file; its folder must exist.
        what: one sentence.
        rows: one row a measurement, units in the key names.
        where: the device; this machine's processor unless given.
        command: what was run to measure; this program's command line unless given.
    """
    data = {
        "what": what,
        "where": where or machine(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": command or shlex.join(["python", *_relative(sys.argv)]),
        "versions": {"python": platform.python_version(), **_versions()},
        "rows": list(rows),
    }
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def machine() -> str:
    """Name the processor, its cores and the memory."""
    import os

    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB"


def gpu_word(name: str | None) -> str:
    """The word of a GPU's name that result files begin with, such as "h100"; "cpu" for None."""
    if name is None:
        return "cpu"
    return next((word.lower() for word in name.split() if any(c.isdigit() for c in word)), "gpu")


def commit() -> str | None:
    """Name the commit of the working tree, with "+" when it holds changes; None outside a repository or without git."""
    if shutil.which("git") is None:
        return None
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if head.returncode != 0:
        return None
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _versions() -> dict[str, str]:
    found = {"mmm-export": mmm_export.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "onnxruntime-gpu" in found:  # both are the module onnxruntime; where both are installed this one was imported
        found.pop("onnxruntime", None)
    return found


def _relative(arguments: Sequence[str]) -> list[str]:
    """Write the command as one would type it in the repository, without this machine's folders."""
    return [
        str(Path(a).resolve().relative_to(ROOT)) if Path(a).resolve().is_relative_to(ROOT) and "/" in a else a
        for a in arguments
    ]
