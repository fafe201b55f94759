"""How long work tells what it is doing: a bar on a terminal, plain lines in a log, nothing in a library."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Advance = Callable[[int], None]  # told the bytes done since the last call

LOG_STEP = 0.25  # a log gets a percentage at every quarter: enough to see life, few enough to read


class Progress(Protocol):
    """What every stage takes. Stages may nest; `advance` may be called from another thread than the stage's."""

    def stage(self, title: str, total_bytes: int | None = None) -> AbstractContextManager[Advance]:
        """Announce a piece of work and yield the function that is told the bytes done since the last call."""
        ...


class SilentProgress:
    """Says nothing: the default of the Python API."""

    @contextmanager
    def stage(self, title: str, total_bytes: int | None = None) -> Iterator[Advance]:
        yield lambda done: None


class LogProgress:
    """One line a stage, `title ... 25 % 50 % 75 % 12.3 s`, for pipes, files and terminals that cannot redraw."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line_is_open = False

    @contextmanager
    def stage(self, title: str, total_bytes: int | None = None) -> Iterator[Advance]:
        size = "" if total_bytes is None else f" ({total_bytes / 2**20:.1f} MiB)"
        self._write(f"{title}{size} ...", opens=True)
        begin = time.perf_counter()
        done = 0
        shown = LOG_STEP

        def advance(step: int) -> None:
            nonlocal done, shown
            done += step
            while total_bytes and shown < 1 and done >= shown * total_bytes:
                self._write(f" {shown:.0%}".replace("%", " %"))
                shown += LOG_STEP

        try:
            yield advance
        except BaseException:
            self._close(title, "stopped")
            raise
        self._close(title, f"{time.perf_counter() - begin:.1f} s")

    def _write(self, text: str, *, opens: bool = False) -> None:
        if opens and self._line_is_open:  # a stage inside a stage: the outer one repeats its title when it ends
            text = "\n" + text
        self._stream.write(text)
        self._stream.flush()
        self._line_is_open = True

    def _close(self, title: str, end: str) -> None:
        self._stream.write(f" {end}\n" if self._line_is_open else f"{title}: {end}\n")
        self._stream.flush()
        self._line_is_open = False


class BarProgress:
    """A rich bar on stderr with bytes and elapsed time; a spinner where the size is not known."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._depth = 0

    @contextmanager
    def stage(self, title: str, total_bytes: int | None = None) -> Iterator[Advance]:
        bar = self._bar
        if bar is None:
            bar = self._bar = _new_bar()
            bar.start()
        self._depth += 1
        task = bar.add_task(title, total=total_bytes)
        try:
            yield lambda done: bar.update(task, advance=done)
            total = total_bytes or 1
            bar.update(task, total=total, completed=total)
        finally:
            self._depth -= 1
            if self._depth == 0:  # rich draws one live display at a time, so nested stages share it
                bar.stop()
                self._bar = None


def _new_bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def console_progress() -> Progress:
    """Return a bar when stderr is a terminal that can redraw, else plain lines on stderr."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return BarProgress()
    return LogProgress(sys.stderr)
