"""What `mmm-export calibrate` says: warnings about the measurement, what was written, what quantizing costs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmm_export.rendering.text import size, table

if TYPE_CHECKING:
    from mmm_export.calibration.calibration_file import Calibration
    from mmm_export.calibration.sensitivity import Recommendation
    from mmm_export.manifest import Manifest

FEW_SAMPLES = 16


def calibration_warnings(calibration: Calibration, asked: int) -> list[str]:
    """Too few samples, and ranges that still grew in their second half."""
    lines = []
    total, unstable = len(calibration.tensors), calibration.unstable
    if calibration.samples < min(asked, FEW_SAMPLES):
        lines.append(
            f"warning: {calibration.samples} samples are few (wanted at least {FEW_SAMPLES}, up to {asked}): "
            f"{total - len(unstable)} of {total} ranges are stable"
        )
    if unstable:
        worst = max(unstable, key=lambda tensor: tensor.largest / max(tensor.first_half, 1e-30))
        lines.append(
            f"warning: {len(unstable)} of {total} ranges grew by more than 5 % in the second half of the samples, most the "
            f"input of {worst.linears[0]} ({worst.first_half:.3g} to {worst.largest:.3g}); more samples would settle them"
        )
    return lines


def quantization_summary(folder: Path, manifest: Manifest, calibration: Path) -> str:
    """Say what was written and what to do next."""
    found = manifest.quantization
    if found is None:
        raise ValueError("not quantized")
    total = sum(info.bytes for info in manifest.files.values())
    smooth = "" if found.smooth == "none" else f", smoothing {found.smooth}"
    lines = [
        f"wrote {folder}: {found.format} for {found.consumer}{smooth}, {size(total)} in {len(manifest.files)} files"
    ]
    if found.left:
        lines.append(f"left as they were: {', '.join(found.left)}")
    if found.format == "int8-weights" and found.consumer == "tensorrt":
        lines.append(
            "note: TensorRT documents weight-only for int4 alone; it may store these weights as 16 bits in the engine"
        )
    lines.append(f"calibration: {calibration}, for other formats too: --from")
    if found.consumer in ("onnxruntime", "onnxruntime-cuda", "reference"):
        lines.append(f"next: mmm-export verify {shlex.quote(str(folder))} --checkpoint CHECKPOINT")
    return "\n".join(lines)


def sensitivity(
    columns: Sequence[str], rows: Sequence[Sequence[str]], hidden: int, advice: Recommendation | None
) -> str:
    """Render the largest costs, and the recommended exceptions as the options that make them."""
    parts = [table([columns, *rows])]
    if hidden > 0:
        parts.append(f"and {hidden} more that cost less; --json and --report have all")
    if advice is not None:
        skip = "\n".join(f"  --skip {shlex.quote(name)}" for name in advice.skip) or "  no exceptions"
        parts.append(
            f"recommended:\n{skip}\nKL {advice.measured.kl_mean:.2e} measured, {advice.predicted_kl:.2e} predicted; "
            f"{size(advice.bytes)} of weights"
        )
    return "\n\n".join(parts)
