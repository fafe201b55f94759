"""Tokenizer folders made of the reference vocabularies beside this file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(__file__).parent / "vectors"


@lru_cache(maxsize=1)
def read_vectors() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads((VECTORS / "vectors.json").read_text(encoding="utf-8")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vector" in metafunc.fixturenames:
        metafunc.parametrize("vector", read_vectors(), ids=lambda vector: vector["name"].replace(" ", "-"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a new folder with a vocabulary and JSON files: `tokenizer_folder("plain", {"added_tokens.json": {...}})`.

    A file's content may be a string, written as it is. Without files: those of the released layout.
    """

    def make(model: str = "plain", files: dict[str, Any] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        shutil.copy(VECTORS / f"{model}.model", folder / "tokenizer.model")
        if files is None:
            files = next(v for v in read_vectors() if v["name"] == f"released layout, {model}")["files"]
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return make
