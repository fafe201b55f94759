"""What quantizing costs the demo models: accuracy on the digits task, divergence of distributions, drift of states.

python benchmarks/digits_quantization.py                 writes results/digits-quantization.json
python benchmarks/digits_quantization.py --test 100 --results FILE      a quick look

Beside ours: the same decoder graph through onnxruntime.quantization's static quantizer, calibrated on the same prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quantized_models import (
    DecoderRun,
    Outcome,
    Questions,
    ask,
    distance,
    divergence,
    points_lost,
    questions,
    states_after,
)
from result_file import RESULTS, ROOT, write_results

from mmm_export import names
from mmm_export.calibration.collect import CollectOptions, collect
from mmm_export.calibration.plan import QuantizeOptions
from mmm_export.calibration.quantize import quantize_bundle
from mmm_export.exporter.bundle import ExportOptions, export_bundle
from mmm_export.manifest import QUANTIZED_FORMATS, QuantizedFormat, read_manifest
from mmm_export.onnxruntime_support import best_body
from mmm_export.progress import SilentProgress

KINDS = ("linear", "hybrid", "teacher")
CALIBRATED_ON = 128
STEPS = (200, 2000)
MAX_TOKENS = 2560  # of KV caches: a drift of 2,000 steps fits

# What the formats are to keep to: points of accuracy lost, mean divergence in nats.
LIMITS: dict[QuantizedFormat, tuple[float, float]] = {
    "int8-weights": (0.3, 1e-3),
    "int8": (0.5, 1e-2),
    "fp8": (0.3, 5e-3),
    "int4": (1.0, 3e-2),
}


@dataclass(frozen=True)
class Model:
    """One demo model: its bundles, its prompts, what the fp32 bundle makes of them."""

    kind: str
    bundle: Path
    asked: Questions
    whole: Outcome
    plain: DecoderRun
    states: list[list[Any]]  # SSM states of the fp32 bundle after STEPS; none where no layer has one


def write_data(folder: Path, split: str, count: int) -> Path:
    """The first samples of a split of the digits task as a JSONL file with pictures."""
    from mmm_export.distillation.digits.assets import packaged_assets
    from mmm_export.distillation.digits.files import DATA_FILE, write_samples
    from mmm_export.distillation.digits.samples import samples

    folder.mkdir(parents=True)
    write_samples(folder, samples(split, count), packaged_assets())  # type: ignore[arg-type]
    return folder / DATA_FILE


def ort_static(model: Model, train: Path, folder: Path, method: str) -> Path:
    """Quantize the decoder of a bundle with ONNX Runtime's own static quantizer: int8, by column, symmetric, Q/DQ."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    run, calls = model.plain, questions(model.bundle, train, CALIBRATED_ON)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(range(len(calls.lengths)))

        def get_next(self) -> dict[str, Any] | None:
            i = next(self._rows, None)
            if i is None:
                return None
            length = int(calls.lengths[i])
            # Prompt and answer in one call: the sums are the same as in a prefill and steps.
            said = int((calls.answers[i] >= 0).sum()) - 1
            embeds = np.concatenate([calls.embeds[i, :length], calls.answer_embeds[i, :said]])[None]
            run.begin(1)
            feeds = {names.INPUTS_EMBEDS: embeds, names.LENGTHS: np.array([length + said], np.int32), **run._state}
            if any(node.name == names.PAST_LENGTHS for node in run.session.get_inputs()):
                feeds[names.PAST_LENGTHS] = np.zeros(1, np.int32)
            return feeds

    target = folder / f"static-{method}.onnx"
    quantize_static(
        model.bundle / names.DECODER_FILE,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "MatMulConstBOnly": True},
    )
    return target


