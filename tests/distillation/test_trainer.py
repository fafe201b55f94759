"""The loop: it learns, passes do not matter, order does not depend on who reads, a bad loss ends it."""

from dataclasses import replace

import pytest
import torch
from toy_task import toy_data, toy_teacher

from mmm_export.distillation.order import SampleOrder
from mmm_export.distillation.stage import StageOptions, learning_rate
from mmm_export.distillation.states import load_trainer, trainer_state
from mmm_export.distillation.trainer import LoopOptions, StageTrainer, TrainingError

OPTIONS = StageOptions(steps=12, batch_samples=8, samples_per_pass=8, learning_rate=2e-3, weight_decay=0.05)
ALL = frozenset(range(4))


def losses_of(name, options=OPTIONS, *, network=None, data=None, loop=None, **more):
    records = []
    network = network or toy_teacher(students=frozenset() if name == "supervised" else ALL)
    trainer = StageTrainer(network, name, options, data or toy_data(), loop or LoopOptions(), **more)
    trainer.run(on_record=records.append)
    return [record["loss"] for record in records]


@pytest.mark.parametrize("name", ["supervised", "stage-1", "stage-2", "stage-3"])
def test_every_stage_lowers_its_loss(name):
    found = losses_of(name, replace(OPTIONS, steps=30, learning_rate=5e-3))
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


def test_the_same_seed_gives_the_same_curve_and_another_seed_another():
    first = losses_of("stage-1")
    assert first == losses_of("stage-1")
    assert first != losses_of("stage-1", loop=LoopOptions(seed=1))


def test_how_a_step_is_cut_into_passes_does_not_change_it():
    whole = losses_of("stage-2")
    parts = losses_of("stage-2", replace(OPTIONS, samples_per_pass=3))
    assert parts == pytest.approx(whole, rel=1e-4)  # float32 sums in another order, through twelve steps


def test_a_stage_goes_on_from_its_state_as_if_it_had_never_stopped():
    whole = losses_of("stage-2")
    first, states = [], []
    trainer = StageTrainer(toy_teacher(students=ALL), "stage-2", OPTIONS, toy_data())
    trainer.run(
        on_record=first.append, on_snapshot=lambda t: states.append(trainer_state(t)), stop=lambda: trainer.step == 5
    )
    assert trainer.step == 5
    second = StageTrainer(toy_teacher(students=ALL, seed=3), "stage-2", OPTIONS, toy_data())
    frozen = dict(trainer.network.named_parameters())
    with torch.no_grad():
        for name, parameter in second.network.named_parameters():
            parameter.copy_(frozen[name])
    load_trainer(second, states[0])
    second.run(on_record=first.append)
    assert [record["loss"] for record in first] == whole


def test_a_loss_that_is_no_number_ends_the_stage_and_names_the_step():
    data = toy_data()
    network = toy_teacher(students=ALL)
    bad = SampleOrder(len(data), 0).step(4, OPTIONS.batch_samples)[0]
    data.pixels[bad] = torch.inf
    trainer = StageTrainer(network, "stage-1", OPTIONS, data)
    records = []
    with pytest.raises(TrainingError, match="step 5 of stage-1"):
        trainer.run(on_record=records.append)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert trainer.step == 4


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_samples_of_a_step(world):
    order = SampleOrder(50, seed=1)
    for step in range(20):
        shares = [order.passes(step, 8, 2, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for part in share for i in part) == sorted(order.step(step, 8))


def test_every_epoch_reads_every_sample_once():
    order = SampleOrder(40, seed=1)
    epochs = [[i for step in range(5 * e, 5 * e + 5) for i in order.step(step, 8)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]


def test_the_rate_rises_stays_and_falls():
    options = StageOptions(steps=100, batch_samples=1, learning_rate=1.0)
    rates = [learning_rate(options, step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:90] == [1.0] * 81
    assert rates[90:] == pytest.approx([10 / 11 - i / 11 for i in range(10)])
