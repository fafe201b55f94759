"""The state of a training as plain tensors, whatever the number of processes: what a snapshot stores and a run resumes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmm_export.distillation.parallel import whole
from mmm_export.distillation.trainer import StageTrainer

ADAM = ("exp_avg", "exp_avg_sq")


def parameters_state(network: nn.Module, trained: list[str]) -> dict[str, Tensor]:
    """Give the values of some parameters, on the CPU."""
    named = dict(network.named_parameters())
    return {name: whole(named[name].detach()).cpu().clone() for name in trained}


def load_parameters(network: nn.Module, values: dict[str, Tensor]) -> None:
    """Update parameters to stored values."""
    named = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            _copy(named[name], value)


def trainer_state(trainer: StageTrainer) -> dict[str, Any]:
    """Give everything that the rest of a stage depends on."""
    named = dict(trainer.network.named_parameters())
    optimizer: dict[str, dict[str, Tensor]] = {}
    for name in trainer.trained:
        state = trainer.optimizer.state.get(named[name], {})
        if state:
            moments = {key: whole(state[key].detach()).cpu().clone() for key in ADAM}
            optimizer[name] = {**moments, "step": torch.as_tensor(state["step"]).detach().cpu().clone()}
    return {
        "stage": trainer.name,
        "step": trainer.step,
        "parameters": parameters_state(trainer.network, trainer.trained),
        "optimizer": optimizer,
        "random": torch.get_rng_state(),
    }


def load_trainer(trainer: StageTrainer, state: dict[str, Any]) -> None:
    """Update a trainer of the same stage and options to a stored state."""
    load_parameters(trainer.network, state["parameters"])
    named = dict(trainer.network.named_parameters())
    on_device = trainer.optimizer.param_groups[0]["capturable"] or trainer.optimizer.param_groups[0]["fused"]
    for name, stored in state["optimizer"].items():
        parameter = named[name]
        moments = {}
        for key in ADAM:
            moments[key] = torch.zeros_like(parameter)
            _copy(moments[key], stored[key])
        step = stored["step"].to(trainer.device if on_device else "cpu")
        trainer.optimizer.state[parameter] = {"step": step, **moments}
    trainer.step = int(state["step"])
    torch.set_rng_state(state["random"])


def _copy(target: Tensor, value: Tensor) -> None:
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
