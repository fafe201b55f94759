"""Opens an engine folder: every check that can fail, in order of its cost, and then the backend."""

from __future__ import annotations

from pathlib import Path

from mmm_export.engine_manifest import EngineManifest, check_engine_files, read_engine_manifest
from mmm_export.runtime.tensorrt.backend import EngineShapes, TensorRTBackend, engine_shapes
from mmm_export.runtime.tensorrt.binding_table import buffer_sizes
from mmm_export.runtime.tensorrt.buffer_plan import plan_buffers
from mmm_export.runtime.tensorrt.cuda import CudaDevice
from mmm_export.runtime.tensorrt.library import TensorRT
from mmm_export.runtime.tensorrt.requirements import (
    Machine,
    check_device,
    check_memory,
    check_platform,
    check_plugin,
    check_replacement,
    check_version,
)


def open_engine(
    folder: Path, *, check_content: bool = True, plugin: Path | None = None, ordinal: int = 0
) -> tuple[EngineManifest, TensorRTBackend]:
    """Open an engine folder on a GPU.

    Checks, in this order, before a plan is loaded: manifest, files, platform, library installed, its version, the GPU, the plugin
    library, free memory.

    Args:
        folder: written by `mmm-export trt`.
        check_content: compare the SHA-256 of every file; that of the plugin library is always compared.
        plugin: library to load instead of the engine's own, such as one that has code for this GPU.
        ordinal: of the GPU.

    Raises:
        EngineError: no engine, damaged, or for another machine or version.
        KernelError: the plugin library cannot be used.
        MissingPackageError: TensorRT, CUDA's bindings or the driver are missing.
        CudaError: the GPU refuses.
    """
    manifest = read_engine_manifest(folder)
    shapes = engine_shapes(manifest)
    check_engine_files(folder, manifest, content=check_content)
    check_platform(folder, manifest)
    library = TensorRT(manifest.flavor)
    check_version(folder, manifest, library.version)
    device = CudaDevice(ordinal)
    try:
        machine = Machine(device.name, device.compute_capability, device.free_bytes())
        check_device(folder, manifest, machine)
        if plugin is None:
            check_plugin(folder, manifest, machine)
        else:
            check_replacement(plugin, machine)
        check_memory(folder, needed_bytes(manifest, shapes), machine)
        library.start()
        if manifest.plugin.needed:
            if plugin is None and manifest.plugin.embedded:
                library.allow_embedded_plugins()
            else:
                library.load_plugins(plugin or folder / manifest.plugin.file)
        return manifest, TensorRTBackend(folder, manifest, shapes, device, library)
    except BaseException:
        library.close()
        device.close()
        raise


def needed_bytes(manifest: EngineManifest, shapes: EngineShapes) -> int:
    """Device memory of a session: the weights as the build expects them, and our own buffers."""
    memory = manifest.memory
    sizes = buffer_sizes(
        shapes.bindings,
        tokens=shapes.profiles.prefill.most,
        hidden=manifest.model.hidden_size,
        scratch=memory.activation_bytes,
        vision=shapes.vision_bytes,
    )
    return memory.weights_bytes + plan_buffers(sizes).total_bytes
