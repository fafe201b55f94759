"""The C++ and CUDA sources beside this file, and the fingerprint that names a build of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
_SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".cmake", ".map", ".in"}


def source_files() -> list[Path]:
    """Everything that the result of a build depends on, in a fixed order."""
    found = [path for path in FOLDER.rglob("*") if path.suffix in _SUFFIXES and path.is_file()]
    return sorted([*found, FOLDER / "CMakeLists.txt"])


def fingerprint(conditions: Iterable[str]) -> str:
    """Return 12 hexadecimal digits of the sources and of `conditions`: tools, headers and targets of a build."""
    digest = hashlib.sha256()
    for path in source_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(FOLDER)} {len(content)}\n".encode())
        digest.update(content)
    for condition in conditions:
        digest.update(f"\n{condition}".encode())
    return digest.hexdigest()[:12]
