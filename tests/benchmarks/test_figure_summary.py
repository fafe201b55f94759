"""What is derived from measured rows: ratios, their two factors, rooflines, memory and targets."""

from __future__ import annotations

from typing import Any

import pytest
from figure_summary import TARGETS, summary_rows

Row = dict[str, Any]
GIB = 2**30


def decode(contender: str, ms: float, gib: float, *, tokens: int = 103_000, batch: int = 1) -> Row:
    bytes_ = int(gib * GIB)
    return {
        "name": "decode",
        "contender": contender,
        "batch": batch,
        "tokens": tokens,
        "ms": ms,
        "device_bytes": bytes_,
    }


ROWS: list[Row] = [
    {"name": "gpu", "model": "NVIDIA H100 80GB HBM3"},
    {"name": "ceiling_copy", "bytes_per_s": 3.0e12},
    {"name": "linear_bytes", "contender": "ours", "weights": 4_600_000_000, "state": 35_000_000},
    {"name": "teacher_bytes", "weights": 4_800_000_000, "cache_per_token": 131_072},
    decode("ours", 2.0, 6.0),
    decode("teacher-hf-eager", 90.0, 20.0),
    decode("teacher-hf-flash", 50.0, 20.0),
    decode("teacher-static-cudnn", 8.0, 18.0),
    decode("teacher-static-products", 10.0, 18.0),
    decode("triton", 3.0, 6.0, tokens=1024),
    {"name": "decode", "contender": "plain", "batch": 1, "tokens": 103_000, "missing": "no time was left"},
]


def of(name: str, **values: Any) -> Row:
    found = [r for r in summary_rows(ROWS) if r["name"] == name and all(r.get(k) == v for k, v in values.items())]
    assert len(found) == 1, (name, values)
    return found[0]


def test_a_ratio_is_the_product_of_its_algorithm_and_its_overhead() -> None:
    ratios = [row for row in summary_rows(ROWS) if row["name"] == "ratio"]
    assert len(ratios) == 3
    for row in ratios:
        assert row["ratio"] == pytest.approx(row["algorithm"] * row["overhead"])


def test_the_algorithm_is_the_fastest_static_teacher_over_ours() -> None:
    assert of("ratio", contender="teacher-hf-eager")["algorithm"] == pytest.approx(8.0 / 2.0)


def test_the_bytes_behind_the_algorithm_are_weights_and_cache_over_weights_and_state() -> None:
    found = of("ratio", contender="teacher-hf-eager")["bytes"]
    assert found == pytest.approx((4.8e9 + 131_072 * 103_001) / (4.6e9 + 2 * 35e6))
    assert "bytes" not in of("ratio", contender="triton")


def test_other_implementations_of_the_linear_model_differ_by_overhead_alone() -> None:
    row = of("ratio", contender="triton")
    assert (row["algorithm"], row["overhead"]) == (1.0, pytest.approx(1.5))


def test_what_was_not_measured_has_no_ratio() -> None:
    assert not [row for row in summary_rows(ROWS) if row["name"] == "ratio" and row["contender"] == "plain"]


def test_a_roofline_counts_weights_once_and_the_state_read_and_written() -> None:
    row = of("roofline", contender="ours")
    assert row["bytes"] == 4_670_000_000
    assert row["copy_share"] == pytest.approx(4.67e9 / 3.0e12 / 2.0e-3)
    assert row["nominal_ms"] == pytest.approx(4.67e9 / 3.35e12 * 1e3)


def test_the_teachers_roofline_reads_its_whole_cache() -> None:
    assert of("roofline", contender="teacher-static-cudnn")["bytes"] == 4_800_000_000 + 131_072 * 103_001


def test_memory_saved_is_a_share_of_theirs() -> None:
    assert of("memory", contender="teacher-hf-flash")["saved"] == pytest.approx(0.7)


def test_every_target_is_judged_or_named_as_not_measured() -> None:
    targets = [row for row in summary_rows(ROWS) if row["name"] == "target"]
    assert len(targets) == len(TARGETS)
    judged = {row["figure"]: row for row in targets if "missing" not in row}
    eager = next(row for figure, row in judged.items() if "eager" in figure)
    assert (eager["measured"], eager["is_reached"], eager["is_aim_reached"]) == (45.0, True, False)
    assert not [row for row in targets if ("missing" in row) == ("measured" in row)]
