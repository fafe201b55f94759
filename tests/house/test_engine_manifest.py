"""What an engine's manifest may say: it comes back as written, and any wrong or contradictory value is one clear error."""

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmm_export.engine_manifest import (
    DeviceMemory,
    EmbeddingTable,
    EngineManifest,
    Limits,
    PlanInfo,
    PluginInfo,
    ProfileInfo,
    ShapeRange,
    check_engine_files,
    folder_kind,
    read_engine_manifest,
    write_engine_manifest,
)
from mmm_export.errors import EngineError
from mmm_export.manifest import FileInfo, TensorInfo, file_info
from mmm_export.model.testing import tiny_spec

DECODER = PlanInfo(
    inputs=(
        TensorInfo("inputs_embeds", "float16", ("batch", "tokens", 64)),
        TensorInfo("past.0.key", "float16", (1, 0)),
    ),
    outputs=(TensorInfo("logits", "float32", ("batch", 1, 99)), TensorInfo("present.0.key", "float16", (1, 0))),
    profiles=(
        ProfileInfo(
            "prefill",
            {
                "inputs_embeds": ShapeRange((1, 1, 64), (1, 8, 64), (2, 16, 64)),
                "past.0.key": ShapeRange((1, 0), (1, 0), (1, 0)),
            },
        ),
    ),
    key="0" * 64,
    build_seconds=1.5,
    peak_bytes=0,
    in_place={"present.0.key": "past.0.key"},
)
MANIFEST = EngineManifest(
    model=tiny_spec(kinds="hybrid"),
    flavor="tensorrt-rtx",
    tensorrt_version="1.7.1.116",
    compute_capabilities=(86, 89),
    platform="x86_64-linux",
    target="rtx",
    dtype="fp16",
    precision={"decoder": "fp16"},
    bundle="bundle",
    bundle_sha256="1" * 64,
    source="toy",
    source_sha256="0" * 64,
    logits="last",
    limits=Limits(max_batch=2, max_prefill_tokens=16, max_tokens=64, max_tiles=13),
    plans={"decoder.plan": DECODER},
    plugin=PluginInfo("libmmm_tensorrt.so", False, True, "2" * 64, 1, "0.1", "x86_64", (86, 89)),
    embedding=EmbeddingTable("embedding.bin", "float16", 99, 64),
    memory=DeviceMemory(1, 2, 0, 3, 4, 5),
    options={"workspace_mib": "2048"},
    build_seconds=2.0,
    tools={"mmm-export": "0.1"},
    files={
        name: FileInfo(1, "a" * 64) for name in ("decoder.plan", "embedding.bin", "libmmm_tensorrt.so", "layers.json")
    },
    findings=("one",),
)
VALID = json.loads(json.dumps(MANIFEST.to_json()))
PLAN = ("plans", "decoder.plan")
INPUT = (*PLAN, "profiles", 0, "inputs", "inputs_embeds")
PLACES = (
    *((name,) for name in VALID),
    *(("limits", name) for name in VALID["limits"]),
    *(("plugin", name) for name in VALID["plugin"]),
    *(("embedding", name) for name in VALID["embedding"]),
    *(("memory", name) for name in VALID["memory"]),
    *((*PLAN, name) for name in VALID["plans"]["decoder.plan"]),
    (*PLAN, "profiles", 0),
    *((*INPUT, name) for name in ("least", "typical", "most")),
    (*PLAN, "inputs", 0, "shape"),
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["fp16", "prefill", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def changed(place, value):
    data = json.loads(json.dumps(VALID))
    part = data
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return json.dumps(data)


def test_an_engine_manifest_comes_back_as_it_was_written(tmp_path):
    write_engine_manifest(tmp_path, MANIFEST)
    assert read_engine_manifest(tmp_path) == MANIFEST
    assert folder_kind(tmp_path) == "engine"


def test_the_expected_memory_is_the_sum_of_its_parts():
    assert MANIFEST.memory.total_bytes == 10


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("flavor",), "onnxruntime"),
        (("compute_capabilities",), []),
        (("compute_capabilities",), ["8.6"]),
        (("plans",), {}),
        (("embedding", "file"), "other.bin"),
        (("plugin", "file"), "other.so"),
        (("plugin", "embedded"), 1),
        (("limits", "max_batch"), 0),
        (("memory", "weights_bytes"), -1),
        ((*PLAN, "profiles"), []),
        ((*PLAN, "profiles", 0, "name"), "third"),
        ((*PLAN, "profiles", 0, "inputs"), {}),
        ((*PLAN, "in_place"), {"present.0.key": "past.9.key"}),
        ((*INPUT, "most"), [1, 4, 64]),  # below typical
        ((*INPUT, "least"), [1, 1, 63]),  # of a fixed dimension
        ((*INPUT, "typical"), [1, 8]),
        (("build_seconds",), float("inf")),
    ],
)
def test_a_wrong_or_contradictory_value_is_refused(place, value, tmp_path):
    (tmp_path / "manifest.json").write_text(changed(place, value))
    with pytest.raises(EngineError, match="is damaged"):
        read_engine_manifest(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=values)
def test_any_value_anywhere_gives_a_manifest_or_an_engine_error(place, value, tmp_path):
    (tmp_path / "manifest.json").write_text(changed(place, value))
    try:
        manifest = read_engine_manifest(tmp_path)
    except EngineError:
        return
    assert isinstance(manifest, EngineManifest)


def test_a_bundle_is_refused_as_an_engine(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 1, "kind": "bundle"}))
    with pytest.raises(EngineError, match="of another schema") as caught:
        read_engine_manifest(tmp_path)
    assert caught.value.found == "schema 1, kind 'bundle'"


def test_a_changed_plan_is_refused(tmp_path):
    for name in MANIFEST.files:
        (tmp_path / name).write_bytes(b"x")
    manifest = dataclasses.replace(MANIFEST, files={name: file_info(tmp_path / name) for name in MANIFEST.files})
    check_engine_files(tmp_path, manifest)
    (tmp_path / "decoder.plan").write_bytes(b"y")
    check_engine_files(tmp_path, manifest, content=False)
    with pytest.raises(EngineError, match=r"decoder\.plan was changed") as caught:
        check_engine_files(tmp_path, manifest)
    assert "build the engine again" in str(caught.value.hint)
