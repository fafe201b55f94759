"""The plugin compiled for every GPU family, and cross-compiled for a Jetson: what is in the files, and what they compute on a CPU.

Each of the two builds takes minutes at its first run; afterwards it lies in build/test-plugins.
"""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles.scan_node import TYPES, Feeds, Sizes, draw, node_model, wanted
from oracle.compare import relative_l2
from tensorrt_tools import runtimes
from tensorrt_tools.building import build_folder
from tensorrt_tools.engines import node_engine
from tensorrt_tools.host_calls import fields, run_host

from mmm_export.errors import KernelError
from mmm_export.plugins.inspection import inspect_library
from mmm_export.plugins.library import ABI_VERSION, Device, DType, ScanArguments, ScanShape, load_library

pytestmark = pytest.mark.slow

GPUS = (80, 86, 87, 89, 90, 120)
JETSON_GLIBC = (2, 35)  # of Ubuntu 22.04, the system of JetPack 6
SYSROOT = Path("/usr/aarch64-linux-gnu")
# The bounds and their reasons are those of test_mini_host.py: rounded once; float32 sums some hundred products.
BOUND = {"fp32": 1e-6, "fp16": 2.0**-11, "bf16": 2.0**-8}
SMALL, RELEASED = Sizes(), Sizes(heads=16, kv_heads=8, head_dim=128, state_dim=128)


@pytest.fixture(scope="module")
def everywhere() -> Path:
    return build_folder(GPUS)


@pytest.fixture(scope="module")
def jetson() -> Path:
    if platform.machine() == "aarch64":
        pytest.skip("this machine is one of those that would be cross-compiled for")
    return build_folder((87,), "aarch64")


@pytest.fixture(scope="module")
def aarch64() -> Sequence[str | Path]:
    """The mini host of a build for the CPU of a Jetson."""
    if platform.machine() == "aarch64":
        pytest.skip("tests/plugins/test_mini_host.py runs the same here")
    return emulated(build_folder((), "aarch64"))


def emulated(folder: Path) -> Sequence[str | Path]:
    """How to run the mini host for aarch64 here."""
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        pytest.skip("no qemu-aarch64: make cross-tools, or apt-get install qemu-user-static")
    return (qemu, "-L", SYSROOT, folder / "mmm_mini_host", folder / "libmmm_tensorrt.so")


def wrong(data: dict[str, Any]) -> list[str]:
    return [text for severity, text in data["findings"] if severity in ("error", "warning")]


@pytest.mark.parametrize("name", ["libmmm_kernels.so", "libmmm_tensorrt.so"])
def test_a_library_holds_machine_code_for_every_gpu_family_and_needs_no_tensorrt(everywhere: Path, name: str) -> None:
    data = inspect_library(everywhere / name)
    assert data["architectures"] == list(GPUS)
    assert data["machine"] == platform.machine()
    # Undefined TensorRT symbols, foreign libraries and extra exports would be such. What is compiled here may need this glibc.
    assert [text for text in wrong(data) if "glibc" not in text] == []


def test_a_call_without_a_gpu_is_refused_in_words(everywhere: Path, tmp_path: Path) -> None:
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("this machine may have a GPU, where the call would be run")
    library = load_library(everywhere / "libmmm_kernels.so")
    shape = ScanShape(ABI_VERSION, Device.CUDA, DType.FLOAT16, DType.FLOAT32, 1, 1, 4, 2, 16, 16, 2, 1e-5, 0)
    names = [name for name, kind in ScanArguments._fields_ if kind is ctypes.c_void_p and name != "lengths"]
    places = {name: 4096 * (number + 1) for number, name in enumerate(names)}  # never followed: there is no device
    with pytest.raises(KernelError, match=r"\(MMM_WRONG_DEVICE\): no CUDA device"):
        library.selective_scan(ScanArguments(shape=shape, projected_token_stride=196, **places))
    host = (everywhere / "mmm_mini_host", everywhere / "libmmm_tensorrt.so")
    run = run_host(tmp_path, draw(SMALL, [3], 3), *fields(SMALL), "--device", "cuda", program=host)
    assert run.code == 1
    assert "CUDA" in run.stderr


