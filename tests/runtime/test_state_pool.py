"""The two slots of state buffers."""

from __future__ import annotations

import numpy as np
import pytest

from mmm_export.runtime.state_layout import StateTensor
from mmm_export.runtime.state_pool import StatePool

LAYOUT = (StateTensor("ssm", (1, 2, 3), "float32"), StateTensor("key", (1, 2, 8, 3), "float16", per_token=True))


def filled(tokens: int) -> StatePool:
    """A pool of `tokens` tokens whose other slot holds rubbish."""
    pool = StatePool(LAYOUT)
    random = np.random.default_rng(0)
    for slot in pool.slots:
        for array in slot.values():
            array[...] = random.standard_normal(array.shape)
    for array in pool.slots[1].values():
        array[...] = np.nan
    pool.positions.commit(0, tokens)
    return pool


def test_write_keeps_the_rows_it_is_not_given_and_clears_the_unused_ones() -> None:
    pool = filled(6)
    before = pool.read(6)
    pool.write({"ssm": np.ones((1, 2, 3)), "key": np.full((1, 2, 2, 3), 7)}, 5)
    after = pool.read(8)
    assert pool.positions[0].tokens == 5
    assert (after["ssm"] == 1).all()
    assert (after["key"][:, :, :2] == 7).all()
    assert np.array_equal(after["key"][:, :, 2:5], before["key"][:, :, 2:5])
    assert (after["key"][:, :, 5:] == 0).all()


def test_read_gives_copies_of_the_used_rows() -> None:
    pool = filled(6)
    copy = pool.read(4)
    assert copy["key"].shape == (1, 2, 4, 3)
    copy["ssm"][...] = 9
    assert not (pool.read(0)["ssm"] == 9).any()


def test_clear_leaves_nothing_not_even_nan() -> None:
    pool = filled(6)
    pool.clear()
    assert pool.positions[0].tokens == 0
    assert all((array == 0).all() for array in pool.read(8).values())


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_buffers_have_the_size_of_the_layout(dtype: str, bytes_each: int) -> None:
    tensor = StateTensor("x", (1, 2, 8, 3), dtype, per_token=True)
    assert tensor.bytes == StatePool((tensor,)).slots[0]["x"].nbytes == 48 * bytes_each
    assert tensor.used_shape(5) == (1, 2, 5, 3)
