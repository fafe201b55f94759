"""Several processes that train one network together: what they are, what they add up, and how a network is spread over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Processes:
    """One process among `count`; `rank` from 0."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def add_up(self, *values: Tensor) -> None:
        """Update tensors to their sum over all processes."""
        if self.count > 1:
            for value in values:
                dist.all_reduce(value)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell whether the flag of any process is set."""
        if self.count == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value)
        return bool(value.item())

    def wait(self) -> None:
        """Wait for all the others."""
        if self.count > 1:
            dist.barrier()


SINGLE = Processes()


@contextmanager
def launched_processes(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that torchrun started; without it, this process is alone.

    Args:
        device: "cuda" or "cpu".

    Yields:
        the processes and the device of this one.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield SINGLE, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), count), device
        dist.barrier()  # who leaves first would break the others' connections
    finally:
        dist.destroy_process_group()


def spread(network: nn.Module, layers: list[nn.Module], device: str) -> None:
    """Update a network so that each process holds a part of every parameter (FSDP2).

    A layer gathers its weights when it runs. Students are groups of their own: their weights are of another number format.
    """
    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    for layer in layers:
        student = getattr(layer, "student", None)
        if student is not None:
            fully_shard(student, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)


def set_trained(network: nn.Module, names: set[str]) -> None:
    """Update which parameters want a gradient: those of `names` and no other."""
    for prefix, module in network.named_modules():
        if isinstance(module, FSDPModule):
            # Gathered parameters are kept as objects of their own, with a flag of their own.
            module.unshard()
            _flag(network.get_submodule(prefix), names, f"{prefix}." if prefix else "")
            module.reshard()
    _flag(network, names, "")


def _flag(module: nn.Module, names: set[str], prefix: str) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(prefix + name in names)


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that may be spread over processes; every process has to ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
