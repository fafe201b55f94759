"""An engine folder appears whole or not at all, its manifest tells the truth, and no plan is built twice.

Built with the stand-in for TensorRT: what is tested is all around it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmm_export import names
from mmm_export.engine_manifest import EngineManifest, PluginInfo, check_engine_files, read_engine_manifest
from mmm_export.errors import EngineError, OutputError
from mmm_export.exporter.trt import builder, engine
from mmm_export.exporter.trt.engine import PluginChoice, build_engine
from mmm_export.exporter.trt.planning import EngineOptions, plan_engine
from mmm_export.exporter.trt.profiles import ProfileOptions
from mmm_export.inspection import inspect
from mmm_export.manifest import file_info, read_manifest

SMALL = ProfileOptions((1, 4, 8), max_batch=2, max_tiles=3)


@pytest.fixture
def plugin(tmp_path: Path) -> PluginChoice:
    path = tmp_path / "libplugin.so"
    path.write_bytes(b"library")
    return PluginChoice(path, PluginInfo("", False, True, file_info(path).sha256, 1, "0.1", "aarch64", (87,)))


@pytest.fixture
def build(tiny_bundle: Callable[..., Path], plugin: PluginChoice) -> Callable[..., EngineManifest]:
    """Build with the stand-in, of a tiny linear model unless told otherwise."""

    def make(output: Path, kind: str = "linear", *, force: bool = False, **options: Any) -> EngineManifest:
        options.setdefault("profiles", SMALL)
        plan = plan_engine(tiny_bundle(kind), EngineOptions(target="orin-jp62", **options), dry_run=False)
        return build_engine(plan, output, None if kind == "teacher" else plugin, force=force)

    return make


def beside(folder: Path) -> set[str]:
    return {path.name for path in folder.parent.iterdir()} - {"libplugin.so"}


def test_a_folder_holds_what_its_manifest_says(
    build: Callable[..., EngineManifest], stand_in: Callable[..., None], tmp_path: Path
) -> None:
    stand_in()
    folder = tmp_path / "engine"
    made = build(folder, "hybrid", max_tokens=32)
    found = read_engine_manifest(folder)
    assert found == made
    check_engine_files(folder, found)
    assert {path.name for path in folder.iterdir()} == {*found.files, names.MANIFEST_FILE}
    assert beside(folder) == {"engine"}
    assert (found.flavor, found.tensorrt_version, found.compute_capabilities) == ("tensorrt", "10.3.0.30", (87,))
    assert [profile.name for profile in found.plans["decoder.plan"].profiles] == ["prefill", "decode"]
    prefill, decode = found.plans["decoder.plan"].profiles
    assert prefill.inputs["inputs_embeds"].most == (2, 8, 64)
    assert decode.inputs["inputs_embeds"].most == (2, 1, 64)
    assert decode.inputs["past.0.key"].most == (2, 2, 32, 16)
    assert found.plans["vision.plan"].profiles[0].inputs["pixel_values"].most == (3, 3, 56, 56)
    assert found.plugin.file == names.PLUGIN_LIBRARY
    assert found.limits.max_tokens == 32
    assert found.plans["decoder.plan"].in_place == {}  # 10.3 has no TensorScatter


def test_the_embedding_table_holds_the_rows_of_the_checkpoint(
    build: Callable[..., EngineManifest],
    tiny_bundle: Callable[..., Path],
    stand_in: Callable[..., None],
    tmp_path: Path,
) -> None:
    import onnxruntime

    stand_in()
    table = build(tmp_path / "engine").embedding
    rows = np.fromfile(tmp_path / "engine" / table.file, table.dtype).reshape(table.rows, table.width)
    bundle = tiny_bundle()
    spec = read_manifest(bundle).model
    ids = np.array([[5, 0, spec.vocab_size - 1]], np.int64)
    graph = onnxruntime.InferenceSession(str(bundle / names.EMBEDDING_FILE), providers=["CPUExecutionProvider"])
    features = np.zeros((0, spec.hidden_size), np.float16)
    (wanted,) = graph.run(None, {"input_ids": ids, "image_features": features})
    assert np.array_equal(rows[ids], wanted)


def test_a_model_of_attention_alone_carries_no_plugin(
    build: Callable[..., EngineManifest], stand_in: Callable[..., None], tmp_path: Path
) -> None:
    stand_in()
    made = build(tmp_path / "engine", "teacher")
    assert (made.plugin.needed, made.plugin.file) == (False, "")
    assert names.PLUGIN_LIBRARY not in made.files


def test_an_embedded_plugin_is_no_file(
    build: Callable[..., EngineManifest], stand_in: Callable[..., None], tmp_path: Path
) -> None:
    stand_in()
    made = build(tmp_path / "engine", embed_plugin=True)
    assert (made.plugin.embedded, made.plugin.file) == (True, "")
    assert names.PLUGIN_LIBRARY not in made.files


def test_the_inspectors_layers_are_stored_by_part(
    build: Callable[..., EngineManifest], stand_in: Callable[..., None], tmp_path: Path
) -> None:
    stand_in()
    build(tmp_path / "engine")
    data = inspect(tmp_path / "engine")
    assert data["layers_by_part"]["decoder.plan prefill"] == {"layers": 1, "PluginV3": 1}
    assert data["layers_by_part"]["decoder.plan decode"] == {"layers": 1, "gemm": 1}
    assert data["layer_listing"]["decoder.plan decode"][0]["inputs"] == ["x:Half[1,2]"]


def test_an_engine_that_cannot_be_loaded_here_has_no_listing(
    build: Callable[..., EngineManifest], stand_in: Callable[..., None], tmp_path: Path
) -> None:
    stand_in(failure="no-inspector")
    build(tmp_path / "engine")
    assert inspect(tmp_path / "engine")["layers_by_part"] == {}


def test_a_timing_cache_is_written_and_read_again(
    build: Callable[..., EngineManifest], stand_in: Callable[..., None], tmp_path: Path
) -> None:
    stand_in()
    cache = tmp_path / "timings"
    build(tmp_path / "engine", timing_cache=cache)
    assert cache.read_bytes() == b"timings"
    build(tmp_path / "second", timing_cache=cache)


class TestResume:
    @pytest.fixture
    def built(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the plans that were built, in order."""
        seen: list[str] = []
        original = builder.build_plan

        def counted(library: Any, job: builder.Job, *rest: Any) -> builder.Built:
            seen.append(Path(job.plan).name)
            return original(library, job, *rest)

        monkeypatch.setattr(engine, "build_plan", counted)
        return seen

    def test_a_plan_that_was_finished_is_not_built_again(
        self,
        build: Callable[..., EngineManifest],
        stand_in: Callable[..., None],
        built: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        stand_in()
        folder = tmp_path / "engine"

        def interrupt(*_arguments: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(engine, "vision_profiles", interrupt)
            with pytest.raises(KeyboardInterrupt):
                build(folder)
        assert beside(folder) == {".engine.finished"}
        build(folder)
        assert built == ["decoder.plan", "vision.plan"]
        assert beside(folder) == {"engine"}
        check_engine_files(folder, read_engine_manifest(folder))

    def test_other_options_build_again(
        self,
        build: Callable[..., EngineManifest],
        stand_in: Callable[..., None],
        built: list[str],
        tmp_path: Path,
    ) -> None:
        stand_in()
        folder = tmp_path / "engine"
        first = build(folder)
        build(folder, force=True)
        assert built == ["decoder.plan", "vision.plan"]
        second = build(folder, force=True, profiles=ProfileOptions((1, 4, 16), 2, 3))
        assert built == ["decoder.plan", "vision.plan", "decoder.plan"]  # the vision engine does not depend on them
        assert first.plans["decoder.plan"].key != second.plans["decoder.plan"].key
        stand_in("10.4.0.1")
        build(folder, force=True)
        assert built[3:] == ["decoder.plan", "vision.plan"]

    def test_a_damaged_plan_is_built_again(
        self, build: Callable[..., EngineManifest], stand_in: Callable[..., None], built: list[str], tmp_path: Path
    ) -> None:
        stand_in()
        folder = tmp_path / "engine"
        build(folder)
        (folder / "decoder.plan").write_bytes(b"damaged")
        build(folder, force=True)
        assert built == ["decoder.plan", "vision.plan", "decoder.plan"]
        check_engine_files(folder, read_engine_manifest(folder))


class TestFailures:
    @pytest.mark.parametrize(
        ("failure", "what", "found", "hint"),
        [
            (
                "parse",
                "cannot read decoder.onnx",
                "node node_matmul (MatMul), which comes from embedding_model.encoder.0.attention.wvkqgdt: this MatMul is too wide",
                "does not take the operator MatMul as written",
            ),
            ("plugin", "the plugin library cannot be loaded", "does not load", "mmm-export plugins inspect"),
            ("build", "cannot build decoder.plan", "OutOfMemory", "lower --workspace"),
            ("cache", "the timing cache does not fit", "another TensorRT", "another --timing-cache"),
            ("abort", "ended while it was building", "SIGABRT", "report it"),
            ("killed", "ended while it was building", "SIGKILL", "ran out of memory"),
        ],
    )
    def test_each_is_one_clear_error_and_leaves_nothing(
        self,
        build: Callable[..., EngineManifest],
        stand_in: Callable[..., None],
        tmp_path: Path,
        failure: str,
        what: str,
        found: str,
        hint: str,
    ) -> None:
        stand_in(failure=failure)
        (tmp_path / "out").mkdir()
        with pytest.raises(EngineError) as caught:
            build(tmp_path / "out" / "engine", timing_cache=tmp_path / "timings")
        assert what in caught.value.what
        assert found in str(caught.value.found)
        assert hint in str(caught.value.hint)
        assert not list((tmp_path / "out").iterdir())

    def test_a_full_disk(
        self, build: Callable[..., EngineManifest], stand_in: Callable[..., None], tmp_path: Path
    ) -> None:
        stand_in(failure="disk")
        (tmp_path / "out").mkdir()
        with pytest.raises(OutputError, match="the disk is too full to write"):
            build(tmp_path / "out" / "engine")
        assert not list((tmp_path / "out").iterdir())

    def test_a_disk_that_is_too_small_is_refused_before_anything_is_built(
        self,
        build: Callable[..., EngineManifest],
        stand_in: Callable[..., None],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        stand_in(failure="abort")
        import shutil

        total, used, _ = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _path: type("", (), {"total": total, "used": used, "free": 9})()
        )
        with pytest.raises(OutputError, match="the disk is too full"):
            build(tmp_path / "engine")

    def test_a_folder_that_exists_is_refused(
        self, build: Callable[..., EngineManifest], stand_in: Callable[..., None], tmp_path: Path
    ) -> None:
        stand_in(failure="abort")
        (tmp_path / "engine").mkdir()
        (tmp_path / "engine" / "mine").write_text("x")
        with pytest.raises(OutputError, match="exists"):
            build(tmp_path / "engine")
        with pytest.raises(OutputError, match="will not be replaced"):
            build(tmp_path / "engine", force=True)

    def test_the_bundle_is_never_replaced(
        self, build: Callable[..., EngineManifest], stand_in: Callable[..., None], tiny_bundle: Callable[..., Path]
    ) -> None:
        stand_in(failure="abort")
        with pytest.raises(OutputError, match="it holds the input"):
            build(tiny_bundle(), force=True)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupt_ends_the_builder_and_leaves_nothing(
        self,
        stand_in: Callable[..., None],
        tiny_bundle: Callable[..., Path],
        tmp_path: Path,
        number: signal.Signals,
    ) -> None:
        stand_in(failure="hang")
        script = (
            "import signal, sys\nfrom pathlib import Path\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a shell runs behind
            "from mmm_export.exporter.trt import planning\n"
            "from mmm_export.exporter.trt.device import LocalDevice\n"
            "from mmm_export.exporter.trt.engine import build_engine\n"
            "planning.local_device = lambda: LocalDevice('Orin', 87, 16 << 30, True)\n"
            "plan = planning.plan_engine(Path(sys.argv[1]), planning.EngineOptions(), dry_run=False)\n"
            "build_engine(plan, sys.argv[2], None)\n"
        )
        output = tmp_path / "out" / "engine"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], *sys.path])}
        command = [sys.executable, "-c", script, str(tiny_bundle("teacher")), str(output)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (jobs := list(tmp_path.glob("out/.engine.partial-*/decoder.plan"))) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        assert jobs
        process.send_signal(number)
        try:
            assert process.wait(60) != 0
        finally:
            process.kill()
        assert not (tmp_path / "out").exists()
        assert not builders_alive(tmp_path)


def builders_alive(folder: Path) -> list[str]:
    """Command lines of build processes that work in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "build_process" in line and str(folder) in line:
            found.append(line)
    return found


def test_building_needs_no_torch() -> None:
    """A Jetson has none."""
    script = (
        "import sys\nimport mmm_export.engine_plugin, mmm_export.exporter.trt.lowered_folder\n"
        "import mmm_export.plugins.inspection\nsys.exit('torch' in sys.modules or 'onnxscript' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


def test_a_damaged_listing_is_told_as_one(
    build: Callable[..., EngineManifest], stand_in: Callable[..., None], tmp_path: Path
) -> None:
    stand_in()
    folder = tmp_path / "engine"
    build(folder)
    size = (folder / names.LAYERS_FILE).stat().st_size
    (folder / names.LAYERS_FILE).write_text(json.dumps({"decoder.plan": 3}).ljust(size))
    with pytest.raises(EngineError, match=r"layers\.json cannot be read"):
        inspect(folder)
