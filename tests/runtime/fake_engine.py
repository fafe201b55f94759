"""Engine folders without TensorRT: fake plans over the graphs of a bundle, with a manifest as `mmm-export trt` writes it."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_cuda import FakeDriver
from fake_tensorrt import FakeTensorRT, write_plan

from mmm_export import names
from mmm_export.engine_manifest import (
    DeviceMemory,
    EmbeddingTable,
    EngineManifest,
    Limits,
    PlanInfo,
    PluginInfo,
    ProfileInfo,
    ProfileName,
    ShapeRange,
    write_engine_manifest,
)
from mmm_export.manifest import Manifest, TensorInfo, file_info, read_manifest
from mmm_export.plugin_files import KERNEL_ABI

PREFILL_TOKENS = 8
MAX_TILES = 2
_TYPES = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT64", "bfloat16": "BF16"}


def write_engine(
    bundle: Path,
    folder: Path,
    *,
    flavor: Any = "tensorrt",
    version: str = "10.3.0.30",
    capability: int = 87,
    kv_in_place: bool = True,
    least_prefill: int = 1,
    decode_profile: bool = True,
) -> EngineManifest:
    """Write an engine folder for a bundle."""
    manifest = read_manifest(bundle)
    folder.mkdir()
    for name in (*names.TOKENIZER_FILES, names.GOLDEN_FILE):
        if (bundle / name).is_file():
            shutil.copy(bundle / name, folder / name)
    table = _table(bundle, manifest)
    table.tofile(folder / names.EMBEDDING_TABLE)
    (folder / names.PLUGIN_LIBRARY).write_bytes(b"a library")
    ranges: dict[ProfileName, tuple[int, int]] = {"prefill": (least_prefill, PREFILL_TOKENS)}
    if decode_profile:
        ranges["decode"] = (1, 1)
    plans = {
        names.DECODER_PLAN: _plan(
            bundle, folder, manifest, names.DECODER_FILE, names.DECODER_PLAN, ranges, kv_in_place
        ),
        names.VISION_PLAN: _plan(
            bundle, folder, manifest, names.VISION_FILE, names.VISION_PLAN, {"tiles": (1, MAX_TILES)}, False
        ),
    }
    made = EngineManifest(
        model=manifest.model,
        flavor=flavor,
        tensorrt_version=version,
        compute_capabilities=(capability,),
        platform=f"{platform.machine()}-linux",
        target="auto",
        dtype=manifest.dtype,
        precision={"decoder": manifest.dtype},
        bundle=bundle.name,
        bundle_sha256=manifest.model_sha256,
        source=manifest.source,
        source_sha256=manifest.source_sha256,
        logits=manifest.logits,
        limits=Limits(1, PREFILL_TOKENS, manifest.max_tokens, MAX_TILES),
        plans=plans,
        plugin=PluginInfo(
            names.PLUGIN_LIBRARY,
            False,
            True,
            file_info(folder / names.PLUGIN_LIBRARY).sha256,
            KERNEL_ABI,
            "0.1",
            platform.machine(),
            (capability,),
        ),
        embedding=EmbeddingTable(
            names.EMBEDDING_TABLE, "float16" if table.dtype == np.float16 else "float32", *table.shape
        ),
        memory=DeviceMemory(1 << 20, 1, 1, 1 << 10, 1, 1),
        options={},
        build_seconds=1.0,
        tools={},
        files={path.name: file_info(path) for path in folder.iterdir()},
    )
    write_engine_manifest(folder, made)
    return made


def rewrite(folder: Path, **changes: Any) -> EngineManifest:
    """Change fields of an engine's manifest, and take the files as they are now."""
    from mmm_export.engine_manifest import read_engine_manifest

    files = {path.name: file_info(path) for path in folder.iterdir() if path.name != names.MANIFEST_FILE}
    made = dataclasses.replace(read_engine_manifest(folder), **{"files": files, **changes})
    write_engine_manifest(folder, made)
    return made