def test_workspace_is_asked_for_without_a_gpu_and_never_shrinks(everywhere: Path) -> None:
    library = load_library(everywhere / "libmmm_kernels.so")
    sizes = [
        library.workspace_bytes(
            ScanShape(ABI_VERSION, Device.CUDA, DType.BFLOAT16, DType.FLOAT32, 2, tokens, 16, 8, 128, 128, 2, 1e-5, 0)
        )
        for tokens in (1, 2, 64, 65, 1024, 8192, 103_000)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 0


@pytest.mark.parametrize(("name", "version"), [("lean-10", "10.16.1"), ("lean-11", "11.4.0")])
def test_tensorrt_10_and_11_register_the_library_with_all_machine_code(
    everywhere: Path, name: str, version: str
) -> None:
    script = Path(runtimes.__file__).with_name("lean_registration.py")
    done = runtimes.run_with_runtime(name, script, str(everywhere / "libmmm_tensorrt.so"))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"].startswith(version)
    assert told["builds"]
    assert told["runs"]


def test_tensorrt_rtx_builds_an_engine_with_the_library_with_all_machine_code(everywhere: Path, tmp_path: Path) -> None:
    engine = node_engine(tmp_path, node_model(SMALL, "fp16"), everywhere / "libmmm_tensorrt.so")
    assert (engine.errors, engine.byte_count > 0) == ([], True)


@pytest.mark.parametrize("name", ["libmmm_kernels.so", "libmmm_tensorrt.so"])
def test_a_jetsons_library_is_for_its_processor_gpu_and_system(jetson: Path, name: str) -> None:
    data = inspect_library(jetson / name)
    assert (data["machine"], data["architectures"]) == ("aarch64", [87])
    assert wrong(data) == []
    assert tuple(map(int, data["glibc"].split("."))) <= JETSON_GLIBC


def test_a_jetsons_library_is_refused_on_another_processor(jetson: Path) -> None:
    with pytest.raises(KernelError, match="another processor") as caught:
        load_library(jetson / "libmmm_kernels.so")
    assert (caught.value.found, caught.value.wanted) == ("aarch64", platform.machine())


def assert_right(run: Any, sizes: Sizes, feeds: Feeds, dtype: str) -> None:
    assert run.code == 0, run.stderr
    right = wanted(sizes, feeds)
    assert relative_l2(run.outputs["y"], right["y"]) <= BOUND[dtype]
    assert relative_l2(run.outputs["ssm_state_out"], right["ssm_state_out"]) <= BOUND["fp32"]
    assert np.array_equal(run.outputs["conv_state_out"].astype(np.float64), right["conv_state_out"])


def test_a_jetsons_plugin_lives_up_to_its_first_kernel_on_an_emulated_processor(jetson: Path, tmp_path: Path) -> None:
    stored = tmp_path / "fields"
    feeds = draw(RELEASED, [3], 3, "fp16")
    run = run_host(tmp_path, feeds, *fields(RELEASED), "--serialize", str(stored), program=emulated(jetson))
    assert [step["step"] for step in run.steps][-1] == "onShapeChange"  # what is left is the launch
    assert stored.read_text().splitlines()[:2] == ["heads=int32:16", "kv_heads=int32:8"]
    assert run.code == 1
    assert "MmmSelectiveScan layer0: no CUDA device" in run.stderr


# The plugin enqueues on a GPU if it was built for one, which no emulator has: so its numbers are those of a build for the CPU.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lengths", [[1], [65], [7, 0, 3]], ids=["step", "prefill", "ragged"])
def test_the_plugin_computes_what_float64_does_on_an_emulated_processor(
    aarch64: Sequence[str | Path], tmp_path: Path, dtype: str, lengths: list[int]
) -> None:
    feeds = draw(SMALL, lengths, max(lengths), dtype)
    assert_right(run_host(tmp_path, feeds, *fields(SMALL), program=aarch64), SMALL, feeds, dtype)


def test_the_plugin_carries_states_in_place_on_an_emulated_processor(
    aarch64: Sequence[str | Path], tmp_path: Path
) -> None:
    feeds = draw(RELEASED, [20], 20, "fp16")
    run = run_host(tmp_path, feeds, *fields(RELEASED), "--split", "18,1,1", "--in-place-state", program=aarch64)
    assert_right(run, RELEASED, feeds, "fp16")


def test_a_wrong_field_is_refused_on_an_emulated_processor_as_here(
    aarch64: Sequence[str | Path], tmp_path: Path
) -> None:
    run = run_host(tmp_path, draw(SMALL, [1], 1), *fields(SMALL, head_dim="int32:24"), program=aarch64)
    assert run.code == 1
    assert "head_dim 24" in run.stderr
