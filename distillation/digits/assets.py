"""What pictures are made of: scikit-learn's handwritten digits, and photographs of scikit-image and scikit-learn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "test"]
Bytes = NDArray[np.uint8]

TEST_SHARE = 0.2  # of the handwritten digits, never seen in training
SPLIT_SEED = 0
# Photographs as they are shipped, none of them in both splits: the test set has backgrounds that training never showed.
TRAIN_PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "brick",
    "grass",
)
TEST_PHOTOGRAPHS = ("chelsea", "china.jpg", "flower.jpg")
SHORT_SIDE = 144  # pixels of the shorter side, at least, once a photograph is scaled down


@dataclass(frozen=True)
class Assets:
    """Handwritten digits and photographs of both splits.

    Attributes:
        handwriting: (1797, 8, 8) grey values 0..16.
        labels: (1797,) the digit that each one shows.
        test: (1797,) whether it belongs to the test set.
        photographs: RGB pictures (height, width, 3) of each split.
    """

    handwriting: Bytes
    labels: Bytes
    test: NDArray[np.bool_]
    photographs: dict[Split, tuple[Bytes, ...]]

    def samples(self, split: Split, digit: int) -> list[int]:
        """Indices of the handwritten samples of a digit that belong to a split."""
        return [int(i) for i in np.flatnonzero((self.labels == digit) & (self.test == (split == "test")))]

    def save(self, path: Path) -> None:
        """Write everything into one .npz, so that a machine without these packages can draw the same pictures."""
        arrays: dict[str, Any] = {"handwriting": self.handwriting, "labels": self.labels, "test": self.test}
        arrays |= {
            f"{split}_{i}": photo for split, photos in self.photographs.items() for i, photo in enumerate(photos)
        }
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Assets:
        """Read what `save` wrote."""
        with np.load(path) as stored:

            def photographs(split: Split) -> Iterator[Bytes]:
                count = sum(name.startswith(f"{split}_") for name in stored.files)
                return (stored[f"{split}_{i}"] for i in range(count))

            photos: dict[Split, tuple[Bytes, ...]] = {
                "train": tuple(photographs("train")),
                "test": tuple(photographs("test")),
            }
            return cls(stored["handwriting"], stored["labels"], stored["test"], photos)


def packaged_assets() -> Assets:
    """Read the digits and photographs that scikit-learn and scikit-image ship."""
    from sklearn.datasets import load_digits

    digits = cast(Any, load_digits())
    labels = np.asarray(digits.target, np.uint8)
    photos: dict[Split, tuple[Bytes, ...]] = {
        "train": tuple(map(_photograph, TRAIN_PHOTOGRAPHS)),
        "test": tuple(map(_photograph, TEST_PHOTOGRAPHS)),
    }
    return Assets(np.asarray(digits.images, np.uint8), labels, _held_out(labels), photos)


def _held_out(labels: Bytes) -> NDArray[np.bool_]:
    """Choose the test samples: the same share of every digit."""
    held = np.zeros(len(labels), np.bool_)
    for digit in range(10):
        indices = [int(i) for i in np.flatnonzero(labels == digit)]
        random.Random(f"{SPLIT_SEED}/{digit}").shuffle(indices)
        held[indices[: round(TEST_SHARE * len(indices))]] = True
    return held


def _photograph(name: str) -> Bytes:
    """Read a photograph as RGB, scaled down by averaging square blocks of pixels."""
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        picture = np.asarray(load_sample_image(name))
    else:
        from skimage import data

        picture = np.asarray(getattr(cast(Any, data), name)())
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    block = max(1, min(picture.shape[:2]) // SHORT_SIDE)
    height, width = picture.shape[0] // block, picture.shape[1] // block
    cut = picture[: height * block, : width * block, :3].astype(np.float64)
    scaled: Bytes = cut.reshape(height, block, width, block, 3).mean((1, 3)).round().astype(np.uint8)
    return scaled
