"""A verification must pass for an honest bundle and fail for every other."""

import shutil

import numpy as np
import onnx
import pytest

from mmm_export.errors import BundleError, OptionError, PromptError
from mmm_export.exporter.comparison import compare
from mmm_export.exporter.recording import Recording
from mmm_export.exporter.report import html_report, table_rows, verdict_lines
from mmm_export.exporter.verify import VerifyOptions, check_tokens, verify_bundle
from mmm_export.manifest import file_info, read_manifest, write_manifest
from mmm_export.model.testing import tiny_spec

SMALL = tiny_spec(kinds=("mamba2", "mha", "mamba2"))


@pytest.fixture
def checkpoint(make_checkpoint):
    return make_checkpoint(SMALL)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_honest_bundle_passes(dtype, checkpoint, make_bundle):
    report = verify_bundle(make_bundle(checkpoint, dtype=dtype, max_tokens=400), checkpoint)
    assert report.passed, "\n".join(verdict_lines(report))
    assert report.image_tokens == SMALL.vision.tokens_per_tile
    assert len(report.tokens.wanted) == 8
    layers = {row.layer for row in report.comparisons} - {None}
    assert layers == {0, 1, 2}


def tampered(folder, target, change):
    """A copy of a bundle with another decoder, and a manifest that vouches for it."""
    shutil.copytree(folder, target)
    model = onnx.load(target / "decoder.onnx", load_external_data=False)
    change(model, target)
    onnx.save(model, target / "decoder.onnx")
    manifest = read_manifest(target)
    for name in ("decoder.onnx", "decoder.onnx.data"):
        manifest.files[name] = file_info(target / name)
    write_manifest(target, manifest)
    return target


def node_of(model, kind):
    return next(node for node in model.graph.node if node.op_type == kind)


