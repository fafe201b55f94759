"""Losses: their formulas, in parts and whole; the same samples through every way into a batch."""

import numpy as np
import pytest
import torch
from toy_task import SPEC, toy_data, toy_teacher

from mmm_export.distillation.batch import NO_TARGET
from mmm_export.distillation.conversation import Sample
from mmm_export.distillation.losses import cross_entropy_sum, divergence_sum
from mmm_export.distillation.memory_data import MemoryData
from mmm_export.distillation.packing import batch_from_samples

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # the same float64 numbers, added in another order
OBJECTIVES = (("mimic", "all"), ("divergence", "all"), ("divergence", "answers"), ("answers", "all"))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tokens", [3, 7, 1000])
def test_the_divergence_is_that_of_the_teachers_distribution_from_the_students(tokens):
    head, hidden, other = normal(8, 11), normal(2, 10, 8, seed=1).requires_grad_(True), normal(2, 10, 8, seed=2)
    counted = torch.arange(20).reshape(2, 10) % 3 > 0
    found = divergence_sum(lambda x: x @ head, hidden, other, counted, tokens)
    p, q = ((x @ head).softmax(-1) for x in (other, hidden))
    wanted = (p * (p / q).log()).sum(-1)[counted].sum()
    torch.testing.assert_close(found, wanted, **EXACT)
    gradients = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, **EXACT)
    assert divergence_sum(lambda x: x @ head, other, other, counted, tokens).abs() < 1e-12


@pytest.mark.parametrize("tokens", [3, 1000])
def test_the_cross_entropy_counts_targets_alone(tokens):
    head, hidden = normal(8, 11), normal(2, 10, 8, seed=1)
    targets = torch.full((2, 10), NO_TARGET)
    targets[0, 3], targets[1, 9] = 4, 0
    found = cross_entropy_sum(lambda x: x @ head, hidden, targets, tokens)
    log = (hidden @ head).log_softmax(-1)
    torch.testing.assert_close(found, -log[0, 3, 4] - log[1, 9, 0], **EXACT)


def ragged_samples():
    rng = np.random.default_rng(0)
    samples = []
    for length in (30, 17, 44, 9):
        ids = rng.integers(3, 300, length).astype(np.int32)
        ids[1:5] = SPEC.image_token_id
        answers = np.arange(length) >= length - 3
        samples.append(Sample(ids, answers, rng.normal(size=(1, 3, 56, 56)).astype(np.float32)))
    return samples


@pytest.mark.parametrize(("objective", "positions"), OBJECTIVES)
def test_packed_padded_and_in_memory_samples_have_the_same_loss(objective, positions):
    samples = ragged_samples()
    network = toy_teacher(students=frozenset(range(4)), dtype=torch.float64)
    width = max(len(sample.ids) for sample in samples)
    memory = MemoryData(
        torch.tensor(np.stack([np.pad(s.ids, (0, width - len(s.ids)), constant_values=7) for s in samples])),
        torch.tensor(np.stack([np.pad(s.answers, (0, width - len(s.ids)), constant_values=True) for s in samples])),
        torch.tensor([len(s.ids) for s in samples]),
        torch.tensor(np.stack([s.pixels for s in samples])),
        dtype=torch.float64,
    )
    batches = [memory.batch(range(4))]
    for packing in (True, False):
        batches.append(batch_from_samples(samples, SPEC, max_tokens=64, packing=packing, dtype=torch.float64))
    assert batches[1].segments is not None
    with torch.no_grad():
        wanted, *others = (network(batch, objective, positions) for batch in batches)
    assert (wanted > 0).all()
    for found in others:
        # Through four layers with float32 weights read as float64; rows are padded to other lengths.
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("objective", "positions"), OBJECTIVES)
def test_what_is_computed_again_has_the_same_gradient(objective, positions):
    gradients = []
    for recompute, tokens in ((False, 1 << 20), (True, 16)):
        network = toy_teacher(students=frozenset(range(4)))
        network.recompute, network.logit_tokens = recompute, tokens
        for layer in network.layers:
            layer.student.requires_grad_(True)
        network(toy_data().batch(range(6)), objective, positions).sum().backward()
        gradients.append([p.grad for layer in network.layers for p in layer.student.parameters()])
    for plain, again in zip(*gradients, strict=True):
        # Float32 sums over logits in parts of 16 positions.
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()) + 1e-9)


def test_pixels_of_eight_bits_are_normalised_when_a_batch_is_made():
    raw = torch.randint(0, 256, (3, 1, 3, 8, 8), dtype=torch.uint8)
    ids = torch.ones(3, 4, dtype=torch.int64)
    data = MemoryData(ids, ids > 0, torch.tensor([4, 4, 4]), raw)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(data.batch([2, 0]).pixels, ((raw[[2, 0], 0].float() / 255) - mean) / std)
