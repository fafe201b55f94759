"""Opens a folder: a bundle with ONNX Runtime, an engine with TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmm_export.engine_manifest import EngineManifest, folder_kind
from mmm_export.errors import OptionError
from mmm_export.manifest import Manifest
from mmm_export.runtime.backend import Backend, BatchBackend

DEFAULT_CHUNK_TOKENS = 512
CUDA_CHUNK_TOKENS = 4096  # large products keep a GPU busy; activations of a full-size model then take 0.3 GiB
MOST_ROWS = 1024  # more are a slip of the finger: the states of so many would be tens of GB


@dataclass(frozen=True)
class OpenedModel:
    """What was opened: `backend` is row 0 of `batch`; `kernels` the library that computes the scan, None for the function body."""

    folder: Path
    manifest: Manifest | EngineManifest
    backend: Backend
    batch: BatchBackend
    chunk_tokens: int
    kernels: Path | None


def open_model(
    path: Path | str,
    *,
    rows: int = 1,
    providers: Sequence[str] | None,
    chunk_tokens: int | None,
    threads: int | None,
    kernels: str | Path,
    check_content: bool,
) -> OpenedModel:
    """Open a bundle or an engine for so many sequences.

    Args and Raises: as of `Session.open`; OptionError also for an engine that shall take more than one row.
    """
    for name, value in (("chunk_tokens", chunk_tokens), ("threads", threads), ("rows", rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{name} is out of range", found=repr(value), wanted="a whole number of at least 1")
    if rows > MOST_ROWS:
        raise OptionError("rows is out of range", found=f"{rows}", wanted=f"at most {MOST_ROWS}")
    if isinstance(providers, str):
        providers = [providers]  # one name is that name, and not its letters
    folder = Path(path)
    if folder_kind(folder) == "engine":
        from mmm_export.runtime.engine_session import open_engine_backend
        from mmm_export.runtime.rows_backend import OneRow

        if rows > 1:
            raise OptionError(
                "an engine takes one sequence at a time",
                found=f"{rows} rows for {folder}",
                wanted="1, as the engine was built",
                hint="leave it out, or open the bundle",
            )
        wanted = chunk_tokens or DEFAULT_CHUNK_TOKENS
        engine, backend, chunk = open_engine_backend(folder, providers, threads, kernels, wanted, check_content)
        return OpenedModel(folder, engine, backend, OneRow(backend), chunk, None)
    # Imported here: a state file can be inspected where ONNX Runtime is not installed.
    from mmm_export.runtime.backends import open_bundle
    from mmm_export.runtime.onnxruntime_cuda_backend import OnnxRuntimeCudaBackend

    manifest, opened, library = open_bundle(folder, providers, threads, kernels, check_content, rows)
    default = CUDA_CHUNK_TOKENS if isinstance(opened, OnnxRuntimeCudaBackend) else DEFAULT_CHUNK_TOKENS
    return OpenedModel(folder, manifest, opened, opened, chunk_tokens or default, library)
