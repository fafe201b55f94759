"""The PyTorch model in float64 against the independent oracle, over checkpoints of many shapes."""

import numpy as np
import pytest
import torch
from oracle.model import OracleModel

from mmm_export.model import scan
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import tiny_spec
from mmm_export.model.weights import load_model
from mmm_export.spec import RopeSpec

SPECS = {
    "linear": tiny_spec(),
    "hybrid": tiny_spec(kinds="hybrid"),
    "teacher": tiny_spec(kinds="teacher"),
    "six heads over three": tiny_spec(kinds=("mha", "mamba2", "mamba2"), heads=6, kv_heads=3, head_dim=16),
    "one kv head, wide conv": tiny_spec(kinds=("mamba2", "mha"), heads=4, kv_heads=1, conv_width=4),
    "interpolated positions": tiny_spec(tile_size=84, position_grid=4),
    "no projection": tiny_spec(projected=False, shuffle=1),
    "special rows, normalised": tiny_spec(special_tokens=3, normalize_embedding=True),
    "own eps and theta": tiny_spec(kinds="hybrid", norm_eps=1e-3, rope=RopeSpec(theta=500.0)),
}


def sample(spec, tokens, tiles=1, seed=0):
    """Token ids (T,) with image tokens of `tiles` tiles inside, and the tiles."""
    rng = np.random.default_rng(seed)
    text_ids = [i for i in range(3, spec.vocab_size + spec.special_tokens) if i != spec.image_token_id]
    ids = rng.choice(text_ids, tokens)
    image = tiles * spec.vision.tokens_per_tile
    ids[2 : 2 + image] = spec.image_token_id
    pixels = rng.standard_normal((tiles, 3, spec.vision.tile_size, spec.vision.tile_size)).astype(np.float32)
    return ids.astype(np.int64), pixels


@pytest.mark.parametrize("name", SPECS)
def test_float64_model_equals_the_oracle_in_every_layer(name, make_checkpoint):
    folder = make_checkpoint(SPECS[name], dtype="bf16")
    source = Checkpoint.open(folder)
    ids, pixels = sample(source.spec, 90)
    wanted = OracleModel.from_checkpoint(folder).forward(ids, pixels)
    layers = []
    model = load_model(source, dtype=torch.float64)
    with torch.inference_mode():
        embeds = model.embed(torch.from_numpy(ids)[None], model.image_features(torch.from_numpy(pixels)))
        hidden, _ = model.hidden(
            embeds,
            torch.tensor([90], dtype=torch.int32),
            model.initial_states(1, 90),
            torch.tensor([0], dtype=torch.int32),
            on_layer=lambda i, x: layers.append(x),
        )
        logits = model.logits(hidden)[0]
    # Two float64 programs: only the order of sums differs. Interpolated positions are float32, as in the reference.
    rtol = 1e-6 if name == "interpolated positions" else 1e-9
    for found, layer_wanted in zip(layers, wanted.layer_outputs, strict=True):
        np.testing.assert_allclose(found[0].numpy(), layer_wanted, rtol=rtol, atol=rtol * np.abs(layer_wanted).max())
    np.testing.assert_allclose(logits.numpy(), wanted.logits, rtol=rtol, atol=rtol * np.abs(wanted.logits).max())


@pytest.mark.parametrize("kind", ["linear", "hybrid", "teacher"])
def test_prefill_then_steps_equal_one_prefill(kind, make_checkpoint):
    model = load_model(Checkpoint.open(make_checkpoint(kind)), dtype=torch.float64)
    ids = torch.from_numpy(sample(model.spec, 40, tiles=0)[0])[None]
    none = torch.zeros(0, model.spec.hidden_size, dtype=torch.float64)

    def lengths(n):
        return torch.tensor([n], dtype=torch.int32)

    with torch.inference_mode():
        whole, _ = model.prefill(model.embed(ids, none), lengths(40), model.initial_states(1, 40), lengths(0))
        logits, states = model.prefill(
            model.embed(ids[:, :33], none), lengths(33), model.initial_states(1, 40), lengths(0)
        )
        for t in range(33, 40):
            logits, states = model.step(ids[:, t], states, lengths(t))
    torch.testing.assert_close(logits, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "hybrid", "teacher"])
def test_rows_of_a_padded_batch_equal_each_row_alone(kind, make_checkpoint):
    model = load_model(Checkpoint.open(make_checkpoint(kind)), dtype=torch.float64, scan=scan.chunked)
    ids = torch.from_numpy(np.stack([sample(model.spec, 70, tiles=0, seed=s)[0] for s in range(3)]))
    lengths = torch.tensor([70, 31, 1], dtype=torch.int32)
    none = torch.zeros(0, model.spec.hidden_size, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.int32)
    with torch.inference_mode():
        embeds = model.embed(ids, none)
        for row, length in enumerate(lengths):
            embeds[row, length:] = torch.nan
        batch, states = model.prefill(embeds, lengths, model.initial_states(3, 80), zero)
        for row, length in enumerate(lengths.tolist()):
            alone, alone_states = model.prefill(
                embeds[row : row + 1, :length], lengths[row : row + 1], model.initial_states(1, 80), zero[:1]
            )
            torch.testing.assert_close(batch[row], alone[0], rtol=1e-9, atol=1e-9)
            for state, alone_state in zip(states, alone_states, strict=True):
                for part, alone_part in zip(state, alone_state, strict=True):
                    torch.testing.assert_close(part[row], alone_part[0], rtol=1e-9, atol=1e-9)


def test_dynamic_rope_scaling_equals_the_oracle_past_the_trained_length(make_checkpoint):
    rope = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32}
    folder = make_checkpoint("teacher", dtype="fp32", config_overrides={"llm_config": rope, "embedding_config": rope})
    source = Checkpoint.open(folder, rope_scaling="teacher")
    ids, _ = sample(source.spec, 60, tiles=0)
    wanted = OracleModel.from_checkpoint(folder, rope_scaling="teacher").forward(ids)
    ignored = OracleModel.from_checkpoint(folder).forward(ids)
    model = load_model(source, dtype=torch.float64)
    with torch.inference_mode():
        embeds = model.embed(torch.from_numpy(ids)[None], torch.zeros(0, source.spec.hidden_size, dtype=torch.float64))
        found, _ = model.prefill(
            embeds,
            torch.tensor([60], dtype=torch.int32),
            model.initial_states(1, 60),
            torch.tensor([0], dtype=torch.int32),
        )
    np.testing.assert_allclose(found[0, 0].numpy(), wanted.logits[-1], rtol=1e-9, atol=1e-9)
    assert not np.allclose(found[0, 0].numpy(), ignored.logits[-1], rtol=1e-3)


def test_weights_are_views_of_the_file_not_copies(make_checkpoint):
    source = Checkpoint.open(make_checkpoint("linear"))
    model = load_model(source)
    name = "language_model.model.layers.0.feed_forward.w1.weight"
    parameter = dict(model.named_parameters())[name]
    assert parameter.dtype == torch.bfloat16
    assert parameter.data_ptr() == source.tensor(name).data_ptr()
