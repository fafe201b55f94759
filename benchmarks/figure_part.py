"""What the parts of the figure share: rows as they come, a deadline, times and memory, on a GPU or, to try the scripts, on a CPU."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_timing
import numpy as np
import torch
from device_memory import DeviceMemory
from numpy.typing import NDArray

from mmm_export.bench.meters import AnonymousMemory

Row = dict[str, Any]
CHECK_TOKENS, CHECK_STEPS = 1024, 8


@dataclass(frozen=True)
class Sizes:
    """What is measured: prompts of `lengths` tokens, decode steps after them for `batches` rows; `calls` bounds repetitions."""

    lengths: tuple[int, ...] = (1024, 8192, 32_768, 103_000)
    batches: tuple[int, ...] = (1, 8)
    new_tokens: int = 128
    calls: int = 8

    @property
    def check_tokens(self) -> int:
        return min(CHECK_TOKENS, self.lengths[0])


@dataclass
class Part:
    """One part of a figure, in a process of its own.

    Attributes:
        folder: takes `rows.jsonl`, and the logits that contenders are compared by.
        deadline: of time.time(); items that would not end before it are left out, with a row that says so.
        device: "cuda" or "cpu".
    """

    folder: Path
    deadline: float
    device: str

    def __post_init__(self) -> None:
        self.memory = DeviceMemory() if self.device == "cuda" else AnonymousMemory()

    def note(self, **row: Any) -> None:
        """Add a row to the file, so that it outlives what fails later."""
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.tell(str(row))

    @staticmethod
    def tell(text: str) -> None:
        """Tell what happens, with the time."""
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def attempt(self, about: Row, work: Callable[[], Row], seconds: float = 0.0) -> bool:
        """Note `about` with what the work found, or why it found nothing; the others shall go on.

        Args:
            about: name, contender, batch and tokens of the row.
            work: gives the rest.
            seconds: that it takes, roughly.
        """
        if time.time() + seconds > self.deadline:
            self.note(**about, missing="no time was left")
            return False
        try:
            found = work()
        except Exception as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            reason = "out of memory" if out_of_memory else f"{type(error).__name__}: {str(error)[:200]}"
            self.note(**about, missing=reason)
            return False
        finally:
            free_memory()
        self.note(**about, **found)
        return True

    def prompt(self, tokens: int, vocab_size: int) -> NDArray[np.int64]:
        """Draw the same ids in every part; none of the last, which are special tokens."""
        return np.random.default_rng(tokens).integers(3, vocab_size - 20, tokens)

    def tensor(self, ids: NDArray[np.int64] | Sequence[int]) -> torch.Tensor:
        return torch.as_tensor(np.asarray(ids), device=self.device)

    def keep_logits(self, contender: str, logits: Sequence[Any]) -> None:
        """Keep logits (steps, vocab) for the comparison of contenders."""
        arrays = [row.float().cpu().numpy() if isinstance(row, torch.Tensor) else row for row in logits]
        partial = self.folder / f"{contender}.partial"
        with partial.open("wb") as file:  # a part may be stopped at any time
            np.save(file, np.stack(arrays))
        partial.rename(partial.with_suffix(".npy"))


def eager_ms(work: Callable[[int], object], *, calls: int, warm: int = 1) -> Row:
    """Time calls one by one, from an idle device to an idle device."""
    for i in range(warm):
        work(i)
    times = []
    for i in range(calls):
        _wait()
        begin = time.perf_counter()
        work(warm + i)
        _wait()
        times.append((time.perf_counter() - begin) * 1e3)
    return summary(times)


def graph_ms(work: Callable[[int], object], *, replays: int = 30) -> Row:
    """Time replays of a CUDA graph that holds one call; on a CPU two plain calls."""
    if not gpu_timing.CUDA:
        return {**eager_ms(work, calls=2), "in_graph": False}
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(0)
        work(1)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work(2)
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return {**summary(times[3:]), "in_graph": True}


def summary(times: Sequence[float]) -> Row:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return {
        "ms": statistics.median(ordered),
        "low_ms": ordered[tenth],
        "high_ms": ordered[len(ordered) - 1 - tenth],
        "runs": len(ordered),
    }


def free_memory() -> None:
    gc.collect()
    if gpu_timing.CUDA:
        torch.cuda.empty_cache()


class PeakAllocated:
    """Resets PyTorch's peak, and tells it and the device's memory afterwards; PyTorch gives nothing back in between."""

    def __init__(self, part: Part) -> None:
        self._part = part
        free_memory()
        if gpu_timing.CUDA:
            torch.cuda.reset_peak_memory_stats()

    def row(self) -> Row:
        allocated = torch.cuda.max_memory_allocated() if gpu_timing.CUDA else 0
        return {"device_bytes": self._part.memory.read(), "allocated_bytes": allocated}


def _wait() -> None:
    if gpu_timing.CUDA:
        torch.cuda.synchronize()
