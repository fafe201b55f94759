"""The float64 reference of these tests agrees with the oracle. Runs on any machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle.activations import silu, softplus
from oracle.compare import relative_error
from oracle.convolution import causal_conv
from oracle.norms import GATE_EPS, gated_rms_norm
from oracle.scan import scan

from gpu.inputs import DECAYS, EPS, Inputs, Sizes, draw
from gpu.reference import mixer, scan_by_token, scan_in_chunks

CLOSE = 1e-11  # float64 sums of some hundred terms, in another order


def oracle_row(inputs: Inputs, row: int) -> tuple[Any, Any, Any]:
    """y, conv state and SSM state of one row, from its valid tokens alone."""
    s = inputs.sizes
    length = int(inputs.valid()[row])
    projected = inputs.projected[row : row + 1, :length].double().numpy()
    raw, gate, dt = np.split(projected, [s.channels, s.channels + s.heads * s.head_dim], axis=-1)
    u, conv = causal_conv(
        raw,
        inputs.conv_state[row : row + 1].double().numpy(),
        inputs.conv_weight.double().numpy(),
        inputs.conv_bias.double().numpy(),
    )
    v, k, q = np.split(silu(u), [s.kv_heads * s.head_dim, s.kv_heads * (s.head_dim + s.state_dim)], axis=-1)
    kv_head = [h // (s.heads // s.kv_heads) for h in range(s.heads)]
    y, ssm = scan(
        v.reshape(1, length, s.kv_heads, s.head_dim)[:, :, kv_head],
        k.reshape(1, length, s.kv_heads, s.state_dim)[:, :, kv_head],
        q.reshape(1, length, s.heads, s.state_dim),
        softplus(dt + inputs.dt_bias.double().numpy()),
        -np.exp(inputs.A_log.double().numpy()),
        inputs.ssm_state[row : row + 1].double().numpy(),
    )
    gate = gate.reshape(1, length, s.heads, s.head_dim)
    y = gated_rms_norm(y, gate, inputs.norm_weight.double().numpy()).reshape(1, length, s.heads * s.head_dim)
    return y[0], conv[0], ssm[0]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("scan_form", [scan_by_token, scan_in_chunks])
@pytest.mark.parametrize("conv_width", [2, 3, 4])
def test_the_reference_is_the_oracle(conv_width: int, scan_form: Any, decay: str) -> None:
    assert EPS == GATE_EPS
    sizes = Sizes(4, 110, heads=4, kv_heads=2, head_dim=16, state_dim=32, conv_width=conv_width)
    inputs = draw(sizes, torch.float32, lengths=[0, 1, 97, 110], decay=decay, device="cpu")
    found = mixer(inputs, scan=scan_form)
    for row in range(sizes.batch):
        length = int(inputs.valid()[row])
        y, conv, ssm = oracle_row(inputs, row)
        assert relative_error(found.y[row, :length], y) < CLOSE
        assert relative_error(found.conv_state[row], conv) == 0
        assert relative_error(found.ssm_state[row], ssm) < CLOSE
        assert not found.y[row, length:].any()


def test_rounded_operands_differ_from_exact_ones_by_a_rounding() -> None:
    inputs = draw(Sizes(1, 130, heads=4, kv_heads=4, head_dim=16, state_dim=16), device="cpu")
    exact, rounded = mixer(inputs), mixer(inputs, operands=torch.bfloat16)
    difference = float((exact.y - rounded.y).norm() / exact.y.norm())
    assert 1e-4 < difference < 1e-2  # three roundings of 2**-9 at most, norms of sums
