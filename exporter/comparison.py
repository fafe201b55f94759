"""How far two results may lie apart, and how far they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mmm_export.engine_manifest import EngineManifest
from mmm_export.manifest import Dtype, Manifest, QuantizedFormat

Array = npt.NDArray[Any]
Measure = Literal["relative", "l2", "cosine", "kl"]


@dataclass(frozen=True)
class Bound:
    """A limit on one measure and why it is where it is. For "cosine" the limit is the least allowed, else the most."""

    measure: Measure
    limit: float
    reason: str


@dataclass(frozen=True)
class Comparison:
    """One compared pair.

    Attributes:
        what: what was compared, e.g. "layer 3 output".
        hop: from where to where, e.g. "PyTorch fp32 -> ONNX Runtime".
        layer: global layer index, or None.
        max_abs: largest difference.
        relative: largest difference over the largest magnitude wanted.
        l2: Euclidean length of the difference over that of what was wanted.
        cosine: of the angle between both, as vectors.
        kl: divergence of the softmaxes in nats, for logits only.
        bounds: limits that hold for this pair; none makes the row information only.
    """

    what: str
    hop: str
    layer: int | None
    max_abs: float
    relative: float
    l2: float
    cosine: float
    kl: float | None
    bounds: tuple[Bound, ...]

    @property
    def broken(self) -> tuple[Bound, ...]:
        """The bounds that this pair does not meet. A NaN meets none."""
        return tuple(bound for bound in self.bounds if not self._meets(bound))

    @property
    def passed(self) -> bool:
        return not self.broken

    def value(self, measure: Measure) -> float:
        value = getattr(self, measure)
        return float("nan") if value is None else float(value)

    def _meets(self, bound: Bound) -> bool:
        value = self.value(bound.measure)
        return value >= bound.limit if bound.measure == "cosine" else value <= bound.limit


def compare(
    what: str,
    hop: str,
    found: Array,
    wanted: Array,
    *,
    layer: int | None = None,
    bounds: tuple[Bound, ...] = (),
    logits: bool = False,
) -> Comparison:
    """Measure `found` against `wanted`, arrays of one shape; a difference in shape is our bug and raises ValueError."""
    if found.shape != wanted.shape:
        raise ValueError(f"{what}: {found.shape} against {wanted.shape}")
    found, wanted = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    difference = found - wanted
    max_abs = float(np.abs(difference).max(initial=0.0))
    scale = float(np.abs(wanted).max(initial=0.0))
    length = float(np.linalg.norm(wanted))
    both = float(np.linalg.norm(found)) * length
    return Comparison(
        what,
        hop,
        layer,
        max_abs,
        max_abs / scale if scale else max_abs,
        float(np.linalg.norm(difference)) / length if length else float(np.linalg.norm(difference)),
        float(found @ wanted) / both if both else float(not difference.any()),
        _kl(wanted, found) if logits else None,
        bounds,
    )


def _kl(wanted: Array, found: Array) -> float:
    """KL(softmax(wanted) || softmax(found)) of two vectors of logits, in nats."""
    p, q = (z - z.max() - np.log(np.exp(z - z.max()).sum()) for z in (wanted, found))
    return float((np.exp(p) * (p - q)).sum())


FP32_LOGITS = (Bound("relative", 1e-4, "float32 on both sides; only the order of sums differs, through every layer"),)
FP32_LAYER = (Bound("l2", 1e-5, "float32 against float64: about a hundred roundings (6e-8 each) reach a layer"),)
REDUCED_LOGITS = (
    Bound("kl", 1e-3, "16-bit weights and activations may move probabilities by a tenth of a percent, not answers"),
    Bound("cosine", 0.9999, "16-bit rounding is noise: it must not turn the vector of logits"),
)
SPLIT = (Bound("relative", 1e-4, "float32, the same sums in another grouping"),)
REDUCED_SPLIT = (Bound("cosine", 0.9999, "16-bit sums in another grouping round differently"),)

# How far a logit may be off before another greedy token counts as a fault, as a share of the largest logit. fp32: the bound on
# logits. 16 bits: twice what float16 models of 4 to 32 layers were seen to be off at worst.
TIE = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-3}


# What a quantized decoder may move the distribution of one token by, in nats: ten times what the mean over prompts is to stay below,
# since single tokens scatter.
QUANTIZED_KL: dict[QuantizedFormat, float] = {"int8-weights": 1e-2, "int8": 1e-1, "fp8": 1e-1, "int4": 3e-1}
# As TIE: above what logits of random models of 4 layers were seen to be off by at worst, 1.2 %, 8 %, 12 % and 16 % of the largest.
QUANTIZED_TIE: dict[QuantizedFormat, float] = {"int8-weights": 2e-2, "int8": 1e-1, "fp8": 2e-1, "int4": 2e-1}
QUANTIZED_SPLIT = (Bound("cosine", 0.999, "an activation at the edge of two levels may be rounded to either"),)


def quantized_format(manifest: Manifest | EngineManifest) -> QuantizedFormat | None:
    """Format of a quantized bundle; an engine's manifest does not tell."""
    found = manifest.quantization if isinstance(manifest, Manifest) else None
    return None if found is None else found.format


def tie_margin(dtype: Dtype, logits: Array, quantized: QuantizedFormat | None = None) -> float:
    """Two tokens whose logits differ by less are a tie: each may move by TIE."""
    share = TIE[dtype] if quantized is None else QUANTIZED_TIE[quantized]
    return 2 * share * float(np.abs(logits).max())


def logits_bounds(dtype: Dtype, quantized: QuantizedFormat | None = None) -> tuple[Bound, ...]:
    if quantized is not None:
        return (Bound("kl", QUANTIZED_KL[quantized], "ten times what the mean over prompts is to stay below"),)
    return FP32_LOGITS if dtype == "fp32" else REDUCED_LOGITS


def layer_bounds(dtype: Dtype, quantized: QuantizedFormat | None = None) -> tuple[Bound, ...]:
    """Bounds of each layer's output and states against float64; 16-bit and quantized bundles are judged by their logits alone."""
    return FP32_LAYER if dtype == "fp32" and quantized is None else ()


def split_bounds(dtype: Dtype, quantized: QuantizedFormat | None = None) -> tuple[Bound, ...]:
    """Bounds of prefill-then-step against one prefill."""
    if quantized is not None:
        return QUANTIZED_SPLIT
    return SPLIT if dtype == "fp32" else REDUCED_SPLIT
