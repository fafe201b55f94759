"""What it costs to quantize each linear map alone, and which to leave out for an error or a size that is asked for.

Layer after layer is opened once; a copy of the hidden states for every variant travels along. So memory holds one layer and those
states, and every variant is the real rewritten graph.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmm_export import names
from mmm_export.calibration.calibration_file import read_calibration
from mmm_export.calibration.collect import CollectOptions, Stream, embed_samples, load_samples
from mmm_export.calibration.plan import LinearPlan, Plan, QuantizeOptions
from mmm_export.calibration.quantize import check_calibration, open_source, plan_from_calibration
from mmm_export.calibration.rewrite import Rewriter
from mmm_export.calibration.segments import Decoder, HeadRows, Segment
from mmm_export.calibration.weights import Weights
from mmm_export.manifest import Manifest
from mmm_export.progress import Progress, SilentProgress

Array = NDArray[Any]
_ALL = "all together"
_ROUNDS = 4  # of adding exceptions until what is measured meets what was asked for
_STORED_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Cost:
    """Of one linear map quantized alone, or of several together.

    `layer_error`: relative L2 error of its layer's output, 0 for several; `kl_mean`, `kl_max`: divergence of the next-token
    distributions from those of the bundle, in nats; `bytes`: of its weight and scales quantized; `whole_bytes`: as it is.
    """

    name: str
    layer: int
    role: str
    layer_error: float
    kl_mean: float
    kl_max: float
    bytes: int
    whole_bytes: int


@dataclass(frozen=True)
class Recommendation:
    """Linear maps to leave out: `predicted` from single costs, `measured` with all others quantized."""

    skip: tuple[str, ...]
    bytes: int
    predicted_kl: float
    measured: Cost


@dataclass(frozen=True)
class Analysis:
    """The costs, largest first, of all together, and what is recommended, if anything was asked for."""

    bundle: str
    format: str
    samples: int
    positions: int
    costs: tuple[Cost, ...]
    together: Cost
    recommendation: Recommendation | None


def analyze(
    bundle: Path,
    calibration_file: Path,
    data: Path,
    options: QuantizeOptions,
    *,
    samples: int = 8,
    max_kl: float | None = None,
    max_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Measure every linear map that the options would quantize, on prompts of `data`.

    Args:
        bundle: that the calibration is of.
        calibration_file: with its samples beside it.
        data: prompts, as for calibrating.
        options: the format that is analysed.
        samples: prompts to run.
        max_kl: recommend exceptions until the mean divergence is at most this.
        max_bytes: recommend the exceptions that help most within so many bytes of weights.
        threads: to compute with.
        progress: told what is being done.

    Raises:
        BundleError, CalibrationError, OptionError: an input cannot be used.
    """
    progress = progress or SilentProgress()
    manifest = open_source(bundle, dataclasses.replace(options, consumer="reference"), progress)
    calibration = read_calibration(calibration_file)
    check_calibration(calibration, manifest, calibration_file)
    model = ir.load(bundle / names.DECODER_FILE)
    plan = plan_from_calibration(model, manifest, calibration, calibration_file.parent, options, progress)
    wanted = CollectOptions(samples=samples, threads=threads)
    loaded, _ = load_samples(bundle, manifest, data, wanted)
    with tempfile.TemporaryDirectory() as scratch:
        stream = embed_samples(bundle, manifest, loaded, Path(scratch))
        probe = _Probe(bundle, manifest, plan, stream, threads, progress)
        quantized = [linear for linear in plan.linears if linear.format is not None]
        chosen = {linear.linear.name: frozenset([linear.linear.name]) for linear in quantized}
        everything = frozenset(chosen)
        costs = probe.measure({**chosen, _ALL: everything}, "measure each linear map")
        singles = sorted((costs[name] for name in chosen), key=lambda cost: -cost.kl_mean)
        recommendation = None
        if max_kl is not None or max_bytes is not None:
            recommendation = _recommend(probe, singles, costs[_ALL], max_kl, max_bytes)
    return Analysis(
        str(bundle), options.format, len(loaded), len(probe.positions), tuple(singles), costs[_ALL], recommendation
    )


