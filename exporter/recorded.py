"""What a model computed for one input, in a form that can be compared; whoever computed it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mmm_export.spec import ModelSpec

Array = npt.NDArray[Any]


@dataclass
class Recording:
    """Values of one prefill and some decode steps after it, as float64 arrays.

    Shapes: image_features (image tokens, hidden); embeds (T, hidden); layers: L x (T, hidden); states: one {name: array} per
    layer, KV caches cut to their T tokens; logits (vocab,) of the last token; steps: logits (vocab,) after each forced token.
    """

    image_features: Array
    embeds: Array
    layers: list[Array] = field(default_factory=list)
    states: list[dict[str, Array]] = field(default_factory=list)
    logits: Array = field(default_factory=lambda: np.zeros(0))
    steps: list[Array] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """One input: token ids (T,) int64 and the tiles of its images (tiles, 3, S, S) float32, possibly none."""

    input_ids: npt.NDArray[np.int64]
    pixel_values: npt.NDArray[np.float32]


def greedy(logits: Array, spec: ModelSpec) -> int:
    """The best token that is not an image token: those need an image to be embedded."""
    order = np.argsort(-logits, kind="stable")
    return int(next(token for token in order if token != spec.image_token_id))
