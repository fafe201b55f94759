"""A million prompt tokens and a hundred thousand decode steps in one context: memory, numbers, and whether cutting otherwise matters.

python benchmarks/long_runs.py --bundle BUNDLE --kernels LIBRARY    four minutes on an H100; writes results/<gpu>-long-runs.json
python benchmarks/long_runs.py --tiny --device cpu                  a tiny model and fewer tokens, to try this script

Run one reads the prompt in large chunks. Run two reads the same prompt in small ones. Then decode steps go on from run one, and
a third run reads the tokens of those steps as a prompt. Runs end by --seconds, and the results say what was reached.

Bounds. Memory: after a warm-up every mark is within 1 % of the first. Two runs: logits have a relative L2 distance of at most 5 % in
fp16 and bf16, since each run is 1 to 2 % from exact arithmetic after 32 layers that round to 8 bits; 0.1 % in fp32. An SSM state sums
products of key, value and delta, three such vectors, whose distances add up as squares: the square root of three times as much.
Drift: states forget, so the distance must not grow with the context. The median over the last ten marks is at most twice that over
the first ten, whose own scatter is about a third.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from mmm_export.runtime import Session  # noqa: E402
from mmm_export.runtime.state_file import read_state  # noqa: E402

MARKS = 50
FLAT_SHARE = 0.01
DISTANCES = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.05}
STATE_FACTOR = math.sqrt(3)
DRIFT = 2.0
MARGIN_S = 6.0  # to write the results, and to end the call under way

Row = dict[str, Any]
Array = NDArray[Any]


@dataclass
class Watch:
    """Memory and time of a run.

    Attributes:
        meter: of device memory.
        deadline: of time.monotonic().
        rows: marks as they came.
    """

    meter: Any
    deadline: float
    rows: list[Row] = field(default_factory=list)

    def mark(self, run: str, tokens: int) -> None:
        from memory import anonymous_bytes

        row = {"name": "mark", "run": run, "tokens": tokens, "device_bytes": self.meter.read()}
        self.rows.append({**row, "host_bytes": anonymous_bytes()})

    def time_left(self) -> float:
        return self.deadline - time.monotonic()


def read_prompt(
    session: Session, ids: Array, call_tokens: int, mark_tokens: int, watch: Watch, run: str, until: float
) -> tuple[Row, list[Array]]:
    """Read ids in calls of so many tokens until time.monotonic() is `until`; return the run's row and the logits at each mark."""
    marks: list[Array] = []
    begin = time.monotonic()
    done = 0
    for end in range(mark_tokens, len(ids) + 1, mark_tokens):
        for start in range(end - mark_tokens, end, call_tokens):
            logits = session.prefill(ids[start : min(start + call_tokens, end)])
        done = end
        marks.append(logits.copy())
        watch.mark(run, done)
        if time.monotonic() > until:
            break
    seconds = time.monotonic() - begin
    finite = all(bool(np.isfinite(m).all()) for m in marks)
    row: Row = {"name": "prompt", "run": run, "call_tokens": call_tokens, "tokens": done, "wanted_tokens": len(ids)}
    return {**row, "seconds": seconds, "tokens_per_s": done / seconds, "is_finite": finite}, marks


