"""What is told before the files of a bundle are read: reading gigabytes for their hashes takes long."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmm_export import names
from mmm_export.errors import BundleError, OptionError, PromptError
from mmm_export.manifest import read_manifest, write_manifest
from mmm_export.model.testing import tiny_spec
from mmm_export.runtime import Session
from mmm_export.runtime.token_input import pixels_from_input


@pytest.fixture
def copy(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle with a decoder that was changed."""
    folder = tmp_path / "bundle"
    shutil.copytree(make_bundle(make_checkpoint("linear")), folder)
    path = folder / names.DECODER_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return folder


def change_manifest(folder: Path, **changes: Any) -> None:
    write_manifest(folder, dataclasses.replace(read_manifest(folder), **changes))


def test_misspelt_provider_is_told_before_the_files_are_read(copy: Path) -> None:
    with pytest.raises(BundleError, match="was changed"):
        Session.open(copy)
    with pytest.raises(OptionError, match="no execution provider"):
        Session.open(copy, providers=["cpuu"])


def test_bf16_on_a_cpu_is_told_before_the_files_are_read(copy: Path) -> None:
    change_manifest(copy, dtype="bf16")
    with pytest.raises(BundleError, match="CPU"):
        Session.open(copy)


@pytest.mark.parametrize("file", names.GRAPH_FILES)
def test_graph_whose_weights_are_not_listed_is_refused(copy: Path, file: str) -> None:
    weights = file + names.WEIGHTS_SUFFIX
    files = {name: info for name, info in read_manifest(copy).files.items() if name != weights}
    change_manifest(copy, files=files)
    with pytest.raises(BundleError, match=f"lists no {weights}"):
        Session.open(copy)


def test_not_a_number_in_the_pixels_is_refused() -> None:
    spec = tiny_spec()
    pixels = np.zeros((1, 3, spec.vision.tile_size, spec.vision.tile_size), np.float32)
    pixels[0, 0, 0, 0] = np.nan
    with pytest.raises(PromptError, match="damaged"):
        pixels_from_input(pixels, spec)
