"""A bundle without its large weights travels, and becomes a bundle again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bundle_weights import all_weights
from full_size_bundle import export_random, fill, strip

from mmm_export.manifest import Manifest, check_files, read_manifest
from mmm_export.runtime import Session


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    export_random(folder, kind="linear", dtype="fp32", fuse=False, tiny=True)
    return folder


@pytest.fixture(scope="module")
def filled(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("filled")
    strip(bundle, folder / "graphs")
    return folder / "bundle", fill(folder / "graphs", folder / "bundle", device="cpu")


def test_a_filled_bundle_is_whole_and_its_hashes_are_right(filled: tuple[Path, Manifest]) -> None:
    folder, manifest = filled
    assert read_manifest(folder) == manifest
    check_files(folder, manifest, content=True)


def test_a_filled_bundle_keeps_small_weights_and_the_spread_of_large_ones(
    bundle: Path, filled: tuple[Path, Manifest]
) -> None:
    for (before, old), (after, new) in zip(all_weights(bundle), all_weights(filled[0]), strict=True):
        assert before == after
        if before.bytes <= 64 << 10:
            assert np.array_equal(old, new)
            continue
        assert not np.array_equal(old, new)
        a, b = old.view(np.float32), new.view(np.float32)
        # 4,096 sampled values tell a deviation to about 1 in 90; four times that.
        assert b.std() == pytest.approx(a.std(), rel=0.045)


def test_a_filled_bundle_runs_and_its_logits_are_finite(filled: tuple[Path, Manifest]) -> None:
    with Session.open(filled[0], kernels="none") as session:
        assert np.isfinite(session.prefill([5, 6, 7, 8])).all()


def test_filling_twice_gives_the_same_bundle(bundle: Path, filled: tuple[Path, Manifest], tmp_path: Path) -> None:
    strip(bundle, tmp_path / "graphs")
    assert fill(tmp_path / "graphs", tmp_path / "bundle", device="cpu").files == filled[1].files
