"""What `mmm-export trt` writes is what the runtime takes: manifest, profiles, embedding table, plugin, golden file.

The folders are those of the real command with a stand-in for the builder; then a fake TensorRT runs the bundle's graphs in the place
of the plans, so that a session must give what it gives on the bundle.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmm_export.engine_manifest import PluginInfo, read_engine_manifest
from mmm_export.exporter.trt.engine import PluginChoice, build_engine
from mmm_export.exporter.trt.planning import EngineOptions, plan_engine
from mmm_export.exporter.trt.profiles import ProfileOptions
from mmm_export.manifest import file_info
from mmm_export.plugin_files import KERNEL_ABI
from mmm_export.runtime import Session
from mmm_export.runtime.tensorrt.backend import engine_shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("linear", "10.3.0.30"),
        ("hybrid", "11.4.0.106"),
        pytest.param("hybrid", "10.3.0.30", marks=pytest.mark.slow),
        pytest.param("teacher", "11.4.0.106", marks=pytest.mark.slow),
    ],
)
def test_session_takes_the_folder_of_the_build(
    kind: str,
    version: str,
    tiny_bundle: Callable[..., Path],
    stand_in: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fake_engine import install, put_fake_plans

    bundle = tiny_bundle(kind)
    library = tmp_path / "libplugin.so"
    library.write_bytes(b"library")
    plugin = PluginChoice(
        library, PluginInfo("", False, True, file_info(library).sha256, KERNEL_ABI, "0.1", "aarch64", (87,))
    )
    stand_in(version)
    options = EngineOptions(
        target="orin-jp62" if version.startswith("10.3") else "orin-jp72",
        profiles=ProfileOptions((1, 4, 8), max_batch=2, max_tiles=3),
    )
    folder = tmp_path / "engine"
    build_engine(plan_engine(bundle, options, dry_run=False), folder, None if kind == "teacher" else plugin)
    manifest = read_engine_manifest(folder)
    states = {state.past.rsplit(".", 1)[1]: state.in_place for state in engine_shapes(manifest).bindings.states}
    in_place_caches = version.startswith("11")
    assert states == {
        **({} if kind == "teacher" else {"conv": False, "recurrent": True}),
        **({} if kind == "linear" else {"key": in_place_caches, "value": in_place_caches}),
    }

    put_fake_plans(folder, bundle)
    install(monkeypatch, version=version)
    ids = np.arange(3, 22)
    with Session.open(bundle, threads=1, chunk_tokens=8) as right, Session.open(folder) as session:
        wanted, found = [right.prefill(ids)], [session.prefill(ids)]
        for token in (5, 6, 7, 8):
            wanted.append(right.step(token))
            found.append(session.step(token))
    np.testing.assert_array_equal(np.stack(found), np.stack(wanted))
