"""The trained demo models as bundles: exported, calibrated on the digits task and quantized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmm_export import names
from mmm_export.calibration.collect import CollectOptions, collect
from mmm_export.calibration.plan import QuantizeOptions
from mmm_export.calibration.quantize import quantize_bundle
from mmm_export.exporter.bundle import ExportOptions, export_bundle
from mmm_export.manifest import Dtype, read_manifest
from mmm_export.onnxruntime_support import best_body
from mmm_export.progress import SilentProgress

CALIBRATED_ON = 128
DTYPES: tuple[Dtype, ...] = ("fp32", "fp16")


def write_data(folder: Path, split: str, count: int) -> Path:
    """The first samples of a split of the digits task as a JSONL file with pictures."""
    from mmm_export.distillation.digits.assets import packaged_assets
    from mmm_export.distillation.digits.files import DATA_FILE, write_samples
    from mmm_export.distillation.digits.samples import samples

    folder.mkdir(parents=True)
    write_samples(folder, samples(split, count), packaged_assets())  # type: ignore[arg-type]
    return folder / DATA_FILE


@dataclass(frozen=True)
class Bundles:
    """One model: its bundle in each dtype, and the calibration of the fp32 one; `folder` takes the quantized ones."""

    folder: Path
    plain: dict[Dtype, Path]
    calibration: Path

    def quantized(self, options: QuantizeOptions, name: str = "") -> Path:
        """The fp32 bundle quantized, once for each name; the format is the default."""
        target = self.folder / (name or options.format)
        if not target.exists():
            quantize_bundle(self.plain["fp32"], self.calibration, target, options)
        return target


def bundles_from_checkpoint(checkpoint: Path, folder: Path, train: Path, max_tokens: int) -> Bundles:
    """Export a checkpoint, with KV caches of so many tokens where it has attention, and calibrate it."""
    plain = {dtype: folder / dtype for dtype in DTYPES}
    for dtype, bundle in plain.items():
        export_bundle(checkpoint, bundle, ExportOptions(dtype=dtype, max_tokens=max_tokens, body=best_body()))
    target = folder / "calibration"
    wanted = CollectOptions(samples=CALIBRATED_ON)
    collect(plain["fp32"], read_manifest(plain["fp32"]), train, target, wanted, force=False, progress=SilentProgress())
    return Bundles(folder, plain, target / names.CALIBRATION_FILE)
