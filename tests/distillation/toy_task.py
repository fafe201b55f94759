"""A task that a tiny model learns in seconds: which token of the prompt comes again."""

from __future__ import annotations

import torch

from mmm_export.distillation.loading import network_from_tensors, untrained_source
from mmm_export.distillation.memory_data import MemoryData
from mmm_export.distillation.network import Network
from mmm_export.model.testing import tiny_spec

SPEC = tiny_spec(kinds="teacher", vocab_size=512)


def toy_data(samples: int = 64, *, tokens: int = 20, seed: int = 0, tiles: int = 1, device: str = "cpu") -> MemoryData:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (samples, tokens), generator=g)
    ids[:, -1] = ids[:, 6]  # the answer: a token seen before
    image = SPEC.vision.tokens_per_tile
    pixels = torch.randn(samples, tiles, 3, 56, 56, generator=g)
    if tiles:
        ids[:, 1 : 1 + image] = SPEC.image_token_id
    answers = torch.zeros(samples, tokens, dtype=torch.bool)
    answers[:, -1] = True
    return MemoryData(ids, answers, torch.full((samples,), tokens), pixels, device=device)


def toy_teacher(
    *, students: frozenset[int] = frozenset(), dtype: torch.dtype = torch.float32, seed: int = 0
) -> Network:
    return network_from_tensors(SPEC, untrained_source(SPEC, seed), students=students, dtype=dtype)
