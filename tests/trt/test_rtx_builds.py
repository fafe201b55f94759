"""`mmm-export trt` builds engines of every kind and number format with TensorRT-RTX on a CPU, for four compute capabilities, with the
real plugin. None of them runs here. Listings are stored in golden/; UPDATE_GOLDEN=1 writes them anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from tensorrt_tools.building import plugin_library
from tensorrt_tools.listing import PLUGIN, Layer, Tensor, golden_text
from tensorrt_tools.runtimes import require_runtime

from mmm_export.engine_manifest import EngineManifest, check_engine_files, read_engine_manifest
from mmm_export.exporter.trt.layer_listing import is_copy
from mmm_export.exporter.trt.operators import NATIVE
from mmm_export.inspection import read_layers
from mmm_export.model.testing import tiny_spec
from trt import lowered

GOLDEN = Path(__file__).parent / "golden"
CAPABILITIES = (80, 86, 89, 120)
PLUGINS = {"linear": 4, "hybrid": 3, "teacher": 0}
TOKENS = "1,8,64"

QUICK = {("linear", "fp16"), ("hybrid", "fp16")}
CASES = [
    pytest.param(kind, dtype, marks=() if (kind, dtype) in QUICK else pytest.mark.slow)
    for kind in PLUGINS
    for dtype in ("fp16", "bf16", "fp32")
]


@dataclass(frozen=True)
class Built:
    folder: Path
    manifest: EngineManifest
    decoder: list[Layer]


def program(*arguments: object, timeout_s: int = 300) -> subprocess.CompletedProcess[str]:
    """Run mmm-export with TensorRT-RTX importable."""
    paths = [str(require_runtime("rtx")), *filter(None, sys.path), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "mmm_export", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def build_command(bundle: Path, folder: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return program(
        *("trt", bundle, "-o", folder, "--target", "rtx", "--prefill-tokens", TOKENS),
        *("--plugin", plugin_library(), "--any-plugin", *more),
    )


@pytest.fixture(scope="module")
def built(tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Built]:
    """Build the engine of a tiny model once, for all compute capabilities."""
    made: dict[tuple[str, str], Built] = {}

    def make(kind: str, dtype: str) -> Built:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("rtx") / "engine"
            done = build_command(tiny_bundle(kind, dtype), folder)
            assert done.returncode == 0, done.stderr
            layers = [
                Layer(number, row["kind"], row["name"], tensors(row["inputs"]), tensors(row["outputs"]))
                for number, part in enumerate(("decoder.plan prefill", "decoder.plan decode"))
                for row in read_layers(folder)[part]
            ]
            made[kind, dtype] = Built(folder, read_engine_manifest(folder), layers)
        return made[kind, dtype]

    return make


def tensors(rows: list[str]) -> tuple[Tensor, ...]:
    """Read "name:Half[1,2]"."""
    split = (row.rpartition(":") for row in rows)
    return tuple(
        Tensor(name, form.partition("[")[0], form.partition("[")[2].rstrip("]"), "") for name, _, form in split
    )


def is_mamba_state(tensor: Tensor) -> bool:
    return tensor.is_state and tensor.name.endswith((".conv", ".recurrent"))


@pytest.mark.parametrize(("kind", "dtype"), CASES)
class TestEngine:
    def test_the_folder_is_whole_and_says_what_it_was_built_for(
        self, built: Callable[..., Built], kind: str, dtype: str
    ) -> None:
        engine = built(kind, dtype)
        check_engine_files(engine.folder, engine.manifest)
        assert engine.manifest.compute_capabilities == CAPABILITIES
        assert (engine.manifest.flavor, engine.manifest.dtype) == ("tensorrt-rtx", dtype)
        assert [profile.name for profile in engine.manifest.plans["decoder.plan"].profiles] == ["prefill", "decode"]

    def test_every_mamba_layer_is_one_plugin_in_each_profile(
        self, built: Callable[..., Built], kind: str, dtype: str
    ) -> None:
        found = [layer.profile for layer in built(kind, dtype).decoder if layer.kind == PLUGIN]
        assert found == [0] * PLUGINS[kind] + [1] * PLUGINS[kind]

    def test_no_layer_but_the_plugin_touches_its_states(
        self, built: Callable[..., Built], kind: str, dtype: str
    ) -> None:
        foreign = [
            (layer.name, tensor.name)
            for layer in built(kind, dtype).decoder
            for tensor in (*layer.inputs, *layer.outputs)
            if is_mamba_state(tensor) and layer.kind != PLUGIN
        ]
        assert not foreign

    def test_no_copy_lies_beside_a_plugin(self, built: Callable[..., Built], kind: str, dtype: str) -> None:
        layers = built(kind, dtype).decoder
        for plugin in (layer for layer in layers if layer.kind == PLUGIN):
            inner = {t.name for t in (*plugin.inputs, *plugin.outputs) if not t.is_state and t.name != "lengths"}
            beside = [
                layer
                for layer in layers
                if layer is not plugin
                and layer.profile == plugin.profile
                and inner & {tensor.name for tensor in (*layer.inputs, *layer.outputs)}
            ]
            assert len(beside) == 2, [layer.name for layer in beside]
            for layer in beside:
                assert any(word in layer.name for word in ("matmul", "Fc", "MulSum")), layer.name
                assert not is_copy({"kind": layer.kind, "name": layer.name})

    def test_a_cache_is_written_where_it_is_read(self, built: Callable[..., Built], kind: str, dtype: str) -> None:
        """One layer of each profile writes a cache, and no layer reads it under its old name: it lies at one address."""
        engine = built(kind, dtype)
        caches = len(engine.manifest.model.attention_layers)
        in_place = engine.manifest.plans["decoder.plan"].in_place
        assert len(in_place) == (2 * caches if dtype != "fp32" else 0)  # no Attention in float32
        for profile in (0, 1):
            layers = [layer for layer in engine.decoder if layer.profile == profile]
            for name in in_place:
                assert sum(name in [tensor.name for tensor in layer.outputs] for layer in layers) == 1

    def test_the_layers_are_the_stored_ones(self, built: Callable[..., Built], kind: str, dtype: str) -> None:
        engine = built(kind, dtype)
        plan = engine.manifest.plans["decoder.plan"]
        found = golden_text(engine.decoder, [tensor.name for tensor in (*plan.inputs, *plan.outputs)])
        path = GOLDEN / f"rtx-{kind}-{dtype}.txt"
        if os.environ.get("UPDATE_GOLDEN"):
            path.write_text(found)
        assert path.is_file(), "no listing is stored; UPDATE_GOLDEN=1 writes it"
        assert found == path.read_text(), "the layers changed; look at the difference, then UPDATE_GOLDEN=1 stores them"


@pytest.mark.parametrize(("kind", "dtype"), [("hybrid", "fp16"), ("linear", "fp16")])
def test_the_export_leaves_no_pair_of_casts(
    tiny_bundle: Callable[..., Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    """A value cast there and back would be two kernels, and a rounding too many."""
    graph = onnx.load(lowered.lower(tiny_bundle(kind, dtype), tmp_path, NATIVE).path, load_external_data=False).graph
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    pairs = [node.name for node in casts.values() if node.input[0] in casts]
    assert not pairs
    # What is left: indices, and the logits.
    floats = [node for node in casts.values() if onnx.helper.get_node_attr_value(node, "to") in (1, 10, 16)]
    angles = [node for node in floats if ".cast" in node.output[0]]
    assert [node.output[0] for node in floats if node not in angles] == ["logits"]
    assert len(angles) == (2 if kind == "hybrid" else 0)  # cosine and sine, once for all layers of a stack


def test_engines_of_single_capabilities_and_an_embedded_plugin(
    tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = tiny_bundle("linear", "fp16")
    sizes = {}
    for number in ("8.6", "12.0"):
        done = build_command(bundle, tmp_path / number, "--compute-capability", number)
        assert done.returncode == 0, done.stderr
        sizes[number] = (tmp_path / number / "decoder.plan").stat().st_size
    done = build_command(bundle, tmp_path / "embedded", "--compute-capability", "8.6", "--embed-plugin")
    assert done.returncode == 0, done.stderr
    manifest = read_engine_manifest(tmp_path / "embedded")
    assert (manifest.plugin.embedded, manifest.plugin.file) == (True, "")
    grown = (tmp_path / "embedded" / "decoder.plan").stat().st_size - sizes["8.6"]
    assert 0 <= grown - plugin_library().stat().st_size < 64 << 10  # the library and a header


def test_a_plugin_for_a_cpu_is_refused_with_the_command_that_makes_one(
    tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    done = program(
        "trt", tiny_bundle(), "-o", tmp_path / "engine", "--target", "rtx", "--plugin", plugin_library(),
        "--compute-capability", "8.6",
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot run on SM 8.6" in done.stderr
    assert "found:  a library that computes on the CPU" in done.stderr
    assert "hint: mmm-export plugins build --cuda-arch 86" in done.stderr
    assert not (tmp_path / "engine").exists()


def test_what_the_plugin_refuses_is_told_in_its_own_words(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """A bundle whose graph was changed on purpose, with its hash: the manifest cannot see it, the plugin can."""
    from mmm_export.manifest import file_info

    folder = tmp_path / "bundle"
    lowered.copy(tiny_bundle(), folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MmmSelectiveScan")
    next(attribute for attribute in node.attribute if attribute.name == "heads").i = 5
    before = file_info(folder / "decoder.onnx")
    onnx.save(model, folder / "decoder.onnx")
    after = file_info(folder / "decoder.onnx")
    text = (folder / "manifest.json").read_text()
    text = text.replace(before.sha256, after.sha256).replace(f'"bytes": {before.bytes},', f'"bytes": {after.bytes},')
    (folder / "manifest.json").write_text(text)
    done = build_command(folder, tmp_path / "engine", "--compute-capability", "8.6")
    assert done.returncode == 1
    assert "heads is 5; wanted a multiple of kv_heads, 2" in done.stderr, done.stderr
    assert not (tmp_path / "engine").exists()


def test_inspect_lists_the_layers(built: Callable[..., Built]) -> None:
    folder = built("linear", "fp16").folder
    done = program("inspect", folder)
    assert done.returncode == 0, done.stderr
    assert "layers by part" in done.stdout
    listed = program("inspect", folder, "--layers")
    assert listed.stdout.count("custom_layer") == 2 * PLUGINS["linear"]


@pytest.mark.slow
def test_both_profiles_share_one_copy_of_the_weights(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights of 20 MB: so many that the code of the kernels beside them, 4 MB for one device, cannot hide a second copy."""
    spec = tiny_spec(heads=8, kv_heads=4, head_dim=64, intermediate_size=2048, llm_layers=1)
    bundle = make_bundle(make_checkpoint(spec), dtype="fp16")
    done = build_command(bundle, tmp_path / "engine", "--compute-capability", "8.6")
    assert done.returncode == 0, done.stderr
    weights = (bundle / "decoder.onnx.data").stat().st_size
    assert weights > 15e6
    assert (tmp_path / "engine" / "decoder.plan").stat().st_size < 1.5 * weights
