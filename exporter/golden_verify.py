"""Hold a bundle or an engine against golden values, through whatever runs it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mmm_export.engine_manifest import EngineManifest
from mmm_export.exporter.comparison import Bound, Comparison, compare, logits_bounds, quantized_format, split_bounds
from mmm_export.exporter.golden import Golden, GoldenExample
from mmm_export.exporter.recorded import Recording
from mmm_export.exporter.verify_report import (
    TokenCheck,
    VerifyReport,
    check_tokens,
    compare_split,
    compare_steps,
)
from mmm_export.manifest import Dtype, Manifest, QuantizedFormat
from mmm_export.progress import Progress, SilentProgress

Array = npt.NDArray[Any]

SPLIT_TOKENS = 5  # so many of a prompt's last tokens are fed one by one in the prefill-then-step check

# Of states, where both sides computed in float32.
GOLDEN_STATES = (
    Bound("l2", 2e-5, "float32 on both sides: each may lie 1e-5 from float64, as about a hundred roundings do"),
)


class Runner(Protocol):
    """One context of a folder's model."""

    @property
    def name(self) -> str:
        """What runs it, for the report: "TensorRT 10.3.0"."""

    def reset(self) -> None:
        """Forget the context."""

    def prefill(self, input_ids: npt.NDArray[np.int64], pixel_values: Array | None) -> Array:
        """Go on with tokens and tiles, and return the logits of the last token, (vocabulary,)."""

    def image_features(self, pixel_values: Array) -> Array:
        """Features of tiles, (image tokens, hidden), as floats."""

    def states(self) -> dict[str, Array]:
        """The states, by name of the decoder's input, without the batch, as floats."""


def verify_golden(
    folder: Path,
    manifest: Manifest | EngineManifest,
    golden: Golden,
    runner: Runner,
    *,
    origin: str,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> VerifyReport:
    """Run every golden example and compare: image features, states, logits, decode steps, greedy tokens, and a cut prompt.

    Args:
        folder: the bundle or engine, for the report.
        manifest: of that folder.
        golden: checked against the manifest.
        runner: of that folder.
        origin: where the golden values come from, for the report.
        notes: sentences for the report.
        progress: told of.
    """
    progress = progress or SilentProgress()
    rows: list[Comparison] = []
    checks: list[TokenCheck] = []
    for each in golden.examples:
        hop = f"PyTorch fp32 -> {runner.name}: {each.name}"
        with progress.stage(f"run {runner.name}: {each.name}"):
            ids = each.example.input_ids
            found = _record(runner, each, len(ids))
            first = max(len(ids) - SPLIT_TOKENS, _first_after_images(ids, manifest.model.image_token_id))
            parted = _record(runner, each, first, steps=False)
        rows += _compare(hop, found, each.wanted, manifest.dtype, quantized_format(manifest))
        rows += compare_steps(found, each.wanted, logits_bounds(manifest.dtype, quantized_format(manifest)), hop)
        rows += compare_split(parted, found, split_bounds(manifest.dtype, quantized_format(manifest)))
        checks.append(check_tokens(found, each.wanted, each.forced, manifest))
    prompts = [each.example.input_ids for each in golden.examples]
    return VerifyReport(
        str(folder),
        origin,
        manifest,
        sum(map(len, prompts)),
        sum(int((ids == manifest.model.image_token_id).sum()) for ids in prompts),
        tuple(rows),
        _worst(checks),
        tuple(notes),
    )


def _record(runner: Runner, golden: GoldenExample, first: int, *, steps: bool = True) -> Recording:
    """Prefill the first tokens, with all tiles, feed the rest one by one, and step over the golden tokens."""
    example = golden.example
    pixels = example.pixel_values if len(example.pixel_values) else None
    features = golden.wanted.image_features[:0] if pixels is None else runner.image_features(pixels)
    recording = Recording(features, np.zeros((0, 0)))
    runner.reset()
    recording.logits = runner.prefill(example.input_ids[:first], pixels)
    for token in example.input_ids[first:]:
        recording.logits = runner.prefill(np.array([token]), None)
    states = runner.states()
    recording.states = [{name: states[name] for name in wanted} for wanted in golden.wanted.states]
    if steps:
        recording.steps = [runner.prefill(np.array([token]), None) for token in golden.forced]
    return recording


def _first_after_images(ids: npt.NDArray[np.int64], image_token_id: int) -> int:
    """A prompt can be cut only behind its image tokens: they and their tiles are given together."""
    places = np.flatnonzero(ids == image_token_id)
    return int(places[-1]) + 1 if len(places) else 1


def _compare(
    hop: str, found: Recording, wanted: Recording, dtype: Dtype, quantized: QuantizedFormat | None
) -> list[Comparison]:
    bounds = (
        GOLDEN_STATES if dtype == "fp32" and quantized is None else ()
    )  # 16 bits and less are judged by their logits alone
    rows = []
    if len(wanted.image_features):
        rows.append(compare("image features", hop, found.image_features, wanted.image_features))
    for i, states in enumerate(wanted.states):
        for name, state in states.items():
            short = name.rsplit(".", 1)[1].replace("recurrent", "ssm")
            rows.append(compare(f"layer {i} {short}", hop, found.states[i][name], state, layer=i, bounds=bounds))
    rows.append(
        compare("logits", hop, found.logits, wanted.logits, bounds=logits_bounds(dtype, quantized), logits=True)
    )
    return rows


def _worst(checks: Sequence[TokenCheck]) -> TokenCheck:
    """One check for all examples: the first that failed, else the first that parts at a tie, else all tokens together."""
    parted = sorted((check for check in checks if check.first_difference is not None), key=lambda check: check.passed)
    if parted:
        return parted[0]
    wanted = tuple(token for check in checks for token in check.wanted)
    return TokenCheck(wanted, wanted, None, excused=False)
