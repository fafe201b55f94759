"""Running prompts layer by layer: the same numbers as the whole model, and one clear error for activations that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from calibration_data.bundles import write_prompts
from onnx import numpy_helper

from mmm_export import names
from mmm_export.calibration.calibration_file import Calibration
from mmm_export.calibration.collect import CollectOptions, collect
from mmm_export.calibration.plan import QuantizeOptions
from mmm_export.calibration.segments import Decoder, Embedder
from mmm_export.calibration.sensitivity import analyze
from mmm_export.errors import CalibrationError, OptionError
from mmm_export.manifest import file_info, read_manifest
from mmm_export.progress import SilentProgress
from mmm_export.rendering import calibration_warnings
from mmm_export.runtime import Session

IDS = np.array([5, 77, 140, 33, 260, 9, 301, 18], np.int64)


def run(bundle: Path, data: Path, target: Path, **options: int) -> Calibration:
    wanted = CollectOptions(**{"samples": 4, "chunk_tokens": 32, "threads": 1, **options})
    return collect(bundle, read_manifest(bundle), data, target, wanted, force=False, progress=SilentProgress())


def test_layer_after_layer_computes_what_the_whole_decoder_computes(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    decoder = Decoder(bundle, manifest)
    hidden = Embedder(bundle, manifest).embed(IDS, np.zeros((0, 3, 56, 56), np.float32))
    with Session.open(bundle) as session:
        wanted = session.prefill(IDS)
    for index in range(decoder.segments):
        segment = decoder.open(index, threads=1)
        calls = [hidden[:5], hidden[5:6], hidden[6:]] if index < manifest.model.layers else [hidden]
        hidden = np.concatenate([segment.run(call)[0] for call in calls])
    # float32: the same sums, a prompt cut into three calls.
    assert np.abs(hidden[-1] - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_two_runs_measure_the_same(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    first, second = (run(bundle, prompts, tmp_path / name, samples=2) for name in "ab")
    assert first == second


def test_how_a_prompt_is_cut_changes_no_range(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    short = run(bundle, prompts, tmp_path / "short", samples=2, chunk_tokens=7)
    whole = run(bundle, prompts, tmp_path / "whole", samples=2, chunk_tokens=512)
    for one, other in zip(short.tensors[:-1], whole.tensors[:-1], strict=True):  # the head reads the end of each chunk
        assert one.largest == pytest.approx(other.largest, rel=1e-4)  # float32 sums in another grouping


def test_few_samples_are_told_with_what_is_stable(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    found = run(bundle, prompts, tmp_path / "few", samples=2)
    lines = calibration_warnings(found, 128)
    assert lines[0].startswith("warning: 2 samples are few (wanted at least 16, up to 128): ")
    assert f"of {len(found.tensors)} ranges are stable" in lines[0]


def changed(bundle: Path, target: Path, weight: str, value: float) -> Path:
    """A copy of a bundle one weight of which is `value` throughout."""
    shutil.copytree(bundle, target)
    model = onnx.load(target / names.DECODER_FILE, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name == weight:
            shape = tuple(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(np.full(shape, value, np.float32), weight))
    onnx.save(model, target / names.DECODER_FILE)
    data = json.loads((target / names.MANIFEST_FILE).read_text())
    info = file_info(target / names.DECODER_FILE)
    data["files"][names.DECODER_FILE] = {"bytes": info.bytes, "sha256": info.sha256}
    (target / names.MANIFEST_FILE).write_text(json.dumps(data))
    return target


@pytest.mark.parametrize(
    ("value", "told"), [(0.0, "is always 0"), (float("nan"), "is not finite"), (float("inf"), "is not finite")]
)
def test_an_activation_that_cannot_be_used_is_named(
    bundle: Path, prompts: Path, tmp_path: Path, value: float, told: str
) -> None:
    broken = changed(bundle, tmp_path / "bundle", "language_model.model.layers.0.ffn_norm.weight", value)
    with pytest.raises(CalibrationError, match=told) as caught:
        run(broken, prompts, tmp_path / "out", samples=1)
    assert "language_model.model.layers.0.feed_forward.w1" in caught.value.what
    assert "layer 1" in caught.value.what
    assert not (tmp_path / "out").exists()


def test_a_picture_that_is_not_there_and_a_prompt_that_is_too_long_are_told_by_their_lines(
    bundle: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps({"prompt": "q", "images": ["no.png"]}))
    with pytest.raises(CalibrationError, match=r"line 2 of .* cannot be used"):
        run(bundle, data, tmp_path / "out")
    long = write_prompts(tmp_path / "long", count=2, words=400)
    with pytest.raises(CalibrationError, match=r"line 1 of .* does not fit into the KV cache"):
        run(bundle, long, tmp_path / "out")


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(OptionError, match="samples is too small"):
        CollectOptions(samples=0)


def test_an_analysis_finds_what_costs_most_and_its_advice_holds(bundle: Path, prompts: Path, calibration: Path) -> None:
    options = QuantizeOptions("int4", head="int8")
    found = analyze(bundle, calibration, prompts, options, samples=2, max_kl=0.02, threads=1)
    assert len(found.costs) == 21
    assert [cost.kl_mean for cost in found.costs] == sorted((cost.kl_mean for cost in found.costs), reverse=True)
    assert all(cost.kl_mean > 0 and cost.layer_error > 0 and cost.bytes < cost.whole_bytes for cost in found.costs)
    assert found.together.kl_mean > found.costs[0].kl_mean  # all together cost more than the worst alone
    advice = found.recommendation
    assert advice is not None
    assert advice.skip
    assert advice.measured.kl_mean <= 0.02 < found.together.kl_mean
    assert found.together.bytes < advice.bytes < found.together.whole_bytes


def test_an_analysis_stays_within_the_bytes_it_is_given(bundle: Path, prompts: Path, calibration: Path) -> None:
    options = QuantizeOptions("int4", head="int8")
    found = analyze(bundle, calibration, prompts, options, samples=1, max_bytes=300_000, threads=1)
    advice = found.recommendation
    assert advice is not None
    assert found.together.bytes < advice.bytes <= 300_000
    assert advice.measured.kl_mean < found.together.kl_mean
