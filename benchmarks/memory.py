"""Anonymous memory of processes: what they allocated, without the page cache that mapped weights leave behind."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

MIB = 1 << 20


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon of a process in bytes; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def family(pid: int) -> list[int]:
    """List a process and all its descendants."""
    members = [pid]
    for member in members:  # grows while it is walked
        for file in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members.extend(int(child) for child in file.read_text(encoding="ascii").split())
            except OSError:
                continue
    return members


def run_sampled(command: list[str], *, interval_s: float = 0.05) -> tuple[float, int]:
    """Run a command to its end; return its wall time in seconds and the peak anonymous bytes of it and its children.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    begin = time.perf_counter()
    peak = 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, sum(anonymous_bytes(member) for member in family(process.pid)))
            time.sleep(interval_s)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - begin, peak
