"""From a checkpoint, or from nothing, to a Network with numbers; from a Network to the tensors of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mmm_export.distillation.mixers import StudentMixer
from mmm_export.distillation.network import Layer, Network
from mmm_export.distillation.parallel import whole
from mmm_export.distillation.seeding import Init, seeded_mixer
from mmm_export.model import tensors
from mmm_export.model.decoder import MmMamba
from mmm_export.model.linear import Projection
from mmm_export.model.vision import interpolate_positions
from mmm_export.spec import ModelSpec

Source = Callable[[str], Tensor]  # a stored tensor by its name

STUDENT_PARAMETERS = (
    "conv1d.weight",
    "conv1d.bias",
    "dt_bias",
    "A_log_bias",
    "g_norm_swish_gate.weight",
)  # stored under the names that they have in the mixer


def network_from_tensors(
    spec: ModelSpec,
    source: Source,
    *,
    students: frozenset[int] = frozenset(),
    init: Init = "inherit+mimic",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    stored_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    head: str = tensors.HEAD,
) -> Network:
    """Build a network, one tensor after the other, so that a memory-mapped checkpoint needs no second copy.

    Args:
        spec: the teacher's dimensions.
        source: gives a stored tensor.
        students: attention layers that get a seeded student mixer.
        init: what the students start from.
        seed: of the students' drawn values.
        dtype: of the activations.
        stored_dtype: of the weights that do not train here (all but the students'); theirs as stored when None.
        device: where the weights go.
        head: stored name of the output head.
    """
    network = Network(spec, students=students, dtype=dtype)

    def put(name: str, value: Tensor, number_type: torch.dtype | None) -> None:
        owner_name, _, leaf = name.rpartition(".")
        owner = network.get_submodule(owner_name)
        if isinstance(owner, Projection) and leaf == "weight":
            value = value.t()
        value = value.to(device=device, dtype=number_type or value.dtype, copy=True).contiguous()
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))

    for name, _ in list(network.named_parameters()):
        if ".attention." in name or ".student." in name or ".teacher." in name or ".out." in name:
            continue
        put(name, _plain(source, name, spec, head), stored_dtype)
    for i, layer in enumerate(network.layers):
        prefix = tensors.layer_prefix(spec, i)
        if layer.teacher is not None:
            wqkv = source(prefix + tensors.ATTENTION_PROJECTION)
            put(f"{prefix}teacher.wqkv.weight", wqkv, stored_dtype)
            put(f"{prefix}out.weight", source(prefix + "attention.wo.weight"), stored_dtype)
            if layer.student is not None:
                _put_student(put, prefix, spec, seeded_mixer(wqkv, spec, i, init=init, seed=seed), torch.float32)
        else:
            names = (*STUDENT_PARAMETERS, "wvkqgdt.weight")
            stored = {name: source(f"{prefix}attention.{name}") for name in names}
            _put_student(put, prefix, spec, stored, stored_dtype)
            put(f"{prefix}out.weight", source(prefix + "attention.o_proj.weight"), stored_dtype)
    network.ropes = MmMamba.make_ropes(spec).to(device)
    return network


def _put_student(
    put: Callable[[str, Tensor, torch.dtype | None], None],
    prefix: str,
    spec: ModelSpec,
    stored: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> None:
    rows = [spec.conv_channels, spec.heads * spec.head_dim, spec.heads]
    for name, part in zip(("wvkq", "wg", "wdt"), torch.split(stored["wvkqgdt.weight"], rows), strict=True):
        put(f"{prefix}student.{name}.weight", part, dtype)
    for name in STUDENT_PARAMETERS:
        value = stored[name]
        put(f"{prefix}student.{name}", value.squeeze(1) if name == "conv1d.weight" else value, dtype)


def _plain(source: Source, name: str, spec: ModelSpec, head: str) -> Tensor:
    """Value of a parameter outside the mixers, in the layout of the checkpoint."""
    if name == tensors.POSITIONS:
        return interpolate_positions(source(name), spec.vision)
    value = source(head if name == tensors.HEAD else name)
    if name == tensors.TEXT_TABLE and spec.special_tokens:
        return torch.cat([value, source(tensors.SPECIAL_TABLE).to(value.dtype)])
    return value


def student_tensors(student: StudentMixer) -> dict[str, Tensor]:
    """Give a student's parameters by their name in a checkpoint, without the layer's prefix and `attention.`."""
    packed = torch.cat([_value(part.weight) for part in (student.wvkq, student.wg, student.wdt)], dim=1)
    found = {name: _value(student.get_parameter(name)) for name in STUDENT_PARAMETERS}
    found["conv1d.weight"] = found["conv1d.weight"][:, None]
    return {"wvkqgdt.weight": packed.t(), **found}


def _value(parameter: Tensor) -> Tensor:
    return whole(parameter.detach()).float()


def layer_tensors(layer: Layer, *, keep_attention: bool) -> dict[str, Tensor]:
    """Give the mixer of a layer as a checkpoint stores it, without the layer's prefix and `attention.`.

    Args:
        layer: of a network.
        keep_attention: whether the teacher's mixer is stored where there are both.
    """
    out = whole(layer.out.weight.detach()).t()
    if layer.teacher is not None and (keep_attention or layer.student is None):
        return {"wqkv.weight": whole(layer.teacher.wqkv.weight.detach()).t(), "wo.weight": out}
    assert layer.student is not None
    return {**student_tensors(layer.student), "o_proj.weight": out}


def checkpoint_tensors(network: Network, kept: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor of the student's checkpoint under its stored name, but those that no network reads.

    Args:
        network: the trained one. Its positions are at the grid of its tiles, which must be that of the checkpoint.
        kept: global indices of the layers that stay attention.
    """
    spec = network.spec
    for name, parameter in network.named_parameters():
        if any(part in name for part in (".student.", ".teacher.", ".out.")):
            continue
        value = whole(parameter.detach())
        owner = network.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Projection) and name.endswith(".weight"):
            value = value.t()
        if name == tensors.POSITIONS:
            value = torch.cat([value.new_zeros(1, value.shape[1]), value])[None]
        if name == tensors.TEXT_TABLE and spec.special_tokens:
            yield tensors.SPECIAL_TABLE, value[spec.vocab_size :]
            value = value[: spec.vocab_size]
        yield name, value
    for i, layer in enumerate(network.layers):
        prefix = tensors.layer_prefix(spec, i)
        for name, value in layer_tensors(layer, keep_attention=i in kept).items():
            yield f"{prefix}attention.{name}", value


def untrained_source(spec: ModelSpec, seed: int) -> Source:
    """Give the tensors that a teacher without any training starts from, by name.

    Matrices keep the magnitude of what they are fed; those that end a residual branch are smaller the deeper the model is,
    and the head begins almost flat.
    """
    shapes = tensors.required_shapes(spec)

    def source(name: str) -> Tensor:
        shape = shapes[name]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + list(shapes).index(name))
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        deviation = 1 / math.sqrt(math.prod(shape[1:]))
        if name in (tensors.TEXT_TABLE, tensors.SPECIAL_TABLE, tensors.POSITIONS):
            deviation = 0.5
        elif name.endswith(("wo.weight", "w2.weight")):
            deviation /= math.sqrt(2 * spec.layers)
        elif name == tensors.HEAD:
            deviation *= 0.5
        return torch.randn(shape, generator=generator) * deviation

    return source
