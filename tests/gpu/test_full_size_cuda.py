"""A model of full size on a GPU: the numbers of the CPU, which computes the same bundle with the same weights.

MMM_FULL_SIZE_BUNDLE names a bundle in fp16, as `python benchmarks/full_size_bundle.py --dtype fp16 FOLDER` makes one;
MMM_ONNXRUNTIME_LIBRARY the library that computes its operators on both sides, for both was built into it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmm_export.runtime import Session

BUNDLE = os.environ.get("MMM_FULL_SIZE_BUNDLE")
LIBRARY = os.environ.get("MMM_ONNXRUNTIME_LIBRARY") or "auto"
PROMPT_TOKENS, STEPS = 24, 2
# Both round every activation to 11 bits, some 15 times a layer and in another order of sums: half a unit, 2^-12, each time,
# uncorrelated over 32 layers: sqrt(480) of them are 5e-3. Twice that.
BOUND = 1e-2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("cuda_provider"),
    pytest.mark.skipif(BUNDLE is None, reason="needs a bundle of full size, named by MMM_FULL_SIZE_BUNDLE"),
]


def logits(session: Session) -> list[Any]:
    ids = np.random.default_rng(0).integers(3, session.manifest.model.vocab_size - 20, PROMPT_TOKENS + STEPS)
    found = [session.prefill(ids[:PROMPT_TOKENS])]
    return found + [session.step(int(token)) for token in ids[PROMPT_TOKENS:]]


def test_logits_of_full_size_are_those_of_the_cpu() -> None:
    folder = Path(str(BUNDLE))
    with Session.open(folder, kernels=LIBRARY, check_content=False) as session:
        assert session.manifest.model.layers == 32
        wanted = logits(session)
    with Session.open(folder, providers=["cuda"], kernels=LIBRARY, check_content=False) as session:
        found = logits(session)
    for one, other in zip(found, wanted, strict=True):
        assert np.isfinite(one).all()
        assert np.linalg.norm(one - other) <= BOUND * np.linalg.norm(other)
        # The CPU's favourite is among the GPU's first three: random weights may leave two of them nearly level.
        assert int(other.argmax()) in np.argsort(one)[-3:]
