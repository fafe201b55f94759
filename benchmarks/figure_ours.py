"""The runtime of this project as a contender of the figure: what `mmm-export bench` times, and several rows at once."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import numpy as np
from figure_part import CHECK_STEPS, Part, Row, Sizes, summary
from numpy.typing import NDArray

from mmm_export.bench.measurement import WARM_UP_STEPS, BenchOptions, measure
from mmm_export.bench.meters import PeakWatch
from mmm_export.bench.roofline import step_bytes
from mmm_export.runtime import BatchSession, Session


def measure_ours(part: Part, sizes: Sizes, bundle: Path, contender: str, *, kernels: str, chunk_tokens: int) -> None:
    """Measure a bundle by what `mmm-export bench` runs."""
    providers = ["cuda"] if part.device == "cuda" else None
    with Session.open(
        bundle, providers=providers, kernels=kernels, chunk_tokens=chunk_tokens, check_content=False
    ) as session:
        vocab = session.manifest.model.vocab_size
        ids = part.prompt(sizes.check_tokens + CHECK_STEPS, vocab)
        logits = [session.prefill(ids[: sizes.check_tokens])]
        logits += [session.step(int(token)) for token in ids[sizes.check_tokens :]]
        part.keep_logits(contender, logits)
        weights = step_bytes(session.manifest, 0) - 2 * session.state_bytes
        part.note(name="linear_bytes", contender=contender, weights=weights, state=session.state_bytes)
        for length in sizes.lengths:
            options = BenchOptions((length,), new_tokens=sizes.new_tokens, repeats=min(3, sizes.calls), budget_s=3.0)
            rows = measure(session, options, memory=part.memory)
            for row in rows:
                part.note(
                    name=row.test,
                    contender=contender,
                    batch=1,
                    tokens=length,
                    ms=row.median_ms,
                    low_ms=row.low_ms,
                    high_ms=row.high_ms,
                    runs=row.runs,
                    device_bytes=row.peak_bytes,
                    chunk_tokens=chunk_tokens,
                )


def measure_rows(part: Part, sizes: Sizes, bundle: Path, contender: str, *, kernels: str, chunk_tokens: int) -> None:
    """Measure decode steps of several rows at once: each step chooses and feeds a token for every row."""
    providers = ["cuda"] if part.device == "cuda" else None
    for rows in sizes.batches:
        if rows == 1:
            continue
        with BatchSession.open(
            bundle, rows=rows, providers=providers, kernels=kernels, chunk_tokens=chunk_tokens, check_content=False
        ) as batch:
            for length in sizes.lengths:
                about = {"name": "decode", "contender": contender, "batch": rows, "tokens": length}
                work = functools.partial(_steps_of_rows, part, batch, length, sizes.new_tokens)
                # A prompt a row, at a hundred thousand tokens a second.
                part.attempt(about, work, rows * length / 1e5)


def _steps_of_rows(part: Part, batch: BatchSession, length: int, steps: int) -> Row:
    ids = part.prompt(length, batch.manifest.model.vocab_size)
    logits = dict(batch.prefill(ids) for _ in range(batch.rows))
    banned = batch.manifest.model.image_token_id
    times = []
    try:
        with PeakWatch(part.memory) as peak:
            for _ in range(steps + WARM_UP_STEPS):
                begin = time.perf_counter()
                logits = batch.advance({row: _choice(scores, banned) for row, scores in logits.items()})
                times.append((time.perf_counter() - begin) * 1e3)
    finally:
        for row in logits:
            batch.free(row)
    return {**summary(times[WARM_UP_STEPS:]), "device_bytes": peak.peak}


def _choice(scores: NDArray[np.float32], banned: int) -> int:
    token = int(np.argmax(scores))
    return token if token != banned else int(np.argsort(scores)[-2])
