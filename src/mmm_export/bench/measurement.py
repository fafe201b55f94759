"""Times a session or a batch: the prefill of a prompt of random tokens, then decode steps after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmm_export.bench.meters import EnergyMeter, MemoryMeter, PeakWatch
from mmm_export.bench.roofline import step_bytes
from mmm_export.bench.sequences import Logits, Sequences, sequences_of
from mmm_export.errors import OptionError
from mmm_export.progress import Progress, SilentProgress
from mmm_export.runtime import BatchSession, Session
from mmm_export.runtime.opening import MOST_ROWS
from mmm_export.spec import ModelSpec

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        lengths: prompt lengths, in tokens.
        new_tokens: decode steps after each prompt.
        repeats: prefills of each length, as long as they fit into `budget_s`; one at least, and one for each row of a batch.
        budget_s: seconds that the prefills of one length may take together.
        seed: of the random tokens.
    """

    lengths: tuple[int, ...] = (512, 1000, 8000)
    new_tokens: int = 64
    repeats: int = 3
    budget_s: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("new_tokens", self.new_tokens), ("repeats", self.repeats)):
            if value < 1:
                raise OptionError(f"{name} is out of range", found=str(value), wanted="at least 1")
        if not self.lengths or min(self.lengths) < 1:
            raise OptionError(
                "a prompt length is out of range", found=str(self.lengths), wanted="at least 1 token each"
            )


@dataclass(frozen=True)
class Measurement:
    """One row: times in ms over `runs` prefills or decode steps; what no meter tells is None.

    A prefill ends when its first token is chosen: its time is the time to the first token.

    Of a batch, a decode step is one run of all rows, and `tokens_per_s` counts them all; prompts are read one by one, and a prefill
    is that of one row. `roofline` is the least time that the memory allows over the median, in (0, 1] on an exact bandwidth.
    """

    test: Literal["prefill", "decode"]
    tokens: int
    runs: int
    median_ms: float
    low_ms: float
    high_ms: float
    tokens_per_s: float
    peak_bytes: int
    joules_per_token: float | None
    roofline: float | None
    batch: int = 1

    @property
    def tokens_per_s_each(self) -> float:
        """Of one sequence, while all are decoded."""
        return self.tokens_per_s / self.batch if self.test == "decode" else self.tokens_per_s


def batches_from_text(text: str) -> tuple[int, ...]:
    """Read "1,8" as numbers of rows.

    Raises:
        OptionError: a part is no such number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= MOST_ROWS for part in parts):
        raise OptionError("a batch size cannot be read", found=repr(text), wanted=f"numbers of 1 to {MOST_ROWS}")
    return tuple(int(part) for part in parts)


def lengths_from_text(text: str) -> tuple[int, ...]:
    """Read "1K,8K,1M" as numbers of tokens; K is 1,000 and M 1,000,000.

    Raises:
        OptionError: a part is no such number.
    """
    units = {"K": 1_000, "M": 1_000_000}
    lengths = []
    for part in text.split(","):
        digits, factor = part.strip().upper(), 1
        if digits[-1:] in units:
            digits, factor = digits[:-1], units[digits[-1]]
        if not digits.isascii() or not digits.isdigit() or not 1 <= int(digits) * factor <= 1_000_000_000:
            raise OptionError(
                "a prompt length cannot be read", found=repr(part), wanted="numbers such as 512, 8K or 1M"
            )
        lengths.append(int(digits) * factor)
    return tuple(lengths)


def check_lengths(session: Session | BatchSession, options: BenchOptions) -> None:
    """Refuse lengths that the KV cache cannot hold, before any work. Raises OptionError."""
    longest = max(options.lengths) + options.new_tokens
    if session.capacity is not None and longest > session.capacity:
        raise OptionError(
            "the prompt does not fit into the KV cache",
            found=f"{max(options.lengths)} tokens and {options.new_tokens} new ones",
            wanted=f"at most {session.capacity} in all",
            hint=f"shorter --lengths, or export with --max-tokens {longest} or more",
        )


def measure(
    session: Session | BatchSession,
    options: BenchOptions,
    *,
    memory: MemoryMeter,
    energy: EnergyMeter | None = None,
    bandwidth: float | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Measure every length; the session's context, or every row, is empty afterwards.

    Args:
        session: an open one; its chunks bound the memory of a prefill. Of a batch all rows hold the same prompt.
        options: what to measure.
        memory: read while it runs, for the peak.
        energy: read around it.
        bandwidth: bytes a second of the memory that holds the weights, for the roofline.
        progress: told of each length.
        clock: seconds.

    Raises:
        OptionError: a length does not fit into the KV cache.
    """
    check_lengths(session, options)
    progress = progress or SilentProgress()
    sequences = sequences_of(session)
    with progress.stage("warming up"):
        sequences.clear()
        ids = _tokens(session.manifest.model, 16, options.seed)
        _decode(sequences, [sequences.prefill(ids) for _ in range(sequences.batch)], WARM_UP_STEPS, clock)
    rows = []
    for length in options.lengths:
        with progress.stage(f"{length:,} tokens" if sequences.batch == 1 else f"{sequences.batch} x {length:,} tokens"):
            rows += _measure_length(sequences, length, options, memory, energy, bandwidth, clock)
    sequences.clear()
    return rows


