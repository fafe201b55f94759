"""Times work on a GPU: one CUDA graph over rotated inputs, replayed; the median replay and its spread.

The inputs are rotated among so many sets that their sum is several times the L2, so that every call reads memory.
Without a CUDA device the same functions take wall time, to check the scripts on any machine; those figures mean nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 160e6  # three times the largest L2 of today's GPUs, and a little
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median over replays, and the 10th to 90th percentile's distance."""

    us: float
    spread_us: float


def rotation(call_bytes: float, *, least: int = 2, most: int = 128) -> int:
    """How many sets of inputs to rotate among, for calls that move so many bytes each."""
    return max(least, min(most if CUDA else 2, math.ceil(FLUSH_BYTES / max(call_bytes, 1))))


def graph_time(
    work: Callable[[int], object], sets: int, *, per_graph: int = 0, replays: int = 30, budget_s: float = 0.6
) -> Timing:
    """Time `work(i)`, i rotating among so many sets.

    Args:
        work: enqueues one call on the current stream.
        sets: how many sets of inputs there are.
        per_graph: least number of calls in the graph; 0: one for each set, and at least 60 microseconds' worth.
        replays: to take the median of.
        budget_s: stop replaying after this long, though never before the fifth.
    """
    if not CUDA:
        return _summary([_wall_us(work, i % sets) for i in range(3)], 1)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(sets, 3)):
            work(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    calls = max(1, math.ceil(per_graph / sets)) * sets
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            work(i % sets)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (len(times) < replays and time.perf_counter() - begin < budget_s):
        times.append(_event_us(graph.replay))
    return _summary(times, calls)


def hot_time(work: Callable[[int], object]) -> Timing:
    """Time `work(0)` alone, again and again: its data stays in the L2."""
    return graph_time(work, 1, per_graph=100)


def eager_time(work: Callable[[int], object], sets: int, *, calls: int = 10, budget_s: float = 1.5) -> Timing:
    """Time `work(i)` without a graph, one pair of events a call; for long calls that allocate much."""
    if not CUDA:
        return graph_time(work, sets)
    for i in range(2):
        work(i % sets)
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (len(times) < calls and time.perf_counter() - begin < budget_s):
        turn = len(times) % sets
        times.append(_event_us(lambda turn=turn: work(turn)))  # type: ignore[misc]
    return _summary(times, 1)


def copy_bytes_per_s() -> float:
    """Bytes read plus bytes written a second by the best of two copies of 1 GiB: the driver's, and a kernel's.

    The driver's copy is timed outside a graph: as a node of one it reached 2.7 TB/s on an H200, whose memory gives over 4.
    """
    source = torch.randn(1 << (28 if CUDA else 18), device=DEVICE)
    target = torch.empty_like(source)
    driver = eager_time(lambda _: target.copy_(source), 1)
    kernel = graph_time(lambda _: torch.mul(source, 2.0, out=target), 1, per_graph=4)
    return 2 * source.numel() * source.element_size() / min(driver.us, kernel.us) * 1e6


def gemm_flop_per_s() -> float:
    """Operations a second of a bf16 matrix product of random 8192 x 8192 matrices."""
    size = 8192 if CUDA else 128
    one, other = (torch.randn(size, size, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    return 2 * size**3 / graph_time(lambda _: one @ other, 1).us * 1e6


def small_kernel_us() -> float:
    """Microseconds of a kernel that does next to nothing and depends on the one before, inside a graph."""
    number = torch.zeros(256, device=DEVICE)
    return graph_time(lambda _: number.add_(1), 1, per_graph=200).us


def _event_us(enqueue: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    enqueue()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def _wall_us(work: Callable[[int], object], turn: int) -> float:
    begin = time.perf_counter()
    work(turn)
    return (time.perf_counter() - begin) * 1e6


def _summary(times: list[float], calls: int) -> Timing:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    spread = ordered[len(ordered) - 1 - tenth] - ordered[tenth]
    return Timing(statistics.median(ordered) / calls, spread / calls)