class _Probe:
    """Runs variants of one decoder: sets of linear maps that are quantized, the others not."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        plan: Plan,
        stream: Stream,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self.decoder = Decoder(folder, manifest)
        self._weights = Weights(ir.load(folder / names.DECODER_FILE))
        self._manifest = manifest
        self._plan = plan
        self._stream = stream
        self._threads = threads
        self._progress = progress
        # Where the model chooses a token: the end of each prompt and every token after it.
        self.positions = np.concatenate(
            [
                np.arange(start + sample.prompt_tokens - 1, start + len(sample.input_ids))
                for start, sample in zip(stream.starts, stream.samples, strict=False)
            ]
        )

    def measure(self, variants: dict[str, frozenset[str]], title: str) -> dict[str, Cost]:
        """Costs of variants by name."""
        hidden = {"": np.array(self._stream.hidden)}  # "" is the bundle itself
        errors = dict.fromkeys(variants, 0.0)
        layers = self._manifest.model.layers
        with self._progress.stage(title):
            for index in range(layers):
                here = {linear.linear.name for linear in self._plan.linears if linear.linear.layer == index}
                plain = self.decoder.open(index, threads=self._threads)
                wanted = self._run(plain, hidden[""])
                outputs: dict[str, Array] = {"": wanted}
                edited: dict[frozenset[str], Segment] = {}
                for name, members in variants.items():
                    active = members & here
                    before = hidden.get(name)
                    if before is None and not active:
                        continue
                    if active and active not in edited:
                        edited[active] = self._open(index, active)
                    segment = edited[active] if active else plain
                    outputs[name] = self._run(segment, hidden[""] if before is None else before)
                    if active and len(members) == 1:
                        difference = outputs[name].astype(np.float64) - wanted
                        errors[name] = float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))
                hidden = outputs
            return self._costs(variants, hidden, errors)

    def bytes_without(self, skip: Iterable[str]) -> int:
        """Bytes of all weights when these stay as they are."""
        left = set(skip)
        return sum(
            self.whole_bytes(linear) if linear.linear.name in left else self.quantized_bytes(linear)
            for linear in self._plan.linears
        )

    def whole_bytes(self, plan: LinearPlan) -> int:
        return plan.linear.rows * plan.linear.columns * _STORED_BYTES[self._manifest.dtype]

    def quantized_bytes(self, plan: LinearPlan) -> int:
        K, N, item = plan.linear.rows, plan.linear.quantized_columns, _STORED_BYTES[self._manifest.dtype]
        if plan.format is None:
            return self.whole_bytes(plan)
        kept = K * plan.linear.kept_columns * item
        if plan.format == "int4":
            return kept + K * N // 2 + K // plan.group * N * item
        return kept + K * N + N * item

    def _costs(
        self, variants: dict[str, frozenset[str]], hidden: dict[str, Array], errors: dict[str, float]
    ) -> dict[str, Cost]:
        layers = self._manifest.model.layers
        head = {linear.linear.name for linear in self._plan.linears if linear.linear.layer == layers}
        plain = HeadRows(self.decoder.open(layers, threads=self._threads))
        edited: dict[frozenset[str], HeadRows] = {}
        reference = _log_softmax(plain.logits(hidden[""][self.positions]))
        plans = {linear.linear.name: linear for linear in self._plan.linears}
        costs = {}
        for name, members in variants.items():
            active = members & head
            if active and active not in edited:
                edited[active] = HeadRows(self._open(layers, active))
            rows = hidden.get(name, hidden[""])[self.positions]
            found = _log_softmax((edited[active] if active else plain).logits(rows))
            kl = (np.exp(reference) * (reference - found)).sum(-1)
            if active and len(members) == 1:
                errors[name] = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
            only = plans.get(name)
            costs[name] = Cost(
                name,
                only.linear.layer if only else -1,
                only.linear.role if only else "",
                errors[name],
                float(kl.mean()),
                float(kl.max()),
                self.quantized_bytes(only) if only else self.bytes_without(set(plans) - members),
                self.whole_bytes(only) if only else sum(map(self.whole_bytes, plans.values())),
            )
        return costs

    def _open(self, index: int, active: frozenset[str]) -> Segment:
        """A segment with some of its linear maps quantized, and the factors of all of it folded."""
        linears = tuple(
            linear if linear.linear.name in active else dataclasses.replace(linear, format=None)
            for linear in self._plan.linears
            if linear.linear.layer == index
        )
        sources = tuple(source for source in self._plan.sources if source.source.layer == index)
        plan = Plan(linears, sources)

        def edit(model: ir.Model) -> None:
            dtype = "fp32" if self._manifest.dtype == "bf16" else self._manifest.dtype
            Rewriter(model, self._weights, "reference", dtype).apply(plan)

        return self.decoder.open(index, edit=edit, threads=self._threads)

    def _run(self, segment: Segment, hidden: Array) -> Array:
        out = np.empty_like(hidden)
        starts = self._stream.starts
        for begin, end in itertools.pairwise(starts):
            segment.reset()
            out[begin:end] = segment.run(hidden[begin:end])[0]
        return out


def _recommend(
    probe: _Probe, singles: Sequence[Cost], together: Cost, max_kl: float | None, max_bytes: int | None
) -> Recommendation:
    """Leave out what costs most for each byte that leaving it out takes, until the wish is met."""
    order = sorted(singles, key=lambda cost: -cost.kl_mean / max(cost.whole_bytes - cost.bytes, 1))
    total = sum(cost.kl_mean for cost in singles) or 1.0
    everything = frozenset(cost.name for cost in singles)

    def predicted(skip: Sequence[str]) -> float:
        left = sum(cost.kl_mean for cost in singles if cost.name not in skip)
        return together.kl_mean * left / total

    def measured(skip: Sequence[str]) -> Cost:
        return probe.measure({_ALL: everything - set(skip)}, f"measure with {len(skip)} exceptions")[_ALL]

    skip: list[str] = []
    if max_kl is None:
        for cost in order:
            if max_bytes is not None and probe.bytes_without([*skip, cost.name]) <= max_bytes:
                skip.append(cost.name)
        found = measured(skip)
    else:
        goal, found = max_kl, together
        for _ in range(_ROUNDS):
            waiting = [cost.name for cost in order if cost.name not in skip]
            while waiting and predicted(skip) > goal:
                skip.append(waiting.pop(0))
            found = measured(skip)
            if found.kl_mean <= max_kl or not waiting:
                break
            goal *= 0.9 * max_kl / found.kl_mean
    return Recommendation(tuple(skip), probe.bytes_without(skip), predicted(skip), found)


def _log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    shifted: Array = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return shifted
