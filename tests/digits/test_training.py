"""A minute of training on the demo task, on a CPU: every stage lowers its loss, and what it trains is put back where it belongs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mmm_export.demo import demo_checkpoint
from mmm_export.distillation.digits import experiment
from mmm_export.distillation.digits.architecture import digits_spec
from mmm_export.distillation.digits.arrays import Arrays, Encoding
from mmm_export.distillation.digits.assets import packaged_assets
from mmm_export.distillation.memory_data import MemoryData
from mmm_export.distillation.stage import STAGES, StageName, StageOptions
from mmm_export.distillation.trainer import Record
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.model.tensors import required_shapes
from mmm_export.text import Tokenizer

STEPS = 16


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    encoding = Encoding.from_tokenizer(Tokenizer.from_folder(demo_checkpoint("teacher")), 16)
    folder = tmp_path_factory.mktemp("arrays")
    return experiment.draw_arrays(folder / "train", "train", 64, packaged_assets(), encoding, workers=2)


@pytest.fixture(scope="module")
def data(arrays: Arrays) -> MemoryData:
    return experiment.memory_data(arrays, "cpu", torch.float32)


def stored(kind: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(demo_checkpoint(kind))
    return {name: checkpoint.tensor(name).float() for name in required_shapes(checkpoint.spec)}


def small(options: StageOptions, batch: int) -> StageOptions:
    return dataclasses.replace(options, steps=STEPS, batch_samples=batch, samples_per_pass=batch)


def losses_of(network: experiment.Network, name: StageName, options: StageOptions, data: MemoryData) -> list[float]:
    rows: list[Record] = []
    experiment.train(network, name, options, data, curve=rows.append)
    return [float(row["loss"]) for row in rows]


def falls(losses: list[float]) -> bool:
    """Whether the mean of the last quarter is below that of the first: single batches differ."""
    quarter = len(losses) // 4
    return sum(losses[-quarter:]) < sum(losses[:quarter])


def test_every_stage_lowers_its_loss(data: MemoryData) -> None:
    network = experiment.student_of(stored("teacher"), "cpu", torch.float32)
    for name in STAGES:
        losses = losses_of(network, name, small(experiment.ABLATION[name], 8), data)
        assert len(losses) == STEPS
        assert falls(losses), (name, losses)


def test_a_teacher_lowers_its_loss_from_nothing(data: MemoryData) -> None:
    network = experiment.untrained_teacher(0, "cpu", torch.float32)
    assert falls(losses_of(network, "supervised", small(experiment.TEACHER, 8), data))


def test_drawn_arrays_do_not_depend_on_the_number_of_processes(arrays: Arrays, tmp_path: Path) -> None:
    encoding = Encoding.from_tokenizer(Tokenizer.from_folder(demo_checkpoint("teacher")), 16)
    again = experiment.draw_arrays(tmp_path / "train", "train", 64, packaged_assets(), encoding, workers=1)
    for name in Arrays.__dataclass_fields__:
        assert (getattr(again, name) == getattr(arrays, name)).all()


@pytest.mark.parametrize("kind", ["teacher", "linear"])
def test_a_network_built_of_a_shipped_model_answers_as_it_does(kind: str, data: MemoryData, arrays: Arrays) -> None:
    """These samples were trained on, so nearly all are right."""
    teacher = stored("teacher")
    network = (
        experiment.trained_student(teacher, stored("linear"), "cpu", torch.float32)
        if kind == "linear"
        else experiment.with_attention(experiment.student_of(teacher, "cpu", torch.float32), range(8))
    )
    assert experiment.accuracy(network, data, arrays.kinds)["all"] > 0.9
    written = experiment.stored_tensors(network, range(8) if kind == "teacher" else ())
    wanted = stored(kind)
    assert set(written) == set(required_shapes(digits_spec("teacher" if kind == "teacher" else "linear")))
    for name, value in written.items():
        if not name.endswith("position_embedding"):  # its first row is the unused class position
            assert torch.equal(value, wanted[name]), name
