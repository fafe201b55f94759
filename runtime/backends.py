"""Which backend runs a bundle: one for each kind of memory its states live in."""

from __future__ import annotations

from pathlib import Path

from mmm_export.manifest import Manifest
from mmm_export.operator_library import CUDA_PROVIDER
from mmm_export.runtime.backend import Backend
from mmm_export.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mmm_export.runtime.onnxruntime_cuda_backend import OnnxRuntimeCudaBackend


def onnxruntime_backend(
    folder: Path, manifest: Manifest, *, providers: list[str], threads: int | None, library: Path | None
) -> Backend:
    """Open a checked bundle with ONNX Runtime; for the CUDA provider states stay on the GPU.

    Args and Raises: as of the two backends.
    """
    if providers[0] == CUDA_PROVIDER:
        return OnnxRuntimeCudaBackend(folder, manifest, threads=threads, library=library)
    return OnnxRuntimeBackend(folder, manifest, providers=providers, threads=threads, library=library)
