"""The runtime of this project as a contender of the figure: what `mmm-export bench` times, one sequence and several rows at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from figure_part import CHECK_STEPS, Part, Row, Sizes
from figure_summary import OURS

from mmm_export.bench.measurement import BenchOptions, Measurement, measure
from mmm_export.bench.roofline import step_bytes
from mmm_export.runtime import BatchSession, Session

TOKENS_PER_S = 1e5  # of a prompt, roughly: tells what a deadline leaves time for


def measure_bundles(part: Part, sizes: Sizes, bundles: dict[str, Path], *, kernels: str, chunk_tokens: int) -> None:
    """Measure every bundle; the rows of the first, `OURS`, at the longest prompt come last, since they take longest."""
    ways: dict[str, Any] = {"kernels": kernels, "chunk_tokens": chunk_tokens}
    ends = dataclasses.replace(sizes, lengths=tuple(dict.fromkeys((sizes.lengths[0], sizes.lengths[-1]))))

    def attempt(contender: str, work: Callable[..., None], *given: Any, **options: Any) -> None:
        def row() -> Row:
            work(part, *given, contender, **options, **ways)
            return {}

        part.attempt({"name": "session", "contender": contender}, row)

    for contender, bundle in bundles.items():
        # Other weights of the same model say what is new at both ends.
        attempt(contender, measure_ours, sizes if contender == OURS else ends, bundle)
        if contender == OURS:
            attempt(contender, measure_rows, sizes, bundle, lengths=sizes.lengths[:-1])
    if OURS in bundles and len(sizes.lengths) > 1:
        attempt(OURS, measure_rows, sizes, bundles[OURS], lengths=sizes.lengths[-1:])


def measure_ours(part: Part, sizes: Sizes, bundle: Path, contender: str, *, kernels: str, chunk_tokens: int) -> None:
    """Measure prefill and decode of one sequence, and keep logits for the comparison."""
    providers = ["cuda"] if part.device == "cuda" else None
    with Session.open(
        bundle, providers=providers, kernels=kernels, chunk_tokens=chunk_tokens, check_content=False
    ) as session:
        manifest = session.manifest
        ids = part.prompt(sizes.check_tokens + CHECK_STEPS, manifest.model.vocab_size)
        logits = [session.prefill(ids[: sizes.check_tokens])]
        logits += [session.step(int(token)) for token in ids[sizes.check_tokens :]]
        if contender == OURS:
            part.keep_logits(contender, logits)
        else:  # other weights, of which PyTorch's contenders have no copy
            part.note(name="check", contender=contender, is_finite=all(bool(np.isfinite(row).all()) for row in logits))
        weights = step_bytes(manifest, 0) - 2 * session.state_bytes
        part.note(name="linear_bytes", contender=contender, weights=weights, state=session.state_bytes)
        part.note(name="runtime", contender=contender, onnxruntime=onnxruntime.__version__, chunk_tokens=chunk_tokens)
        for length in sizes.lengths:
            work = _measurement(session, length, sizes, part)
            _note(part, contender, work, length)


def measure_rows(
    part: Part, sizes: Sizes, bundle: Path, contender: str, *, lengths: tuple[int, ...], kernels: str, chunk_tokens: int
) -> None:
    """Measure decode steps of several rows at once."""
    providers = ["cuda"] if part.device == "cuda" else None
    for rows in sizes.batches:
        if rows == 1:
            continue
        with BatchSession.open(
            bundle, rows=rows, providers=providers, kernels=kernels, chunk_tokens=chunk_tokens, check_content=False
        ) as batch:
            for length in lengths:
                work = _measurement(batch, length, sizes, part)
                _note(part, contender, work, length, rows)


def _measurement(
    session: Session | BatchSession, length: int, sizes: Sizes, part: Part
) -> Callable[[], list[Measurement]]:
    options = BenchOptions((length,), new_tokens=sizes.new_tokens, repeats=min(3, sizes.calls), budget_s=3.0)
    return lambda: measure(session, options, memory=part.memory)


def _note(part: Part, contender: str, work: Callable[[], list[Measurement]], length: int, rows: int = 1) -> None:
    """Note what was measured; of several rows the decode step alone, since prompts are read one by one."""
    measured: list[Measurement] = []

    def prefill() -> Row:
        measured.extend(work())
        return _figures(measured[0])

    about = {"contender": contender, "batch": rows, "tokens": length}
    seconds = rows * length / TOKENS_PER_S
    if rows == 1:
        if part.attempt({"name": "prefill", **about}, prefill, seconds):
            part.note(name="decode", **about, **_figures(measured[1]))
    else:
        part.attempt({"name": "decode", **about}, lambda: _figures(work()[1]), seconds)


def _figures(row: Measurement) -> Row:
    figures = {"ms": row.median_ms, "low_ms": row.low_ms, "high_ms": row.high_ms, "runs": row.runs}
    return {**figures, "device_bytes": row.peak_bytes}
