"""How far the SSM states of quantized demo models are from those of the fp32 bundle, and whether that grows with the steps.

python benchmarks/state_drift.py              writes results/digits-state-drift.json
python benchmarks/state_drift.py --steps 400  a quick look

Two things move a state away: the rounded weights and activations, from the first step on, and what adds up in the recurrence. The
error late in a sequence over the error early in it tells the second from the first: where nothing adds up it is at most 1. The fp16
bundle stands beside it. Bundles with some linear maps left as they are show which of them the first comes from.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
from demo_bundles import CALIBRATED_ON as PROMPTS
from demo_bundles import Bundles, bundles_from_checkpoint, write_data
from quantized_models import DecoderRun, distance, questions, states_during
from result_file import RESULTS, ROOT, write_results

from mmm_export import names
from mmm_export.calibration.linears import find_linears
from mmm_export.calibration.plan import QuantizeOptions
from mmm_export.manifest import QUANTIZED_FORMATS, read_manifest

KINDS = ("linear", "hybrid")  # the teacher has no states
EARLY = 200
WINDOW = 80  # steps that an error is the mean of: about two prompts, since it differs from token to token
MOST_GROWTH = 1.0
FORMING = "*.attention.wvkqgdt"  # the projection that makes v, k, q, gate and delta
OTHERS = ("*.o_proj", "*.wqkv", "*.wo", "*.feed_forward.*", "language_model.output")
# Of the weight-only format with the smallest error: what is quantized, and the linear maps that are left out.
PARTS: dict[str, tuple[str, ...]] = {
    "all but the projections into the states": (FORMING,),
    "the projections into the states alone": OTHERS,
}


def drift_rows(kind: str, bundles: Bundles, test: Path, steps: int) -> Iterator[dict[str, Any]]:
    """All rows of one model, fp16 first."""
    asked = questions(bundles.plain["fp32"], test, PROMPTS)
    windows = [range(end - WINDOW + 1, end + 1) for end in (min(EARLY, steps // 2), steps)]
    kept = {step for window in windows for step in window}
    wanted = states_during(DecoderRun(bundles.plain["fp32"]), asked, steps, kept)

    def errors(bundle: Path) -> tuple[float, float]:
        found = states_during(DecoderRun(bundle), asked, steps, kept)
        early, late = (statistics.fmean(distance(wanted[i], found[i]) for i in window) for window in windows)
        return early, late

    half = errors(bundles.plain["fp16"])
    cases = [("fp16", "", bundles.plain["fp16"])]
    cases += [(form, "all", bundles.quantized(QuantizeOptions(form))) for form in QUANTIZED_FORMATS]
    cases += [
        ("int8-weights", part, bundles.quantized(QuantizeOptions("int8-weights", skip=present(skip, bundles)), part))
        for part, skip in PARTS.items()
    ]
    for form, part, bundle in cases:
        early, late = half if form == "fp16" else errors(bundle)
        growth = late / early
        yield {
            "model": kind,
            "format": form,
            "quantized": part,
            "decoder_bytes": (bundle / (names.DECODER_FILE + names.WEIGHTS_SUFFIX)).stat().st_size,
            "early_steps": windows[0][-1],
            "late_steps": windows[1][-1],
            "early_error": rounded(early),
            "late_error": rounded(late),
            "late_error_over_fp16": rounded(late / half[1]),
            "growth": rounded(growth),
            "growth_limit": MOST_GROWTH,
            "within": bool(growth <= MOST_GROWTH),
        }


def present(patterns: tuple[str, ...], bundles: Bundles) -> tuple[str, ...]:
    """The patterns that match a linear map of the model: a linear one has no attention."""
    model = ir.load(bundles.plain["fp32"] / names.DECODER_FILE)
    known = [linear.name for linear in find_linears(model, read_manifest(bundles.plain["fp32"]).model)]
    return tuple(pattern for pattern in patterns if fnmatch.filter(known, pattern))


def rounded(number: float) -> float:
    return float(f"{number:.3g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "demo_models", help="folder of the trained checkpoints")
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable (default: all)")
    parser.add_argument("--steps", type=int, default=2000, help="decode steps (default: 2000)")
    parser.add_argument("--results", type=Path, help="result file (default: results/digits-state-drift.json)")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        train, test = (write_data(work / split, split, PROMPTS) for split in ("train", "test"))
        for kind in options.kind or KINDS:
            bundles = bundles_from_checkpoint(options.models / kind, work / kind, train, options.steps)
            for row in drift_rows(kind, bundles, test, options.steps):
                rows.append(row)
                sys.stderr.write(f"{row}\n")
                results = options.results or RESULTS / "digits-state-drift.json"
                write_results(results, "SSM states of quantized demo models against their fp32 bundles", rows)
    return 0 if all(row.get("within", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
