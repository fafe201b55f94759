"""Which tensor of a plan is what, checked against the model and against the engine that was loaded. Needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mmm_export import names
from mmm_export.engine_manifest import PlanInfo, ShapeRange
from mmm_export.errors import EngineError
from mmm_export.manifest import TensorInfo
from mmm_export.runtime.state_layout import STORAGE, StateTensor

ITEM_BYTES = {**{name: np.dtype(kind).itemsize for name, kind in STORAGE.items()}, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class StateBinding:
    """One state of one sequence.

    Attributes:
        past: name of the input; `present` that of the output.
        bytes: of one buffer.
        in_place: input and output have one address. SSM states: the kernel reads its part before it writes it. KV caches that the
            engine updates in place. All others have two buffers that swap at every call: conv states, because neighbours read what
            a channel's owner writes, and KV caches that the engine copies.
    """

    past: str
    present: str
    bytes: int
    in_place: bool


@dataclass(frozen=True)
class DecoderBindings:
    """The decoder's tensors by role.

    Attributes:
        embeds: dtype of `inputs_embeds`, by name.
        takes_lengths: whether it has the input `lengths`; likewise `takes_past_lengths`.
        vocabulary: width of the logits, which may be padded beyond the model's.
        all_logits: logits of every token of a call instead of the last.
        states: in the order of the layout.
    """

    embeds: str
    takes_lengths: bool
    takes_past_lengths: bool
    vocabulary: int
    all_logits: bool
    states: tuple[StateBinding, ...]


def decoder_bindings(
    file: str, plan: PlanInfo, layout: Sequence[StateTensor], *, hidden: int, vocabulary: int, embeds_dtype: str
) -> DecoderBindings:
    """Sort the decoder's tensors, every one of which must be known.

    Args:
        file: name of the plan, for errors.
        plan: from the manifest.
        layout: the states that the model has.
        hidden: width of `inputs_embeds`.
        vocabulary: logits are at least so wide.
        embeds_dtype: of the embedding table, whose rows are fed.

    Raises:
        EngineError: a tensor is missing, unknown, or of another type or shape.
    """
    inputs = {tensor.name: tensor for tensor in plan.inputs}
    outputs = {tensor.name: tensor for tensor in plan.outputs}
    _check(file, inputs.pop(names.INPUTS_EMBEDS, None), names.INPUTS_EMBEDS, embeds_dtype, (None, None, hidden))
    lengths = [
        _check_optional(file, inputs.pop(name, None), name, "int32", (None,))
        for name in (names.LENGTHS, names.PAST_LENGTHS)
    ]
    logits = _check(file, outputs.pop(names.LOGITS, None), names.LOGITS, "float32", (None, None, None))
    width = logits.shape[2]
    if not isinstance(width, int) or width < vocabulary:
        raise _mismatch(file, f"{names.LOGITS} of width {width}", f"at least {vocabulary}")
    states = []
    for state in layout:
        present = names.present(state.name)
        shape = (None, *state.shape[1:])
        _check(file, inputs.pop(state.name, None), state.name, state.dtype, shape)
        _check(file, outputs.pop(present, None), present, state.dtype, shape)
        if plan.in_place.get(present, state.name) != state.name:
            raise _mismatch(file, f"{present} in the place of {plan.in_place[present]}", f"in that of {state.name}")
        in_place = present in plan.in_place or _is_recurrent(state.name)
        states.append(StateBinding(state.name, present, state.bytes, in_place))
    if unknown := sorted({*inputs, *outputs}):
        raise _mismatch(
            file, f"{', '.join(unknown)}, which this version does not know", "the tensors of its model alone"
        )
    return DecoderBindings(
        embeds=embeds_dtype,
        takes_lengths=lengths[0],
        takes_past_lengths=lengths[1],
        vocabulary=width,
        all_logits=logits.shape[1] != 1,
        states=tuple(states),
    )


def vision_output_dtype(file: str, plan: PlanInfo, *, tile: tuple[int, ...], hidden: int) -> str:
    """Check the vision plan's tensors and return the dtype of image features, by name. Raises EngineError."""
    inputs = {tensor.name: tensor for tensor in plan.inputs}
    outputs = {tensor.name: tensor for tensor in plan.outputs}
    _check(file, inputs.pop(names.PIXEL_VALUES, None), names.PIXEL_VALUES, "float32", (None, *tile))
    features = outputs.pop(names.IMAGE_FEATURES, None)
    dtype = "float32" if features is None else features.dtype
    _check(file, features, names.IMAGE_FEATURES, dtype, (None, hidden))
    if unknown := sorted({*inputs, *outputs}):
        raise _mismatch(
            file, f"{', '.join(unknown)}, which this version does not know", "the tensors of its model alone"
        )
    return dtype


