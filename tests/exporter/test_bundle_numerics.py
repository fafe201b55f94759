"""Exported bundles, run by plain ONNX Runtime, against the independent float64 oracle of their checkpoints."""

import numpy as np
import pytest
from bundles.plain import PlainBundle
from oracle import OracleModel, relative_error

from mmm_export.model.testing import tiny_spec
from mmm_export.onnxruntime_support import has_linear_attention
from mmm_export.spec import RopeSpec

# Sums of float32 in another order, through a handful of layers; measured 2e-7 to 1e-6.
FP32 = 1e-5
# The whole chain rounds to 11 bits some ten times a layer: measured 1e-3.
FP16 = 1e-2

CASES = {
    "linear": (tiny_spec(), {}, {}),
    "hybrid from two fp16 shards": (tiny_spec(kinds="hybrid"), {"dtype": "fp16", "shards": 2}, {}),
    "teacher": (tiny_spec(kinds="teacher", llm_layers=2), {"dtype": "fp32"}, {}),
    "odd heads, unlabelled": (
        tiny_spec(kinds=("mha", "mamba2", "mha"), heads=6, kv_heads=3, head_dim=16),
        {"layers_block_type": False},
        {},
    ),
    "wide conv, one kv head": (tiny_spec(kinds=("mamba2", "mamba2"), heads=4, kv_heads=1, conv_width=4), {}, {}),
    "interpolated, special rows, normalised": (
        tiny_spec(tile_size=84, position_grid=4, special_tokens=3, normalize_embedding=True, llm_layers=1),
        {"dtype": "bf16"},
        {},
    ),
    "standard body": (tiny_spec(llm_layers=1), {}, {"body": "standard"}),
}
if has_linear_attention():  # as old as support for opset 27
    CASES["opset 27 operators"] = (tiny_spec(llm_layers=1), {}, {"standard_ops": True})


def sample(spec, tokens, tiles=2, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.choice([i for i in range(3, spec.vocab_size) if i != spec.image_token_id], tokens)
    ids[2 : 2 + tiles * spec.vision.tokens_per_tile] = spec.image_token_id
    side = spec.vision.tile_size
    return ids, rng.standard_normal((tiles, 3, side, side)).astype(np.float32)


@pytest.fixture(params=CASES)
def case(request, make_checkpoint, make_bundle):
    spec, written, exported = CASES[request.param]
    checkpoint = make_checkpoint(spec, **written)
    return spec, checkpoint, make_bundle(checkpoint, dtype="fp32", max_tokens=96, **exported)


def test_logits_and_states_equal_the_oracle_over_prefill_and_steps(case):
    spec, checkpoint, folder = case
    ids, pixels = sample(spec, 75)
    oracle = OracleModel.from_checkpoint(checkpoint)
    bundle = PlainBundle(folder)
    logits, states = bundle.decode(bundle.embed(ids[None], pixels), [75], bundle.states(1))
    wanted = oracle.forward(ids, pixels)
    assert relative_error(logits[0, 0], wanted.logits[-1]) < FP32
    for layer, kind in enumerate(spec.kinds):
        state = wanted.state.layers[layer]
        if kind == "mamba2":
            assert relative_error(states[f"past.{layer}.conv"], state.conv) < FP32
            assert relative_error(states[f"past.{layer}.recurrent"], state.ssm) < FP32
        else:
            assert relative_error(states[f"past.{layer}.key"][:, :, :75], state.key) < FP32
            assert relative_error(states[f"past.{layer}.value"][:, :, :75], state.value) < FP32
    for i, token in enumerate((7, 8, 9)):
        logits, states = bundle.decode(bundle.embed([[token]]), [1], states, [75 + i])
        wanted = oracle.forward(np.array([token]), state=wanted.state)
        assert relative_error(logits[0, 0], wanted.logits[-1]) < FP32


def test_rows_of_a_padded_batch_equal_each_row_alone(case):
    spec, checkpoint, folder = case
    oracle = OracleModel.from_checkpoint(checkpoint)
    bundle = PlainBundle(folder)
    rows = [sample(spec, 66, tiles=0, seed=s)[0] for s in range(3)]
    lengths = [66, 20, 1]
    embeds = bundle.embed(np.stack(rows))
    for row, length in enumerate(lengths):
        embeds[row, length:] = np.nan
    logits, states = bundle.decode(embeds, lengths, bundle.states(3))
    for row, length in enumerate(lengths):
        assert relative_error(logits[row, 0], oracle.forward(rows[row][:length]).logits[-1]) < FP32
    # Each row goes on from its own length; a row with nothing to read keeps its states.
    more = bundle.embed(np.full((3, 2), 5))
    logits, after = bundle.decode(more, [2, 1, 0], states, lengths)
    wanted = oracle.forward(np.append(rows[1][:20], 5)).logits[-1]
    assert relative_error(logits[1, 0], wanted) < FP32
    for name in states:
        assert np.array_equal(after[name][2], states[name][2])


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_float16_bundle_follows_the_oracle(kind, make_checkpoint, make_bundle):
    checkpoint = make_checkpoint(kind)
    bundle = PlainBundle(make_bundle(checkpoint, dtype="fp16", max_tokens=96))
    ids, pixels = sample(tiny_spec(kinds=kind), 60)
    embeds = bundle.embed(ids[None], pixels)
    assert embeds.dtype == np.float16
    logits, states = bundle.decode(embeds, [60], bundle.states(1))
    assert logits.dtype == np.float32
    assert states["past.1.recurrent"].dtype == np.float32
    wanted = OracleModel.from_checkpoint(checkpoint).forward(ids, pixels)
    assert relative_error(logits[0, 0], wanted.logits[-1]) < FP16


def test_logits_of_all_tokens_on_request(make_checkpoint, make_bundle):
    checkpoint = make_checkpoint("linear")
    bundle = PlainBundle(make_bundle(checkpoint, logits="all"))
    ids, _ = sample(tiny_spec(), 30, tiles=0)
    logits, _ = bundle.decode(bundle.embed(ids[None]), [30], bundle.states(1))
    assert relative_error(logits[0], OracleModel.from_checkpoint(checkpoint).forward(ids).logits) < FP32


@pytest.mark.parametrize("scaling", [{"type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 4.0}])
def test_rope_scaling_of_the_teacher_is_exported_on_request(scaling, make_checkpoint, make_bundle):
    part = {"rope_scaling": scaling, "max_position_embeddings": 32}
    spec = tiny_spec(kinds="teacher", llm_layers=1, rope=RopeSpec(theta=1e4))
    checkpoint = make_checkpoint(spec, config_overrides={"llm_config": part, "embedding_config": part})
    ids, _ = sample(spec, 60, tiles=0)
    for policy in ("teacher", "ignore"):
        bundle = PlainBundle(make_bundle(checkpoint, rope_scaling=policy, max_tokens=64))
        logits, _ = bundle.decode(bundle.embed(ids[None]), [60], bundle.states(1))
        wanted = OracleModel.from_checkpoint(checkpoint, rope_scaling=policy).forward(ids)
        # The dynamic base is computed in the graph, in float32: angles of up to 60 radians carry 60 * 6e-8.
        assert relative_error(logits[0, 0], wanted.logits[-1]) < 3 * FP32
