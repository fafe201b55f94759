"""Attention and RoPE of the oracle against torch's attention and complex numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.attention import KVState, mha
from oracle.compare import relative_error
from oracle.geometry import Geometry
from oracle.rope import Rope, rotate
from oracle_checks.second_formulation import attention_sdpa, turn
from oracle_checks.tiny_checkpoint import Sizes, random_tensors

EXACT = 1e-12  # float64 against float64: sums of some hundred terms of size 1


def _layer(heads: int, kv_heads: int, size: int = 8) -> tuple[Sizes, dict[str, np.ndarray], Geometry]:
    sizes = Sizes(kinds=(("mha",), ()), heads=heads, kv_heads=kv_heads, head_dim=size)
    prefix = "embedding_model.encoder.0.attention."
    tensors = random_tensors(sizes, 5)
    weights = {n.removeprefix(prefix): w.astype(np.float64) for n, w in tensors.items() if n.startswith(prefix)}
    return sizes, weights, Geometry(sizes.hidden, heads, kv_heads, size)


def _input(tokens: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(6).standard_normal((batch, tokens, Sizes().hidden))


def _torch(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in weights.items()}


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (4, 4), (8, 1), (1, 1)])
def test_attention_agrees_with_sdpa(heads: int, kv_heads: int) -> None:
    sizes, weights, geometry = _layer(heads, kv_heads)
    u = _input(19, batch=2)
    y, state = mha(u, weights, geometry, Rope(300.0), KVState.empty(2, geometry))
    assert relative_error(y, attention_sdpa(torch.from_numpy(u), _torch(weights), sizes, 300.0)) < EXACT
    assert state.key.shape == state.value.shape == (2, kv_heads, 19, 8)


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 12), data=st.data())
def test_attention_split_anywhere_equals_one_run(tokens: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, tokens))
    _, weights, geometry = _layer(6, 3)
    u, rope, nothing = _input(tokens), Rope(300.0), KVState.empty(1, geometry)
    whole, end = mha(u, weights, geometry, rope, nothing)
    first, middle = mha(u[:, :cut], weights, geometry, rope, nothing)
    second, last = mha(u[:, cut:], weights, geometry, rope, middle)
    assert relative_error(np.concatenate([first, second], axis=1), whole) < EXACT
    assert relative_error(last.key, end.key) < EXACT
    assert relative_error(last.value, end.value) < EXACT


def test_rotation_agrees_with_complex_numbers() -> None:
    x = np.random.default_rng(7).standard_normal((2, 3, 11, 10))
    positions = np.arange(40, 51)
    found = rotate(x, Rope(1e6).angles(positions, 51, 10))
    assert relative_error(found, turn(torch.from_numpy(x), 1e6, torch.from_numpy(positions).double())) < EXACT


def test_rotation_pairs_a_dimension_with_the_one_half_a_head_away() -> None:
    x = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    quarter = np.array([[math.pi / 2, 0.0], [0.0, math.pi / 2]])
    # A quarter turn takes dimension 0 to dimension 2, and dimension 3 to minus dimension 1. cos(pi/2) is 6e-17, not 0.
    np.testing.assert_allclose(rotate(x, quarter), [[0, 0, 1, 0], [0, -1, 0, 0]], atol=1e-15)


def test_scores_depend_on_the_distance_of_tokens_alone() -> None:
    q, k = np.random.default_rng(8).standard_normal((2, 1, 8))
    rope = Rope(100.0)
    products = [
        float((rotate(q, rope.angles(np.array([p + 3]), 0, 8)) * rotate(k, rope.angles(np.array([p]), 0, 8))).sum())
        for p in (0, 1, 50)
    ]
    np.testing.assert_allclose(products, products[0], rtol=EXACT)
    far = float((rotate(q, rope.angles(np.array([4]), 0, 8)) * rotate(k, rope.angles(np.array([0]), 0, 8))).sum())
    assert abs(far - products[0]) > 1e-3


def test_linear_scaling_divides_positions() -> None:
    sizes, weights, geometry = _layer(6, 3)
    u = _input(9)
    y, _ = mha(u, weights, geometry, Rope(300.0, "linear", 4.0, 2), KVState.empty(1, geometry))
    wanted = attention_sdpa(torch.from_numpy(u), _torch(weights), sizes, 300.0, stretch=4.0)
    assert relative_error(y, wanted) < EXACT


@pytest.mark.parametrize(
    ("tokens", "base"),
    # head width 8: the exponent is 8/6; 2 * 12/6 - 1 = 3
    [(1, 300.0), (6, 300.0), (12, 300.0 * 3 ** (8 / 6)), (24, 300.0 * 7 ** (8 / 6))],
)
def test_dynamic_scaling_stretches_the_base_only_beyond_the_trained_length(tokens: int, base: float) -> None:
    sizes, weights, geometry = _layer(6, 3)
    u = _input(tokens)
    y, _ = mha(u, weights, geometry, Rope(300.0, "dynamic", 2.0, 6), KVState.empty(1, geometry))
    assert relative_error(y, attention_sdpa(torch.from_numpy(u), _torch(weights), sizes, base)) < EXACT


def test_dynamic_scaling_leaves_keys_that_are_already_stored_as_they_are() -> None:
    _, weights, geometry = _layer(6, 3)
    u, rope = _input(12), Rope(300.0, "dynamic", 2.0, 6)
    _, before = mha(u[:, :6], weights, geometry, rope, KVState.empty(1, geometry))
    _, after = mha(u[:, 6:], weights, geometry, rope, before)
    np.testing.assert_array_equal(after.key[:, :, :6], before.key)
    _, whole = mha(u, weights, geometry, rope, KVState.empty(1, geometry))
    assert relative_error(after.key[:, :, 6:], whole.key[:, :, 6:]) < EXACT


def test_scaling_is_read_only_for_the_teacher_policy() -> None:
    part = {
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    assert Rope.from_config(part, "ignore") == Rope(1e6)
    assert Rope.from_config(part, "teacher") == Rope(1e6, "dynamic", 2.0, 32768)
    assert Rope.from_config({"rope_scaling": None}, "teacher") == Rope(10000.0)
