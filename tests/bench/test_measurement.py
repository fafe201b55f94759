"""What is timed is what is said to be timed, and figures follow from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_batch, toy_session

from mmm_export.bench.measurement import BenchOptions, batches_from_text, lengths_from_text, measure
from mmm_export.bench.roofline import step_bytes
from mmm_export.errors import MmmError, OptionError
from mmm_export.manifest import FileInfo


class Clock:
    """Time that passes only while the model works: a millisecond a token."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Memory:
    metric = "bytes of a test"

    def __init__(self) -> None:
        self.readings = 0

    def read(self) -> int:
        self.readings += 1
        return 1000 + self.readings


class Energy:
    metric = "joules of a test"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def read(self) -> float:
        return 5 * self.clock.now  # 5 W


def timed(kinds: Any = "linear", **session: Any) -> tuple[Any, Any, Clock]:
    made, backend = toy_session(kinds, chunk_tokens=16, **session)
    clock = Clock()

    def pass_time(call: int) -> None:
        clock.now += backend.calls[call] / 1000

    backend.after_call = pass_time
    return made, backend, clock


def test_rates_are_tokens_over_the_time_that_the_model_took() -> None:
    session, _, clock = timed()
    rows = measure(
        session,
        BenchOptions(lengths=(40, 8), new_tokens=5, repeats=2),
        memory=Memory(),
        energy=Energy(clock),
        clock=clock,
    )
    assert [(row.test, row.tokens, row.runs) for row in rows] == [
        ("prefill", 40, 2),
        ("decode", 40, 5),
        ("prefill", 8, 2),
        ("decode", 8, 5),
    ]
    for row in rows:
        assert row.tokens_per_s == pytest.approx(1000)
        assert row.median_ms == pytest.approx(row.tokens if row.test == "prefill" else 1)
        assert row.joules_per_token == pytest.approx(0.005)
        assert row.peak_bytes > 1000
        assert row.roofline is None  # nothing told the bandwidth
    assert session.tokens == 0


def test_every_run_reads_the_whole_prompt_from_an_empty_context() -> None:
    session, backend, clock = timed()
    measure(session, BenchOptions(lengths=(40,), new_tokens=3, repeats=2), memory=Memory(), clock=clock)
    assert backend.calls == [16, 1, 1, 1, *(16, 16, 8) * 2, 1, 1, 1]


def test_a_batch_reads_prompts_one_by_one_and_decodes_all_rows_in_one_step() -> None:
    session, backend = toy_batch(rows=3, chunk_tokens=16)
    clock = Clock()

    def pass_time(seconds: float) -> None:
        clock.now += seconds

    for toy in backend.toys:
        toy.after_call = lambda call, toy=toy: pass_time(toy.calls[call] / 1000)
    # A step of all rows takes as long as one of a row.
    backend.after_step = lambda logits: pass_time(0.001 - 0.001 * len(logits))
    rows = measure(
        session,
        BenchOptions(lengths=(40,), new_tokens=5, repeats=2),
        memory=Memory(),
        energy=Energy(clock),
        bandwidth=1e9,
        clock=clock,
    )
    prefill, decode = rows
    assert (prefill.batch, prefill.runs, decode.batch, decode.runs) == (3, 3, 3, 5)
    assert prefill.median_ms == pytest.approx(40)
    assert prefill.tokens_per_s == prefill.tokens_per_s_each == pytest.approx(1000)
    assert decode.median_ms == pytest.approx(1)
    assert (decode.tokens_per_s, decode.tokens_per_s_each) == (pytest.approx(3000), pytest.approx(1000))
    assert decode.joules_per_token == pytest.approx(0.005 / 3)
    one, three = (step_bytes(session.manifest, 40, batch) for batch in (1, 3))
    assert three == 3 * one  # a toy has no weights
    assert decode.roofline == pytest.approx(three / 1e9 / 1e-3)
    assert [toy.calls for toy in backend.toys] == [[16, 1, 1, 1, 16, 16, 8, 1, 1, 1, 1, 1]] * 3
    assert session.free_rows == 3


