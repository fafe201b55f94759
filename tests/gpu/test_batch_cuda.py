"""Batches on a GPU: rows that begin and end at any time have the numbers of single sessions on the CPU.

Needs onnxruntime-gpu, and the packages that write and export a tiny model. With MMM_ONNXRUNTIME_LIBRARY our kernels compute the scan
too; without it only ONNX Runtime's own operators are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu.cuda_sessions import BOUND, CAPACITY, CHUNK, KERNELS
from mmm_export.manifest import read_manifest
from mmm_export.runtime import BatchSession, GenerationOptions, Question, Session

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_provider")]

ROWS = 5  # steps of 1, 2, 4 and 5 rows: two CUDA graphs each


@dataclass
class Life:
    """What happens to one sequence: it begins at a step, reads a prompt, is fed tokens, and ends."""

    begin: int
    length: int
    tokens: list[int]
    tiles: int = 0
    logits: list[Any] = field(default_factory=list)


def lives() -> list[Life]:
    """Twelve sequences for five rows: prompts of one token to several chunks, one with images, lives of 1 to 12 tokens."""
    random = np.random.default_rng(4)
    lengths = (1, 63, 64, 65, 130, 200, 3, 129, 90, 64, 31, 260)
    return [
        Life(
            begin=number // 2,
            length=length,
            tokens=random.integers(3, 400, 1 + 5 * number % 12).tolist(),
            tiles=2 if length == 90 else 0,
        )
        for number, length in enumerate(lengths)
    ]


def prompt(spec: Any, life: Life) -> tuple[Any, Any]:
    random = np.random.default_rng(life.length)
    ids = random.integers(3, spec.vocab_size - 20, life.length)
    if not life.tiles:
        return ids, None
    ids[20 : 20 + life.tiles * spec.vision.tokens_per_tile] = spec.image_token_id
    side = spec.vision.tile_size
    return ids, random.standard_normal((life.tiles, 3, side, side)).astype(np.float32)


def run_together(batch: BatchSession) -> list[Life]:
    """Run all lives in one batch, each as soon after its begin as a row is free."""
    everyone = lives()
    waiting, running = list(everyone), {}
    step = 0
    while waiting or running:
        while waiting and waiting[0].begin <= step and batch.free_rows:
            life = waiting.pop(0)
            row, logits = batch.prefill(*prompt(batch.manifest.model, life))
            life.logits.append(logits)
            running[row] = life
        tokens = {row: life.tokens[len(life.logits) - 1] for row, life in running.items()}
        for row, logits in batch.advance(tokens).items():
            running[row].logits.append(logits)
            if len(running[row].logits) > len(running[row].tokens):
                batch.free(row)
                del running[row]
        step += 1
    return everyone


def error(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def wanted(reference: Session) -> list[Life]:
    everyone = lives()
    for life in everyone:
        reference.reset()
        life.logits = [reference.prefill(*prompt(reference.manifest.model, life)), *map(reference.step, life.tokens)]
    return everyone


@KERNELS
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_rows_have_the_logits_of_single_sessions_on_the_cpu(
    checkpoint: Path, make_bundle: Callable[..., Path], wanted: list[Life], dtype: str, kernels: str
) -> None:
    bundle = make_bundle(checkpoint, dtype=dtype, max_tokens=CAPACITY)
    with BatchSession.open(bundle, rows=ROWS, providers=["cuda"], kernels=kernels, chunk_tokens=CHUNK) as batch:
        for _ in range(2):  # the second time the CUDA graphs are replayed, not captured
            for found, right in zip(run_together(batch), wanted, strict=True):
                assert len(found.logits) == len(right.logits) == 1 + len(right.tokens)
                assert max(map(error, found.logits, right.logits)) <= BOUND[dtype]


@KERNELS
def test_captured_steps_of_rows_equal_launched_ones(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path], kernels: str
) -> None:
    from mmm_export.runtime.onnxruntime_cuda_backend import OnnxRuntimeCudaBackend

    bundle = make_bundle(make_checkpoint("linear"), max_tokens=CAPACITY)
    manifest = read_manifest(bundle)
    library = None if kernels == "none" else Path(kernels)
    found = []
    for capture in (True, False):
        backend = OnnxRuntimeCudaBackend(bundle, manifest, library=library, capture=capture, batch=ROWS)
        assert backend.captures_steps == capture
        with BatchSession(bundle, manifest, backend, chunk_tokens=CHUNK) as batch:
            found.append(run_together(batch))
    for captured, launched in zip(*found, strict=True):
        np.testing.assert_array_equal(captured.logits, launched.logits)


def test_answers_are_those_of_single_sessions_on_the_cpu(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> None:
    bundle = make_bundle(make_checkpoint("linear"), max_tokens=CAPACITY)
    questions = [
        Question(f"What is number {number}?", options=GenerationOptions(max_new_tokens=3 + 4 * number, stop_ids=()))
        for number in range(7)
    ]
    with BatchSession.open(bundle, rows=3, providers=["cuda"], kernels="none") as batch:
        found = {done.number: done.answer for done in batch.answers(questions)}
    with Session.open(bundle, kernels="none") as session:
        for number, question in enumerate(questions):
            session.reset()
            answer = session.generate(question.prompt, options=question.options)
            text = "".join(answer)
            batched = found[number]
            assert batched is not None
            assert (batched.text, batched.token_ids) == (text, answer.token_ids)


def test_closing_a_batch_gives_all_memory_back(
    make_checkpoint: Callable[..., Path], make_bundle: Callable[..., Path]
) -> None:
    import torch

    bundle = make_bundle(make_checkpoint("linear"), max_tokens=CAPACITY)
    free = []
    for _ in range(20):
        with BatchSession.open(bundle, rows=4, providers=["cuda"], kernels="none", check_content=False) as batch:
            for row in range(4):
                batch.prefill([5, 6])
                batch.advance(dict.fromkeys(range(row + 1), 7))  # steps of 1, 2 and 4 rows
        free.append(torch.cuda.mem_get_info()[0])
    # The first ones load CUDA modules, which stay; after that not a megabyte may be lost.
    assert free[5] - free[-1] < 1 << 20
