"""What tests of sessions on a GPU share: sizes, the kernels to try, and how near to the CPU they must come."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CAPACITY = 512
CHUNK = 64
LIBRARY = os.environ.get("MMM_ONNXRUNTIME_LIBRARY")
KERNELS = pytest.mark.parametrize("kernels", ["none", *([LIBRARY] if LIBRARY else [])], ids=lambda k: Path(k).name)
# float32 sums in another order, over 4 layers; 16-bit types round each of some 60 values in a row, at half a unit of 2^-11 or 2^-8.
BOUND = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2}
