"""Estimates of a dry run against what was measured on an H100."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmm_export.distillation.estimate import estimate, trained_parameters
from mmm_export.distillation.recipe_file import read_recipe, recipe_path
from mmm_export.model.testing import full_size_spec

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h100-full-size-distillation.json"
ROWS = [row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if not row["compiled"]]
SPEC = full_size_spec("teacher")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['name']}-{'recompute' if row['recompute'] else 'keep'}")
def test_memory_and_time_of_a_stage_are_near_what_was_measured(row):
    recipe = read_recipe(recipe_path("mmmamba-hybrid"))
    name = row["name"]
    stage = replace(recipe.stages[name], samples_per_pass=1, batch_samples=1, steps=1)  # one row of 8192 tokens
    recipe = replace(recipe, stages={name: stage}, run=replace(recipe.run, recompute=row["recompute"]))
    (found,) = estimate(SPEC, recipe, gpus=1, samples=None).stages
    assert found.trained_parameters == row["trained_parameters"]
    # The tensors that autograd keeps are counted one by one, small ones not at all; the allocator's rounding neither.
    assert found.memory_bytes / 2**30 == pytest.approx(row["peak_gib"], rel=0.15)
    assert found.seconds == pytest.approx(row["step_s"], rel=0.35)  # one rate for all stages of a kind


def test_what_the_paper_calls_trainable_is_what_stage_three_trains():
    linear, hybrid = (read_recipe(recipe_path(f"mmmamba-{kind}")) for kind in ("linear", "hybrid"))
    # 14.7 % and 11.2 %: the paper's percentages, rounded to a tenth.
    assert trained_parameters(SPEC, linear, "stage-3") / 2_741_992_448 == pytest.approx(0.147, abs=0.0005)
    assert trained_parameters(SPEC, hybrid, "stage-3") / 2_708_076_288 == pytest.approx(0.112, abs=0.0005)


def test_more_gpus_need_less_memory_and_time_each():
    recipe = read_recipe(recipe_path("mmmamba-linear"))
    one, eight = (estimate(SPEC, recipe, gpus=n, samples=None).stages for n in (1, 8))
    for alone, shared in zip(one, eight, strict=True):
        assert shared.memory_bytes < alone.memory_bytes
        assert shared.seconds == pytest.approx(alone.seconds / 8)
