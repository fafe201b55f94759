"""KV caches can be made smaller than the bundle's: what fits into them is computed as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from oracle import relative_error

from mmm_export import names
from mmm_export.errors import EngineError
from mmm_export.exporter.trt.lowering import lower_graph
from mmm_export.exporter.trt.operators import NATIVE, PLAIN, Operators
from mmm_export.manifest import read_manifest
from trt import lowered

CAPACITY = 12
FP32 = 1e-5  # as in test_lowering.py


@pytest.mark.parametrize("operators", [PLAIN, NATIVE], ids=["plain", "native"])
def test_smaller_caches_compute_the_same(
    tiny_bundle: Callable[..., Path], tmp_path: Path, operators: Operators
) -> None:
    folder = tiny_bundle("hybrid", "fp32")
    (tmp_path / "small").mkdir()
    made = lower_graph(folder, names.DECODER_FILE, tmp_path / "small", operators, lowered.MUCH, CAPACITY)
    shapes = {t.name: t.shape for t in (*made.inputs, *made.outputs)}
    assert shapes["past.0.key"] == shapes["present.0.value"] == ("batch", 2, CAPACITY, 16)
    hidden = read_manifest(folder).model.hidden_size
    rng = np.random.default_rng(1)
    sessions = (lowered.session(made.path), lowered.plain_session(folder))
    states = [lowered.empty_states(path, 1) for path in (made.path, folder / names.DECODER_FILE)]
    past = 0
    for tokens in (7, 4, 1):  # fills the cache to its end
        feeds = {
            "inputs_embeds": rng.standard_normal((1, tokens, hidden)).astype(np.float32),
            "lengths": np.array([tokens], np.int32),
            "past_lengths": np.array([past], np.int32),
        }
        past += tokens
        found, wanted = (lowered.run(s, {**feeds, **state}) for s, state in zip(sessions, states, strict=True))
        assert relative_error(found["logits"], wanted["logits"]) < FP32
        for part in ("key", "value"):
            cache = wanted[f"present.0.{part}"][:, :, :past]
            assert relative_error(found[f"present.0.{part}"][:, :, :past], cache) < FP32
        states = [lowered.next_states(outputs) for outputs in (found, wanted)]
    assert past == CAPACITY


def test_larger_caches_are_refused(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be lowered") as caught:
        lower_graph(tiny_bundle("hybrid"), names.DECODER_FILE, tmp_path, PLAIN, lowered.MUCH, 5000)
    assert "cannot hold 5000" in str(caught.value.found)


def test_a_linear_model_is_left_as_it_is(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    graphs = []
    for name, capacity in (("with", 12), ("without", None)):
        (tmp_path / name).mkdir()
        made = lower_graph(tiny_bundle(), names.DECODER_FILE, tmp_path / name, PLAIN, lowered.MUCH, capacity)
        graphs.append(onnx.load(made.path, load_external_data=False))
    assert graphs[0] == graphs[1]
