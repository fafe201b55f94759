"""What a distillation prints besides its steps."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmm_export.rendering.text import printable, size, table

if TYPE_CHECKING:
    from mmm_export.distillation.estimate import Estimate
    from mmm_export.distillation.recipe import Recipe


def seeded(output: Path, recipe: Recipe) -> str:
    """Say what a seeding wrote."""
    return f"wrote {printable(str(output))}: seeded by {recipe.seeding.init}, seed {recipe.seed}, not trained"


def estimates(found: Estimate) -> str:
    """Render a dry run."""
    from mmm_export.distillation.journal import in_words

    lengths = found.lengths
    if lengths is None:
        head = f"no data: every sample is taken to have {found.sample_tokens:,.0f} tokens"
    else:
        head = (
            f"data: {lengths.samples:,} samples; of {lengths.looked_at} looked at, {lengths.unusable} are unusable, the others "
            f"have {lengths.mean_tokens:,.0f} tokens on average, {lengths.longest_tokens:,} at most"
        )
    rows = [["stage", "trained", "weights", "moments", "gradients", "activations", "memory", "tokens", "FLOP", "time"]]
    for stage in found.stages:
        rows.append(
            [
                stage.name,
                f"{stage.trained_parameters / 1e6:,.1f} M",
                size(stage.weights_bytes),
                size(stage.moments_bytes),
                size(stage.gradients_bytes),
                size(stage.activations_bytes),
                size(stage.memory_bytes),
                f"{stage.tokens / 1e9:,.2f} G",
                f"{stage.flop:.2e}",
                in_words(stage.seconds),
            ]
        )
    total = in_words(sum(stage.seconds for stage in found.stages))
    foot = f"memory is of each of {found.gpus} GPUs, estimated; time is that of H100s: {total} in all"
    return f"{head}\n\n{table(rows, indent=2)}\n\n{foot}"


def finished(
    output: Path,
    work: Path,
    recipe: Recipe,
    *,
    done: bool,
    skipped: Mapping[str, int],
    last: Mapping[str, Mapping[str, Any]],
) -> str:
    """Say how a run ended and what to do next."""
    lines = [f"{name}: loss {float(record['loss']):.4g} at step {record['step']}" for name, record in last.items()]
    if skipped:
        reasons = ", ".join(f"{count} of {reason}" for reason, count in skipped.items())
        lines.append(f"left out: {sum(skipped.values())} unusable samples, {reasons}")
    if not done:
        lines.append(f"stopped; the state is in {printable(str(work))}: go on with the same command and --resume")
        return "\n".join(lines)
    lines.append(f"wrote {printable(str(output))}; the log is {printable(str(work / 'log.jsonl'))}")
    if not recipe.supervised:
        lines.append(f"next: mmm-export onnx {shlex.quote(str(output))} -o BUNDLE")
    return "\n".join(lines)
