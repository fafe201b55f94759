"""Times the mixer's kernels beside the peers' and the roofline, and writes benchmarks/results/<gpu>-kernels.json.

python benchmarks/kernels.py --peers DIR                  everything, within two minutes; DIR holds the peers' benchmark kit
python benchmarks/kernels.py --parts ceil,decode,prefill  without peers
python benchmarks/kernels.py --quick                      fewer sizes and no forced variants
python benchmarks/kernels.py --parts ceil --update        measure the ceilings anew and derive the floors from them

Every part runs in a process of its own with a time limit, so that a part that fails or hangs costs its rows alone. The
library is named by MMM_KERNEL_LIBRARY, or is the newest of `mmm-export plugins build`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

LIMITS_S = {"ceil": 25, "decode": 40, "prefill": 60, "peers-decode": 45, "peers-prefill": 110, "errors": 60}
PREFILL_TOKENS = (256, 1024, 4096, 8192, 16_384, 65_536, 103_000)
KEY = ("name", "batch", "tokens", "dtype", "state_dtype")

# Microseconds a layer that this project set out to reach on an H100: (at most, aim).
TARGETS = {
    ("decode_mixer", 1, 1): (4.0, 2.8),
    ("decode_mixer", 8, 1): (8.8, 7.0),
    ("prefill_mixer", 1, 1024): (26.0, 14.0),
    ("prefill_mixer", 1, 8192): (120.0, 80.0),
    ("prefill_mixer", 1, 103_000): (1350.0, 800.0),
}

Row = dict[str, Any]


def run_part(options: argparse.Namespace) -> None:
    """Run one part in this process, appending its rows to a file of JSON lines as they come."""
    import mixer_timing
    import torch

    tokens = options.tokens or (PREFILL_TOKENS if torch.cuda.is_available() else (64, 130))

    def note(row: Row) -> None:
        with options.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def library() -> Any:
        from gpu.kernels import Kernels, library_path

        path = library_path()
        if path is None:
            sys.exit("error: no kernel library\n\nhint: set MMM_KERNEL_LIBRARY, or run mmm-export plugins build")
        return Kernels(path)

    methods = [] if options.quick else options.methods
    with torch.no_grad():
        if options.part == "ceil":
            import gpu_timing

            note({"name": "ceiling_copy", "tb_per_s": gpu_timing.copy_bytes_per_s() / 1e12})
            note({"name": "ceiling_gemm", "tflop_per_s": gpu_timing.gemm_flop_per_s() / 1e12})
            note({"name": "ceiling_small_kernel", "us": gpu_timing.small_kernel_us()})
        elif options.part in ("decode", "prefill"):
            kernels, quick = library(), options.quick
            if options.part == "decode":
                rows = mixer_timing.decode_rows(kernels, methods, options.segments, quick=quick)
            else:
                rows = mixer_timing.prefill_rows(kernels, tokens, methods, options.segments, quick=quick)
            for row in rows:
                note(row)
        else:
            import mixer_peers

            kit = mixer_peers.Kit(options.peers)
            if options.part == "errors":
                note(mixer_peers.error_row(kit, library()))
            else:
                decode = options.part == "peers-decode"
                for row in mixer_peers.decode_rows(kit) if decode else mixer_peers.prefill_rows(kit, tokens):
                    note(row)


def run_parts(parts: list[str], arguments: list[str], budget_s: float) -> Iterator[list[Row]]:
    """Run each part in a watched child process and yield its rows, whatever it came to."""
    begin = time.monotonic()
    for part in parts:
        left = budget_s - (time.monotonic() - begin)
        if left < 5:
            sys.stderr.write(f"{part}: left out, the budget of {budget_s:.0f} s is spent\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            file, started = Path(folder) / "rows", time.monotonic()
            command = [sys.executable, __file__, *arguments, "--part", part, "--rows", str(file)]
            with subprocess.Popen(command, start_new_session=True) as child:
                try:
                    outcome = f"exit code {child.wait(min(LIMITS_S[part], left))}"
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    outcome = "stopped at its time limit"
            found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        sys.stderr.write(f"{part}: {outcome}, {len(found)} rows, {time.monotonic() - started:.0f} s\n")
        yield found


def merge(rows: list[Row]) -> list[Row]:
    """Join the rows of ours and of the peers that are about the same size, and add floors from the measured ceilings."""
    merged: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        merged.setdefault(tuple(row.get(key) for key in KEY), {}).update(row)
    ceilings = {row["name"]: row for row in rows}
    copy = ceilings.get("ceiling_copy", {}).get("tb_per_s")
    gemm = ceilings.get("ceiling_gemm", {}).get("tflop_per_s")
    for row in merged.values():
        if copy and gemm and "bytes" in row:
            row["floor_us"] = max(row["bytes"] / copy, row["operations"] / gemm) / 1e6
            row["fraction_of_roofline"] = row["floor_us"] / row["ours_us"]
    return [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for row in merged.values()]


def table(rows: list[Row]) -> list[str]:
    """One line a size: ours, with overlap, the best variant, the floor, the peers, the targets."""
    lines = [
        f"{'':32s} {'ours':>9s} {'spread':>7s} {'hot':>9s} {'overlap':>9s} {'best':>9s} {'floor':>8s} {'frac':>5s} "
        f"{'peers':>9s} {'faster':>6s} {'error':>8s}  target: at least, aim (ours / target)"
    ]
    for row in rows:
        if "ours_us" not in row and "peer_us" not in row:
            lines.append("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()))
            continue
        where = f"{row['name']} B={row['batch']} T={row['tokens']} {row['dtype']}"
        where += "" if row["state_dtype"] == "fp32" else f" state {row['state_dtype']}"
        ours, peers = row.get("ours_us"), row.get("peer_us")
        cells = [
            *(_us(row.get(k), w) for k, w in (("ours_us", 9), ("ours_spread_us", 7), ("ours_hot_us", 9))),
            *(_us(row.get(k), w) for k, w in (("ours_overlap_us", 9), ("best_us", 9), ("floor_us", 8))),
            _us(row.get("fraction_of_roofline"), 5),
            _us(peers, 9),
            f"{peers / ours:5.1f}x" if ours and peers else f"{'-':>6s}",
            f"{row['error']:8.1e}" if row.get("error") is not None else f"{'-':>8s}",
        ]
        target = TARGETS.get((row["name"], row["batch"], row["tokens"])) if row["dtype"] == "bf16" else None
        if target and ours and row["state_dtype"] == "fp32":
            cells.append(f" {target[0]:g}, {target[1]:g} ({ours / target[0]:.2f}, {ours / target[1]:.2f})")
        lines.append(f"{where:32s} " + " ".join(cells))
        if row.get("variants_us") and len(row["variants_us"]) > 2:
            named = " ".join(f"{name}={us:.4g}" for name, us in row["variants_us"].items() if us)
            lines.append(f"    best {row['best']}: {named}")
    return lines


def _us(value: float | None, width: int) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.2f}" if value < 1000 else f"{value:{width}.0f}"


def device() -> tuple[str, str]:
    """Name the GPU for people, and for a file: "NVIDIA H100 80GB HBM3", "h100"."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU: a dry run, whose figures mean nothing", "dry"
    name = torch.cuda.get_device_name(0)
    words = re.findall(r"[A-Za-z]*\d+[A-Za-z]*", name)
    return f"{name}, CUDA {torch.version.cuda}", (words[0] if words else name.split()[-1]).lower()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    numbers = lambda text: [int(word) for word in listed(text)]  # noqa: E731
    parser.add_argument("--parts", type=listed, default=["ceil", "decode", "prefill", "peers"], help="comma-separated")
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", help="the peers' benchmark kit; without it no peer is timed"
    )
    parser.add_argument("--methods", type=listed, default=["step", "chunked", "sequential"], help="variants to force")
    parser.add_argument("--segments", type=numbers, default=[1, 2, 4, 8, 12, 16, 24, 32], help="for the chunked method")
    parser.add_argument("--tokens", type=numbers, help="prompt lengths, instead of 256 to 103,000")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, no forced variants")
    parser.add_argument("--budget", type=float, default=120, metavar="SECONDS", help="for all parts [default: 120]")
    parser.add_argument("--results", type=Path, metavar="PATH", help="file or folder, instead of benchmarks/results")
    parser.add_argument("--update", action="store_true", help="keep rows of the result file that no part measures anew")
    parser.add_argument("--part", choices=LIMITS_S, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options)
        return 0

    parts = [part for part in options.parts if part != "peers"]
    if "peers" in options.parts and options.peers:
        parts += ["peers-decode", "errors", "peers-prefill"]
    unknown = [part for part in parts if part not in LIMITS_S]
    if unknown:
        parser.error(f"unknown part {unknown[0]}; wanted ceil, decode, prefill, peers")
    where, short = device()
    from result_file import RESULTS, write_results

    path = options.results or RESULTS
    if path.is_dir():
        path /= f"{short}-kernels.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if options.update and path.is_file() else []
    what = (
        "The mixer of one layer of mmMamba: this project's kernels, the peers' and the roofline, microseconds a layer"
    )
    rows = merge(kept)
    for found in run_parts(parts, sys.argv[1:], options.budget):
        kept += found
        rows = merge(kept)
        if rows and (
            options.results or short != "dry"
        ):  # after each part: one that breaks the machine costs its own rows
            write_results(path, what, rows, where=where)
            sys.stderr.write(f"wrote {path}\n")
    sys.stdout.write("\n".join([where, *table(rows)]) + "\n")
    return 0 if any("ours_us" in row for row in rows) or "ceil" in parts[:1] else 1


if __name__ == "__main__":
    sys.exit(main())
