"""Who is charged for the time on a GPU, in made-up timelines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from runtime_profile import charged, kind_of


def test_kernels_that_overlap_share_the_time_and_gaps_are_idle() -> None:
    found = charged(
        [
            ("void mmm::step_kernel<..>", 104.0, 113.0),  # ends 3 us after the one before
            ("nvjet_a", 100.0, 110.0),  # out of order, as a trace has them
            ("void mmm::linear_norm_kernel<..>", 115.0, 120.0),  # after 2 us in which nothing runs
            ("nvjet_b", 119.0, 125.0),
        ]
    )
    assert found == {
        "products, cuBLAS": {"count": 2, "path_us": 15.0, "idle_us": 0.0},
        "scan, one token": {"count": 1, "path_us": 3.0, "idle_us": 0.0},
        "RMS norm": {"count": 1, "path_us": 7.0, "idle_us": 2.0},
    }


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void mmm::linear_vector_kept_kernel<__nv_bfloat16, 1, 16, 2>", "products, few tokens"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "products, cuBLAS"),
        ("mmm::(anonymous namespace)::start_states(mmm::ChunkedArgs, int)", "scan, chunks"),
        ("something else", "other"),
    ],
)
def test_kernels_are_named_by_what_they_do(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind
