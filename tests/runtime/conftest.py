"""Tests of the runtime can import `toy`, a model small enough to be obvious."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_engine import FakeMachine

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


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A machine with a GPU and TensorRT, both stand-ins."""
    from fake_engine import install

    return install(monkeypatch)


@pytest.fixture(scope="module")
def engine(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An engine of a tiny linear model; copy it before writing into it."""
    from fake_engine import write_engine

    folder = tmp_path_factory.mktemp("engine") / "engine"
    write_engine(make_bundle(make_checkpoint("linear")), folder)
    return folder