def scale_one_weight(model, folder):
    tensor = next(i for i in model.graph.initializer if i.name.endswith("layers.1.feed_forward.w2.weight"))
    where = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    path = folder / "decoder.onnx.data"
    data = bytearray(path.read_bytes())
    weight = np.frombuffer(data, np.float32, where["length"] // 4, where["offset"])
    data[where["offset"] : where["offset"] + where["length"]] = (weight * 1.01).tobytes()
    path.write_bytes(data)


def change_eps(model, _folder):
    for attribute in node_of(model, "MmmSelectiveScan").attribute:
        if attribute.name == "eps":
            attribute.f = 1e-3


def swap_delta_and_decay_weights(model, _folder):
    node = node_of(model, "MmmSelectiveScan")
    node.input[6], node.input[7] = node.input[7], node.input[6]


def ignore_the_past(model, _folder):
    """Feed the scan its own new state's shape of zeros: prefill is right, steps are not."""
    node = node_of(model, "MmmSelectiveScan")
    past = node.input[3]
    zero = onnx.helper.make_node("Sub", [past, past], ["no_past"])
    node.input[3] = "no_past"
    model.graph.node.insert(0, zero)


@pytest.mark.parametrize("change", [scale_one_weight, change_eps, swap_delta_and_decay_weights, ignore_the_past])
def test_a_bundle_that_computes_something_else_fails(change, checkpoint, make_bundle, tmp_path):
    folder = tampered(make_bundle(checkpoint, max_tokens=400), tmp_path / "tampered", change)
    report = verify_bundle(folder, checkpoint)
    assert not report.passed
    assert verdict_lines(report)[-1] == "verdict: FAILED"


def test_a_bundle_of_another_checkpoint_is_refused(checkpoint, make_checkpoint, make_bundle):
    other = make_checkpoint(SMALL, seed=5)
    with pytest.raises(BundleError, match="not made from this checkpoint"):
        verify_bundle(make_bundle(checkpoint, max_tokens=400), other)


def test_a_prompt_past_the_kv_cache_is_refused(checkpoint, make_bundle):
    with pytest.raises(PromptError, match="KV cache"):
        verify_bundle(make_bundle(checkpoint, max_tokens=20), checkpoint)


def test_a_checkpoint_without_tokenizer_can_still_be_verified(make_checkpoint, make_bundle):
    spec = tiny_spec(llm_layers=1)
    bare = make_checkpoint(spec, tokenizer=False)
    bundle = make_bundle(bare)
    assert verify_bundle(bundle, bare, VerifyOptions(new_tokens=2)).passed
    with pytest.raises(Exception, match=r"tokenizer\.model"):
        verify_bundle(bundle, bare, VerifyOptions(prompt="Hello"))


def test_rope_policy_of_the_bundle_is_the_one_verified(make_checkpoint, make_bundle):
    part = {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 32}
    spec = tiny_spec(kinds=("mha", "mamba2"))
    checkpoint = make_checkpoint(spec, config_overrides={"llm_config": part, "embedding_config": part})
    folder = make_bundle(checkpoint, rope_scaling="teacher", max_tokens=400)
    assert verify_bundle(folder, checkpoint).passed


def use_an_unknown_operator(model, _folder):
    del model.functions[:]


def test_a_graph_that_onnxruntime_cannot_open_is_a_clear_error(checkpoint, make_bundle, tmp_path):
    folder = tampered(make_bundle(checkpoint, max_tokens=400), tmp_path / "tampered", use_an_unknown_operator)
    with pytest.raises(BundleError, match="cannot open") as caught:
        verify_bundle(folder, checkpoint)
    assert "--body standard" in str(caught.value)


def test_another_greedy_token_fails_unless_it_is_a_tie(checkpoint, make_bundle):
    manifest = read_manifest(make_bundle(checkpoint, max_tokens=400))
    wanted = np.zeros(SMALL.vocab_size)
    wanted[5], wanted[6] = 10.0, 9.5
    for second, passed in ((10.1, False), (9.5, True)):
        found = wanted.copy()
        found[6] = second
        recordings = (Recording(np.zeros(0), np.zeros(0), logits=logits) for logits in (found, wanted))
        check = check_tokens(*recordings, [5], manifest)
        assert check.passed is passed
    tied = wanted.copy()
    tied[6] = 9.9995  # nearer to the best than fp32 logits may be off
    found = tied.copy()
    found[6] = 10.0001
    recordings = (Recording(np.zeros(0), np.zeros(0), logits=logits) for logits in (found, tied))
    check = check_tokens(*recordings, [5], manifest)
    assert check.first_difference == 0
    assert check.passed


def test_stand_ins_for_an_image_are_told(checkpoint, make_bundle):
    report = verify_bundle(make_bundle(checkpoint, max_tokens=400), checkpoint, VerifyOptions(new_tokens=0))
    assert any("pattern" in note for note in report.notes)


def test_an_empty_prompt_is_refused_and_not_replaced(checkpoint, make_bundle):
    with pytest.raises(PromptError):
        verify_bundle(make_bundle(checkpoint, max_tokens=400), checkpoint, VerifyOptions(prompt=""))


def test_options_out_of_range_are_refused():
    with pytest.raises(OptionError):
        VerifyOptions(new_tokens=-1)
    with pytest.raises(OptionError):
        VerifyOptions(split_tokens=0)


def test_report_shows_every_hop_and_needs_no_other_file(checkpoint, make_bundle):
    report = verify_bundle(make_bundle(checkpoint, max_tokens=400), checkpoint)
    page = html_report(report)
    assert page.count("<svg") == 2
    for forbidden in ("<script src", "<link", "<img", "url(http"):
        assert forbidden not in page
    for hop in {row[0] for row in table_rows(report)}:
        assert hop.replace(">", "&gt;") in page
    assert "PASSED" in page
    assert html_report(report) == page


def test_measures_have_their_meaning():
    wanted = np.array([1.0, -2.0, 4.0])
    row = compare("x", "a -> b", wanted * 1.5, wanted, logits=True)
    assert row.max_abs == 2.0
    assert row.relative == 0.5
    assert row.l2 == pytest.approx(0.5)
    assert row.cosine == pytest.approx(1.0)
    p, q = (np.exp(z) / np.exp(z).sum() for z in (wanted, wanted * 1.5))
    assert row.kl == pytest.approx(float((p * np.log(p / q)).sum()))
    assert compare("x", "a -> b", np.zeros(3), np.zeros(3)).cosine == 1.0


def test_nan_passes_no_bound(checkpoint, make_bundle, tmp_path):
    from mmm_export.exporter.comparison import logits_bounds, split_bounds

    row = compare("x", "a -> b", np.array([np.nan, 1.0]), np.ones(2), bounds=logits_bounds("fp32"), logits=True)
    assert not row.passed
    row = compare("x", "a -> b", np.array([np.nan, 1.0]), np.ones(2), bounds=split_bounds("fp16"))
    assert not row.passed
