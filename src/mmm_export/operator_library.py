"""Which library of ours computes MmmSelectiveScan in ONNX Runtime; without one the function body in the graph does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmm_export.errors import KernelError, OptionError
from mmm_export.library_file import check_library_file
from mmm_export.manifest import Manifest
from mmm_export.plugin_files import find_library

AUTO, NONE = "auto", "none"
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"


def choose_library(kernels: str | Path, manifest: Manifest, providers: Sequence[str]) -> Path | None:
    """Return the library to register with a session, None for the function body.

    Args:
        kernels: "auto" for one that `mmm-export plugins build` made and that fits the first provider, if there is one; "none";
            or the path of a libmmm_onnxruntime.so.
        manifest: of the bundle.
        providers: full names of the execution providers, in order of preference.

    Raises:
        OptionError: no such file.
    """
    if kernels == NONE:
        return None
    if kernels == AUTO:
        if manifest.body == "standard-ops" or providers[0] not in (CPU_PROVIDER, CUDA_PROVIDER):
            return None
        return find_library("onnxruntime", cuda=providers[0] == CUDA_PROVIDER)
    path = Path(kernels)
    if not path.is_file():
        raise OptionError(
            f"no kernel library {path}",
            found="a folder" if path.is_dir() else "no such file",
            wanted=f"{AUTO}, {NONE}, or the path of a libmmm_onnxruntime.so",
            hint="mmm-export plugins build makes one",
        )
    return path


def register_library(options: Any, library: Path) -> None:
    """Make the sessions that are opened with these onnxruntime.SessionOptions use a library.

    Raises:
        KernelError: ONNX Runtime cannot load it.
    """
    try:
        check_library_file(library)
        options.register_custom_ops_library(str(library.resolve()))
    except Exception as error:
        import onnxruntime

        if isinstance(error, KernelError):
            reason = error.what.removeprefix(f"{library} ")
            raise _unusable(library, f"{reason}: {error.found}" if error.found else reason) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _unusable(library, f"onnxruntime {onnxruntime.__version__}: {lines[0][:300]}") from error


def _unusable(library: Path, found: str) -> KernelError:
    return KernelError(
        f"ONNX Runtime cannot use the kernel library {library}",
        found=found,
        hint="build it again on this machine: mmm-export plugins build; or go without: --kernels none",
    )
