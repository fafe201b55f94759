"""Documents and figures come from result files: here from one that a tiny run on a CPU writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import figures
import pytest
import runtime_plots
import runtime_tables

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "paper_figure.py"
TINY = ("--tiny", "--device", "cpu", "--kernels", "none", "--seconds", "200")
# float32 on both sides: sums of some hundred products in another order.
FLOAT32_DISTANCE = 1e-4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("figure") / "cpu-runtime.json"
    command = [sys.executable, str(SCRIPT), *TINY, "--results", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def data(results: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return found


def test_every_contender_is_measured_and_none_is_missing(data: dict[str, Any]) -> None:
    measured = {row["contender"] for row in data["rows"] if row["name"] == "decode" and "missing" not in row}
    static = {"teacher-static-cudnn", "teacher-static-flash", "teacher-static-products"}
    assert measured == {"ours", "plain", "triton", "teacher-hf-eager", "teacher-hf-flash"} | static
    assert {row["batch"] for row in data["rows"] if row["name"] == "decode" and row["contender"] == "ours"} == {1, 2}
    assert not [row for row in data["rows"] if "missing" in row and row["name"] != "target"]


def test_all_contenders_compute_the_same_logits(data: dict[str, Any]) -> None:
    found = {row["contender"]: row for row in data["rows"] if row["name"] == "agreement"}
    assert {"ours", "plain", "triton", "teacher-eager", "teacher-flash", "teacher-cudnn"} == set(found)
    assert max(row["distance"] for row in found.values()) < FLOAT32_DISTANCE
    assert found["ours"]["distance"] > 0  # another program than the reference


def test_each_table_holds_each_contender(data: dict[str, Any]) -> None:
    table = runtime_tables.runtime_table(data)
    assert all(name in table for name in runtime_tables.CONTENDERS.values())
    assert "teacher, growing cache, eager attention" in runtime_tables.ratios_table(data)
    assert "cuDNN attention" in runtime_tables.roofline_table(data)
    assert "teacher, static cache" in runtime_tables.memory_table(data)
    assert runtime_tables.targets_table(data).count("not measured") == 10  # a tiny model is none of them
    assert "9 of 9" in runtime_tables.agreement_table(data)


def test_a_figure_carries_the_hash_of_its_results(results: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [bench] is not installed")
    assert figures.digest(results) in runtime_plots.draw(results)
