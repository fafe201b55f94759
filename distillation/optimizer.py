"""AdamW over the trained parameters, and the division of a gradient that was summed over passes and processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmm_export.distillation.stage import StageOptions


def adamw(named: Iterable[tuple[str, nn.Parameter]], options: StageOptions, *, graph: bool) -> torch.optim.AdamW:
    """Make the optimizer; parameters whose name contains "bias" do not decay.

    Args:
        named: trained parameters.
        options: of the stage.
        graph: whether its steps are recorded in a CUDA graph: the rate is then a tensor.
    """
    decaying: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        (plain if "bias" in name else decaying).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    on_gpu = any(p.is_cuda for p in (*decaying, *plain))
    rate: float | Tensor = options.learning_rate
    if graph:
        rate = torch.tensor(options.learning_rate, device=(*decaying, *plain)[0].device)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, options.beta2), fused=on_gpu or None, capturable=graph)


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Update the learning rate of all groups."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def scale_gradients(parameters: list[nn.Parameter], factor: Tensor, clip_norm: float) -> Tensor:
    """Update all gradients: times `factor`, then clipped to `clip_norm` (0: not). Returns the norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm * factor
    if clip_norm > 0:
        factor = factor * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local, factor.to(local[0].dtype))
    return norm
