"""The long runs' verdicts can be false, and a tiny run on a CPU holds them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from long_runs import FLAT_SHARE, agreement, distance, verdicts

Row = dict[str, Any]
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "long_runs.py"


def rows(**changes: Any) -> list[Row]:
    """Rows of a run that keeps all promises, but for `changes`."""
    given = {"last_bytes": 1000, "is_finite": True, "distance": 0.01, "drift": 1.1, **changes}
    agreements = [
        {"logits_distance": 0.01, "state_distance": given["distance"], "bound": 0.05, "state_bound": 0.05}
        for _ in range(2)
    ]
    return [
        {"name": "opened", "metric": "GPU memory"},
        {"name": "mark", "device_bytes": 1000},
        {"name": "mark", "device_bytes": given["last_bytes"]},
        {"name": "prompt", "is_finite": given["is_finite"]},
        *({"name": "agreement", **row} for row in agreements),
        {"name": "distances", "drift": given["drift"]},
    ]


def test_a_run_that_keeps_all_promises_passes() -> None:
    assert all(row["holds"] for row in verdicts(rows()))


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"last_bytes": int(1000 * (1 + 2 * FLAT_SHARE))}, "memory, last mark over first"),
        ({"is_finite": False}, "all logits are finite"),
        ({"distance": 0.06}, "runs agree within the bounds, as a share of them"),
        ({"drift": 2.5}, "the distance does not grow"),
    ],
)
def test_each_promise_can_be_broken(changes: Row, fails: str) -> None:
    assert fails in [row["of"] for row in verdicts(rows(**changes)) if not row["holds"]]


def test_a_run_without_comparison_fails() -> None:
    left = [row for row in rows() if row["name"] != "agreement"]
    assert [row["of"] for row in verdicts(left) if not row["holds"]] == [
        "runs agree within the bounds, as a share of them"
    ]


def test_the_worst_state_is_named() -> None:
    states = {"a": np.ones(4), "b": np.ones(4)}, {"a": np.ones(4), "b": 1.5 * np.ones(4)}
    row = agreement("x and y", 4, (np.ones(2), np.ones(2)), states, 0.05)
    assert (row["worst_state"], row["state_distance"]) == ("b", distance(states[1]["b"], states[0]["b"]))


@pytest.mark.slow
def test_a_tiny_run_on_a_cpu_holds_its_promises(tmp_path: Path) -> None:
    results = tmp_path / "long.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--kernels", "none", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert sum(row["tokens"] for row in found if row["name"] == "prompt") == 40_000
    assert [row["steps"] for row in found if row["name"] == "steps"] == [500]
    assert all(row["is_finite"] for row in found if "is_finite" in row)
    # One at a time and many at once are different programs; exact equality would mean that one was compared with itself.
    assert [row["logits_distance"] > 0 for row in found if row["name"] == "agreement"][-1]
