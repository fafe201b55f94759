"""Makes benchmarks/results/digits-distillation.json of what benchmarks/digits_distillation.py left in its folder.

python benchmarks/digits_results.py --work DIR --where "NVIDIA H100 80GB HBM3" --commands "..."

The accuracy of each shipped model is measured anew here: its checkpoint by PyTorch and its bundle by ONNX Runtime, both in float32
on this machine's CPU, on the whole test set.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from result_file import RESULTS, write_results

from mmm_export.demo import demo_checkpoint
from mmm_export.evaluation.answering import AnswerOptions, opened
from mmm_export.evaluation.samples import read_samples
from mmm_export.evaluation.scoring import ask_all, shares
from mmm_export.exporter.bundle import ExportOptions, export_bundle

MODELS = ("teacher", "linear", "hybrid")
CURVES = RESULTS / "digits-distillation-curves.jsonl"
MAX_TOKENS = 128


def shipped(kind: str) -> dict[str, Any]:
    """Measure a shipped model, as checkpoint and as bundle."""
    samples = read_samples("digits")
    checkpoint = demo_checkpoint(kind)
    with opened(checkpoint, AnswerOptions()) as (_, answer):
        by_torch = ask_all(samples, answer)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_bundle(checkpoint, bundle, ExportOptions(max_tokens=MAX_TOKENS))
        with opened(bundle, AnswerOptions(kernels="none")) as (_, answer):
            by_onnxruntime = ask_all(samples, answer)
    found = shares(by_torch)
    low, high = found["all"].interval
    row = {
        "name": "model",
        "model": kind,
        "right": found["all"].right,
        "samples": found["all"].total,
        "accuracy": found["all"].accuracy,
        "low": round(low, 4),
        "high": round(high, 4),
        "onnxruntime_right": shares(by_onnxruntime)["all"].right,
        "other_answers": sum(one.said != other.said for one, other in zip(by_torch, by_onnxruntime, strict=True)),
        "by_kind": {name: round(share.accuracy, 4) for name, share in found.items() if name != "all"},
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
    }
    sys.stdout.write(
        f"{kind}: {row['right']} of {row['samples']}, {row['other_answers']} other answers in ONNX Runtime\n"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, action="append", help="only measure this one; repeatable")
    parser.add_argument("--where", required=True, help="the device that trained")
    parser.add_argument("--commands", required=True, help="the commands that trained")
    options = parser.parse_args()
    results = [
        json.loads(line)
        for path in sorted(options.work.glob("results*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    rows = []
    for kind in options.model or MODELS:
        kept = options.work / f"measured-{kind}.json"  # measuring takes minutes: once for each checkpoint
        if not kept.exists() or kept.stat().st_mtime < (demo_checkpoint(kind) / "model.safetensors").stat().st_mtime:
            kept.write_text(json.dumps(shipped(kind)), encoding="utf-8")
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
    if options.model:
        return
    rows += [{"name": "progress", **row} for row in results if "step" in row]
    rows += [{"name": "ablation", **row} for row in results if "stages" in row]
    rows += [{"name": "rates", **row} for row in results if str(row["run"]).startswith("rates")]
    write_results(
        RESULTS / "digits-distillation.json",
        "Accuracy on the test set of the demo task: the shipped models, and the paper's ablations in short runs",
        rows,
        where=options.where,
        command=options.commands,
    )
    curves = [path.read_text(encoding="utf-8") for path in sorted(options.work.glob("curves*.jsonl"))]
    CURVES.write_text("".join(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
