"""`mmm-export distill` from end to end on a tiny teacher."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from mmm_export.cli import cli
from mmm_export.command_line import run
from mmm_export.distillation.pipeline import random_teacher
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.testing import tiny_spec
from mmm_export.model.testing.vocabulary import write_tokenizer
from mmm_export.onnxruntime_support import best_body

RECIPE = """
seed: 3
layout: {attention_layers: 1}
data: {max_tokens: 256, workers: 0, system: ""}
run: {dtype: fp32, log_steps: 2, snapshot_steps: 2, recompute: false}
stages:
  stage-1: {steps: 6, batch_samples: 4, samples_per_pass: 4, learning_rate: 1e-2, loss_scale: 1000}
  stage-2: {steps: 6, batch_samples: 4, samples_per_pass: 4, learning_rate: 1e-2, loss_scale: 1000}
  stage-3: {steps: 6, batch_samples: 4, samples_per_pass: 4, learning_rate: 1e-2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    spec = tiny_spec(kinds="teacher")
    (folder / "words").mkdir()
    write_tokenizer(folder / "words", spec.vocab_size)
    random_teacher(folder / "teacher", spec, seed=0, tokenizer=folder / "words")
    Image.new("RGB", (60, 50), "blue").save(folder / "a.png")
    lines = [
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is {i}?"},
                {"from": "gpt", "value": f"It is {i}."},
            ],
        }
        for i in range(12)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{oops\n"
    (folder / "data.jsonl").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def command(place, tmp_path):
    def arguments(*more, output="student", data="data.jsonl", recipe="recipe.yaml"):
        found = ["distill", "--teacher", str(place / "teacher"), "--recipe", str(place / recipe)]
        found += ["--data", str(place / data)] if data else []
        return [*found, "-o", str(tmp_path / output), "--device", "cpu", *more]

    return arguments


def test_it_writes_a_student_and_says_what_it_left_out_and_what_comes_next(command, tmp_path, capsys):
    assert run(cli, command("--tensorboard")) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "left out: 1 unusable samples, 1 of no JSON" in shown.err
    assert f"next: mmm-export onnx {tmp_path / 'student'}" in shown.err
    assert Checkpoint.open(tmp_path / "student").spec.attention_layers == (0,)
    records = [json.loads(line) for line in (tmp_path / "student.work" / "log.jsonl").read_text().splitlines()]
    for stage in ("stage-1", "stage-2", "stage-3"):
        losses = [record["loss"] for record in records if record["stage"] == stage]
        assert len(losses) == 6
        assert losses[-1] < losses[0], stage
        assert list((tmp_path / "student.work" / "tensorboard" / stage).iterdir())
    assert run(cli, ["inspect", str(tmp_path / "student")]) == 0


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_curve_and_student(command, tmp_path):
    assert run(cli, command(output="whole")) == 0
    killed = tmp_path / "killed.work" / "log.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    program = [sys.executable, "-m", "mmm_export", *command(output="killed", recipe="recipe.yaml")]
    process = subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed.is_file() and len(killed.read_text().splitlines()) >= 8) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists() or process.returncode == 0
    assert run(cli, command("--resume", "--force", output="killed")) == 0
    curves = []
    for name in ("whole", "killed"):
        lines = (tmp_path / f"{name}.work" / "log.jsonl").read_text().splitlines()
        curves.append([(r["stage"], r["step"], r["loss"]) for r in map(json.loads, lines)])
    assert curves[0] == curves[1]
    assert Checkpoint.open(tmp_path / "killed").sha256() == Checkpoint.open(tmp_path / "whole").sha256()


def test_a_seeded_student_needs_no_data(command, tmp_path, capsys):
    assert run(cli, command("--stage", "seed", data=None)) == 0
    assert "not trained" in capsys.readouterr().err
    assert Checkpoint.open(tmp_path / "student").spec.attention_layers == (0,)


def test_a_dry_run_prints_stages_and_writes_nothing(command, tmp_path, capsys):
    assert run(cli, command("--dry-run", "--gpus", "2")) == 0
    shown = capsys.readouterr().out
    assert "13 samples; of 13 looked at, 1 are unusable" in shown
    assert all(f"stage-{i}" in shown for i in (1, 2, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--stage", "4"], 2, "'4' is not one of"),
        (["--recipe", "mmmamba-liner"], 1, "did you mean mmmamba-linear"),
        (["--strict"], 1, "line 13 of"),
        (["--data", "nothing.jsonl"], 1, "nothing.jsonl cannot be read"),
        (["--teacher", "nothing"], 1, "not a checkpoint folder"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(command, tmp_path, capsys, more, code, said):
    assert run(cli, command(*more)) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_data_is_asked_for_before_the_teacher_is_read(command, capsys):
    assert run(cli, command(data=None)) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("layers", [0, 1])
def test_the_student_is_exported_at_once_and_the_bundle_computes_what_it_computes(command, place, tmp_path, layers):
    text = RECIPE.replace("attention_layers: 1", f"attention_layers: {layers}")
    (place / f"recipe-{layers}.yaml").write_text(text, encoding="utf-8")
    assert run(cli, command(recipe=f"recipe-{layers}.yaml")) == 0
    student, bundle = str(tmp_path / "student"), str(tmp_path / "bundle")
    assert run(cli, ["onnx", student, "-o", bundle, "--max-tokens", "256", "--body", best_body()]) == 0
    assert run(cli, ["verify", bundle, "--checkpoint", student, "--new-tokens", "2"]) == 0


@pytest.mark.slow
def test_ctrl_c_ends_a_run_after_a_whole_step_and_says_how_to_go_on(command, place, tmp_path):
    endless = RECIPE.replace("steps: 6", "steps: 100000").replace("workers: 0", "workers: 1")
    (place / "endless.yaml").write_text(endless, encoding="utf-8")
    log = tmp_path / "student.work" / "log.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    program = [sys.executable, "-m", "mmm_export", *command(recipe="endless.yaml")]
    process = subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 4) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the worker is interrupted too
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "--resume" in said
    assert (tmp_path / "student.work" / "snapshot.pt").is_file()
    assert not (tmp_path / "student").exists()
