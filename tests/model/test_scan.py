"""The two forms of the scan against each other and the oracle; padding, splits, chunk borders."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm_export.model import scan

SIZES = scan.ScanSizes(heads=6, kv_heads=3, head_dim=16, state_dim=16, eps=1e-5)
CHANNELS = (6 + 2 * 3) * 16
PROJECTED = CHANNELS + 6 * 16 + 6


def scan_inputs(batch, tokens, *, seed=0, conv_width=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    weights = scan.ScanWeights(
        conv_weight=normal(CHANNELS, conv_width),
        conv_bias=normal(CHANNELS),
        dt_bias=normal(6) - 4,
        A_log=normal(6),
        norm_weight=normal(16),
    )
    states = (normal(batch, CHANNELS, conv_width - 1), normal(batch, 6, 16, 16) * 0.1)
    return normal(batch, tokens, PROJECTED), states, weights


def run(form, projected, lengths, states, weights):
    return form(projected, torch.tensor(lengths, dtype=torch.int32), *states, weights, SIZES)


# Both forms add the same float64 numbers in another order: 200 tokens leave under 1e-12.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 2 * scan.CHUNK_TOKENS + 3),
    conv_width=st.integers(2, 4),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_chunked_equals_sequential_for_every_length(tokens, conv_width, seed, data):
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=2, max_size=2))
    projected, states, weights = scan_inputs(2, tokens, seed=seed, conv_width=conv_width)
    fast = run(scan.chunked, projected, lengths, states, weights)
    slow = run(scan.sequential, projected, lengths, states, weights)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(fast[0][row, :length], slow[0][row, :length], **EXACT)
    torch.testing.assert_close(fast[1], slow[1], **EXACT)
    torch.testing.assert_close(fast[2], slow[2], **EXACT)


@pytest.mark.parametrize("form", [scan.chunked, scan.sequential])
def test_not_even_nan_in_the_padding_reaches_a_state(form):
    projected, states, weights = scan_inputs(3, 70)
    lengths = [70, 1, 0]
    clean = run(form, projected, lengths, states, weights)
    poisoned = projected.clone()
    for row, length in enumerate(lengths):
        poisoned[row, length:] = torch.nan
    dirty = run(form, poisoned, lengths, states, weights)
    assert torch.equal(clean[1], dirty[1])
    assert torch.equal(clean[2], dirty[2])
    assert torch.isfinite(dirty[0]).all()


def test_a_row_without_valid_tokens_keeps_its_states():
    projected, states, weights = scan_inputs(1, 5)
    _, conv, ssm = run(scan.chunked, projected, [0], states, weights)
    assert torch.equal(conv, states[0])
    assert torch.equal(ssm, states[1])


def test_no_tokens_at_all_is_a_call_that_changes_nothing():
    projected, states, weights = scan_inputs(2, 0)
    y, conv, ssm = run(scan.sequential, projected, [0, 0], states, weights)
    assert y.shape == (2, 0, 96)
    assert torch.equal(conv, states[0])
    assert torch.equal(ssm, states[1])


@settings(max_examples=15, deadline=None)
@given(split=st.integers(1, 149), conv_width=st.integers(2, 4))
def test_two_short_prefills_equal_one_long_prefill(split, conv_width):
    projected, states, weights = scan_inputs(1, 150, conv_width=conv_width)
    whole = run(scan.chunked, projected, [150], states, weights)
    first = run(scan.chunked, projected[:, :split], [split], states, weights)
    second = run(scan.chunked, projected[:, split:], [150 - split], first[1:], weights)
    torch.testing.assert_close(torch.cat([first[0], second[0]], dim=1), whole[0], **EXACT)
    torch.testing.assert_close(second[1], whole[1], **EXACT)
    torch.testing.assert_close(second[2], whole[2], **EXACT)


def test_the_first_channel_of_a_strong_decay_forgets_and_of_none_remembers():
    projected, states, weights = scan_inputs(1, 20)
    projected[..., -6:] = 0
    forget = torch.tensor([50.0, -50, 0, 0, 0, 0], dtype=torch.float64)  # delta 50 and 0
    weights = scan.ScanWeights(weights.conv_weight, weights.conv_bias, forget, weights.A_log, weights.norm_weight)
    _, _, ssm = run(scan.chunked, projected, [20], states, weights)
    assert torch.equal(ssm[0, 1], states[1][0, 1])
    assert not np.isclose(ssm[0, 0].numpy(), states[1][0, 0].numpy()).any()


def test_float16_inputs_are_computed_in_float32():
    projected, states, weights = scan_inputs(1, 40, dtype=torch.float16)
    state32 = (states[0], states[1].float())
    found = run(scan.chunked, projected, [40], state32, weights)
    wanted = run(scan.chunked, projected.double(), [40], (states[0].double(), states[1].double()), weights)
    assert found[0].dtype == torch.float16
    assert found[2].dtype == torch.float32
    # The state never leaves float32: its error is that of float32 sums, not of float16 (1e-3).
    torch.testing.assert_close(found[2].double(), wanted[2], rtol=1e-5, atol=1e-5)
