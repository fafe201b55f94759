"""Times this runtime, PyTorch, and the attention teacher side by side on one GPU, and writes benchmarks/results/<gpu>-runtime.json.

python benchmarks/paper_figure.py --bundle BUNDLE --kernels LIBRARY --peers DIR    everything, in about four minutes on an H100
python benchmarks/paper_figure.py --tiny --device cpu                              tiny models, to try this script on any machine

BUNDLE is a full-size one: benchmarks/full_size_bundle.py makes one with random weights. LIBRARY is the libmmm_onnxruntime.so of
`mmm-export plugins build`. DIR holds the package mamba_ssm, of which its Triton operators are enough, if it is not installed.
Several bundles: --bundle BUNDLE --bundle int8=BUNDLE. Every contender runs in a process of its own, the GPU to itself; whatever fails
or finds no time is in the results as such.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

LIMITS_S = {"ours": 60, "teacher": 95, "linear": 110}
SPARE_S = 5.0  # to write the results

Row = dict[str, Any]


def run_part(options: argparse.Namespace) -> None:
    """Run one part in this process; its rows go to a file."""
    import figure_contenders as contenders
    import torch
    from figure_part import Part
    from figure_summary import OURS
    from torch_models import TORCH_DTYPES

    from mmm_export.model.testing import full_size_spec, tiny_spec

    part = Part(options.folder, options.deadline, options.device)
    sizes = _sizes(options)
    bundles = _bundles(options)
    part.note(name="memory_metric", metric=part.memory.metric)
    torch.manual_seed(0)
    if options.part == "ours":
        import figure_ours

        figure_ours.measure_bundles(part, sizes, bundles, kernels=options.kernels, chunk_tokens=options.chunk_tokens)
    elif options.part == "linear":
        contenders.measure_linear(part, sizes, bundles[OURS], options.peers)
    else:
        contenders.measure_ceilings(part)
        spec = tiny_spec(kinds="teacher") if options.tiny else full_size_spec("teacher")
        contenders.measure_teacher(part, sizes, spec, TORCH_DTYPES["fp32" if options.device == "cpu" else "bf16"])


def run_all(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Run each part in a process of its own within its limit, and return all rows, those that tell of failures too."""
    from figure_agreement import agreement_rows

    failures: list[Row] = []
    for name in options.parts or LIMITS_S:
        limit = min(LIMITS_S[name], options.deadline - time.time() - SPARE_S)
        begin = time.time()
        if limit < 5:
            failures.append({"name": "part", "part": name, "missing": "no time was left"})
            continue
        given = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--part", name]
        given += ["--folder", str(folder), "--deadline", str(begin + limit - 3)]
        reason = _run(given, limit)
        sys.stderr.write(f"== {name}: {time.time() - begin:.0f} s{', ' + reason if reason else ''}\n")
        if reason:
            failures.append({"name": "part", "part": name, "missing": reason})
    file = folder / "rows.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [*map(json.loads, lines), *agreement_rows(folder), *failures]


def _run(command: Sequence[str], limit: float) -> str | None:
    """Run a command and all it starts within a limit; why it failed, None if it did not."""
    with subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:.0f} s"
    return None if code == 0 else f"exit code {code}"


def _sizes(options: argparse.Namespace) -> Any:
    from figure_part import Sizes

    sizes = Sizes((128, 300), (1, 2), new_tokens=4, calls=2) if options.tiny else Sizes()
    given = {"lengths": options.lengths, "batches": options.batches}
    return dataclasses.replace(sizes, **{name: tuple(value) for name, value in given.items() if value})


def _bundles(options: argparse.Namespace) -> dict[str, Path]:
    """Label and folder of each bundle; a label becomes the contender's name."""
    found = {}
    for text in options.bundle or []:
        label, _, folder = text.rpartition("=")
        found[label or "ours"] = Path(folder)
    return found


def _where(device: str) -> str:
    import torch
    from result_file import machine

    return torch.cuda.get_device_name() if device == "cuda" else machine()


def _gpu_facts() -> Row:
    """What nvidia-smi tells of the GPU, driver and clocks; changes nothing."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.mem", "power.limit", "temperature.gpu")
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {"name": "gpu"}
    keys = ["model", *(field.replace(".", "_") for field in fields[1:])]
    return {"name": "gpu", **dict(zip(keys, done.stdout.splitlines()[0].split(", "), strict=True))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", action="append", metavar="[LABEL=]BUNDLE", help="the first is also PyTorch's model")
    parser.add_argument("--kernels", default="auto", help="auto, none, or a libmmm_onnxruntime.so (default: auto)")
    parser.add_argument("--peers", type=Path, help="folder with mamba_ssm")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models; a bundle is made for them")
    parser.add_argument("--seconds", type=float, default=280.0, help="for everything (default: 280)")
    parser.add_argument("--chunk-tokens", type=int, default=8192, help="prompt tokens that our runtime reads at once")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt lengths, ascending")
    parser.add_argument("--batches", type=int, nargs="+", help="rows of decode steps, from 1")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS_S), help="some of them; the order is kept")
    parser.add_argument("--results", type=Path, help="result file (default: benchmarks/results/<gpu>-runtime.json)")
    for name, kind in (("part", str), ("folder", Path), ("deadline", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    options = _parser().parse_args()
    if options.part:
        run_part(options)
        return 0
    options.deadline = time.time() + options.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.tiny and not options.bundle:
            from full_size_bundle import export_random

            dtype = "fp32" if options.device == "cpu" else "bf16"
            export_random(folder / "bundle", kind="linear", dtype=dtype, fuse=options.device == "cuda", tiny=True)
            sys.argv += ["--bundle", str(folder / "bundle")]
            options.bundle = [str(folder / "bundle")]
        if not options.bundle:
            sys.exit("error: no bundle\n\nhint: python benchmarks/full_size_bundle.py build/full-size")
        rows = run_all(options, folder)
    from figure_summary import summary_rows
    from result_file import RESULTS, gpu_word, write_results

    where = _where(options.device)
    if options.device == "cuda":
        rows.insert(0, _gpu_facts())
    results = options.results or (None if options.tiny else RESULTS / f"{gpu_word(where)}-runtime.json")
    what = "prefill and decode of the 2.7B linear model, and of its attention teacher, by contender; random weights"
    if results:
        write_results(results, what, rows, where=where)  # minutes of a GPU: kept whatever comes next
    rows += summary_rows(rows)
    if results:
        write_results(results, what, rows, where=where)
    failed = [row for row in rows if row["name"] == "part" or row.get("is_finite") is False]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
