"""Compares the logits that the contenders of the figure computed for the same tokens: a fast wrong answer is no contender."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def agreement_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Compare the logits that contenders kept: relative L2 distance from the plain modules in float32, the worst of all steps."""
    for reference, contenders in (
        ("reference", sorted(folder.glob("*.npy"))),
        ("teacher-plain", sorted(folder.glob("teacher-*.npy"))),
    ):
        if not (folder / f"{reference}.npy").is_file():
            continue
        exact = np.load(folder / f"{reference}.npy")
        for path in contenders:
            if path.stem == reference or (reference == "reference") == path.stem.startswith("teacher"):
                continue
            given = np.load(path)
            distance = np.linalg.norm(given - exact, axis=1) / np.linalg.norm(exact, axis=1)
            yield {
                "name": "agreement",
                "contender": path.stem,
                "steps": len(exact),
                "is_finite": bool(np.isfinite(given).all()),
                "distance": float(distance.max()),
                "same_choice": int((given.argmax(1) == exact.argmax(1)).sum()),
            }