def test_long_prompts_run_once_when_the_budget_is_spent() -> None:
    session, _, clock = timed()
    options = BenchOptions(lengths=(40, 8), new_tokens=1, repeats=9, budget_s=0.05)
    rows = measure(session, options, memory=Memory(), clock=clock)
    assert [row.runs for row in rows if row.test == "prefill"] == [1, 6]


def test_the_roofline_counts_weights_once_and_states_twice() -> None:
    session, _, clock = timed("hybrid", max_tokens=64)
    manifest = session.manifest
    manifest.files["decoder.onnx.data"] = FileInfo(1_000_000, "c" * 64)
    manifest.files["embedding.onnx.data"] = FileInfo(9_000_000, "d" * 64)
    spec = manifest.model
    recurrent, attention = len(spec.mamba_layers), len(spec.attention_layers)
    state = recurrent * 4 * (spec.heads * spec.head_dim * spec.state_dim + spec.conv_channels * (spec.conv_width - 1))
    row_bytes = attention * 2 * spec.kv_heads * spec.head_dim * 4
    assert attention
    assert step_bytes(manifest, 10) == 1_000_000 + 2 * state + 10 * row_bytes
    rows = measure(session, BenchOptions(lengths=(10,), new_tokens=2), memory=Memory(), bandwidth=1e9, clock=clock)
    assert rows[1].roofline == pytest.approx(step_bytes(manifest, 10) / 1e9 / 1e-3)


def test_lengths_that_the_kv_cache_cannot_hold_are_refused_before_any_work() -> None:
    session, backend, clock = timed("hybrid", max_tokens=32)
    with pytest.raises(OptionError, match="does not fit into the KV cache"):
        measure(session, BenchOptions(lengths=(8, 30), new_tokens=4), memory=Memory(), clock=clock)
    assert backend.calls == []


def test_no_image_token_is_ever_fed() -> None:
    session, backend, clock = timed()
    image = session.manifest.model.image_token_id
    seen: list[int] = []
    advance = backend.advance

    def watch(ids: Any, features: Any) -> Any:
        seen.extend(ids.tolist())
        logits = advance(ids, features)
        logits[image] = np.inf  # the model would love to say it
        return logits

    backend.advance = watch
    measure(session, BenchOptions(lengths=(3000,), new_tokens=20, repeats=1), memory=Memory(), clock=clock)
    assert len(seen) > 3000
    assert image not in seen


@pytest.mark.parametrize(
    ("text", "lengths"), [("512", (512,)), ("1K,8k", (1000, 8000)), (" 2 , 1M", (2, 1_000_000)), ("103K", (103_000,))]
)
def test_lengths_are_read_in_thousands_and_millions(text: str, lengths: tuple[int, ...]) -> None:
    assert lengths_from_text(text) == lengths


@given(st.text(max_size=12))
def test_any_text_gives_positive_lengths_or_an_option_error(text: str) -> None:
    try:
        lengths = lengths_from_text(text)
    except MmmError:
        return
    assert lengths
    assert all(0 < length <= 1_000_000_000 for length in lengths)


@given(st.text("0123456789, -x٣", max_size=12))
def test_any_text_gives_positive_batch_sizes_or_an_option_error(text: str) -> None:
    try:
        batches = batches_from_text(text)
    except MmmError:
        return
    assert batches
    assert all(1 <= batch <= 1024 for batch in batches)


def test_batch_sizes_are_read_in_their_order() -> None:
    assert batches_from_text("8, 1") == (8, 1)
    for text in ("", "0", "1,,2", "2000"):
        with pytest.raises(OptionError, match="batch size"):
            batches_from_text(text)


@pytest.mark.parametrize("values", [{"lengths": ()}, {"lengths": (0,)}, {"new_tokens": 0}, {"repeats": 0}])
def test_options_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="out of range"):
        BenchOptions(**values)
