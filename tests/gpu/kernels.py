"""The library under test, through the product's own view of its C interface."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from mmm_export.errors import KernelError
from mmm_export.plugin_files import find_library
from mmm_export.plugins.library import ABI_VERSION, Code, DType, Method, ScanArguments, ScanShape, load_library

__all__ = [
    "ABI_VERSION",
    "DEVICE",
    "DTYPES",
    "Code",
    "Kernels",
    "Method",
    "RefusedError",
    "ScanArguments",
    "ScanShape",
    "library_path",
]

DEVICE = "cpu" if os.environ.get("MMM_KERNEL_DEVICE") == "cpu" else "cuda"
DTYPES = {torch.float32: DType.FLOAT32, torch.float16: DType.FLOAT16, torch.bfloat16: DType.BFLOAT16}


class RefusedError(Exception):
    """The library returned another code than MMM_OK: `code`, and its sentence as `text`."""

    def __init__(self, error: KernelError) -> None:
        super().__init__(str(error))
        named = re.search(r"\((MMM_\w+)\): (.*)", str(error), re.DOTALL)
        assert named, error
        self.code = Code[named[1]]
        self.text = named[2]


class Kernels:
    """A loaded library whose refusals carry their code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = load_library(path)

    @property
    def build_info(self) -> dict[str, Any]:
        return self._library.build_info

    def workspace_bytes(self, shape: ScanShape) -> int:
        try:
            return self._library.workspace_bytes(shape)
        except KernelError as error:
            raise RefusedError(error) from None

    def scan(self, args: ScanArguments) -> None:
        """Enqueue one call.

        Raises:
            RefusedError: the library returned another code than MMM_OK.
        """
        try:
            self._library.selective_scan(args)
        except KernelError as error:
            raise RefusedError(error) from None


def library_path() -> Path | None:
    """Name the library to test: MMM_KERNEL_LIBRARY, else the newest build of `mmm-export plugins build`, else None."""
    named = os.environ.get("MMM_KERNEL_LIBRARY")
    return Path(named) if named else find_library("kernels", cuda=DEVICE == "cuda")
