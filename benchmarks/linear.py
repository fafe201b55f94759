"""Times the matrix products of a decode step beside cuBLAS and the memory's rate, and writes benchmarks/results/<gpu>-linear.json.

python benchmarks/linear.py              every format, batch 1 and 8
python benchmarks/linear.py --search 3   and look for better spreads of the kernels, three seconds for each format and batch

A step is that of the released model: 32 layers and the head. "products" are its products alone; "chain" has the norms, the
residuals and SiLU fused in, as a decoder needs them, and each product reads what the one before wrote. The peer is F.linear with bf16
weights, the products alone. All run from a CUDA graph, over the weights of all layers, which are many times the L2. The library is
named by MMM_KERNEL_LIBRARY, or is the newest of `mmm-export plugins build`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import gpu_timing  # noqa: E402
import torch  # noqa: E402
from gpu.linear_calls import FORMATS, Product, error_of, random_weight, weight_bytes  # noqa: E402

LAYERS = 32
# name: outputs, inputs
SHAPES = {
    "in": (6160, 2048),
    "out": (2048, 2048),
    "gate_up": (16_384, 2048),
    "down": (2048, 8192),
    "head": (92_553, 2048),
}
if not gpu_timing.CUDA:  # a dry run
    LAYERS = 2
    SHAPES = {"in": (160, 128), "out": (128, 128), "gate_up": (1024, 128), "down": (128, 512), "head": (97, 128)}
HIDDEN, WIDE = SHAPES["down"]
# Milliseconds of the products of a step, batch 1, that this project set out to reach on an H100.
TARGETS_MS = {"plain": 1.60, "int8": 0.95, "int4": 0.70}
DEPTHS, WARPS, TURNS, BLOCKS = (2, 3, 4), (8, 16), (1, 2), (1, 2, 3)

Row = dict[str, Any]


@dataclass
class Step:
    """The weights of a step in one format, and its calls.

    Args:
        weights: for each shape, one weight and its scales a layer.
        picks: variant of the kernels for each shape; 0 leaves the choice to the library.
    """

    kernels: Any
    weight_format: str
    batch: int
    weights: dict[str, list[tuple[Any, Any]]]
    picks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SHAPES, 0))

    def calls(self, *, chain: bool) -> list[Product]:
        half = {"device": gpu_timing.DEVICE, "dtype": torch.bfloat16}
        stream = torch.randn(self.batch, HIDDEN, **half)
        wide = torch.randn(self.batch, WIDE, **half)
        norm = torch.ones(HIDDEN, **half)
        out = {name: torch.zeros(self.batch, outputs, **half) for name, (outputs, _) in SHAPES.items()}
        out["head"] = out["head"].float()
        activated = torch.zeros(self.batch, WIDE, **half)
        found = []

        def call(name: str, layer: int, x: Any, to: Any, **options: Any) -> None:
            weight, scales = self.weights[name][layer]
            x = x[:, : SHAPES[name][1]]
            found.append(
                Product(self.kernels, x, weight, scales, to, variant=self.picks[name], overlap=True, **options)
            )

        for layer in range(LAYERS):
            if chain:
                call("in", layer, stream, out["in"], norm_weight=norm)
                call("out", layer, out["in"], stream, residual=stream)
                call("gate_up", layer, stream, activated, norm_weight=norm, silu=True)
                call("down", layer, activated, stream, residual=stream)
            else:
                for name in ("in", "out", "gate_up", "down"):
                    call(name, layer, wide, out[name])
        call("head", 0, stream if chain else wide, out["head"], norm_weight=norm if chain else None)
        return found

    def ms(self, *, chain: bool, replays: int = 30) -> float:
        calls = self.calls(chain=chain)
        return graph_ms(lambda _: [call() for call in calls], replays)


def graph_ms(work: Callable[[int], object], replays: int) -> float:
    return gpu_timing.graph_time(work, 1, replays=replays, budget_s=0.05 * replays).us / 1e3


def drawn_weights(weight_format: str) -> dict[str, list[tuple[Any, Any]]]:
    return {
        name: [random_weight(weight_format, *shape) for _ in range(1 if name == "head" else LAYERS)]
        for name, shape in SHAPES.items()
    }


def shape_rows(step: Step, bytes_per_s: float) -> list[Row]:
    """Each shape alone, over the weights of all layers: without and with overlap, and cuBLAS."""
    rows = []
    for name, (outputs, inputs) in SHAPES.items():
        weights = step.weights[name]
        x = torch.randn(step.batch, inputs, device=gpu_timing.DEVICE).bfloat16()
        out = torch.zeros(step.batch, outputs, device=gpu_timing.DEVICE, dtype=torch.bfloat16)
        row: Row = {
            "name": "linear",
            "shape": name,
            "outputs": outputs,
            "inputs": inputs,
            "batch": step.batch,
            "dtype": "bf16",
            "weight_format": step.weight_format,
            "variant": step.picks[name],
            "bytes": weight_bytes(step.weight_format, outputs, inputs),
        }
        for key, overlap in (("ours", False), ("ours_overlap", True)):
            calls = [
                Product(step.kernels, x, *pair, out, variant=step.picks[name], overlap=overlap) for pair in weights
            ]
            timing = gpu_timing.graph_time(lambda i, calls=calls: calls[i](), len(calls), per_graph=3)
            row |= {f"{key}_us": timing.us, f"{key}_spread_us": timing.spread_us}
        row["floor_us"] = row["bytes"] / bytes_per_s * 1e6
        row["fraction_of_roofline"] = row["floor_us"] / row["ours_overlap_us"]
        row["tb_per_s"] = row["bytes"] / row["ours_overlap_us"] / 1e6
        if step.weight_format == "plain":
            peer = gpu_timing.graph_time(
                lambda i, weights=weights, x=x: torch.nn.functional.linear(x, weights[i][0]), len(weights), per_graph=3
            )
            row |= {"peer_us": peer.us, "peer_spread_us": peer.spread_us}
        row["error"] = error_of(step.kernels, step.weight_format, step.batch, min(outputs, 4099), inputs)
        rows.append(row)
    return rows


def search(step: Step, seconds: float) -> None:
    """Change the picks to the best that is found within whole steps, one shape after the other, twice."""
    begin, best = time.monotonic(), step.ms(chain=True, replays=7)
    for _ in range(2):
        for name in ("gate_up", "down", "in", "out", "head"):
            kept = step.picks[name]
            for variant in _variants(name):
                if time.monotonic() - begin > seconds:
                    break
                step.picks[name] = variant
                ms = step.ms(chain=True, replays=7)
                if ms < best:
                    best, kept = ms, variant
            step.picks[name] = kept


def _variants(name: str) -> list[int]:
    turns: Sequence[int] = (2,) if name == "gate_up" else TURNS
    blocks: Sequence[int] = (1,) if name in ("out", "down") else BLOCKS
    return [
        depth * 10_000 + warps * 100 + turn * 10 + block
        for depth in DEPTHS
        for warps in WARPS
        for turn in turns
        for block in blocks
        if 2 * depth * warps * turn * block <= 200 and warps * block <= 32  # KiB of rings; the registers
    ]


def step_row(step: Step, bytes_per_s: float) -> Row:
    bytes_ = sum(
        weight_bytes(step.weight_format, *shape) * (1 if name == "head" else LAYERS) for name, shape in SHAPES.items()
    )
    row: Row = {
        "name": "linear_step",
        "batch": step.batch,
        "dtype": "bf16",
        "weight_format": step.weight_format,
        "bytes": bytes_,
        "floor_ms": bytes_ / bytes_per_s * 1e3,
        "products_ms": step.ms(chain=False),
        "chain_ms": step.ms(chain=True),
    }
    if step.weight_format == "plain":
        x = torch.randn(step.batch, WIDE, device=gpu_timing.DEVICE).bfloat16()
        operands = [
            (x[:, : SHAPES[n][1]], w) for i in range(LAYERS) for n in list(SHAPES)[:4] for w in [step.weights[n][i][0]]
        ]
        operands.append((x[:, :HIDDEN], step.weights["head"][0][0]))
        row["peer_ms"] = graph_ms(lambda _: [torch.nn.functional.linear(*pair) for pair in operands], 30)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--search", type=float, default=0, metavar="SECONDS", help="for each format and batch")
    parser.add_argument("--results", type=Path, metavar="PATH", help="file or folder, instead of benchmarks/results")
    options = parser.parse_args()
    from gpu.kernels import library_path
    from kernels import device
    from result_file import RESULTS, write_results

    from mmm_export.plugins.library import load_library

    path = library_path()
    if path is None:
        sys.exit("error: no kernel library\n\nhint: set MMM_KERNEL_LIBRARY, or run mmm-export plugins build")
    kernels = load_library(path)
    where, short = device()
    bytes_per_s = gpu_timing.copy_bytes_per_s()
    rows: list[Row] = [{"name": "ceiling_copy", "tb_per_s": bytes_per_s / 1e12}]
    with torch.no_grad():
        for weight_format in options.formats:
            weights = drawn_weights(weight_format)
            for batch in options.batches:
                step = Step(kernels, weight_format, batch, weights)
                rows += shape_rows(step, bytes_per_s)
                rows.append(step_row(step, bytes_per_s))
                sys.stdout.write(f"{rows[-1]}\n")
                if options.search:
                    search(step, options.search)
                    found = step_row(step, bytes_per_s)
                    rows[-1] |= {f"best_{key}": found[key] for key in ("products_ms", "chain_ms")}
                    rows[-1]["best_variants"] = dict(step.picks)
                    sys.stdout.write(f"{rows[-1]}\n")
                sys.stdout.flush()
    rows = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    for row in rows:
        if row["name"] == "linear":
            peer = f"cuBLAS {row['peer_us']:7.1f}" if "peer_us" in row else " " * 14
            sys.stdout.write(
                f"{row['weight_format']:6s} batch {row['batch']} {row['shape']:8s} {row['ours_us']:7.2f} us, overlapping "
                f"{row['ours_overlap_us']:7.2f}, {row['tb_per_s']:.2f} TB/s, {peer}, error {row['error']:.1e}\n"
            )
    target = options.results or RESULTS
    if target.is_dir():
        target /= f"{short}-linear.json"
    what = "The matrix products of one decode step of mmMamba: this project's kernels, cuBLAS and the memory's rate"
    if options.results or short != "dry":
        write_results(target, what, rows, where=where)
        sys.stdout.write(f"wrote {target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
