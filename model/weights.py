"""From a checkpoint's tensors to the parameters of MmMamba: which tensor, turned how."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.decoder import MmMamba
from mmm_export.model.linear import Projection
from mmm_export.model.scan import Scan, chunked
from mmm_export.model.tensors import HEAD, POSITIONS, SPECIAL_TABLE, TEXT_TABLE
from mmm_export.model.vision import interpolate_positions
from mmm_export.spec import ModelSpec


def parameter(checkpoint: Checkpoint, model: nn.Module, name: str) -> Tensor:
    """The value of one parameter of MmMamba, in the stored type and the module's shape.

    A view of the memory-mapped file wherever possible: projections are transposed views; only the interpolated positions and a
    text table with extra rows are new memory.
    """
    if name == POSITIONS:
        return interpolate_positions(checkpoint.tensor(name), checkpoint.spec.vision)
    value = checkpoint.tensor(checkpoint.head_name if name == HEAD else name)
    if name == TEXT_TABLE and checkpoint.spec.special_tokens:
        return torch.cat([value, checkpoint.tensor(SPECIAL_TABLE).to(value.dtype)])
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, Projection) and name.endswith(".weight"):
        return value.t()
    if name.endswith(".conv1d.weight"):
        return value.squeeze(1)
    return value


def model_skeleton(spec: ModelSpec, *, dtype: torch.dtype = torch.float32, scan: Scan = chunked) -> MmMamba:
    """MmMamba without numbers: its parameters have shapes only."""
    with torch.device("meta"):
        return MmMamba(spec, dtype=dtype, scan=scan)


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, scan: Scan = chunked) -> MmMamba:
    """Build MmMamba over a checkpoint. Weights stay memory-mapped in their stored type, so this takes no memory of note.

    Args:
        checkpoint: an open checkpoint.
        dtype: type of the activations; each weight is cast to it where it is used.
        scan: form of the Mamba-2 layers, see MmMamba.
    """
    model = model_skeleton(checkpoint.spec, dtype=dtype, scan=scan)
    for name, _ in list(model.named_parameters()):
        owner_name, _, leaf = name.rpartition(".")
        value = nn.Parameter(parameter(checkpoint, model, name), requires_grad=False)
        setattr(model.get_submodule(owner_name), leaf, value)
    model.ropes = MmMamba.make_ropes(checkpoint.spec)  # computed, not stored: the ones made above hold no numbers
    return model.eval()
