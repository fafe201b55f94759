"""Scan, convolution and mixer of the oracle against forms that share no loop with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.compare import relative_error
from oracle.convolution import causal_conv
from oracle.geometry import Geometry
from oracle.mamba2 import Mamba2State, mamba2
from oracle.scan import scan
from oracle_checks.second_formulation import mamba2_matrix, scan_matrix
from oracle_checks.tiny_checkpoint import Sizes, random_tensors

# float64 against float64: sums of some hundred terms of size 1, each rounded at 1e-16.
EXACT = 1e-12

small = st.integers(1, 5)


def test_scan_gives_the_numbers_worked_out_by_hand() -> None:
    ones = np.ones((1, 3, 1, 1))
    delta = np.full((1, 3, 1), math.log(2.0))
    y, state = scan(ones, ones, 3 * ones, delta, np.array([-1.0]), np.zeros((1, 1, 1, 1)))
    # decay is 1/2 and each token adds log 2: 1, 3/2, 7/4 times log 2, read with q = 3
    np.testing.assert_allclose(y.ravel(), np.array([3.0, 4.5, 5.25]) * math.log(2.0), rtol=1e-15)  # a few ulp
    np.testing.assert_allclose(state.ravel(), 1.75 * math.log(2.0), rtol=1e-15)


def test_state_rows_are_values_and_columns_are_keys() -> None:
    v = np.array([1.0, 2.0]).reshape(1, 1, 1, 2)
    k = np.array([1.0, 10.0, 100.0]).reshape(1, 1, 1, 3)
    y, state = scan(v, k, k / 100, np.ones((1, 1, 1)), np.array([-1.0]), np.zeros((1, 1, 2, 3)))
    np.testing.assert_array_equal(state[0, 0], [[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    np.testing.assert_allclose(y.ravel(), [101.01, 202.02], rtol=1e-15)  # a few ulp


@settings(max_examples=20, deadline=None)
@given(batch=small, tokens=st.integers(1, 40), heads=small, width=small, states=small, seed=st.integers(0, 2**32 - 1))
def test_scan_agrees_with_the_matrix_form(
    batch: int, tokens: int, heads: int, width: int, states: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    v = random.standard_normal((batch, tokens, heads, width))
    k, q = random.standard_normal((2, batch, tokens, heads, states))
    delta = random.uniform(0.001, 2.0, (batch, tokens, heads))
    a = -random.uniform(0.1, 16.0, heads)
    state = random.standard_normal((batch, heads, width, states))
    given_state = state.copy()
    y, last = scan(v, k, q, delta, a, state)
    wanted_y, wanted_last = scan_matrix(*(torch.from_numpy(x) for x in (v, k, q, delta, a, state)))
    assert relative_error(y, wanted_y) < EXACT
    assert relative_error(last, wanted_last) < EXACT
    np.testing.assert_array_equal(state, given_state)


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 5), tokens=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_convolution_agrees_with_conv1d_over_state_and_input(width: int, tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, tokens, 7))
    state = random.standard_normal((2, 7, width - 1))
    weight, bias = random.standard_normal((7, width)), random.standard_normal(7)
    y, last = causal_conv(x, state, weight, bias)
    line = np.concatenate([state, x.transpose(0, 2, 1)], axis=2)
    wanted = F.conv1d(torch.from_numpy(line), torch.from_numpy(weight[:, None]), torch.from_numpy(bias), groups=7)
    assert relative_error(y.transpose(0, 2, 1), wanted) < EXACT
    np.testing.assert_array_equal(last, line[:, :, tokens:])
    assert last.shape == state.shape


def test_convolution_of_width_two_weighs_the_previous_token_with_its_first_column() -> None:
    x = np.array([[[1.0], [10.0], [100.0]]])
    y, state = causal_conv(x, np.array([[[1000.0]]]), np.array([[2.0, 3.0]]), np.array([0.5]))
    np.testing.assert_array_equal(y.ravel(), [2003.5, 32.5, 320.5])
    np.testing.assert_array_equal(state.ravel(), [100.0])


def _mixer(sizes: Sizes, seed: int) -> tuple[dict[str, np.ndarray], Geometry]:
    prefix = "embedding_model.encoder.0.attention."
    tensors = {
        name.removeprefix(prefix): value.astype(np.float64)
        for name, value in random_tensors(sizes, seed).items()
        if name.startswith(prefix)
    }
    return tensors, Geometry(sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim)


MIXERS = [
    Sizes(),
    Sizes(heads=4, kv_heads=4, head_dim=16, hidden=24, conv_width=4),
    Sizes(heads=8, kv_heads=1, head_dim=4, hidden=33, conv_width=1),
]


@pytest.mark.parametrize("sizes", MIXERS, ids=["6-over-3", "4-over-4-wide-conv", "8-over-1-no-conv-state"])
def test_mixer_agrees_with_the_matrix_form(sizes: Sizes) -> None:
    weights, geometry = _mixer(sizes, 1)
    u = np.random.default_rng(2).standard_normal((2, 23, sizes.hidden))
    y, state = mamba2(u, weights, geometry, Mamba2State.zeros(2, geometry, sizes.conv_width))
    wanted = mamba2_matrix(torch.from_numpy(u), {n: torch.from_numpy(w) for n, w in weights.items()}, sizes)
    # The gated norm divides by sizes around 0.1 and so enlarges the scan's rounding a little.
    assert relative_error(y, wanted) < 10 * EXACT
    assert state.conv.shape == (2, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, sizes.conv_width - 1)
    assert state.ssm.shape == (2, sizes.heads, sizes.head_dim, sizes.head_dim)


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 12), data=st.data())
def test_mixer_split_anywhere_equals_one_run(tokens: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, tokens))
    sizes = MIXERS[1]  # a conv state of three tokens, more than some parts hold
    weights, geometry = _mixer(sizes, 3)
    u = np.random.default_rng(4).standard_normal((1, tokens, sizes.hidden))
    zeros = Mamba2State.zeros(1, geometry, sizes.conv_width)
    whole, end = mamba2(u, weights, geometry, zeros)
    first, middle = mamba2(u[:, :cut], weights, geometry, zeros)
    second, last = mamba2(u[:, cut:], weights, geometry, middle)
    # The same sums per token; only the matrix products may be blocked differently.
    assert relative_error(np.concatenate([first, second], axis=1), whole) < EXACT
    assert relative_error(last.ssm, end.ssm) < EXACT
    assert relative_error(last.conv, end.conv) < EXACT
