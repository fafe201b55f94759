"""The rows and the verdict of a verification, whatever ran the two sides. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmm_export.engine_manifest import EngineManifest
from mmm_export.exporter.comparison import Bound, Comparison, compare, quantized_format, tie_margin
from mmm_export.exporter.recorded import Recording, greedy
from mmm_export.manifest import Manifest

TORCH_TO_ORT = "PyTorch fp32 -> ONNX Runtime"
ORACLE_TO_ORT = "float64 -> ONNX Runtime"
ORACLE_TO_TORCH = "float64 -> PyTorch fp32"
ONE_TO_SPLIT = "one prefill -> prefill, then steps"


@dataclass(frozen=True)
class TokenCheck:
    """Greedy tokens of both sides, and where they part first; that is excused when the two tokens are a tie, see `tie_margin`."""

    wanted: tuple[int, ...]
    found: tuple[int, ...]
    first_difference: int | None
    excused: bool

    @property
    def passed(self) -> bool:
        return self.first_difference is None or self.excused


@dataclass(frozen=True)
class VerifyReport:
    """The verdict and everything it rests on."""

    bundle: str
    checkpoint: str
    manifest: Manifest | EngineManifest
    prompt_tokens: int
    image_tokens: int
    comparisons: tuple[Comparison, ...]
    tokens: TokenCheck
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.tokens.passed and all(row.passed for row in self.comparisons)


def compare_prefill(
    hop: str, found: Recording, wanted: Recording, logits: tuple[Bound, ...], layers: tuple[Bound, ...]
) -> list[Comparison]:
    """Every value of a prefill, in the order it is computed."""
    rows = [
        compare("image features", hop, found.image_features, wanted.image_features),
        compare("embeddings", hop, found.embeds, wanted.embeds),
    ]
    for i, (output, output_wanted) in enumerate(zip(found.layers, wanted.layers, strict=True)):
        rows.append(compare(f"layer {i} output", hop, output, output_wanted, layer=i, bounds=layers))
        for name, state in found.states[i].items():
            rows.append(compare(f"layer {i} {name}", hop, state, wanted.states[i][name], layer=i, bounds=layers))
    rows.append(compare("logits", hop, found.logits, wanted.logits, bounds=logits, logits=True))
    return rows


def compare_steps(
    found: Recording, wanted: Recording, bounds: tuple[Bound, ...], hop: str = TORCH_TO_ORT
) -> list[Comparison]:
    """The logits of every decode step."""
    pairs = enumerate(zip(found.steps, wanted.steps, strict=True), 1)
    return [compare(f"logits of step {i}", hop, f, w, bounds=bounds, logits=True) for i, (f, w) in pairs]


def compare_split(parted: Recording, whole: Recording, bounds: tuple[Bound, ...]) -> list[Comparison]:
    """Logits and states after a prompt that was cut, against those of the whole prompt."""
    rows = [compare("logits", ONE_TO_SPLIT, parted.logits, whole.logits, bounds=bounds, logits=True)]
    for i, states in enumerate(whole.states):
        for name, state in states.items():
            what = f"layer {i} {name}"
            rows.append(compare(what, ONE_TO_SPLIT, parted.states[i][name], state, layer=i, bounds=bounds))
    return rows


def check_tokens(
    found: Recording, wanted: Recording, forced: Sequence[int], manifest: Manifest | EngineManifest
) -> TokenCheck:
    """Greedy choices after the prompt and after each forced token: equal as long as both would have written the same text."""
    steps_found = [found.logits, *found.steps][: len(forced)]
    steps_wanted = [wanted.logits, *wanted.steps][: len(forced)]
    chosen = [greedy(logits, manifest.model) for logits in steps_found]
    for i, (token, right) in enumerate(zip(chosen, forced, strict=True)):
        if token != right:
            margin = float(steps_wanted[i][right] - steps_wanted[i][token])
            tie = tie_margin(manifest.dtype, steps_wanted[i], quantized_format(manifest))
            return TokenCheck(tuple(forced), tuple(chosen), i, margin <= tie)
    return TokenCheck(tuple(forced), tuple(chosen), None, False)
