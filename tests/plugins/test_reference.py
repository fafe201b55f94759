"""The CPU reference of the kernels' C interface, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bundles.scan_operands import Operands, Sizes, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.compare import relative_l2

from mmm_export.plugins.library import KernelLibrary
from mmm_export.plugins.numpy_scan import ScanResult

# float64: eps is a float32 in the interface, off by 2.5e-9 of itself, which counts where y is small. float32: the scan's own
# rounding. fp16 and bf16: the arithmetic is float32, so what counts is one rounding of each result, at most half a unit.
CLOSE = {"fp64": 1e-9, "fp32": 4e-6, "fp16": 2.0**-12, "bf16": 2.0**-9}


def check(found: ScanResult, wanted: ScanResult, y: float, state: float) -> None:
    assert relative_l2(found.y, wanted.y) <= y
    assert relative_l2(found.ssm_state, wanted.ssm_state) <= state
    assert np.array_equal(np.asarray(found.conv_state, np.float64), wanted.conv_state)  # a copy of inputs


SIZES = st.builds(
    lambda batch, tokens, kv_heads, share, p, n, width: Sizes(
        batch, tokens, kv_heads * share, kv_heads, 16 * p, 16 * n, width
    ),
    *(
        st.integers(1, 3),
        st.integers(0, 40),
        st.integers(1, 2),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 3),
    ),
    st.integers(2, 4),
)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99), data=st.data())
def test_any_shape_and_any_lengths_agree_with_the_oracle(
    kernels: KernelLibrary, sizes: Sizes, seed: int, data: Any
) -> None:
    lengths = data.draw(st.none() | st.lists(st.integers(0, sizes.tokens), min_size=sizes.batch, max_size=sizes.batch))
    for dtype in ("fp64", "fp32"):
        operands = draw(sizes, dtype, lengths=lengths, seed=seed)
        check(operands.run(kernels), operands.oracle(), CLOSE[dtype], CLOSE[dtype])


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_the_real_sizes_agree_with_the_oracle_in_every_type(kernels: KernelLibrary, dtype: str, tokens: int) -> None:
    operands = draw(Sizes(1, tokens, 16, 8, 128, 128), dtype)
    check(operands.run(kernels), operands.oracle(), CLOSE[dtype], CLOSE["fp64" if dtype == "fp64" else "fp32"])


@pytest.mark.parametrize("state", ["fp16", "bf16"])
def test_a_half_size_state_is_rounded_once(kernels: KernelLibrary, state: str) -> None:
    operands = draw(Sizes(), "fp32", state)
    check(operands.run(kernels), operands.oracle(), CLOSE["fp32"], CLOSE[state])


def test_a_prefill_and_a_step_equal_a_longer_prefill(kernels: KernelLibrary) -> None:
    whole = draw(Sizes(tokens=12, conv_width=3))

    def part(begin: int, end: int, conv_state: Any, ssm_state: Any) -> Operands:
        sizes = replace(whole.sizes, tokens=end - begin)
        return replace(
            whole, sizes=sizes, projected=whole.projected[:, begin:end], conv_state=conv_state, ssm_state=ssm_state
        )

    conv, ssm, rows = whole.conv_state, whole.ssm_state, []
    for begin, end in ((0, 5), (5, 5), (5, 11), (11, 12)):
        done = part(begin, end, conv, ssm).run(kernels)
        conv, ssm = done.conv_state, done.ssm_state
        rows.append(done.y)
    once = whole.run(kernels)
    assert np.array_equal(np.concatenate(rows, axis=1), once.y)  # token by token either way, so to the bit
    assert np.array_equal(ssm, once.ssm_state)
    assert np.array_equal(conv, once.conv_state)


def test_a_state_updated_in_place_is_the_one_written_elsewhere(kernels: KernelLibrary) -> None:
    operands = draw(Sizes(), lengths=[9, 4])
    elsewhere = operands.run(kernels)
    in_place = operands.run(kernels, in_place=True)
    assert in_place.ssm_state is operands.ssm_state
    assert np.array_equal(in_place.ssm_state, elsewhere.ssm_state)
    assert np.array_equal(in_place.y, elsewhere.y)


def test_rows_past_a_length_are_zero_and_never_read(kernels: KernelLibrary) -> None:
    done = draw(Sizes(), lengths=[3, 0]).run(kernels)
    assert np.isfinite(done.y).all()
    assert not done.y[0, 3:].any()
    assert not done.y[1].any()
    assert np.isfinite(done.ssm_state).all()
