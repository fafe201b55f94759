"""Calibrations of tiny bundles, once a session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmm_export import names
from mmm_export.calibration.collect import CollectOptions, collect
from mmm_export.manifest import read_manifest
from mmm_export.progress import SilentProgress

WORDS = ("the", "picture", "shows", "a", "small", "red", "cat", "near", "green", "water", "and", "an", "old", "house")
_made: dict[Path, Path] = {}


def write_prompts(folder: Path, count: int = 6, seed: int = 0, words: int = 8) -> Path:
    """Write prompts.jsonl: lines in both layouts, every other one with a picture, all with an answer."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for i in range(count):
        question, answer = (" ".join(draw.choice(WORDS, n)) for n in (words, 6))
        if i % 2:
            lines.append({"prompt": question, "answer": answer})
            continue
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).resize((56, 56)).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        lines.append({"id": i, "image": f"{i}.png", "conversations": turns})
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def calibrated(bundle: Path, temporary: pytest.TempPathFactory) -> Path:
    """Return the calibration.json of a bundle on the prompts above."""
    if bundle not in _made:
        folder = temporary.mktemp("calibration")
        data = write_prompts(folder / "data")
        options = CollectOptions(samples=6, chunk_tokens=32, threads=1)
        collect(bundle, read_manifest(bundle), data, folder / "out", options, force=False, progress=SilentProgress())
        _made[bundle] = folder / "out" / names.CALIBRATION_FILE
    return _made[bundle]
