"""TensorRT-RTX builds engines of exported models with the real plugin, on a CPU: the plugin stays in the fused region, with no copy
around it, and no other layer touches its states.

Listings are stored in golden/; UPDATE_GOLDEN=1 writes them anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from bundles.scan_node import Sizes, node_model
from tensorrt_tools.engines import (
    DECODE_TOKENS,
    PREFILL_TOKENS,
    Engine,
    build_engines,
    graph_tensors,
    node_engine,
    profile,
    stripped_decoder,
)
from tensorrt_tools.listing import PLUGIN, Layer, Tensor, golden_text, neighbours
from tensorrt_tools.runtimes import require_runtime

GOLDEN = Path(__file__).parent / "golden"
CAPABILITIES = ["8.0", "8.6", "8.9", "12.0"]
PLUGINS = {"linear": 4, "hybrid": 3, "teacher": 0}  # Mamba layers of the tiny model of each kind

# An export and four engines take a quarter of a minute; the quick run has a model with and one without attention layers.
CASES = [
    pytest.param(kind, dtype, marks=() if kind != "teacher" and dtype == "fp16" else pytest.mark.slow)
    for kind in PLUGINS
    for dtype in ("fp16", "bf16", "fp32")
]


class Built:
    """Engines of one exported model, one a compute capability."""

    def __init__(self, name: str, model: Path, engines: list[Engine]) -> None:
        self.name = name
        self.tensors = graph_tensors(model)
        self.engines = engines

    @property
    def layers(self) -> list[Layer]:
        return self.engines[1].layers


@pytest.fixture(scope="module")
def build(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Built]:
    """Export, strip and build a tiny model once: prefill and decode profile, all compute capabilities."""
    made: dict[tuple[str, str], Built] = {}

    def make(kind: str, dtype: str) -> Built:
        require_runtime("rtx")
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("engine")
            model = stripped_decoder(make_bundle(make_checkpoint(kind), dtype=dtype), folder)
            profiles = [profile(model, PREFILL_TOKENS), profile(model, DECODE_TOKENS)]
            made[kind, dtype] = Built(f"{kind}-{dtype}", model, build_engines(folder, model, CAPABILITIES, profiles))
        return made[kind, dtype]

    return make


def is_mamba_state(tensor: Tensor) -> bool:
    return tensor.is_state and tensor.name.endswith((".conv", ".recurrent"))


@pytest.mark.parametrize(("kind", "dtype"), CASES)
class TestModel:
    def test_an_engine_is_built_for_every_compute_capability(
        self, build: Callable[..., Built], kind: str, dtype: str
    ) -> None:
        built = build(kind, dtype)
        assert [engine.errors for engine in built.engines] == [[]] * len(CAPABILITIES)
        assert all(engine.byte_count > 0 for engine in built.engines)

    def test_every_mamba_layer_is_one_plugin_in_each_profile(
        self, build: Callable[..., Built], kind: str, dtype: str
    ) -> None:
        found = [layer.profile for layer in build(kind, dtype).layers if layer.kind == PLUGIN]
        assert found == [0] * PLUGINS[kind] + [1] * PLUGINS[kind]

    def test_no_layer_but_the_plugin_touches_its_states(
        self, build: Callable[..., Built], kind: str, dtype: str
    ) -> None:
        foreign = [
            (layer.name, tensor.name)
            for layer in build(kind, dtype).layers
            for tensor in (*layer.inputs, *layer.outputs)
            if is_mamba_state(tensor) and layer.kind != PLUGIN
        ]
        assert not foreign

    def test_every_plugin_reads_and_writes_its_own_states(
        self, build: Callable[..., Built], kind: str, dtype: str
    ) -> None:
        for layer in build(kind, dtype).layers:
            if layer.kind == PLUGIN:
                past = [tensor.name for tensor in layer.inputs if tensor.is_state]
                present = [tensor.name for tensor in layer.outputs if tensor.is_state]
                assert len(past) == 2
                assert present == [name.replace("past.", "present.") for name in past]

    def test_no_copy_lies_beside_a_plugin(self, build: Callable[..., Built], kind: str, dtype: str) -> None:
        layers = build(kind, dtype).layers
        for plugin in (layer for layer in layers if layer.kind == PLUGIN):
            inner = {t.name for t in (*plugin.inputs, *plugin.outputs) if not t.is_state and t.name != "lengths"}
            beside = [
                layer
                for layer in layers
                if layer is not plugin
                and layer.profile == plugin.profile
                and inner & {tensor.name for tensor in (*layer.inputs, *layer.outputs)}
            ]
            # The two matrix products around the mixer (at T = 1 written as fused products), nothing in between.
            assert len(beside) == 2, [layer.name for layer in beside]
            for layer in beside:
                assert any(word in layer.name for word in ("matmul", "Fc", "MulSum")), layer.name
                assert "Reformat" not in layer.name
                assert layer.kind in ("gemm", "runtime_fusion", "kgen")

    def test_all_compute_capabilities_give_a_plugin_the_same_tensors(
        self, build: Callable[..., Built], kind: str, dtype: str
    ) -> None:
        first, *others = (neighbours(engine.layers) for engine in build(kind, dtype).engines)
        assert all(other == first for other in others)
        assert all("(Linear)" in line for line in first)

    def test_the_layers_are_the_stored_ones(self, build: Callable[..., Built], kind: str, dtype: str) -> None:
        built = build(kind, dtype)
        found = golden_text(built.layers, built.tensors)
        path = GOLDEN / f"rtx-{built.name}.txt"
        if os.environ.get("UPDATE_GOLDEN"):
            path.write_text(found)
        assert path.is_file(), "no listing is stored; UPDATE_GOLDEN=1 writes it"
        assert found == path.read_text(), "the layers changed; look at the difference, then UPDATE_GOLDEN=1 stores them"


def with_attribute(name: str, value: object) -> Callable[[onnx.NodeProto], None]:
    def edit(node: onnx.NodeProto) -> None:
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return edit


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(heads=6, kv_heads=2, head_dim=48, state_dim=32, conv_width=4)])
def test_a_node_with_weights_as_inputs_builds(tmp_path: Path, sizes: Sizes) -> None:
    engine = node_engine(tmp_path, node_model(sizes, "fp16"))
    assert (engine.errors, engine.byte_count > 0) == ([], True)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("heads", 5, "heads is 5; wanted a multiple of kv_heads, 2"),
        ("head_dim", 24, "head_dim 24 has no kernel"),
        ("heads", 8, "projected is (2, 3, 196); wanted (any, any, 328)"),
        ("eps", 0.0, "eps is 0"),
    ],
)
def test_the_plugin_says_why_the_builder_failed(tmp_path: Path, name: str, value: object, words: str) -> None:
    engine = node_engine(tmp_path, node_model(Sizes(), edit=with_attribute(name, value)))
    assert engine.byte_count == 0
    # RTX 1.7.1 hands no logger to plugins, so the reason is on stderr; the builder's log holds its consequence alone.
    assert words in engine.stderr
    assert engine.errors


def test_a_node_of_another_plugin_version_is_not_taken(tmp_path: Path) -> None:
    engine = node_engine(tmp_path, node_model(Sizes(), edit=with_attribute("plugin_version", "2")))
    assert engine.byte_count == 0
    assert engine.errors


def test_an_attribute_of_the_future_is_ignored(tmp_path: Path) -> None:
    engine = node_engine(tmp_path, node_model(Sizes(), edit=with_attribute("from_the_future", 7)))
    assert engine.byte_count > 0