def _table(bundle: Path, manifest: Manifest) -> Any:
    """The rows that the embedding graph gives for each id."""
    session = onnxruntime.InferenceSession(bundle / names.EMBEDDING_FILE, providers=["CPUExecutionProvider"])
    spec = manifest.model
    ids = np.arange(spec.vocab_size + spec.special_tokens, dtype=np.int64)
    ids[spec.image_token_id] = 0  # has no row of its own use: an image takes its place
    kind = np.float16 if manifest.dtype == "fp16" else np.float32
    feeds = {names.INPUT_IDS: ids[None], names.IMAGE_FEATURES: np.zeros((0, spec.hidden_size), kind)}
    return session.run(None, feeds)[0][0]


def _plan(
    bundle: Path,
    folder: Path,
    manifest: Manifest,
    graph: str,
    file: str,
    ranges: dict[ProfileName, tuple[int, int]],
    kv_in_place: bool,
) -> PlanInfo:
    info = manifest.graphs[graph]

    def shape_of(tensor: TensorInfo, varying: int) -> tuple[int, ...]:
        return tuple(
            size if isinstance(size, int) else varying if size in ("tokens", "T", "tiles") else 1
            for size in tensor.shape
        )

    profiles = tuple(
        ProfileInfo(
            name,
            {t.name: ShapeRange(shape_of(t, low), shape_of(t, low), shape_of(t, high)) for t in info.inputs},
        )
        for name, (low, high) in ranges.items()
    )
    rows = [_row(tensor, is_input=True, profiles=profiles) for tensor in info.inputs]
    rows += [_row(tensor, is_input=False, profiles=()) for tensor in info.outputs]
    write_plan(folder / file, bundle / graph, rows, len(profiles))
    caches = [t.name for t in info.inputs if t.name.endswith((".key", ".value"))] if kv_in_place else []
    return PlanInfo(
        info.inputs, info.outputs, profiles, "0" * 64, 1.0, 0, {names.present(name): name for name in caches}
    )


def _row(tensor: TensorInfo, *, is_input: bool, profiles: tuple[ProfileInfo, ...]) -> dict[str, Any]:
    """What an engine tells of a tensor."""
    ranges = (profile.inputs[tensor.name] for profile in profiles)
    return {
        "name": tensor.name,
        "input": is_input,
        "dtype": _TYPES[tensor.dtype],
        "shape": [size if isinstance(size, int) else -1 for size in tensor.shape],
        "ranges": [[list(each.least), list(each.typical), list(each.most)] for each in ranges],
    }


@dataclasses.dataclass
class FakeMachine:
    """A machine with one GPU and one TensorRT."""

    driver: FakeDriver
    tensorrt: FakeTensorRT

    @property
    def behaviour(self) -> Any:
        return self.tensorrt.behaviour


MakeMachine = Callable[..., FakeMachine]


def install(
    monkeypatch: pytest.MonkeyPatch, *, flavor: str = "tensorrt", version: str = "10.3.0", **gpu: Any
) -> FakeMachine:
    """Make the fakes importable under the real names."""
    driver = FakeDriver(**gpu)
    tensorrt = FakeTensorRT(driver, flavor, version)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver.module())
    module = tensorrt.module()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return FakeMachine(driver, tensorrt)


def put_fake_plans(folder: Path, bundle: Path) -> None:
    """Put fake plans into an engine folder that `mmm-export trt` wrote, and call its plugin one of this machine."""
    from mmm_export.engine_manifest import read_engine_manifest

    manifest = read_engine_manifest(folder)
    for file, graph in ((names.DECODER_PLAN, names.DECODER_FILE), (names.VISION_PLAN, names.VISION_FILE)):
        plan = manifest.plans[file]
        rows = [_row(tensor, is_input=True, profiles=plan.profiles) for tensor in plan.inputs]
        rows += [_row(tensor, is_input=False, profiles=()) for tensor in plan.outputs]
        write_plan(folder / file, bundle / graph, rows, len(plan.profiles))
    plugin = dataclasses.replace(manifest.plugin, machine=platform.machine())
    rewrite(folder, platform=f"{platform.machine()}-linux", plugin=plugin)
