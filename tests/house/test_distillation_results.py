"""The committed results of the demo task: what was measured of what the paper shows."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
ROWS = json.loads((RESULTS / "digits-distillation.json").read_text(encoding="utf-8"))["rows"]
MODELS: dict[str, dict[str, Any]] = {row["model"]: row for row in ROWS if row["name"] == "model"}
# Standard deviation of a share of 1,000 samples near 95 % is 0.007.
NOISE = 0.007


def runs(stages: str, init: str = "inherit+mimic") -> list[float]:
    """Accuracy of each seed in the short runs of linear students."""
    wanted = ("ablation", init, stages, 0)
    keys = ("name", "init", "stages", "attention_layers")
    found = {row["seed"]: row["accuracy"] for row in ROWS if tuple(row.get(key) for key in keys) == wanted}
    assert len(found) == 3, wanted  # three seeds
    return list(found.values())


def after(run: str, stage: str) -> float:
    """Accuracy at the end of a stage of the shipped models."""
    rows = [row for row in ROWS if row["name"] == "progress" and (row["run"], row["stage"]) == (run, stage)]
    steps = {row["step"]: row["accuracy"] for row in rows}
    return float(steps[max(steps)])


def test_teacher_and_hybrid_are_as_good_as_asked_for() -> None:
    assert MODELS["teacher"]["accuracy"] >= 0.97
    assert MODELS["hybrid"]["accuracy"] >= MODELS["teacher"]["accuracy"] - 0.01


def test_the_linear_student_is_within_three_points_of_its_teacher() -> None:
    """Two points are the aim, and not reached: the model card says where it falls short."""
    assert MODELS["linear"]["accuracy"] >= MODELS["teacher"]["accuracy"] - 0.03


@pytest.mark.parametrize("stage", ["1", "3"])
def test_one_stage_beats_none_with_every_seed(stage: str) -> None:
    """Of the paper's Table 3; its other subsets were not measured with three seeds."""
    assert min(runs(stage)) > max(runs("none"))


def test_stage_3_alone_beats_stage_1_alone() -> None:
    """As in the paper's Table 3."""
    assert min(runs("3")) > max(runs("1"))


def test_seeding_from_the_teacher_beats_scratch_with_every_seed() -> None:
    """Of the paper's Table 4, after stage 1; "inherit" alone was not measured."""
    assert min(runs("1")) > max(runs("1", "scratch"))


def test_each_stage_adds_to_the_one_before_it() -> None:
    """One seed: the shipped models on their way."""
    first, second = after("linear and hybrid", "stage-1"), after("linear and hybrid", "stage-2")
    assert statistics.fmean(runs("none")) < first < second < after("linear", "stage-3")


def test_a_hybrid_is_better_than_a_linear_student_of_the_same_stages() -> None:
    """Of the paper's Table 5: 0 and 2 attention layers of 8, and the teacher with all; one seed."""
    assert after("linear", "stage-3") < after("hybrid", "stage-3") <= MODELS["teacher"]["accuracy"] + NOISE


def test_loss_curves_of_the_shipped_models_are_kept() -> None:
    lines = (RESULTS / "digits-distillation-curves.jsonl").read_text(encoding="utf-8").splitlines()
    stages = {(row["run"], row["stage"]) for row in map(json.loads, lines)}
    assert {
        ("teacher", "supervised"),
        ("linear and hybrid", "stage-1"),
        ("linear and hybrid", "stage-2"),
        ("linear", "stage-3"),
        ("hybrid", "stage-3"),
        ("linear, second round", "stage-3"),
    } <= stages
