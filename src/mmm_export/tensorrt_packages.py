"""Which Python packages carry TensorRT and CUDA's driver interface: the one place that knows their import names.

Nothing is imported before it is asked for. A Jetson has `tensorrt` from JetPack; wheels of both flavors exist besides.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from mmm_export.engine_manifest import Flavor
from mmm_export.errors import MissingPackageError

# In order of preference. The front package of TensorRT-RTX only forwards to its bindings, and is not always installable.
TENSORRT_MODULES: dict[Flavor, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
CUDA_MODULES = ("cuda.bindings.driver", "cuda.cuda")  # the second is its name before cuda-python 12.6

TENSORRT_HINTS: dict[Flavor, str] = {
    "tensorrt": "on a Jetson: sudo apt install python3-libnvinfer, and a virtual environment with --system-site-packages; "
    "elsewhere: pip install tensorrt of the engine's version",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
}
CUDA_HINT = (
    'pip install "mmm-export[device]"; on JetPack 6 and other CUDA 12 systems: pip install "cuda-bindings==12.9.*"'
)


def find_module(candidates: tuple[str, ...]) -> str | None:
    """Return the first of these modules that is installed, without importing it."""
    for name in candidates:
        try:
            if find_spec(name) is not None:
                return name
        except ModuleNotFoundError:  # the package around a submodule is missing
            continue
    return None


def import_tensorrt(flavor: Flavor) -> Any:
    """Import the Python bindings of a flavor. Raises MissingPackageError when they are missing or broken."""
    return _import(TENSORRT_MODULES[flavor], f"the Python bindings of {flavor}", TENSORRT_HINTS[flavor])


def import_cuda_driver() -> Any:
    """Import CUDA's driver interface. Raises MissingPackageError when it is missing or broken."""
    return _import(CUDA_MODULES, "the Python bindings of CUDA's driver interface", CUDA_HINT)


def _import(candidates: tuple[str, ...], what: str, hint: str) -> Any:
    name = find_module(candidates)
    if name is None:
        raise MissingPackageError(
            f"an engine needs {what}", found="not installed", wanted=" or ".join(candidates), hint=hint
        )
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # a library below it is missing
        lines = str(error).splitlines() or [type(error).__name__]
        raise MissingPackageError(f"{what} cannot be loaded", found=f"{name}: {lines[0][:300]}", hint=hint) from error
