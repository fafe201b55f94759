"""Anonymous memory of a session while its context grows from 1K to 100K tokens: flat for a linear model.

python benchmarks/flat_memory.py            writes results/cpu-runtime-memory.json; takes some minutes
python benchmarks/flat_memory.py --tiny     to 4K tokens, a tiny model; writes a result only to --results
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from memory import MIB, anonymous_bytes
from result_file import RESULTS, write_results

MARKS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
CHUNK_TOKENS = 512
# Allocators keep freed blocks and grow in steps; a context kept in memory would add 100 times more: 100K tokens of
# the model below are 98 MiB for one float32 copy of the hidden vectors alone.
GROWTH_LIMIT_MIB = 8.0


def measure(folder: Path, marks: tuple[int, ...], *, tiny: bool) -> list[dict[str, Any]]:
    """Read random tokens up to each mark and return a row for each."""
    from mmm_export.model.testing import tiny_spec, write_checkpoint
    from mmm_export.runtime import Session

    spec = tiny_spec() if tiny else tiny_spec(heads=4, head_dim=64, embedding_layers=2, llm_layers=6)
    write_checkpoint(folder / "checkpoint", spec)
    # In a process of its own: what an export frees here would hide what the session allocates.
    command = ["-m", "mmm_export", "onnx", str(folder / "checkpoint"), "-o", str(folder / "bundle")]
    subprocess.run([sys.executable, *command], check=True)
    random = np.random.default_rng(0)
    rows = []
    with Session.open(folder / "bundle", chunk_tokens=CHUNK_TOKENS) as session:
        for mark in marks:
            ids = random.integers(3, spec.vocab_size - 15, mark - session.tokens)
            begin = time.perf_counter()
            session.prefill(ids)
            seconds = time.perf_counter() - begin
            session_tokens = session.tokens
            gc.collect()
            rows.append(
                {
                    "name": "session_memory",
                    "model": f"linear, {spec.layers} layers, hidden {spec.hidden_size}, fp32",
                    "tokens": session_tokens,
                    "chunk_tokens": CHUNK_TOKENS,
                    "anonymous_mib": round(anonymous_bytes() / MIB, 1),
                    "state_mib": round(session.state_bytes / MIB, 3),
                    "prefill_tokens_per_s": round(ids.size / seconds),
                }
            )
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and 4K tokens, to try this script")
    parser.add_argument(
        "--results", type=Path, help="result file (default: benchmarks/results/cpu-runtime-memory.json)"
    )
    options = parser.parse_args()
    marks = (1_000, 2_000, 4_000) if options.tiny else MARKS
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name), marks, tiny=options.tiny)
    growth = max(row["anonymous_mib"] for row in rows) - rows[0]["anonymous_mib"]
    results = options.results or (None if options.tiny else RESULTS / "cpu-runtime-memory.json")
    if results:
        write_results(results, "anonymous memory of the process while one context grows", rows)
    if growth > GROWTH_LIMIT_MIB:
        sys.stderr.write(f"memory grew by {growth:.1f} MiB, limit {GROWTH_LIMIT_MIB} MiB\n")
    return 0 if growth <= GROWTH_LIMIT_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
