"""The plugin file that TensorRT loads, driven through its life cycle on a GPU, against the float64 oracle."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles.scan_node import Sizes, draw, wanted
from oracle.compare import relative_l2
from tensorrt_tools.building import FOLDER_VARIABLE
from tensorrt_tools.host_calls import fields, run_host

from gpu.bounds import BOUND

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(FOLDER_VARIABLE not in os.environ, reason=f"name a CUDA build's folder in {FOLDER_VARIABLE}"),
]
SIZES = Sizes(heads=16, kv_heads=8, head_dim=128, state_dim=128)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lengths", [[0], [1], [1, 0], [65], [200, 131]])
@pytest.mark.parametrize("options", [(), ("--in-place-state",)], ids=["own state", "in place"])
def test_the_plugin_agrees_with_float64(
    tmp_path: Path, dtype: str, lengths: list[int], options: tuple[str, ...]
) -> None:
    feeds = draw(SIZES, lengths, max(lengths), dtype)
    done = run_host(tmp_path, feeds, "--device", "cuda", *fields(SIZES), *options)
    assert done.code == 0, done.stderr
    right = wanted(SIZES, feeds)
    for name in ("y", "ssm_state_out"):
        assert relative_l2(done.outputs[name], right[name]) <= BOUND[TYPES[dtype]], name
    assert np.array_equal(done.outputs["conv_state_out"].astype(np.float64), right["conv_state_out"])
