"""A Network against the model it is made of."""

import numpy as np
import pytest
import torch

from mmm_export.distillation.batch import NO_TARGET, Batch
from mmm_export.distillation.loading import checkpoint_tensors, network_from_tensors
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import tiny_spec
from mmm_export.model.weights import load_model
from mmm_export.spec import RopeSpec

# Both add the same float64 numbers in another order, through four layers.
EXACT = {"rtol": 1e-8, "atol": 1e-9}


def batch_of(spec, lengths, *, packed, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 300, n) for n in lengths]
    image = spec.vision.tokens_per_tile
    rows[0][2 : 2 + image] = spec.image_token_id
    pixels = torch.tensor(rng.normal(size=(1, 3, spec.vision.tile_size, spec.vision.tile_size)))
    if packed:
        ids = torch.tensor(np.concatenate(rows))[None]
        segments = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32)[None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        valid = torch.ones_like(ids, dtype=torch.bool)
    else:
        width = max(lengths)
        ids = torch.stack([torch.tensor(np.pad(row, (0, width - len(row)))) for row in rows])
        segments, positions = None, torch.arange(width).expand(len(rows), -1)
        valid = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    targets = torch.full_like(ids, NO_TARGET)
    return Batch(ids, targets, valid, positions, segments, pixels, len(lengths))


SCALED = RopeSpec(theta=10000.0, scaling="dynamic", factor=2.0, max_tokens=12)  # of samples longer than 12 tokens
SPECS = {kind: tiny_spec(kinds=kind) for kind in ("teacher", "hybrid", "linear")}
SPECS["scaled teacher"] = tiny_spec(kinds="teacher", rope=SCALED)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", SPECS)
def test_a_network_computes_what_the_model_computes(make_checkpoint, kind, packed):
    checkpoint = Checkpoint.open(make_checkpoint(SPECS[kind], dtype="fp32"), rope_scaling="teacher")
    spec = checkpoint.spec
    model = load_model(checkpoint, dtype=torch.float64)
    network = network_from_tensors(spec, checkpoint.tensor, dtype=torch.float64)
    lengths = [30, 11, 19]
    batch = batch_of(spec, lengths, packed=packed)
    found = network.hidden(batch)
    features = model.image_features(batch.pixels)
    start = 0
    for row, length in enumerate(lengths):
        part = (0, slice(start, start + length)) if packed else (row, slice(0, length))
        ids = batch.ids[part][None]
        embeds = model.embed(ids, features if row == 0 else features[:0])
        counts, past = torch.tensor([length]), torch.tensor([0])
        wanted, _ = model.hidden(embeds, counts, model.initial_states(1, length), past)
        torch.testing.assert_close(found[part], wanted[0], **EXACT)
        start += length


def test_seeding_an_attention_layer_leaves_the_teacher_as_it_was(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint("teacher", dtype="fp32"))
    plain = network_from_tensors(checkpoint.spec, checkpoint.tensor)
    both = network_from_tensors(checkpoint.spec, checkpoint.tensor, students=frozenset(range(4)))
    batch = batch_of(checkpoint.spec, [30], packed=False).to("cpu")
    with torch.no_grad():
        assert torch.equal(plain.hidden(batch, "teacher"), both.hidden(batch, "teacher"))
        assert torch.equal(plain.hidden(batch, "teacher"), both.hidden(batch, "mimic"))
        assert not torch.equal(plain.hidden(batch, "teacher"), both.hidden(batch, "student"))


def test_the_tensors_of_a_network_are_those_it_was_made_of(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint("hybrid", dtype="fp32"))
    network = network_from_tensors(checkpoint.spec, checkpoint.tensor)
    found = dict(checkpoint_tensors(network, checkpoint.spec.attention_layers))
    unread = {n for n in checkpoint.names() if "class_embedding" in n or "tok_embeddings" in n}
    assert set(found) == checkpoint.names() - unread
    for name, value in found.items():
        stored = checkpoint.tensor(name)
        if name.endswith("position_embedding"):
            value, stored = value[:, 1:], stored[:, 1:]  # the first row is never read
        assert torch.equal(value, stored), name


def test_what_imitates_sends_no_gradient_out_of_its_layer(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint("teacher", dtype="fp32"))
    network = network_from_tensors(checkpoint.spec, checkpoint.tensor, students=frozenset(range(4)))
    for layer in network.layers:
        layer.student.requires_grad_(True)
    losses = network(batch_of(checkpoint.spec, [30], packed=False), "mimic")
    assert losses.shape == (4,)
    losses[2].backward()
    touched = [i for i, layer in enumerate(network.layers) if layer.student.wg.weight.grad.any()]
    assert touched == [2]
