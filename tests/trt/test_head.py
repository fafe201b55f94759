"""The LM head is cut into the fewest parts that fit, and what is padded never shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmm_export.exporter.trt.head import VOCABULARY_MULTIPLE, HeadPart, head_parts
from mmm_export.exporter.trt.operators import PLAIN
from mmm_export.model.testing import tiny_spec
from trt import lowered


def test_the_released_head_fits_512_mib_whole_and_128_mib_in_three() -> None:
    assert head_parts(2048, 92553, 2, 512 << 20) == (HeadPart(0, 92608),)  # 361.8 MiB
    thirds = head_parts(2048, 92553, 2, 128 << 20)
    assert [part.end - part.begin for part in thirds] == [30912, 30912, 30784]


@given(
    hidden=st.integers(1, 4096),
    vocabulary=st.integers(1, 200_000),
    item_bytes=st.sampled_from([2, 4]),
    most=st.integers(1, 1 << 30),
)
def test_parts_join_and_fit(hidden: int, vocabulary: int, item_bytes: int, most: int) -> None:
    parts = head_parts(hidden, vocabulary, item_bytes, most)
    assert parts[0].begin == 0
    assert [part.end for part in parts[:-1]] == [part.begin for part in parts[1:]]
    assert vocabulary <= parts[-1].end < vocabulary + VOCABULARY_MULTIPLE
    assert parts[-1].end % 8 == 0
    least = hidden * item_bytes * VOCABULARY_MULTIPLE
    for part in parts:
        assert part.end > part.begin
        assert (part.end - part.begin) * hidden * item_bytes <= max(most, least)
    if len(parts) > 1:
        joined = parts[-1].end * hidden * item_bytes
        assert joined > most  # one part would not have fitted


@pytest.mark.parametrize("max_alloc", [1 << 30, 1 << 14])
def test_logits_of_an_odd_vocabulary_have_no_padding(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path: Path, max_alloc: int
) -> None:
    spec = tiny_spec(llm_layers=1, vocab_size=509)
    folder = make_bundle(make_checkpoint(spec))
    made = lowered.lower(folder, tmp_path / "lowered", PLAIN, max_alloc=max_alloc)
    shapes = {i.name: list(i.dims) for i in onnx.load(made.path, load_external_data=False).graph.initializer}
    widths = [shape[1] for name, shape in shapes.items() if "output.weight" in name]
    assert sum(widths) == 512
    assert len(widths) == made.head_parts
    feeds = {
        "inputs_embeds": np.ones((1, 3, spec.hidden_size), np.float32),
        "lengths": np.array([3], np.int32),
        **lowered.empty_states(made.path, 1),
    }
    found, wanted = (lowered.run(s, feeds) for s in (lowered.session(made.path), lowered.plain_session(folder)))
    assert found["logits"].shape == (1, 1, 509)
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=1e-5, atol=1e-6)  # one product, other blocks