def _measure_length(
    sequences: Sequences,
    length: int,
    options: BenchOptions,
    memory: MemoryMeter,
    energy: EnergyMeter | None,
    bandwidth: float | None,
    clock: Callable[[], float],
) -> list[Measurement]:
    batch = sequences.batch
    ids = _tokens(sequences.manifest.model, length, options.seed)
    times: list[float] = []
    logits: list[Logits] = []
    joules = energy.read() if energy else 0.0
    with PeakWatch(memory) as prefill_memory:
        # Whole rounds of all rows, so that each holds the prompt in the end.
        while len(times) < options.repeats and (not times or sum(times) + batch * times[-1] <= options.budget_s):
            sequences.clear()
            logits = []
            for _ in range(batch):
                begin = clock()
                logits.append(sequences.prefill(ids))
                _likeliest(logits[-1], sequences.manifest.model.image_token_id)
                times.append(clock() - begin)
    used = _joules(energy, joules, length * len(times))
    prefill = _row("prefill", length, times, length, prefill_memory.peak, used, None, batch)
    joules = energy.read() if energy else 0.0
    with PeakWatch(memory) as decode_memory:
        steps = _decode(sequences, logits, options.new_tokens, clock)
    floor = step_bytes(sequences.manifest, length, batch) / bandwidth if bandwidth else None
    used = _joules(energy, joules, batch * len(steps))
    decode = _row("decode", length, steps, batch, decode_memory.peak, used, floor, batch)
    return [prefill, decode]


def _decode(sequences: Sequences, logits: Sequence[Logits], steps: int, clock: Callable[[], float]) -> list[float]:
    """Take each row's likeliest token and feed all, so many times; return the seconds of each. Choosing is part of a step."""
    times = []
    banned = sequences.manifest.model.image_token_id
    for _ in range(steps):
        begin = clock()
        logits = sequences.step([_likeliest(row, banned) for row in logits])
        times.append(clock() - begin)
    return times


def _likeliest(logits: Logits, banned: int) -> int:
    token = int(np.argmax(logits))
    return int(np.argsort(logits)[-2]) if token == banned else token


def _row(
    test: Literal["prefill", "decode"],
    tokens: int,
    seconds: Sequence[float],
    tokens_per_run: int,
    peak: int,
    joules: float | None,
    floor_s: float | None,
    batch: int,
) -> Measurement:
    low, median, high = np.percentile(seconds, (10, 50, 90))
    return Measurement(
        test=test,
        tokens=tokens,
        runs=len(seconds),
        median_ms=float(median) * 1e3,
        low_ms=float(low) * 1e3,
        high_ms=float(high) * 1e3,
        tokens_per_s=tokens_per_run / float(median) if median else 0.0,
        peak_bytes=peak,
        joules_per_token=joules,
        roofline=floor_s / float(median) if floor_s and median else None,
        batch=batch,
    )


def _joules(meter: EnergyMeter | None, before: float, tokens: int) -> float | None:
    return None if meter is None else (meter.read() - before) / tokens


def _tokens(spec: ModelSpec, count: int, seed: int) -> NDArray[Any]:
    """Draw token ids that stand for no image."""
    ids = np.random.default_rng(seed).integers(0, spec.vocab_size - 1, count)
    return ids + (ids >= spec.image_token_id)
