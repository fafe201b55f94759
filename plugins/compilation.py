"""Runs cmake and what it drives: everything is logged, progress is told, and a failure shows the lines that matter."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TextIO

from mmm_export.errors import BuildError

_PATIENCE_S = 5.0  # for compilers to remove their temporary files after an interrupt
_SHOWN_LINES = 12
_KEPT_LINES = 20_000
_LINE_CHARACTERS = 300
_STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)|%)\]")  # "[3/12] Compiling" of ninja, "[ 25%] Building" of make
_ERROR = re.compile(r"\berror\b|undefined reference|CMake Error|\bfatal\b|\bKilled\b", re.IGNORECASE)
_FULL = "No space left on device"


def run_logged(
    command: Sequence[str], log: TextIO, *, doing: str, advance: Callable[[float], None], echo: bool = False
) -> None:
    """Run a program and append what it says to `log`.

    Args:
        command: the program and its arguments; all that it starts are ended with it if this call is interrupted.
        log: open text file with a name.
        doing: for the error, such as "compiling the plugins".
        advance: told the share that is done, 0 to 1, whenever the program says it.
        echo: repeat every line on stderr.

    Raises:
        BuildError: the program failed; the log stays.
        OSError: the disk is full.
    """
    log.write(f"$ {' '.join(command)}\n")
    said: deque[str] = deque(maxlen=_KEPT_LINES)
    # A session of its own: Ctrl-C reaches this process alone, which then ends compilers that would not have heard SIGTERM.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C", "NINJA_STATUS": "[%f/%t] "},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.write(line)
            said.append(line)
            if echo:
                sys.stderr.write(line)
            step = _STEP.match(line)
            if step:
                advance(int(step[1]) / max(1, int(step[2] or 100)))
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    finally:
        process.stdout.close()
    log.flush()
    if code != 0:
        text = "".join(said)
        if _FULL in text:
            raise OSError(errno.ENOSPC, _FULL)
        raise BuildError(
            f"{doing} failed with exit code {code}",
            found="\n          ".join(relevant_lines(text)) or "no message",
            hint=f"the full log is {log.name}",
        )


def relevant_lines(text: str) -> list[str]:
    """Choose the lines that tell why a compilation failed: the first errors with a line after each, else the last lines."""
    lines = [line.rstrip()[:_LINE_CHARACTERS] for line in text.splitlines() if line.strip()]
    chosen: list[str] = []
    for number, line in enumerate(lines):
        if _ERROR.search(line) and not line.startswith(("FAILED:", "ninja:", "make")):
            chosen.extend(part for part in lines[number : number + 2] if part not in chosen)
    return chosen[:_SHOWN_LINES] if chosen else lines[-_SHOWN_LINES:]


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
            return