def row_of(model: Model, run: DecoderRun, by: str, form: str, more: dict[str, Any]) -> dict[str, Any]:
    """Measure one decoder."""
    found = ask(run, model.asked)
    lost, low, high = points_lost(model.whole, found)
    mean, tail = divergence(model.whole, found)
    row = {
        "model": model.kind,
        "by": by,
        "format": form,
        **more,
        "prompts": len(found.right),
        "accuracy": round(float(found.right.mean()), 4),
        "points_lost": round(lost, 2),
        "points_lost_low": round(low, 2),
        "points_lost_high": round(high, 2),
        "kl_mean": float(f"{mean:.3g}"),
        "kl_p99": float(f"{tail:.3g}"),
    }
    if form in LIMITS and by == "mmm-export":
        most_points, most_kl = LIMITS[form]  # type: ignore[index]
        row |= {"points_lost_limit": most_points, "kl_limit": most_kl}
        row["within"] = bool(lost <= most_points and mean <= most_kl)
    if model.states and by == "mmm-export" and form != "fp32":
        early, late = map(distance, model.states, states_after(run, model.asked, STEPS))
        row |= {
            f"state_error_{STEPS[0]}_steps": float(f"{early:.3g}"),
            f"state_error_{STEPS[1]}_steps": float(f"{late:.3g}"),
        }
    sys.stderr.write(f"{row}\n")
    return row


def rows_of(kind: str, checkpoint: Path, work: Path, test: Path, train: Path) -> Iterator[dict[str, Any]]:
    """All rows of one model."""
    bundles = {}
    for dtype in ("fp32", "fp16"):
        bundles[dtype] = work / f"{kind}-{dtype}"
        export_bundle(checkpoint, bundles[dtype], ExportOptions(dtype=dtype, max_tokens=MAX_TOKENS, body=best_body()))  # type: ignore[arg-type]
    bundle = bundles["fp32"]
    asked = questions(bundle, test, 10**9)
    plain = DecoderRun(bundle)
    states = [] if kind == "teacher" else states_after(plain, asked, STEPS)
    model = Model(kind, bundle, asked, ask(plain, asked), plain, states)
    yield row_of(model, DecoderRun(bundle), "mmm-export", "fp32", {})
    yield row_of(model, DecoderRun(bundles["fp16"]), "mmm-export", "fp16", {})
    calibration = work / f"{kind}.calibration"
    options = CollectOptions(samples=CALIBRATED_ON)
    collect(bundle, read_manifest(bundle), train, calibration, options, force=False, progress=SilentProgress())
    for form in QUANTIZED_FORMATS:
        target = work / f"{kind}-{form}"
        quantize_bundle(bundle, calibration / names.CALIBRATION_FILE, target, QuantizeOptions(form))
        sizes = {"decoder_bytes": (target / "decoder.onnx.data").stat().st_size}
        yield row_of(model, DecoderRun(target), "mmm-export", form, sizes)
    for method in ("MinMax",):  # its histograms want all prompts of one length
        graph = ort_static(model, train, work, method)
        yield row_of(model, DecoderRun(bundle, graph=graph), f"onnxruntime static, {method}", "int8", {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "demo_models", help="folder of the trained checkpoints")
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable (default: all)")
    parser.add_argument("--test", type=int, default=1000, help="test prompts (default: 1000)")
    parser.add_argument("--data", type=Path, help="folder with train/ and test/ in place of the task's own")
    parser.add_argument("--results", type=Path, help="result file (default: results/digits-quantization.json)")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if options.data is None:
            train, test = (
                write_data(work / "train", "train", CALIBRATED_ON),
                write_data(work / "test", "test", options.test),
            )
        else:
            train, test = options.data / "train" / "data.jsonl", options.data / "test" / "data.jsonl"
        for kind in options.kind or KINDS:
            for row in rows_of(kind, options.models / kind, work, test, train):
                rows.append(row)
                results = options.results or RESULTS / "digits-quantization.json"
                write_results(results, "quantized demo models on the digits task against their fp32 bundles", rows)
    return 0 if all(row.get("within", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
