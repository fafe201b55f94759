"""Seeding: what the written formulas say, for every switch, and the same through files as in memory."""

import numpy as np
import pytest
import torch
from oracle.activations import silu

from mmm_export.distillation.layout import Layout
from mmm_export.distillation.loading import checkpoint_tensors, network_from_tensors
from mmm_export.distillation.recipe import Recipe, SeedingOptions
from mmm_export.distillation.seeded_checkpoint import seed_student
from mmm_export.distillation.seeding import INITS, rows_from_blocks, seeded_mixer
from mmm_export.distillation.stage import StageOptions
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import tiny_spec

SPEC = tiny_spec(kinds="teacher")
STAGE = StageOptions(steps=1, batch_samples=1, learning_rate=1e-3)
WQKV = torch.randn(SPEC.conv_channels, SPEC.hidden_size, generator=torch.Generator().manual_seed(1))
XAVIER = 2**-2.5 * (6 / (64 + 64)) ** 0.5  # gain times sqrt(6 / (inputs + outputs)) of the gate projection


def mixer(init, *, seed=0, layer=2):
    return seeded_mixer(WQKV, SPEC, layer, init=init, seed=seed)


def test_rows_are_taken_out_of_the_blocks_of_each_kv_head():
    numbered = torch.arange(SPEC.conv_channels)[:, None].expand(-1, 2)
    # Blocks of two KV heads: rows 0..31 are queries 0 and 1, 32..47 the key, 48..63 the value; then again from 64.
    value, key = [*range(48, 64), *range(112, 128)], [*range(32, 48), *range(96, 112)]
    query = [*range(32), *range(64, 96)]
    assert rows_from_blocks(numbered, SPEC)[:, 0].tolist() == value + key + query


def test_mimicking_students_start_from_the_written_formulas():
    found = mixer("inherit+mimic")
    assert torch.equal(found["wvkqgdt.weight"][: SPEC.conv_channels], rows_from_blocks(WQKV, SPEC))
    assert not found["wvkqgdt.weight"][-SPEC.heads :].any()
    gate = found["wvkqgdt.weight"][SPEC.conv_channels : -SPEC.heads]
    assert gate.abs().max() <= XAVIER
    assert gate.std() == pytest.approx(XAVIER / 3**0.5, rel=0.05)  # of 4096 uniform values
    assert torch.equal(found["conv1d.weight"], torch.tensor([0.0, 1.0]).expand(SPEC.conv_channels, 1, 2))
    assert not found["conv1d.bias"].any()
    delta = torch.nn.functional.softplus(found["dt_bias"].double())
    assert ((delta >= 0.001 * 0.999) & (delta <= 0.1 * 1.001)).all()  # float32 keeps seven digits of dt_bias
    assert torch.equal(found["A_log_bias"], torch.ones(SPEC.heads))
    assert torch.equal(found["g_norm_swish_gate.weight"], torch.ones(SPEC.head_dim))


def test_delta_is_drawn_evenly_in_its_logarithm():
    drawn = [mixer("inherit+mimic", seed=s)["dt_bias"] for s in range(500)]
    logs = torch.nn.functional.softplus(torch.cat(drawn).double()).log10().numpy()
    counts, _ = np.histogram(logs, bins=4, range=(-3, -1))
    assert counts.sum() == 2000
    assert (abs(counts - 500) < 5 * 500**0.5).all()  # five deviations of a count


def test_the_ablations_differ_where_the_paper_says():
    scratch, inherit, mimic = (mixer(init) for init in INITS)
    rows = slice(0, SPEC.conv_channels)
    assert torch.equal(inherit["wvkqgdt.weight"][rows], mimic["wvkqgdt.weight"][rows])
    assert not torch.equal(scratch["wvkqgdt.weight"][rows], mimic["wvkqgdt.weight"][rows])
    for name in ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log_bias"):
        assert torch.equal(scratch[name], inherit[name])
        assert not torch.equal(inherit[name], mimic[name])
    assert not inherit["dt_bias"].any()
    assert ((inherit["A_log_bias"] >= 0) & (inherit["A_log_bias"] <= np.log(16))).all()
    assert inherit["wvkqgdt.weight"][-SPEC.heads :].any()


def test_values_depend_on_seed_and_layer_and_on_nothing_else():
    first = mixer("inherit+mimic")
    assert all(torch.equal(a, b) for a, b in zip(first.values(), mixer("inherit+mimic").values(), strict=True))
    assert not torch.equal(first["dt_bias"], mixer("inherit+mimic", seed=1)["dt_bias"])
    assert not torch.equal(first["dt_bias"], mixer("inherit+mimic", layer=3)["dt_bias"])


def test_a_seeded_student_sees_the_tokens_keys_and_values_of_its_teacher():
    found = mixer("inherit+mimic")
    u = np.random.default_rng(0).normal(size=(5, SPEC.hidden_size))
    projected = u @ found["wvkqgdt.weight"].double().numpy().T
    raw = projected[:, : SPEC.conv_channels]
    before = np.vstack([np.zeros_like(raw[:1]), raw[:-1]])
    taps = found["conv1d.weight"].double().numpy()[:, 0]
    convolved = silu(before * taps[:, 0] + raw * taps[:, 1] + found["conv1d.bias"].double().numpy())
    # The convolution passes the current token alone, so only its SiLU stands between the two.
    np.testing.assert_array_equal(convolved, silu(raw))
    value = (u @ WQKV.double().numpy().T).reshape(5, 2, 4, 16)[:, :, 3]
    np.testing.assert_allclose(raw[:, :32], value.reshape(5, 32), rtol=1e-12)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("attention_layers", [0, 1, 4])
def test_a_seeded_checkpoint_holds_what_training_begins_with(make_checkpoint, tmp_path, init, attention_layers):
    teacher = make_checkpoint("teacher", dtype="fp32")
    recipe = Recipe({"stage-1": STAGE}, 7, SeedingOptions(init), Layout(attention_layers))
    seed_student(teacher, recipe, tmp_path / "student")
    student, source = Checkpoint.open(tmp_path / "student"), Checkpoint.open(teacher)
    kept = recipe.layout.kept(4)
    assert student.spec.attention_layers == kept
    network = network_from_tensors(source.spec, source.tensor, students=frozenset(range(4)), init=init, seed=7)
    wanted = dict(checkpoint_tensors(network, kept))
    for name in student.names():
        value = student.tensor(name)
        if name.endswith("position_embedding") or name not in wanted:
            assert torch.equal(value, source.tensor(name)), name
        else:
            assert torch.equal(value, wanted[name]), name
    assert student.names() >= set(wanted)
