"""What an export leaves on disk: complete bundles, or nothing; and a manifest that tells the truth."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles.plain import PlainBundle

from mmm_export.errors import BundleError, CheckpointError, OptionError, OutputError
from mmm_export.exporter import bundle as bundle_module
from mmm_export.exporter.bundle import ExportOptions, export_bundle
from mmm_export.manifest import check_files, file_info, read_manifest
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import tiny_spec

pytestmark = pytest.mark.usefixtures("quick_exports")
SMALL = tiny_spec(llm_layers=1)


@pytest.fixture
def small(make_checkpoint):
    return make_checkpoint(SMALL)


def test_manifest_lists_every_file_and_every_graph_tensor(make_checkpoint, make_bundle):
    checkpoint = make_checkpoint("hybrid")
    folder = make_bundle(checkpoint, max_tokens=96)
    manifest = read_manifest(folder)
    assert set(manifest.files) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    check_files(folder, manifest)
    assert manifest.source_sha256 == Checkpoint.open(checkpoint).sha256()
    assert manifest.max_tokens == 96
    for name, info in manifest.graphs.items():
        graph = onnx.load(folder / name, load_external_data=False).graph
        assert [t.name for t in info.inputs] == [v.name for v in graph.input]
        assert [t.name for t in info.outputs] == [v.name for v in graph.output]
        for tensor, value in zip((*info.inputs, *info.outputs), (*graph.input, *graph.output), strict=True):
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert list(tensor.shape) == dims


def test_findings_about_the_checkpoint_travel_with_the_bundle(make_checkpoint, make_bundle):
    checkpoint = make_checkpoint(SMALL, config_overrides={"torch_dtype": "float32"})
    (finding,) = read_manifest(make_bundle(checkpoint)).findings
    assert "torch_dtype" in finding


def test_graphs_stay_readable_for_old_consumers(make_checkpoint, make_bundle):
    folder = make_bundle(make_checkpoint("linear"), body="linear-attention")
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    assert model.ir_version == 10
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, "mmm": 1, "com.microsoft": 1}
    scans = [node for node in model.graph.node if node.op_type == "MmmSelectiveScan"]
    assert len(scans) == 4
    assert all(len(node.input) == 9 and len(node.output) == 3 and all(node.output) for node in scans)
    assert not any(node.op_type.startswith("Sequence") for node in model.graph.node)


def test_opset_27_bundle_holds_standard_operators_only(make_checkpoint, make_bundle):
    folder = make_bundle(make_checkpoint(SMALL), standard_ops=True)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import} == {"": 27}
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("LinearAttention") == kinds.count("CausalConvWithState") == 2
    assert not model.functions
    assert read_manifest(folder).environment == {"ALLOW_RELEASED_ONNX_OPSET_ONLY": "0"}


def test_initializers_keep_their_checkpoint_names(make_checkpoint, make_bundle):
    model = onnx.load(make_bundle(make_checkpoint("linear")) / "decoder.onnx", load_external_data=False)
    big = {i.name for i in model.graph.initializer if i.name.endswith(("w1.weight", "wvkqgdt.weight", "output.weight"))}
    assert "language_model.model.layers.2.feed_forward.w1.weight" in big
    assert "embedding_model.encoder.0.attention.wvkqgdt.weight" in big
    assert "language_model.output.weight" in big


def test_the_graph_says_nothing_of_the_machine_that_made_it(make_checkpoint, make_bundle):
    folder = make_bundle(make_checkpoint("linear"))
    for path in (*folder.glob("*.onnx"), folder / "manifest.json"):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path(bundle_module.__file__).parent.parent).encode() not in content
        assert str(folder.parent).encode() not in content


def test_the_same_checkpoint_gives_the_same_bytes(small, tmp_path):
    for name in ("a", "b"):
        export_bundle(small, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert file_info(path) == file_info(tmp_path / "b" / path.name), path.name


def test_bf16_bundle_holds_the_weights_bit_for_bit(small, make_bundle):
    folder = make_bundle(small, dtype="bf16")
    model = onnx.load(folder / "decoder.onnx")
    name = "language_model.output.weight"
    stored = next(i for i in model.graph.initializer if i.name == name)
    assert stored.data_type == onnx.TensorProto.BFLOAT16
    weight = Checkpoint.open(small).tensor(name).t().contiguous()
    assert stored.raw_data == weight.view(torch.int16).numpy().tobytes()
    small_types = {i.data_type for i in model.graph.initializer if i.name.endswith(("A_log_bias", "conv1d.weight"))}
    assert small_types == {onnx.TensorProto.FLOAT}


def test_existing_output_is_refused_and_replaced_with_force(small, tmp_path):
    target = tmp_path / "bundle"
    export_bundle(small, target)
    before = file_info(target / "manifest.json")
    with pytest.raises(OutputError):
        export_bundle(small, target, ExportOptions(dtype="fp16"))
    assert file_info(target / "manifest.json") == before
    export_bundle(small, target, ExportOptions(dtype="fp16"), force=True)
    assert read_manifest(target).dtype == "fp16"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_failure_half_way_leaves_no_trace(small, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("half way")

    monkeypatch.setattr(bundle_module, "optimize_ir", fail)
    with pytest.raises(RuntimeError, match="half way"):
        export_bundle(small, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def export_process(checkpoint, target):
    command = [sys.executable, "-m", "mmm_export", "onnx", str(checkpoint), "-o", str(target)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_partial(folder, process):
    """Wait until the export has begun to write."""
    for _ in range(600):
        if any(p.is_dir() and any(p.iterdir()) for p in folder.iterdir()) or process.poll() is not None:
            return
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_cleans_up_behind_itself(how, make_checkpoint, tmp_path):
    process = export_process(make_checkpoint("hybrid"), tmp_path / "bundle")
    wait_for_partial(tmp_path, process)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_bundle_and_the_next_one_clears_up(make_checkpoint, tmp_path):
    process = export_process(make_checkpoint("hybrid"), tmp_path / "bundle")
    wait_for_partial(tmp_path, process)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "bundle").exists()
    (leftover,) = tmp_path.iterdir()
    os.utime(leftover, (0, 0))  # young ones are spared: their owner may be about to lock them
    export_bundle(make_checkpoint(SMALL), tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # lazy: the kernel may still be closing files


def test_a_disk_too_small_is_noticed_before_any_work(small_disk, make_checkpoint):
    with pytest.raises(OutputError) as caught:
        export_bundle(make_checkpoint("linear"), small_disk / "bundle")
    assert "too full" in caught.value.what
    assert caught.value.found is not None
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_leaves_nothing(small_disk, make_checkpoint, monkeypatch):
    usage = shutil.disk_usage(small_disk)._replace(free=1 << 40)  # so that the check before the work sees nothing amiss
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError):
        export_bundle(make_checkpoint("linear", dtype="fp32"), small_disk / "bundle")
    assert list(small_disk.iterdir()) == []


def test_weights_too_large_for_fp16_are_refused_by_name(make_checkpoint, tmp_path):
    name = "language_model.model.layers.0.ffn_norm.weight"
    checkpoint = make_checkpoint(SMALL, extra={name: np.full(64, 1e6, np.float32)})
    with pytest.raises(CheckpointError, match="ffn_norm") as caught:
        export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(dtype="fp16"))
    assert "bf16" in str(caught.value.hint)
    export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(dtype="bf16"))


def test_nan_in_the_weights_is_refused_by_name(make_checkpoint, tmp_path):
    name = "language_model.model.norm.weight"
    checkpoint = make_checkpoint(SMALL, extra={name: np.full(64, np.nan, np.float32)})
    with pytest.raises(CheckpointError, match=r"language_model\.model\.norm\.weight"):
        export_bundle(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int8"},
        {"body": "fast"},
        {"logits": "first"},
        {"max_tokens": 0},
        {"max_tokens": 1 << 31},
        {"rope_scaling": "ntk"},
    ],
)
def test_unknown_option_values_are_refused(wrong):
    with pytest.raises(OptionError):
        ExportOptions(**wrong)


@pytest.fixture
def copy(small, make_bundle, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(make_bundle(small), folder)
    return folder


def test_a_changed_byte_is_found(copy):
    path = copy / "decoder.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    manifest = read_manifest(copy)
    check_files(copy, manifest, content=False)
    with pytest.raises(BundleError, match="was changed"):
        check_files(copy, manifest)


@pytest.mark.parametrize("name", ["decoder.onnx", "tokenizer.model"])
def test_a_missing_file_is_found(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match="incomplete"):
        check_files(copy, read_manifest(copy), content=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "another schema"),
        ({"kind": "engine"}, "another schema"),
        ({"model": {}}, "damaged"),
        ({"graphs": None}, "damaged"),
        ({"unknown": 1}, "damaged"),
    ],
)
def test_a_foreign_manifest_is_refused(copy, change, message):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        read_manifest(copy)


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        read_manifest(tmp_path)


def test_a_path_out_of_the_bundle_is_refused(copy):
    path = copy / "manifest.json"
    data = json.loads(path.read_text())
    data["files"]["../elsewhere"] = {"bytes": 0, "sha256": "0"}
    path.write_text(json.dumps(data))
    (copy.parent / "elsewhere").write_bytes(b"")
    with pytest.raises(BundleError):
        check_files(copy, read_manifest(copy), content=False)


def test_a_bundle_moves(copy):
    moved = copy.parent / "moved"
    copy.rename(moved)
    assert PlainBundle(moved).embed([[5]]).shape == (1, 1, 64)
