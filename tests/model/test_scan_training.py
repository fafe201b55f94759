"""The form of the scan that is trained: against the reference form, the oracle, and numerical gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.geometry import Geometry
from oracle.mamba2 import Mamba2State, mamba2

from mmm_export.model import scan
from mmm_export.model.scan_training import scan_sequences

SIZES = scan.ScanSizes(heads=4, kv_heads=2, head_dim=8, state_dim=8, eps=1e-5)
CHANNELS = (4 + 2 * 2) * 8
PROJECTED = CHANNELS + 4 * 8 + 4
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # the same float64 numbers, added in another order


def inputs(tokens, *, batch=2, conv_width=2, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = scan.ScanWeights(
        normal(CHANNELS, conv_width), normal(CHANNELS), normal(4) - 3, 1 + 0.3 * normal(4), 1 + 0.1 * normal(8)
    )
    return normal(batch, tokens, PROJECTED), weights


def reference(projected, weights):
    B, T, _ = projected.shape
    states = (
        torch.zeros(B, CHANNELS, weights.conv_weight.shape[1] - 1, dtype=torch.float64),
        torch.zeros(B, 4, 8, 8, dtype=torch.float64),
    )
    return scan.sequential(projected, torch.full((B,), T), *states, weights, SIZES)[0]


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 40), chunk=st.integers(1, 17), conv_width=st.integers(2, 4), seed=st.integers(0, 99))
def test_it_equals_the_reference_form_for_every_length_and_chunk(tokens, chunk, conv_width, seed):
    projected, weights = inputs(tokens, conv_width=conv_width, seed=seed)
    found = scan_sequences(projected, None, weights, SIZES, chunk)
    torch.testing.assert_close(found, reference(projected, weights), **EXACT)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=5),
    padding=st.integers(0, 9),
    chunk=st.integers(1, 17),
    conv_width=st.integers(2, 4),
)
def test_samples_packed_into_one_row_do_not_see_each_other(lengths, padding, chunk, conv_width):
    projected, weights = inputs(sum(lengths) + padding, batch=1, conv_width=conv_width)
    numbers = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    found = scan_sequences(projected, torch.tensor([numbers]), weights, SIZES, chunk)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = reference(projected[:, part], weights)
        torch.testing.assert_close(found[:, part], alone, **EXACT)
        start += length


def test_it_equals_the_oracle():
    projected, weights = inputs(150)
    found = scan_sequences(projected, None, weights, SIZES, 64)
    geometry = Geometry(hidden_size=PROJECTED, heads=4, kv_heads=2, head_dim=8)
    stored = {
        "wvkqgdt.weight": np.eye(PROJECTED),  # so that the hidden vectors are the projected ones
        "o_proj.weight": np.eye(32),
        "conv1d.weight": weights.conv_weight.numpy()[:, None],
        "conv1d.bias": weights.conv_bias.numpy(),
        "dt_bias": weights.dt_bias.numpy(),
        "A_log_bias": weights.A_log.numpy(),
        "g_norm_swish_gate.weight": weights.norm_weight.numpy(),
    }
    wanted, _ = mamba2(projected.numpy(), stored, geometry, Mamba2State.zeros(2, geometry, 2))
    np.testing.assert_allclose(found.numpy(), wanted, **EXACT)


@pytest.mark.parametrize("segments", [None, [[0, 0, 0, 1, 1, 1, 1]]])
def test_its_gradients_are_those_of_finite_differences(segments):
    projected, weights = inputs(7, batch=1)
    numbers = None if segments is None else torch.tensor(segments)
    values = [projected, weights.conv_weight, weights.conv_bias, weights.dt_bias, weights.A_log, weights.norm_weight]
    for value in values:
        value.requires_grad_(True)

    def run(projected, *parts):
        return scan_sequences(projected, numbers, scan.ScanWeights(*parts), SIZES, 3)

    assert torch.autograd.gradcheck(run, values)


def test_gradients_equal_those_through_the_reference_form():
    projected, weights = inputs(70)
    gradients = []
    for form in (lambda p: scan_sequences(p, None, weights, SIZES), lambda p: reference(p, weights)):
        given = projected.clone().requires_grad_(True)
        form(given).square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)  # products of EXACT numbers


def test_strong_decay_gives_finite_gradients():
    projected, weights = inputs(40)
    projected = (projected * 50).requires_grad_(True)  # delta up to 150, decay down to exp(-400)
    scan_sequences(projected, None, weights, SIZES, 16).sum().backward()
    assert torch.isfinite(projected.grad).all()


def test_under_autocast_it_still_computes_in_float32():
    projected, weights = inputs(40)
    single = projected.float()
    plain = scan_sequences(single, None, weights, SIZES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scan_sequences(single, None, weights, SIZES)
    assert torch.equal(plain, inside)
