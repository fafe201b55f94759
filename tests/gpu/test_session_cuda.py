"""Sessions on a GPU: the numbers of the CPU, states that move between them, and memory that comes back.

Needs onnxruntime-gpu, and the packages that write and export a tiny model. With MMM_ONNXRUNTIME_LIBRARY our kernels compute the scan
too; without it only ONNX Runtime's own operators are tested.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu.cuda_sessions import BOUND, CAPACITY, KERNELS, LIBRARY
from mmm_export.errors import MmmError
from mmm_export.manifest import read_manifest
from mmm_export.runtime import GenerationOptions, Session

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_provider")]


def prompt(session: Session, length: int = 300) -> tuple[Any, Any]:
    spec = session.manifest.model
    random = np.random.default_rng(0)
    ids = random.integers(3, spec.vocab_size - 20, length)
    ids[20 : 20 + 2 * spec.vision.tokens_per_tile] = spec.image_token_id
    side = spec.vision.tile_size
    return ids, random.standard_normal((2, 3, side, side)).astype(np.float32)


def read(session: Session) -> list[Any]:
    """Logits after a prompt with images, and after each of six steps."""
    session.reset()
    return [session.prefill(*prompt(session)), *(session.step(token) for token in (5, 9, 11, 7, 8, 9))]


def error(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@KERNELS
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_logits_are_those_of_the_cpu(
    checkpoint: Path, make_bundle: Callable[..., Path], reference: Session, dtype: str, kernels: str
) -> None:
    bundle = make_bundle(checkpoint, dtype=dtype, max_tokens=CAPACITY)
    wanted = read(reference)
    with Session.open(bundle, providers=["cuda"], kernels=kernels, chunk_tokens=64) as session:
        for _ in range(2):  # the second time the CUDA graphs are replayed, not captured
            found = read(session)
            assert max(map(error, found, wanted)) <= BOUND[dtype]


@pytest.mark.skipif(
    LIBRARY is None, reason="fused products need our kernels: name the library in MMM_ONNXRUNTIME_LIBRARY"
)
@pytest.mark.parametrize("chunk_tokens", [8, 16, 300], ids=lambda count: f"chunks of {count}")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_logits_of_a_fused_bundle_are_those_of_the_cpu(
    checkpoint: Path, make_bundle: Callable[..., Path], reference: Session, dtype: str, chunk_tokens: int
) -> None:
    # 8 tokens go through our own products, the others through cuBLAS, whose sums are of the same type.
    bundle = make_bundle(checkpoint, dtype=dtype, max_tokens=CAPACITY, fuse=True)
    wanted = read(reference)
    with Session.open(bundle, providers=["cuda"], kernels=LIBRARY or "", chunk_tokens=chunk_tokens) as session:
        for _ in range(2):
            assert max(map(error, read(session), wanted)) <= BOUND[dtype]


@pytest.mark.skipif(
    LIBRARY is None, reason="fused products need our kernels: name the library in MMM_ONNXRUNTIME_LIBRARY"
)
@pytest.mark.parametrize("chunk_tokens", [8, 300], ids=lambda count: f"chunks of {count}")
@pytest.mark.parametrize("form", ["int8-weights", "int4"])
def test_logits_of_a_quantized_bundle_are_those_of_the_cpu(
    make_checkpoint: Callable[..., Path],
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    tmp_path_factory: Any,
    form: Any,
    chunk_tokens: int,
) -> None:
    from calibration_data.bundles import calibrated

    from mmm_export.calibration.plan import QuantizeOptions
    from mmm_export.calibration.quantize import quantize_bundle
    from mmm_export.model.testing import tiny_spec

    bundle = make_bundle(make_checkpoint(tiny_spec(heads=4, head_dim=32)), dtype="fp16", max_tokens=CAPACITY)
    options = QuantizeOptions(form, consumer="onnxruntime-cuda", head="int8")
    quantize_bundle(bundle, calibrated(bundle, tmp_path_factory), tmp_path / "q", options)
    with (
        Session.open(tmp_path / "q", kernels=LIBRARY or "", chunk_tokens=64) as cpu,
        Session.open(tmp_path / "q", providers=["cuda"], kernels=LIBRARY or "", chunk_tokens=chunk_tokens) as gpu,
    ):
        assert max(map(error, read(gpu), read(cpu))) <= BOUND["fp16"]


@KERNELS
def test_captured_steps_equal_launched_ones(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], kernels: str
) -> None:
    from mmm_export.runtime.onnxruntime_cuda_backend import OnnxRuntimeCudaBackend

    bundle = make_bundle(make_checkpoint("linear"), max_tokens=CAPACITY)
    library = None if kernels == "none" else Path(kernels)
    found = []
    for capture in (True, False):
        backend = OnnxRuntimeCudaBackend(bundle, read_manifest(bundle), library=library, capture=capture)
        assert backend.captures_steps == capture
        with Session(bundle, read_manifest(bundle), backend, chunk_tokens=64) as session:
            found.append(read(session))
    for captured, launched in zip(*found, strict=True):
        np.testing.assert_array_equal(captured, launched)


def test_states_move_between_cpu_and_gpu(
    checkpoint: Path, make_bundle: Callable[..., Path], reference: Session, tmp_path: Path
) -> None:
    bundle = make_bundle(checkpoint, max_tokens=CAPACITY)
    reference.reset()
    reference.prefill(*prompt(reference))
    reference.save_state(tmp_path / "cpu.state")
    with Session.open(bundle, providers=["cuda"], kernels="none") as session:
        session.load_state(tmp_path / "cpu.state")
        assert error(session.step(5), reference.step(5)) <= BOUND["fp32"]
        session.save_state(tmp_path / "gpu.state")
    reference.load_state(tmp_path / "gpu.state")
    found = reference.step(6)
    with Session.open(bundle, providers=["cuda"], kernels="none") as session:
        session.load_state(tmp_path / "gpu.state")
        assert error(session.step(6), found) <= BOUND["fp32"]


def test_two_sessions_on_one_gpu_do_not_disturb_each_other(checkpoint: Path, make_bundle: Callable[..., Path]) -> None:
    bundle = make_bundle(checkpoint, max_tokens=CAPACITY)
    with (
        Session.open(bundle, providers=["cuda"], kernels="none", chunk_tokens=64) as one,
        Session.open(bundle, providers=["cuda"], kernels="none", chunk_tokens=64) as two,
    ):
        alone = read(one)
        one.prefill(*prompt(one, 100))
        together = read(two)
        one.step(5)
        for found, wanted in zip(together, alone, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_running_out_of_memory_is_told_and_the_session_goes_on(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> None:
    from mmm_export.runtime.onnxruntime_cuda_backend import OnnxRuntimeCudaBackend

    bundle = make_bundle(make_checkpoint("linear"), max_tokens=CAPACITY)
    manifest = read_manifest(bundle)
    backend = OnnxRuntimeCudaBackend(bundle, manifest, memory_limit_bytes=24 << 20)
    with Session(bundle, manifest, backend, chunk_tokens=1 << 17) as session:
        wanted = read(session)
        ids = np.random.default_rng(1).integers(3, manifest.model.vocab_size - 20, 100_000)
        with pytest.raises(MmmError, match="failed while running"):
            session.prefill(ids)
        for found, before in zip(read(session), wanted, strict=True):
            np.testing.assert_array_equal(found, before)


def test_an_answer_can_be_cancelled_from_another_thread(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> None:
    bundle = make_bundle(make_checkpoint("linear"), max_tokens=CAPACITY)
    with Session.open(bundle, providers=["cuda"], kernels="none") as session:
        answer = session.generate("What is it?", options=GenerationOptions(max_new_tokens=100_000, stop_ids=()))
        next(answer)
        timer = threading.Timer(0.3, answer.cancel)
        timer.start()
        for _ in answer:
            pass
        assert answer.finish_reason == "cancelled"
        assert session.tokens > 0
        session.step(5)


def test_closing_gives_all_memory_back(make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]) -> None:
    import torch

    bundle = make_bundle(make_checkpoint("linear"), max_tokens=CAPACITY)
    free = []
    rounds = int(os.environ.get("MMM_OPEN_ROUNDS", "100"))
    for _ in range(rounds):
        with Session.open(bundle, providers=["cuda"], kernels="none", check_content=False) as session:
            session.step(5)
        free.append(torch.cuda.mem_get_info()[0])
    # The first sessions load CUDA modules, which stay; after that not a megabyte may be lost in all rounds together.
    assert free[rounds // 10] - free[-1] < 1 << 20
