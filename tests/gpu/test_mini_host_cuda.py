"""The plugin file that TensorRT loads, driven through its life cycle on a GPU by the mini host, against float64.

MMM_TENSORRT_PLUGIN_DIR names the folder of libmmm_tensorrt.so and mmm_mini_host, a CUDA build.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gpu.bounds import BOUND, EXACT_BOUND, relative_l2
from gpu.inputs import Inputs, Sizes, draw
from gpu.kernels import DEVICE
from gpu.mini_host import FOLDER_VARIABLE, read_outputs, run_host
from gpu.reference import mixer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(FOLDER_VARIABLE not in os.environ, reason=f"name a CUDA build's folder in {FOLDER_VARIABLE}"),
]
TYPES = pytest.mark.parametrize("io", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


def assert_right(folder: Path, inputs: Inputs, *options: str) -> None:
    """Hold a run against float64 with operands as they are and as matrix units take them; bounds.py gives the reasons."""
    done = run_host(folder, inputs, *options)
    assert done.returncode == 0, done.stderr
    found, io = read_outputs(folder, inputs), inputs.projected.dtype
    exact = mixer(inputs)
    rounded = exact if io == torch.float32 else mixer(inputs, operands=io)
    assert relative_l2(found.y, exact.y) <= EXACT_BOUND[io]
    for name in ("y", "ssm_state"):
        errors = [relative_l2(getattr(found, name), getattr(right, name)) for right in (exact, rounded)]
        assert min(errors) <= BOUND[io], (name, errors)
    assert torch.equal(found.conv_state, exact.conv_state)


@TYPES
@pytest.mark.parametrize("lengths", [[0], [1], [1, 0], [65], [200, 131]], ids=str)
@pytest.mark.parametrize("options", [(), ("--in-place-state",)], ids=["own state", "in place"])
def test_the_plugin_agrees_with_float64(
    tmp_path: Path, io: torch.dtype, lengths: list[int], options: tuple[str, ...]
) -> None:
    assert_right(tmp_path, draw(Sizes(len(lengths), max(lengths)), io, lengths=lengths), *options)


@TYPES
@pytest.mark.parametrize(
    "sizes", [Sizes(2, 130, 4, 2, 64, 64, 4), Sizes(2, 33, 6, 2, 48, 32, 3), Sizes(1, 1, 3, 1, 112, 80, 4)], ids=str
)
def test_other_sizes_agree_with_float64(tmp_path: Path, io: torch.dtype, sizes: Sizes) -> None:
    assert_right(tmp_path, draw(sizes, io))


@TYPES
def test_a_split_prefill_and_steps_equal_one_call(tmp_path: Path, io: torch.dtype) -> None:
    # The parts are longer than the last one alone, so this holds the conv states of every hand-over as well.
    assert_right(tmp_path, draw(Sizes(1, 131), io), "--split", "64,65,1,1", "--in-place-state")


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are CUDA's")
def test_a_call_captured_in_a_graph_is_timed(tmp_path: Path) -> None:
    done = run_host(tmp_path, draw(Sizes(1, 1), torch.bfloat16), "--time", "200", "--graph")
    assert done.returncode == 0, done.stderr
    assert '"microseconds"' in done.stdout


def test_a_call_longer_than_the_profile_is_refused(tmp_path: Path) -> None:
    done = run_host(tmp_path, draw(Sizes(1, 300), torch.bfloat16), "--profile-max", "64,1")
    assert done.returncode == 1
    assert "--profile-max" in done.stderr
