"""Two processes compute what one computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_task import SPEC

from mmm_export.distillation.pipeline import random_teacher
from mmm_export.model.checkpoint import Checkpoint

PROGRAM = Path(__file__).with_name("distributed_run.py")


def run(processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, *(launcher if processes > 1 else []), str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    # Rarely a process that has done its work aborts on its way out, where C++ ends a thread of gloo's that still runs; whether the
    # work was done is what the tests look at.
    aborted_at_exit = "terminate called without an active exception" in done.stderr and "Traceback" not in own_lines(
        done.stderr
    )
    assert done.returncode == 0 or aborted_at_exit, done.stderr[-3000:]


def own_lines(text):
    """What a program of these tests printed, without the launcher's report, which begins with its warning that it stops the others."""
    return text.partition("Sending process")[0]


def losses(folder):
    lines = (folder / "work" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    random_teacher(folder / "teacher", SPEC, seed=0, tokenizer=None)
    (folder / "one").mkdir()
    run(1, folder / "teacher", folder / "one", "plain", "cpu")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["plain", "recompute"])
def test_two_processes_have_the_curve_of_one_and_make_its_student(alone, tmp_path, recompute):
    (tmp_path / "interrupt").touch()
    run(2, alone / "teacher", tmp_path, recompute, "cpu")  # stops in the second stage
    (tmp_path / "interrupt").unlink()
    run(2, alone / "teacher", tmp_path, recompute, "cpu")
    # Float32 sums in another order, through twelve steps of AdamW.
    assert losses(tmp_path) == pytest.approx(losses(alone / "one"), rel=1e-4)
    one, two = Checkpoint.open(alone / "one" / "student"), Checkpoint.open(tmp_path / "student")
    for name in one.names():
        torch.testing.assert_close(two.tensor(name), one.tensor(name), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_have_the_curve_of_one(tmp_path):
    random_teacher(tmp_path / "teacher", SPEC, seed=0, tokenizer=None)
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        run(processes, tmp_path / "teacher", tmp_path / str(processes), "plain", "cuda")
    # Float32 sums in another order, and through NCCL.
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