@dataclass(frozen=True)
class EngineTensor:
    """One tensor as a loaded engine tells it; -1 for a dimension that varies. `profiles`: (least, typical, most) of inputs."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    on_device: bool
    profiles: tuple[ShapeRange, ...] = ()


def check_engine(file: str, plan: PlanInfo, found: Sequence[EngineTensor]) -> None:
    """Hold a loaded engine against the manifest: tensors, types, fixed dimensions, and ranges of every profile.

    Raises:
        EngineError: they differ, or a tensor is wanted in host memory.
    """
    actual = {tensor.name: tensor for tensor in found}
    for is_input, expected in ((True, plan.inputs), (False, plan.outputs)):
        for tensor in expected:
            there = actual.pop(tensor.name, None)
            if there is None or there.is_input != is_input:
                side = "input" if is_input else "output"
                raise _mismatch(file, f"no {side} {tensor.name} in the plan", _told(tensor))
            fits = len(there.shape) == len(tensor.shape) and all(map(_fits, there.shape, tensor.shape))
            if there.dtype != tensor.dtype or not fits:
                raise _mismatch(file, f"{there.name} {there.dtype} {there.shape}", _told(tensor))
            if not there.on_device:
                raise _mismatch(file, f"{there.name} in host memory", "every tensor in device memory")
            if is_input:
                _check_profiles(file, plan, there)
    if actual:
        raise _mismatch(file, f"{', '.join(sorted(actual))} besides what the manifest lists", "nothing else")


def _check_profiles(file: str, plan: PlanInfo, tensor: EngineTensor) -> None:
    if len(tensor.profiles) != len(plan.profiles):
        raise _mismatch(file, f"{len(tensor.profiles)} profiles", f"{len(plan.profiles)} profiles")
    for ranges, profile in zip(tensor.profiles, plan.profiles, strict=True):
        wanted = profile.inputs[tensor.name]
        if (ranges.least, ranges.most) != (wanted.least, wanted.most):
            raise _mismatch(
                file,
                f"{tensor.name} from {ranges.least} to {ranges.most} in profile {profile.name}",
                f"from {wanted.least} to {wanted.most}",
            )


def buffer_sizes(
    bindings: DecoderBindings, *, tokens: int, hidden: int, scratch: int, vision: Mapping[str, int]
) -> dict[str, int]:
    """Bytes of every buffer of a session, by name; states that swap have a second one, see `second`.

    Args:
        bindings: of the decoder.
        tokens: most of one call.
        hidden: width of `inputs_embeds`.
        scratch: bytes that the engines compute in, one after the other.
        vision: bytes of the vision plan's tensors by name, empty without one.
    """
    rows = tokens if bindings.all_logits else 1
    sizes = {
        names.INPUTS_EMBEDS: tokens * hidden * ITEM_BYTES[bindings.embeds],
        names.LENGTHS: 4,
        names.PAST_LENGTHS: 4,
        names.LOGITS: rows * bindings.vocabulary * ITEM_BYTES["float32"],
        **vision,
    }
    for state in bindings.states:
        sizes[state.past] = state.bytes
        if not state.in_place:
            sizes[second(state.past)] = state.bytes
    sizes[SCRATCH] = scratch
    return sizes


SCRATCH = "scratch"


def second(past: str) -> str:
    """Name of the second buffer of a state that swaps."""
    return f"{past}.second"


def elements(shape: Sequence[int]) -> int:
    return prod(shape)


def _is_recurrent(past: str) -> bool:
    return past.endswith(".recurrent")


def _check_optional(file: str, found: TensorInfo | None, name: str, dtype: str, shape: tuple[int | None, ...]) -> bool:
    return found is not None and bool(_check(file, found, name, dtype, shape))


def _check(file: str, found: TensorInfo | None, name: str, dtype: str, shape: tuple[int | None, ...]) -> TensorInfo:
    told = f"{name} {dtype} ({', '.join('any' if size is None else str(size) for size in shape)})"
    if found is None:
        raise _mismatch(file, f"no {name}", told)
    fits = len(found.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(found.shape, shape, strict=True)
    )
    if found.dtype != dtype or not fits:
        raise _mismatch(file, _told(found), told)
    return found


def _fits(there: int, stated: int | str) -> bool:
    return there == stated if isinstance(stated, int) else True


def _told(tensor: TensorInfo) -> str:
    return f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})"


def _mismatch(file: str, found: str, wanted: str) -> EngineError:
    return EngineError(
        f"the inputs and outputs of {file} are not those of its model",
        found=found,
        wanted=wanted,
        hint="build the engine again: mmm-export trt",
    )
