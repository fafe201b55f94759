"""A whole run on a tiny teacher: what it writes, and how it goes on."""

import json
from dataclasses import replace

import pytest
import torch
from toy_task import SPEC, toy_data

from mmm_export.distillation.layout import Layout
from mmm_export.distillation.order import SampleOrder
from mmm_export.distillation.pipeline import Job, random_teacher, run_job
from mmm_export.distillation.recipe import Recipe, RunOptions
from mmm_export.distillation.stage import StageOptions
from mmm_export.distillation.trainer import TrainingError
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


def test_a_run_goes_on_with_smaller_passes(teacher, tmp_path):
    run_job(job_in(tmp_path, teacher, stages=("stage-1",)), lambda checkpoint: toy_data())
    smaller = replace(RECIPE, stages={name: replace(STAGE, samples_per_pass=2) for name in RECIPE.stages})
    assert run_job(job_in(tmp_path, teacher, smaller, resume=True, force=True), lambda checkpoint: toy_data())


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


def test_a_loss_that_is_no_number_leaves_its_batch_and_the_samples_it_was_made_of(teacher, tmp_path):
    data = toy_data()
    bad = SampleOrder(len(data), RECIPE.seed).step(3, STAGE.batch_samples)
    data.pixels[bad[0]] = torch.nan
    with pytest.raises(TrainingError, match=r"bad-batch\.pt"):
        run_job(job_in(tmp_path, teacher), lambda checkpoint: data)
    stored = torch.load(tmp_path / "work" / "bad-batch.pt", weights_only=True)
    assert stored["indices"] == bad
    assert stored["batches"][0]["pixels"].isnan().any()
    assert torch.equal(stored["batches"][0]["ids"], data.batch(bad).ids)
    assert not (tmp_path / "student").exists()
    assert len(curve(tmp_path)) == 3


@pytest.mark.parametrize(
    ("stage", "run", "option"),
    [
        (STAGE, RECIPE.run, "samples_per_pass"),
        (replace(STAGE, samples_per_pass=1), RECIPE.run, "run.recompute"),
        (replace(STAGE, samples_per_pass=1), replace(RECIPE.run, recompute=True), "run.logit_tokens"),
        (replace(STAGE, samples_per_pass=1), replace(RECIPE.run, recompute=True, logit_tokens=128), "data.max_tokens"),
    ],
)
@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_when_memory_runs_out_the_option_to_lower_is_named(teacher, tmp_path, stage, run, option, error):
    class Full:
        def __len__(self):
            return 8

        def batches(self, plan):
            raise error

    recipe = replace(RECIPE, stages={"stage-1": stage}, run=run)
    with pytest.raises(TrainingError, match=option):
        run_job(job_in(tmp_path, teacher, recipe), lambda checkpoint: Full())


def test_another_error_of_torch_is_not_taken_for_full_memory(teacher, tmp_path):
    class Broken:
        def __len__(self):
            return 8

        def batches(self, plan):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_job(job_in(tmp_path, teacher), lambda checkpoint: Broken())


@pytest.mark.parametrize("content", [b"", b"\x80\x02X", b"PK\x03\x04 no archive"])
def test_a_damaged_snapshot_is_refused_by_name(teacher, tmp_path, content):
    run_job(job_in(tmp_path, teacher, stages=("stage-1",)), lambda checkpoint: toy_data())
    (tmp_path / "work" / "snapshot.pt").write_bytes(content)
    with pytest.raises(SnapshotError, match=r"snapshot\.pt"):
        run_job(job_in(tmp_path, teacher, resume=True, force=True), lambda checkpoint: toy_data())
