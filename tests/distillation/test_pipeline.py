"""A whole run on a tiny teacher: what it writes, and how it goes on."""

import json
from dataclasses import replace

import pytest
import torch
from toy_task import SPEC, toy_data

from mmm_export.distillation.layout import Layout
from mmm_export.distillation.pipeline import Job, random_teacher, run_job
from mmm_export.distillation.recipe import Recipe, RunOptions
from mmm_export.distillation.stage import StageOptions
from mmm_export.distillation.work_folder import SnapshotError
from mmm_export.errors import CheckpointError, OutputError
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.weights import load_model

STAGE = StageOptions(steps=6, batch_samples=8, samples_per_pass=8, learning_rate=5e-3)
RECIPE = Recipe(
    stages={"stage-1": STAGE, "stage-2": STAGE, "stage-3": STAGE},
    layout=Layout(1),
    run=RunOptions(dtype="fp32", recompute=False, snapshot_steps=2),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    random_teacher(folder, SPEC, seed=0, tokenizer=None)
    return folder


def job_in(folder, teacher, recipe=RECIPE, **more):
    more.setdefault("stages", tuple(recipe.stages))
    return Job(teacher, recipe, output=folder / "student", work=folder / "work", **more)


def curve(folder):
    lines = (folder / "work" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [(r["stage"], r["step"], r["loss"]) for r in map(json.loads, lines)]


def test_the_student_is_a_checkpoint_that_loads_with_the_layout_asked_for(teacher, tmp_path):
    assert run_job(job_in(tmp_path, teacher), lambda checkpoint: toy_data())
    student = Checkpoint.open(tmp_path / "student")
    assert student.spec.kinds == ("mha", "mamba2", "mamba2", "mamba2")
    assert student.findings == Checkpoint.open(teacher).findings
    model = load_model(student)
    embeds = torch.randn(1, 9, 64)
    logits, _ = model.prefill(embeds, torch.tensor([9]), model.initial_states(1, 16), torch.tensor([0]))
    assert torch.isfinite(logits).all()
    before, after = Checkpoint.open(teacher), student
    for name in before.names() & after.names():
        assert torch.equal(before.tensor(name), after.tensor(name)), name


def test_a_run_that_was_stopped_goes_on_to_the_same_curve_and_the_same_student(teacher, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_job(job_in(whole, teacher), lambda checkpoint: toy_data())
    calls = [0]

    def stop():
        calls[0] += 1
        return calls[0] % 5 == 0

    runs = 0
    while not run_job(job_in(parts, teacher, resume=True), lambda checkpoint: toy_data(), stop=stop):
        assert not (parts / "student").exists()
        runs += 1
    assert runs == 3
    assert curve(parts) == curve(whole)
    found, wanted = Checkpoint.open(parts / "student"), Checkpoint.open(whole / "student")
    assert found.sha256() == wanted.sha256()


def test_stages_run_one_by_one_give_what_they_give_together(teacher, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_job(job_in(whole, teacher), lambda checkpoint: toy_data())
    for name in RECIPE.stages:
        run_job(job_in(parts, teacher, stages=(name,), resume=True, force=True), lambda checkpoint: toy_data())
    assert Checkpoint.open(parts / "student").sha256() == Checkpoint.open(whole / "student").sha256()


def test_work_of_another_recipe_is_refused(teacher, tmp_path):
    run_job(job_in(tmp_path, teacher, stages=("stage-1",)), lambda checkpoint: toy_data())
    other = job_in(tmp_path, teacher, replace(RECIPE, seed=7), resume=True, force=True)
    with pytest.raises(SnapshotError, match="another run"):
        run_job(other, lambda checkpoint: toy_data())
    with pytest.raises(OutputError, match="earlier run"):
        run_job(job_in(tmp_path, teacher, force=True), lambda checkpoint: toy_data())


def test_a_student_is_no_teacher(teacher, tmp_path):
    run_job(job_in(tmp_path, teacher, stages=("stage-1",)), lambda checkpoint: toy_data())
    with pytest.raises(CheckpointError, match="no teacher"):
        run_job(job_in(tmp_path / "again", tmp_path / "student"), lambda checkpoint: toy_data())


def test_supervised_training_writes_a_teacher_with_every_tensor_trained(teacher, tmp_path):
    recipe = Recipe(stages={"supervised": STAGE}, run=RECIPE.run)
    assert run_job(job_in(tmp_path, teacher, recipe), lambda checkpoint: toy_data())
    before, after = Checkpoint.open(teacher), Checkpoint.open(tmp_path / "student")
    assert after.spec == before.spec
    same = [n for n in before.names() if torch.equal(before.tensor(n), after.tensor(n))]
    assert same == []
