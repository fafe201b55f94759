"""Sizes, tables and printable text, which every rendering is made of."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 100


def size(count: float) -> str:
    """Bytes in the unit that fits: "512 bytes", "16.0 MiB", "5.11 GiB"."""
    for unit, decimals in (("bytes", 0), ("KiB", 1), ("MiB", 1)):
        if count < 1024:
            return f"{count:.{decimals}f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def printable(text: str) -> str:
    """Text with control characters spelt out: a manifest or a state file must not steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def table(rows: Sequence[Sequence[str]], *, indent: int = 0) -> str:
    """Align columns by spaces; the last one is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " " * indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
