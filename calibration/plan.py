"""What happens to each linear map: its format, the scale of its input, and the factors that move magnitude between both."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmm_export.calibration.calibration_file import Calibration, Samples
from mmm_export.calibration.factors import Candidate, choose_factor
from mmm_export.calibration.linears import Linear, Source
from mmm_export.calibration.ranges import METHODS, Method, clip_from_histogram
from mmm_export.calibration.rounding import FP8, INT8, group_size, stored_scale
from mmm_export.calibration.weights import Weights
from mmm_export.errors import OptionError
from mmm_export.manifest import CONSUMERS, QUANTIZED_FORMATS, Consumer, Dtype, QuantizedFormat
from mmm_export.progress import Advance

Array = NDArray[Any]
Head = Literal["auto", "int8", "keep"]
GROUP = 128
ACTIVATION_GRIDS = {"int8": INT8, "fp8": FP8}


@dataclass(frozen=True)
class QuantizeOptions:
    """What to write.

    Attributes:
        format: int8 (weights and activations), int8-weights, int4 (weights), fp8 (weights and activations).
        consumer: whose preferred form the graph gets.
        method: how ranges of activations are found, see `ranges`. Weight-only formats have none.
        smooth: SmoothQuant's alpha for int8, 0 to 1, or "auto" to search it (and AWQ's exponent) for each layer, or "none".
        skip: linear maps that stay as they are; `*` and `?` match.
        head: with int4, whether the head becomes int8 weight-only or stays; auto keeps it for TensorRT, whose documentation has
            no int8 weight-only, and takes int8 otherwise.
    """

    format: QuantizedFormat
    consumer: Consumer = "reference"
    method: Method = "mse"
    smooth: float | Literal["auto", "none"] = "auto"
    skip: tuple[str, ...] = ()
    head: Head = "auto"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("format", self.format, QUANTIZED_FORMATS),
            ("consumer", self.consumer, CONSUMERS),
            ("method", self.method, METHODS),
            ("head", self.head, ("auto", "int8", "keep")),
        ):
            if value not in allowed:
                raise OptionError(f"unknown {name}", found=repr(value), wanted=", ".join(allowed))
        if self.consumer == "onnxruntime-cuda" and self.format not in ("int8-weights", "int4"):
            raise OptionError(
                "our kernels on a GPU have integer weights alone",
                found=f"--format {self.format} --for {self.consumer}",
                wanted="int8-weights or int4",
                hint="TensorRT computes with int8 and fp8 activations: --for tensorrt",
            )
        if not isinstance(self.smooth, str) and not 0 <= self.smooth <= 1:
            raise OptionError("smooth is out of range", found=str(self.smooth), wanted="0 to 1, auto or none")


@dataclass(frozen=True)
class LinearPlan:
    """What becomes of one linear map.

    Attributes:
        linear: which.
        format: None when it stays.
        group: rows that share a scale in int4, else 0.
        input_scale: of the quantizer on its input, or None.
        row_factor: (K,) that the rows of the weight are multiplied by, since its input is divided by it; or None.
        column_factor: (N,) that the columns are divided by, for the factor of what follows; or None.
        importance: (K,) mean square of each input channel, which int4 ranges are chosen by; or None.
    """

    linear: Linear
    format: QuantizedFormat | None
    group: int = 0
    input_scale: float | None = None
    row_factor: Array | None = None
    column_factor: Array | None = None
    importance: Array | None = None


@dataclass(frozen=True)
class SourcePlan:
    """What becomes of one activation: the factor it is divided by, where that is folded, and how it was chosen."""

    source: Source
    factor: Array | None
    chosen: Candidate | None


@dataclass(frozen=True)
class Plan:
    """Everything that `rewrite` needs."""

    linears: tuple[LinearPlan, ...]
    sources: tuple[SourcePlan, ...]
    left: tuple[str, ...] = field(default=())


def check_names(wanted: Iterable[str], linears: Sequence[Linear]) -> set[str]:
    """Names of linear maps that patterns match. Raises OptionError for a pattern that matches none, with the nearest name."""
    known = [linear.name for linear in linears]
    chosen: set[str] = set()
    for pattern in wanted:
        matching = fnmatch.filter(known, pattern.removesuffix(".weight"))
        if not matching:
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise OptionError(
                f"no linear map is named {pattern!r}",
                wanted="a name such as " + known[0] + ", or a pattern such as *.feed_forward.w2",
                hint=f"did you mean {near[0]}?" if near else None,
            )
        chosen.update(matching)
    return chosen


def make_plan(
    sources: Sequence[Source],
    weights: Weights,
    calibration: Calibration,
    samples: Samples,
    options: QuantizeOptions,
    dtype: Dtype,
    advance: Advance = lambda done: None,
) -> Plan:
    """Choose factors and scales for every linear map.

    Raises:
        OptionError: a name to skip does not exist.
        CalibrationError: the calibration lacks an activation.
    """
    skip = check_names(options.skip, [linear for source in sources for linear in source.linears])
    source_plans: list[SourcePlan] = []
    planned: dict[str, LinearPlan] = {}
    column_factors: dict[str, Array] = {}
    for source in sources:
        formats = {linear.name: _format(linear, options, skip) for linear in source.linears}
        members = [linear for linear in source.linears if formats[linear.name] is not None]
        observed = samples.of(source.name)
        chosen = None
        if members and source.fold is not None and options.smooth != "none" and options.format in ("int8", "int4"):
            chosen = choose_factor(
                source, members, weights, observed, options.format, options.method, options.smooth, dtype
            )
        factor = None if chosen is None else chosen.factor
        if factor is not None and source.fold is not None and source.fold.kind == "linear":
            column_factors[source.fold.target] = factor
        scale = None
        if members and options.format in ACTIVATION_GRIDS:
            clip = chosen.clip if chosen is not None and chosen.factor is not None else None
            if clip is None:
                grid = ACTIVATION_GRIDS[options.format]
                clip = clip_from_histogram(observed.histogram, float(observed.maxima.max()), options.method, grid)
            scale = float(stored_scale(np.float32(clip / ACTIVATION_GRIDS[options.format].largest), dtype))
        for linear in source.linears:
            form = formats[linear.name]
            planned[linear.name] = LinearPlan(
                linear,
                form,
                group=group_size(linear.rows, GROUP) if form == "int4" else 0,
                input_scale=scale if form in ACTIVATION_GRIDS else None,
                row_factor=factor,
                importance=_importance(observed.mean_square, factor) if form == "int4" else None,
            )
        source_plans.append(SourcePlan(source, factor, chosen))
        advance(sum(linear.rows * linear.columns for linear in source.linears))
    linears = tuple(_with_columns(plan, column_factors.get(name)) for name, plan in planned.items())
    left = tuple(plan.linear.name for plan in linears if plan.format is None)
    return Plan(linears, tuple(source_plans), left)


def _format(linear: Linear, options: QuantizeOptions, skip: set[str]) -> QuantizedFormat | None:
    if linear.name in skip:
        return None
    if options.format != "int4":
        return options.format
    if linear.role == "head":
        keep = options.head == "keep" or (options.head == "auto" and options.consumer == "tensorrt")
        return None if keep else "int8-weights"
    size = group_size(linear.rows, GROUP)
    if options.consumer == "onnxruntime-cuda" and size != GROUP:
        return "int8-weights"  # the kernels have groups of this size alone
    return "int4" if size else None


def _importance(mean_square: Array, factor: Array | None) -> Array:
    return mean_square if factor is None else mean_square / np.square(factor)


def _with_columns(plan: LinearPlan, factor: Array | None) -> LinearPlan:
    if factor is None:
        return plan
    return LinearPlan(plan.linear, plan.format, plan.group, plan.input_scale, plan.row_factor, factor, plan.importance)