def take_steps(session: Session, ids: Array, watch: Watch, until: float) -> tuple[Row, Array]:
    """Feed ids one by one until time.monotonic() is `until`; return the run's row and the last logits."""
    times, finite = [], True
    every = max(1, len(ids) // MARKS)
    for i, token in enumerate(ids, 1):
        begin = time.perf_counter()
        logits = session.step(int(token))
        times.append(time.perf_counter() - begin)
        finite = finite and bool(np.isfinite(logits.sum()))  # one NaN or infinity makes the sum one
        if i % every == 0 or i == len(ids):
            watch.mark("steps", session.tokens)
            if time.monotonic() > until:
                break
    low, median, high = np.percentile(times, (10, 50, 90)) * 1e3
    row: Row = {"name": "steps", "steps": len(times), "wanted_steps": len(ids), "seconds": sum(times)}
    ends = {"first_ms": statistics.median(times[: len(times) // 10 + 1]) * 1e3}
    ends["last_ms"] = statistics.median(times[-(len(times) // 10) - 1 :]) * 1e3
    row |= {"ms": float(median), "low_ms": float(low), "high_ms": float(high), **ends, "is_finite": finite}
    return row, logits.copy()


def state_arrays(session: Session, folder: Path, name: str) -> dict[str, Array]:
    """Read the state of a session by way of a file, which stays."""
    path = folder / f"{name}.state"
    session.save_state(path)
    arrays = read_state(path, session.manifest).arrays
    return {key: _floats(value) for key, value in arrays.items()}


def distance(found: Array, exact: Array) -> float:
    """Relative L2 distance."""
    return float(np.linalg.norm(found - exact) / max(float(np.linalg.norm(exact)), 1e-30))


def agreement(between: str, tokens: int, logits: tuple[Array, Array], states: tuple[Any, Any], bound: float) -> Row:
    """Compare two runs that read the same tokens; of the states the worst layer counts."""
    worst = max(states[0], key=lambda name: distance(states[1][name], states[0][name]))
    row: Row = {
        "name": "agreement",
        "between": between,
        "tokens": tokens,
        "bound": bound,
        "state_bound": bound * STATE_FACTOR,
    }
    row |= {"logits_distance": distance(logits[1], logits[0]), "worst_state": worst}
    return {**row, "state_distance": distance(states[1][worst], states[0][worst])}


def run(options: argparse.Namespace, bundle: Path, folder: Path) -> list[Row]:
    """Make all runs; rows come even of what the time cut short."""
    watch = Watch(options.meter, time.monotonic() + options.seconds - MARGIN_S)
    providers = ["cuda"] if options.device == "cuda" else None
    begin = time.monotonic()
    with Session.open(
        bundle, providers=providers, kernels=options.kernels, chunk_tokens=options.chunk_tokens, check_content=False
    ) as session:
        watch.rows.append({"name": "opened", "seconds": time.monotonic() - begin, "metric": watch.meter.metric})
        return [*_runs(session, options, watch, folder), *watch.rows]


def _runs(session: Session, options: argparse.Namespace, watch: Watch, folder: Path) -> Iterator[Row]:
    manifest = session.manifest
    bound = DISTANCES[manifest.dtype]
    random = np.random.default_rng(0)
    vocab = manifest.model.vocab_size
    mark = options.prompt_tokens // MARKS
    ids = random.integers(3, vocab - 20, mark * MARKS)
    # Everything allocates at its first use, also the capture of a step as a CUDA graph: two steps for each direction.
    session.prefill(ids[:mark])
    session.prefill(ids[: options.other_tokens])
    for token in ids[:8]:
        session.step(int(token))
    session.reset()
    share = watch.time_left() / 3  # two thirds of the time for prompts at most, the rest for steps
    between = f"chunks of {options.chunk_tokens:,} and of {options.other_tokens:,} tokens"
    row, marks = read_prompt(session, ids, mark, mark, watch, "large chunks", time.monotonic() + share)
    yield {**row, "chunk_tokens": options.chunk_tokens}
    read = row["tokens"]
    logits, states = marks[-1], state_arrays(session, folder, "prompt")
    session.reset()
    row, others = read_prompt(
        session, ids[:read], options.other_tokens, mark, watch, "small chunks", time.monotonic() + share
    )
    yield {**row, "chunk_tokens": options.other_tokens}
    distances = [distance(b, a) for a, b in zip(marks, others, strict=False)]
    ten = max(1, min(10, len(distances) // 2))
    drift = statistics.median(distances[-ten:]) / max(statistics.median(distances[:ten]), 1e-12)
    yield {"name": "distances", "mark_tokens": mark, "logits": distances, "drift": drift, "bound": DRIFT}
    if row["tokens"] == read:
        yield agreement(between, read, (logits, others[-1]), (states, state_arrays(session, folder, "small")), bound)

    session.load_state(folder / "prompt.state")
    steps = random.integers(3, vocab - 20, options.steps)
    # Reading the same tokens as a prompt takes about a hundredth of the time of the steps.
    row, logits = take_steps(session, steps, watch, watch.deadline - 0.02 * options.seconds)
    yield row
    stepped = state_arrays(session, folder, "steps")
    session.load_state(folder / "prompt.state")
    read_again = session.prefill(steps[: row["steps"]])
    again = state_arrays(session, folder, "again")
    yield agreement("decode steps and a prompt", row["steps"], (logits, read_again), (stepped, again), bound)
    watch.mark("end", session.tokens)


def verdicts(rows: list[Row]) -> list[Row]:
    """What of the promises held, as rows. Of memory only where it is a GPU's: the host's allocator grows in steps of its own."""

    def verdict(of: str, holds: bool, found: float | None = None, bound: float | None = None) -> Row:
        return {"name": "verdict", "of": of, "holds": holds, "found": found, "bound": bound}

    found = []
    marks = [row["device_bytes"] for row in rows if row["name"] == "mark"]
    if any(row["name"] == "opened" and "GPU" in row["metric"] for row in rows):
        for of, bytes_ in (("last", marks[-1]), ("highest", max(marks))):
            growth = bytes_ / marks[0] - 1
            found.append(verdict(f"memory, {of} mark over first", growth <= FLAT_SHARE, growth, FLAT_SHARE))
    finite = [row["is_finite"] for row in rows if "is_finite" in row]
    found.append(verdict("all logits are finite", bool(finite) and all(finite)))
    agreements = [row for row in rows if row["name"] == "agreement"]
    shares = [row["logits_distance"] / row["bound"] for row in agreements]
    shares += [row["state_distance"] / row["state_bound"] for row in agreements]
    worst = max(shares, default=math.inf)
    found.append(
        verdict("runs agree within the bounds, as a share of them", len(agreements) == 2 and worst <= 1, worst, 1.0)
    )
    drift = max((row["drift"] for row in rows if row["name"] == "distances"), default=math.inf)
    found.append(verdict("the distance does not grow", drift <= DRIFT, drift, DRIFT))
    return found


def _floats(array: Array) -> Array:
    """Widen bfloat16 bits to float32; other types as they are."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array.astype(np.float32)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--kernels", default="auto", help="auto, none, or a libmmm_onnxruntime.so (default: auto)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    parser.add_argument("--seconds", type=float, default=240.0, help="for everything (default: 240)")
    parser.add_argument("--prompt-tokens", type=int, help="(default: 1,000,000; tiny: 20,000)")
    parser.add_argument("--steps", type=int, help="(default: 100,000; tiny: 500)")
    parser.add_argument("--chunk-tokens", type=int, default=8192, help="of the first run")
    parser.add_argument("--other-tokens", type=int, help="of the second run (default: 1,000; tiny: 100)")
    parser.add_argument("--results", type=Path, help="result file (default: benchmarks/results/<gpu>-long-runs.json)")
    return parser


def main() -> int:
    options = _parser().parse_args()
    options.prompt_tokens = options.prompt_tokens or (20_000 if options.tiny else 1_000_000)
    options.steps = options.steps or (500 if options.tiny else 100_000)
    options.other_tokens = options.other_tokens or (100 if options.tiny else 1000)
    where = None
    if options.device == "cuda":
        import torch  # it also finds the CUDA libraries that ONNX Runtime needs
        from device_memory import DeviceMemory

        options.meter, where = DeviceMemory(), torch.cuda.get_device_name()
    else:
        from mmm_export.bench.meters import AnonymousMemory

        options.meter = AnonymousMemory()
    with tempfile.TemporaryDirectory() as name:
        bundle = options.bundle
        if bundle is None and options.tiny:
            from full_size_bundle import export_random

            bundle = Path(name) / "bundle"
            is_gpu = options.device == "cuda"
            export_random(bundle, kind="linear", dtype="bf16" if is_gpu else "fp32", fuse=is_gpu, tiny=True)
        if bundle is None:
            sys.exit("error: no bundle\n\nhint: python benchmarks/full_size_bundle.py build/full-size")
        rows = run(options, bundle, Path(name))
    rows += verdicts(rows)
    from result_file import RESULTS, gpu_word, write_results

    results = options.results or (None if options.tiny else RESULTS / f"{gpu_word(where)}-long-runs.json")
    if results:
        write_results(results, "one context of a million prompt tokens and a hundred thousand steps", rows, where=where)
    for row in rows:
        if row["name"] not in ("mark", "distances"):
            sys.stderr.write(f"{row}\n")
    return 0 if all(row["holds"] for row in rows if row["name"] == "verdict") else 1


if __name__ == "__main__":
    sys.exit(main())
