"""On a GPU: recorded and compiled steps compute what plain ones do, and the scan what it does on the CPU."""

from dataclasses import replace

import pytest
import torch
from toy_task import SPEC, toy_data

from mmm_export.distillation.loading import network_from_tensors, untrained_source
from mmm_export.distillation.stage import StageOptions
from mmm_export.distillation.states import load_trainer, trainer_state
from mmm_export.distillation.trainer import LoopOptions, StageTrainer
from mmm_export.model import scan
from mmm_export.model.scan_training import scan_sequences

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS = StageOptions(steps=12, batch_samples=16, samples_per_pass=8, learning_rate=2e-3)
STAGES = ("supervised", "stage-1", "stage-2", "stage-3")


def network_for(name, dtype=torch.float32):
    students = frozenset() if name == "supervised" else frozenset(range(4))
    return network_from_tensors(
        SPEC, untrained_source(SPEC, 0), students=students, dtype=dtype, stored_dtype=torch.float32, device="cuda"
    )


def curve(name, loop, *, dtype=torch.float32, options=OPTIONS):
    records = []
    data = toy_data(device="cuda")
    data.dtype = dtype
    trainer = StageTrainer(network_for(name, dtype), name, options, data, loop)
    trainer.run(on_record=records.append)
    return [record["loss"] for record in records]


@pytest.mark.parametrize("name", STAGES)
def test_a_recorded_step_has_the_curve_of_a_plain_one(name):
    plain = curve(name, LoopOptions())
    # The same kernels but for AdamW's, whose rate is a tensor; atomics of the embedding's gradient change the order of sums.
    assert curve(name, LoopOptions(cuda_graph=True)) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_a_compiled_step_has_the_curve_of_a_plain_one(name):
    plain = curve(name, LoopOptions())
    assert curve(name, LoopOptions(compile=True)) == pytest.approx(plain, rel=1e-3)  # fused float32 sums


def test_compiled_and_recorded_steps_go_together():
    plain = curve("stage-3", LoopOptions())
    assert curve("stage-3", LoopOptions(compile=True, cuda_graph=True)) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("name", STAGES)
def test_bf16_lowers_the_loss_too(name):
    found = curve(name, LoopOptions(cuda_graph=True), dtype=torch.bfloat16, options=replace(OPTIONS, steps=30))
    assert sum(found[-3:]) < sum(found[:3])


def test_a_recorded_stage_goes_on_from_its_state():
    loop = LoopOptions(cuda_graph=True)
    whole = curve("stage-2", loop)
    data, states, records = toy_data(device="cuda"), [], []
    first = StageTrainer(network_for("stage-2"), "stage-2", OPTIONS, data, loop)
    first.run(
        on_record=records.append, on_snapshot=lambda t: states.append(trainer_state(t)), stop=lambda: first.step == 5
    )
    second = StageTrainer(network_for("stage-2"), "stage-2", OPTIONS, data, loop)
    load_trainer(second, states[0])
    second.run(on_record=records.append)
    assert [record["loss"] for record in records] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("segmented", [True, False])
def test_the_scan_and_its_gradient_on_the_gpu_are_those_of_float64_on_the_cpu(segmented):
    sizes = scan.ScanSizes(heads=4, kv_heads=2, head_dim=128, state_dim=128, eps=1e-5)
    channels = (4 + 2 * 2) * 128
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = [normal(channels, 2), normal(channels), normal(4) - 3, 1 + 0.3 * normal(4), 1 + 0.1 * normal(128)]
    projected = normal(2, 500, channels + 4 * 128 + 4)
    segments = (torch.arange(500) // 130).expand(2, -1) if segmented else None
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        given = projected.detach().clone().to(device, dtype).requires_grad_(True)
        parts = scan.ScanWeights(*(w.to(device, dtype) for w in weights))
        y = scan_sequences(given, None if segments is None else segments.to(device), parts, sizes)
        y.square().sum().backward()
        results.append((y.detach().cpu().double(), given.grad.cpu().double()))
    for wanted, found in zip(*results, strict=True):
        # Float32, or TF32 where it is allowed (10 bits): errors relative to the largest value.
        bound = 2e-3 if torch.backends.cuda.matmul.allow_tf32 else 1e-5
        assert (found - wanted).abs().max() <= bound * wanted.abs().max()
