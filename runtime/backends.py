"""Which backend runs a bundle: one for each kind of memory its states live in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmm_export.manifest import Manifest, check_files, read_manifest
from mmm_export.operator_library import CUDA_PROVIDER, choose_library
from mmm_export.runtime.graph_loading import check_requirements, providers_from_names
from mmm_export.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mmm_export.runtime.onnxruntime_cuda_backend import OnnxRuntimeCudaBackend
from mmm_export.runtime.rows_backend import RowsBackend


def onnxruntime_backend(
    folder: Path,
    manifest: Manifest,
    *,
    providers: list[str],
    threads: int | None,
    library: Path | None,
    batch: int = 1,
) -> RowsBackend:
    """Open a checked bundle with ONNX Runtime; for the CUDA provider states stay on the GPU.

    Args and Raises: as of the two backends.
    """
    if providers[0] == CUDA_PROVIDER:
        return OnnxRuntimeCudaBackend(folder, manifest, threads=threads, library=library, batch=batch)
    return OnnxRuntimeBackend(folder, manifest, providers=providers, threads=threads, library=library, batch=batch)


def open_bundle(
    folder: Path,
    providers: Sequence[str] | None,
    threads: int | None,
    kernels: str | Path,
    check_content: bool,
    batch: int = 1,
) -> tuple[Manifest, RowsBackend, Path | None]:
    """Check and open a bundle, and return with it the library that computes its scan, None for the function body.

    Args: `batch` sequences; the others and Raises: as of `Session.open`.
    """
    manifest = read_manifest(folder)
    chosen = providers_from_names(providers)
    library = choose_library(kernels, manifest, chosen)
    check_requirements(folder, manifest, chosen, library)
    check_files(folder, manifest, content=check_content)  # last: it reads gigabytes
    backend = onnxruntime_backend(folder, manifest, providers=chosen, threads=threads, library=library, batch=batch)
    return manifest, backend, library
