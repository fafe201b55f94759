"""Figures of result files in docs/: NAME.svg of results/NAME.json, drawn anew when the results are others.

A figure carries the hash of its results, since drawings differ between versions of matplotlib.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs"


def digest(results: Path) -> str:
    return hashlib.sha256(results.read_bytes()).hexdigest()


def figure_of(results: Path) -> Path:
    return FIGURES / f"{results.stem}.svg"


def is_current(results: Path) -> bool:
    """Whether the figure was drawn from these results."""
    figure = figure_of(results)
    return figure.is_file() and digest(results) in figure.read_text(encoding="utf-8")


def stale(results: Iterable[Path]) -> list[Path]:
    """List the result files whose figure was drawn from others, or not at all."""
    return [path for path in results if not is_current(path)]


def draw_stale(results: list[Path], draw: Callable[[Path], str], pattern: str) -> None:
    """Draw the figures of these, and remove those of a pattern whose results are no longer there."""
    for path in stale(results):
        figure_of(path).write_text(draw(path), encoding="utf-8")
    for left_over in set(FIGURES.glob(pattern)) - {figure_of(path) for path in results}:
        left_over.unlink()


def new_pyplot() -> Any:
    """Return matplotlib's pyplot, set up so that the same results give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mmm-export"
    from matplotlib import pyplot

    return pyplot


def svg_text(figure: Any, results: Path) -> str:
    """Return a figure as SVG text that carries the hash of its results."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": f"{results.name} {digest(results)}"})
    new_pyplot().close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
