"""What quantizing costs the demo models: accuracy on the digits task and divergence of distributions.

python benchmarks/digits_quantization.py                            writes results/digits-quantization.json
python benchmarks/digits_quantization.py --modelopt ENV/bin/python  beside nvidia-modelopt too, from an environment that has it
python benchmarks/digits_quantization.py --test 100 --results FILE  a quick look

Beside ours: the same decoder graph through other quantizers, calibrated on the same prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_bundles import CALIBRATED_ON, Bundles, bundles_from_checkpoint, write_data
from other_quantizers import Others, save_calls
from quantized_models import (
    DecoderRun,
    Outcome,
    Questions,
    ask,
    divergence,
    points_lost,
    quantized_products,
    questions,
)
from result_file import RESULTS, ROOT, write_results

from mmm_export import names
from mmm_export.calibration.plan import QuantizeOptions
from mmm_export.manifest import QUANTIZED_FORMATS, QuantizedFormat

KINDS = ("linear", "hybrid", "teacher")
MAX_TOKENS = 64  # of KV caches: every prompt of the task fits, with its answer

# What the formats are to keep to: points of accuracy lost, mean divergence in nats.
LIMITS: dict[QuantizedFormat, tuple[float, float]] = {
    "int8-weights": (0.3, 1e-3),
    "int8": (0.5, 1e-2),
    "fp8": (0.3, 5e-3),
    "int4": (1.0, 3e-2),
}
OURS = "mmm-export"


@dataclass(frozen=True)
class Model:
    """One demo model, its test prompts, and what its fp32 bundle makes of them."""

    kind: str
    asked: Questions
    whole: Outcome

    def row(self, run: DecoderRun, by: str, form: str, **more: Any) -> dict[str, Any]:
        """Measure one decoder."""
        found = ask(run, self.asked)
        lost, low, high = points_lost(self.whole, found)
        mean, tail = divergence(self.whole, found)
        row = {
            "model": self.kind,
            "by": by,
            "format": form,
            "quantized_products": quantized_products(run.path),
            **more,
            "prompts": len(found.right),
            "accuracy": round(float(found.right.mean()), 4),
            "points_lost": round(lost, 2),
            "points_lost_low": round(low, 2),
            "points_lost_high": round(high, 2),
            "kl_mean": float(f"{mean:.3g}"),
            "kl_p99": float(f"{tail:.3g}"),
        }
        if form in LIMITS and by == OURS:
            most_points, most_kl = LIMITS[form]  # type: ignore[index]
            row |= {"points_lost_limit": most_points, "kl_limit": most_kl}
            row["within"] = bool(lost <= most_points and mean <= most_kl)
        sys.stderr.write(f"{row}\n")
        return row


def rows_of(kind: str, bundles: Bundles, train: Path, test: Path, others: Others) -> Iterator[dict[str, Any]]:
    """All rows of one model."""
    bundle = bundles.plain["fp32"]
    asked = questions(bundle, test, 10**9)
    model = Model(kind, asked, ask(DecoderRun(bundle), asked))
    for dtype, plain in bundles.plain.items():
        yield model.row(DecoderRun(plain), OURS, dtype)
    for form in QUANTIZED_FORMATS:
        target = bundles.quantized(QuantizeOptions(form))
        decoder_bytes = (target / (names.DECODER_FILE + names.WEIGHTS_SUFFIX)).stat().st_size
        yield model.row(DecoderRun(target), OURS, form, decoder_bytes=decoder_bytes)
    calls = save_calls(questions(bundle, train, CALIBRATED_ON), bundles.folder / "calls.npz")
    for by, form, graph in others.graphs(bundle / names.DECODER_FILE, calls, bundles.folder):
        yield model.row(DecoderRun(bundle, graph=graph), by, form)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "demo_models", help="folder of the trained checkpoints")
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable (default: all)")
    parser.add_argument("--test", type=int, default=1000, help="test prompts (default: 1000)")
    parser.add_argument("--modelopt", type=Path, metavar="PYTHON", help="of an environment with nvidia-modelopt")
    parser.add_argument("--results", type=Path, help="result file (default: results/digits-quantization.json)")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        train = write_data(work / "train", "train", CALIBRATED_ON)
        test = write_data(work / "test", "test", options.test)
        for kind in options.kind or KINDS:
            bundles = bundles_from_checkpoint(options.models / kind, work / kind, train, MAX_TOKENS)
            for row in rows_of(kind, bundles, train, test, Others(options.modelopt)):
                rows.append(row)
                results = options.results or RESULTS / "digits-quantization.json"
                write_results(results, "quantized demo models on the digits task against their fp32 bundles", rows)
    return 0 if all(row.get("within", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
