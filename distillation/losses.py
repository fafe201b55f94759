"""Losses over the vocabulary, a few positions at a time: logits of all positions at full size would take gigabytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmm_export.distillation.batch import NO_TARGET

Head = Callable[[Tensor], Tensor]


def cross_entropy_sum(head: Head, hidden: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Sum the cross-entropy over all positions that have a target.

    Args:
        head: from hidden vectors to logits.
        hidden: (B, T, hidden).
        targets: (B, T), see Batch.
        tokens: positions whose logits are in memory at a time.
    """

    def part(x: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(x), wanted, ignore_index=NO_TARGET, reduction="sum")

    return _in_parts(part, tokens, hidden.flatten(0, 1), targets.flatten())


def divergence_sum(head: Head, hidden: Tensor, teacher: Tensor, weights: Tensor, tokens: int) -> Tensor:
    """Sum KL(teacher || student) over all positions of weight true.

    Args:
        head: from hidden vectors to logits, of teacher and student alike.
        hidden: the student's, (B, T, hidden).
        teacher: the teacher's, (B, T, hidden); constant.
        weights: (B, T) bool.
        tokens: positions whose logits are in memory at a time.
    """

    def part(x: Tensor, other: Tensor, counted: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(head(other), dim=-1)
        found = F.log_softmax(head(x), dim=-1)
        each = (wanted.exp() * (wanted - found)).sum(-1)
        return torch.where(counted, each, 0).sum()

    return _in_parts(part, tokens, hidden.flatten(0, 1), teacher.flatten(0, 1), weights.flatten())


def _in_parts(part: Callable[..., Tensor], tokens: int, *values: Tensor) -> Tensor:
    if values[0].shape[0] <= tokens:
        return part(*values)
    pieces = zip(*(torch.split(value, tokens) for value in values), strict=True)
    sums = [
        checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces
    ]  # logits are computed again on the way back
    return torch.stack(sums).sum()
