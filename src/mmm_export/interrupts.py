"""Holding Ctrl-C back over a few steps that must not be split."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block ends, then deliver the last one. Other threads get no signals anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    kept: dict[signal.Signals, Callable[[int, FrameType | None], object] | int] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is None:
                continue  # installed from C: Python could not put it back
            kept[number] = handler  # before the change: a signal that raises here must find it
            signal.signal(number, lambda number, frame: arrived.append(number))
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[-1])
