"""PyTorch's contenders run a bundle's own weights, also where the export fused and turned them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from figure_linear import FastLinear, PlainOperators, batched, plain_prefill, plain_step
from figure_teacher import Teacher, attend, static_caches
from full_size_bundle import export_random
from torch_models import model_from_bundle, random_model

from mmm_export.model.decoder import MmMamba
from mmm_export.model.testing import tiny_spec

# float32 against float32 in another order of sums, over four layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IDS = torch.tensor([5, 9, 200, 31, 77, 4, 18])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights, once as they come and once fused."""
    folder = tmp_path_factory.mktemp("bundles")
    for name in ("plain", "fused"):
        export_random(folder / name, kind="linear", dtype="bf16", fuse=name == "fused", tiny=True)
    return {name: folder / name for name in ("plain", "fused")}


@pytest.fixture(scope="module")
def teacher_model() -> MmMamba:
    # Heads of 24: no power of two, so that a scale forgotten or applied twice cannot hide.
    return random_model(tiny_spec(kinds="teacher", head_dim=24), torch.float32, "cpu")


def test_a_fused_bundle_gives_the_same_parameters_as_a_plain_one(bundles: dict[str, Path]) -> None:
    plain, fused = (dict(model_from_bundle(bundles[name], "cpu").named_parameters()) for name in ("plain", "fused"))
    compared = [name for name, value in plain.items() if not value.is_meta]
    assert len(compared) > 40
    for name in compared:
        assert torch.equal(plain[name], fused[name]), name


def test_the_fast_linear_model_computes_what_the_plain_modules_do(bundles: dict[str, Path]) -> None:
    model = model_from_bundle(bundles["fused"], "cpu")
    model.dtype = torch.float32
    for value in model.parameters():
        if not value.is_meta:
            value.data = value.data.float()
    fast = FastLinear(model, PlainOperators(model.spec))
    wanted, states = plain_prefill(model, IDS, chunk_tokens=3)
    logits, fast_states = fast.prefill(IDS)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    fast_states = batched(fast_states, 2)
    for token in (8, 9):
        before = states
        stepped, states = plain_step(model, torch.tensor([token]), states)
        torch.testing.assert_close(stepped, model.step(torch.tensor([token]), before)[0][:, 0], rtol=0, atol=0)
        both = fast.step(torch.tensor([token, token]), fast_states)
        torch.testing.assert_close(both, stepped.expand(2, -1), **CLOSE)


def plain_teacher_logits(model: MmMamba, ids: torch.Tensor) -> torch.Tensor:
    states = model.initial_states(max_tokens=len(ids))
    embeds = model.embed(ids[None], torch.zeros(0, model.spec.hidden_size))
    logits, _ = model.prefill(embeds, torch.tensor([len(ids)]), states, torch.tensor([0]))
    return logits[0, 0]


def test_the_teacher_with_growing_and_static_caches_computes_what_the_plain_modules_do(teacher_model: MmMamba) -> None:
    wanted = plain_teacher_logits(teacher_model, IDS)
    teacher = Teacher(teacher_model, max_tokens=16)
    for how in ("eager", "flash", "cudnn"):
        logits, _ = teacher.prefill(IDS, how)  # type: ignore[arg-type]
        torch.testing.assert_close(logits, wanted, **CLOSE)
    for how in ("eager", "flash"):
        _, caches = teacher.prefill(IDS[:-2], "eager")
        for token in IDS[-2:]:
            logits = teacher.grow(token[None], caches, how)[0]  # type: ignore[arg-type]
        torch.testing.assert_close(logits, wanted, **CLOSE)
    for how in ("cudnn", "flash", "products"):
        caches = static_caches(teacher.prefill(IDS[:-1], "eager")[1], batch=2)
        for _ in range(2):  # again and again, as a graph is replayed
            logits = teacher.overwrite(IDS[-1:].expand(2), caches, how)  # type: ignore[arg-type]
        torch.testing.assert_close(logits, wanted.expand(2, -1), **CLOSE)


def test_attention_of_all_kinds_agrees_with_the_definition() -> None:
    random = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(random.standard_normal(s)) for s in ((2, 4, 1, 24), (2, 2, 9, 24), (2, 2, 9, 24)))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(2, 1)) / 24**0.5
    wanted = torch.einsum("bhts,bhsd->bhtd", scores.softmax(-1), v.repeat_interleave(2, 1))
    for how in ("eager", "flash", "cudnn", "products"):
        # Softmax in float32 by two of them: eight digits.
        torch.testing.assert_close(attend(q, k, v, how), wanted, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
