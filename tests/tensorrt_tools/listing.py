"""The layers of an engine, read from what the TensorRT-RTX builder logs, and written so that two builds compare."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PLUGIN = "custom_layer"  # the layer type of a plugin

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: "
)
_TENSOR = re.compile(
    r"Name: (?P<name>[^,]+), Dimensions: \[(?P<dims>[^]]*)\].*?Datatype: (?P<dtype>\w+), Format: (?P<format>\([^)]*\))"
)
_PROFILE = re.compile(r" \[profile (\d+)\]")


@dataclass(frozen=True)
class Tensor:
    """`name` is the builder's own, and the network's for its inputs and outputs."""

    name: str
    dtype: str
    dims: str
    format: str

    @property
    def is_state(self) -> bool:
        return self.name.startswith(("past.", "present."))


@dataclass(frozen=True)
class Layer:
    """One layer of one profile."""

    profile: int
    kind: str
    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def layers_from_log(message: str) -> list[Layer]:
    """Read the part of a log message between "Layers:" and "I/O Tensors:".

    Raises:
        ValueError: a line in it has another form.
    """
    lines = message.split("Layers:\n", 1)[1].split("I/O Tensors:", 1)[0].splitlines()
    layers: list[Layer] = []
    profile = 0
    for line in filter(str.strip, lines):
        found = _LAYER.match(line.strip())
        if found is None:
            raise ValueError(f"a layer is listed in another form: {line[:200]}")
        inputs, outputs = _tensors(found["inputs"]), _tensors(found["outputs"])
        # Listed profile after profile; only layers that touch a named tensor say which.
        mark = _PROFILE.search(line)
        profile = int(mark[1]) if mark else profile
        layers.append(Layer(profile, found["kind"], found["name"], inputs, outputs))
    return layers


def golden_text(layers: Iterable[Layer], network_tensors: Iterable[str]) -> str:
    """Write layers without what changes from build to build: numbers in names, addresses, constants.

    Tensors between layers are numbered in the order of their appearance, by profile, with type and dimensions where they are
    first written.
    """
    kept = set(network_tensors)
    lines: list[str] = []
    numbers: dict[str, str] = {}
    profile = -1
    for layer in layers:
        if layer.profile != profile:
            profile, numbers = layer.profile, {}
            lines.append(f"profile {profile}")

        def label(tensor: Tensor, known: dict[str, str] = numbers) -> str:
            if tensor.name in kept:
                return tensor.name
            new = tensor.name not in known
            number = known.setdefault(tensor.name, f"t{len(known)}")
            return f"{number}:{tensor.dtype}[{tensor.dims}]" if new else number

        inputs = " ".join(label(tensor) for tensor in layer.inputs)
        outputs = " ".join(label(tensor) for tensor in layer.outputs)
        lines.append(f"  {layer.kind} {_plain_name(layer)}: {inputs} -> {outputs}".replace(":  ->", ": ->").rstrip())
    return "\n".join(lines) + "\n"


def neighbours(layers: Iterable[Layer]) -> list[str]:
    """What the plugins of an engine read and write: one line a plugin, the same wherever it is compiled for."""
    lines = []
    for layer in (layer for layer in layers if layer.kind == PLUGIN):
        read, written = ([_role(tensor) for tensor in tensors] for tensors in (layer.inputs, layer.outputs))
        lines.append(f"profile {layer.profile}: {' '.join(read)} -> {' '.join(written)}")
    return lines


def _role(tensor: Tensor) -> str:
    name = tensor.name if tensor.is_state or tensor.name == "lengths" else "value"
    return f"{name}:{tensor.dtype}[{tensor.dims}]{tensor.format}"


def _tensors(text: str) -> tuple[Tensor, ...]:
    found = (match.groupdict() for match in _TENSOR.finditer(text))
    return tuple(Tensor(**{**row, "name": _PROFILE.sub("", row["name"])}) for row in found)


def _plain_name(layer: Layer) -> str:
    if layer.kind == PLUGIN:
        return "plugin"
    name = re.sub(r"_myl\d+_\d+$", "", _PROFILE.sub("", layer.name))
    name = re.sub(r"__mye\d+_\d+|node_|__myl_", "", name)
    return re.sub(r"_?\d+", "", name) or "-"
