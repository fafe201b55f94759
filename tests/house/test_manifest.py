"""What a manifest may say: every wrong value is one clear error, and every file of the folder is accounted for."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmm_export.errors import BundleError
from mmm_export.inspection import inspect
from mmm_export.manifest import (
    FileInfo,
    GraphInfo,
    Manifest,
    TensorInfo,
    check_files,
    file_info,
    read_manifest,
    write_manifest,
)
from mmm_export.model.testing import tiny_spec

MANIFEST = Manifest(
    model=tiny_spec(kinds=("mamba2", "mha", "mamba2", "mha"), embedding_layers=2),
    source="toy",
    source_sha256="0" * 64,
    dtype="fp32",
    opset=20,
    body="standard",
    logits="last",
    max_tokens=64,
    graphs={"decoder.onnx": GraphInfo((TensorInfo("x", "float32", ("B", 0, 64)),), ())},
    files={"decoder.onnx": FileInfo(1, "a" * 64)},
    tools={"onnx": "1.18"},
    findings=("one",),
)
VALID = json.loads(json.dumps(MANIFEST.to_json()))
PLACES = (
    *((name,) for name in VALID),
    *(("model", name) for name in VALID["model"]),
    *(("model", "vision", name) for name in VALID["model"]["vision"]),
    *(("model", "llm", name) for name in VALID["model"]["llm"]),
    *(("model", "llm", "rope", name) for name in VALID["model"]["llm"]["rope"]),
    *(("graphs", "decoder.onnx", name) for name in ("inputs", "outputs")),
    *(("graphs", "decoder.onnx", "inputs", 0, name) for name in ("name", "dtype", "shape")),
    *(("files", "decoder.onnx", name) for name in ("bytes", "sha256")),
    ("tools", "onnx"),
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["fp16", "mha", "\ud800", "all"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def changed(place, value):
    """The valid manifest's JSON with one value replaced."""
    data = json.loads(json.dumps(VALID))
    part = data
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return json.dumps(data)


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("dtype",), "fp64"),
        (("logits",), "foo"),
        (("max_tokens",), None),
        (("max_tokens",), -1),
        (("opset",), True),
        (("findings",), "text"),
        (("environment",), {"A": 1}),
        (("tools",), []),
        (("model", "heads"), "x"),
        (("model", "heads"), 0),
        (("model", "heads"), 2**31),
        (("model", "normalize_embedding"), 1),
        (("model", "template"), "\ud800"),
        (("model", "vision", "patch_size"), 57),
        (("model", "llm", "norm_eps"), float("nan")),
        (("model", "llm", "kinds"), ["mamba3"]),
        (("model", "llm", "rope", "scaling"), "cubic"),
        (("graphs", "decoder.onnx", "inputs", 0, "shape"), "BT"),
        (("graphs", "decoder.onnx", "inputs", 0, "shape"), [1.5]),
        (("files", "decoder.onnx", "bytes"), "1"),
        (("files", "decoder.onnx", "bytes"), -1),
    ],
)
def test_a_wrong_value_is_refused_when_the_manifest_is_read(place, value, tmp_path):
    (tmp_path / "manifest.json").write_text(changed(place, value))
    with pytest.raises(BundleError, match="is damaged"):
        read_manifest(tmp_path)


def test_endless_nesting_is_refused(tmp_path):
    for text in ("[" * 100_000, json.dumps(VALID)[:-1] + ', "more": ' + "[" * 100_000):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(BundleError, match="cannot be read"):
            read_manifest(tmp_path)


def test_an_unreadable_manifest_is_told_as_one(tmp_path, monkeypatch):
    write_manifest(tmp_path, MANIFEST)

    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(BundleError, match="cannot be read"):
        read_manifest(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=values)
def test_any_value_anywhere_gives_a_manifest_or_a_bundle_error(place, value, tmp_path):
    (tmp_path / "manifest.json").write_text(changed(place, value))
    try:
        manifest = read_manifest(tmp_path)
    except BundleError:
        return
    assert isinstance(manifest, Manifest)
    assert len(manifest.model_sha256) == 64


@pytest.fixture
def folder(tmp_path):
    """A folder with one file, and a manifest of it."""
    (tmp_path / "decoder.onnx").write_bytes(b"x")
    files = {"decoder.onnx": file_info(tmp_path / "decoder.onnx")}
    write_manifest(tmp_path, dataclasses.replace(MANIFEST, files=files))
    return tmp_path


def listing(folder, name):
    """The manifest of a folder that also lists `name`, a file of one byte."""
    manifest = read_manifest(folder)
    manifest.files[name] = manifest.files["decoder.onnx"]
    return manifest


def test_what_else_lies_in_the_folder_is_left_alone(folder):
    (folder / "more").mkdir()
    for name in ("README.md", ".hidden", "talk.state"):
        (folder / name).write_bytes(b"x")
    check_files(folder, read_manifest(folder))


def test_a_link_in_place_of_a_file_is_refused(folder):
    (folder / "link.data").symlink_to(folder / "decoder.onnx")
    with pytest.raises(BundleError, match="incomplete"):
        check_files(folder, listing(folder, "link.data"))


@pytest.mark.parametrize("name", ["more/decoder.onnx", "./decoder.onnx", "..", "", "\0", "x" * 300])
def test_a_name_that_is_no_file_of_the_folder_itself_is_refused(name, folder):
    (folder / "more").mkdir()
    (folder / "more" / "decoder.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="incomplete"):
        check_files(folder, listing(folder, name))


def test_inspect_refuses_a_bundle_with_a_missing_file(folder):
    assert inspect(folder)["files"] == {"decoder.onnx": 1}
    (folder / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match="incomplete"):
        inspect(folder)
