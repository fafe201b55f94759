"""What `Session.open` does with an engine folder. Imported for engines alone: a bundle needs neither TensorRT nor CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmm_export.engine_manifest import EngineManifest
from mmm_export.errors import OptionError
from mmm_export.operator_library import AUTO, NONE
from mmm_export.runtime.backend import Backend
from mmm_export.runtime.tensorrt.opening import open_engine


def open_engine_backend(
    folder: Path,
    providers: Sequence[str] | None,
    threads: int | None,
    kernels: str | Path,
    chunk_tokens: int,
    check_content: bool,
) -> tuple[EngineManifest, Backend, int]:
    """Open an engine, and return with it the tokens of a chunk: those asked for, as far as the engine takes them at once.

    Args: as of `Session.open`.

    Raises:
        OptionError: an option that only a bundle takes.
        EngineError, KernelError, MissingPackageError, CudaError: see `open_engine`.
    """
    for name, is_given in (
        ("providers", providers is not None),
        ("threads", threads is not None),
    ):
        if is_given:
            raise OptionError(
                f"an engine takes no {name}",
                found=f"{name} for {folder}",
                wanted="TensorRT on a GPU, as the engine was built",
                hint=f"leave {name} out, or open the bundle",
            )
    plugin = None if kernels in (AUTO, NONE) else Path(kernels)
    if plugin is not None and not plugin.is_file():
        raise OptionError(
            f"no plugin library {plugin}",
            wanted="the path of a libmmm_tensorrt.so",
            hint="mmm-export plugins build makes one; leave it out to take the engine's own",
        )
    manifest, backend = open_engine(folder, check_content=check_content, plugin=plugin)
    return manifest, backend, min(chunk_tokens, manifest.limits.max_prefill_tokens)
