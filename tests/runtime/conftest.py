"""Tests of the runtime can import `toy`, a model small enough to be obvious."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mmm_export.text import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer files of the test vocabulary."""
    from mmm_export.model.testing.vocabulary import write_tokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, 512)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    from mmm_export.text import Tokenizer

    return Tokenizer.from_folder(folder)
