"""Training on the demo task: data on the device, a teacher, its students by the three stages, and their accuracy."""

from __future__ import annotations

import copy
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmm_export.distillation.digits.architecture import digits_spec
from mmm_export.distillation.digits.arrays import Arrays, Encoding, arrays_from_samples
from mmm_export.distillation.digits.assets import Assets, Split
from mmm_export.distillation.digits.questions import KINDS
from mmm_export.distillation.digits.samples import sample
from mmm_export.distillation.loading import (
    STUDENT_PARAMETERS,
    checkpoint_tensors,
    network_from_tensors,
    untrained_source,
)
from mmm_export.distillation.memory_data import MemoryData
from mmm_export.distillation.network import Network
from mmm_export.distillation.seeding import Init
from mmm_export.distillation.stage import StageName, StageOptions
from mmm_export.distillation.trainer import LoopOptions, Record, StageTrainer
from mmm_export.model.tensors import layer_prefix

EVALUATED_AT_ONCE = 500

# The data set of the shipped models: pictures are drawn as often as wanted, the handwritten samples stay those 1,440.
TRAIN_SAMPLES = 120_000

TEACHER = StageOptions(
    steps=7000,
    batch_samples=512,
    samples_per_pass=512,
    learning_rate=1.5e-3,
    weight_decay=0.05,
    warmup_share=0.03,
    decay_share=0.4,
    clip_norm=1.0,
    beta2=0.98,
)


def _stage(steps: int, learning_rate: float, **more: Any) -> StageOptions:
    shared = {"batch_samples": 256, "samples_per_pass": 256, "clip_norm": 1.0, "decay_share": 0.3}
    return StageOptions(steps=steps, learning_rate=learning_rate, **{**shared, **more})


# The paper's order of stages and of rates; far fewer steps, and higher rates for so small a model. The teacher learned nothing
# about the tokens of a prompt, so stage 3 copies what it says of answers alone.
STUDENT: dict[StageName, StageOptions] = {
    "stage-1": _stage(1500, 5e-3),
    "stage-2": _stage(2500, 2e-3),
    "stage-3": _stage(5000, 1e-3, positions="answers"),
}
# The linear student, which has no attention to fall back on, has a second, longer round of stage 3.
SECOND_ROUND = _stage(
    12_000, 1.5e-3, batch_samples=128, samples_per_pass=128, warmup_share=0.03, decay_share=0.5, positions="answers"
)
# Its third round has five times as many pictures: the second ended with next to no loss on those it was trained on.
THIRD_ROUND_SAMPLES = 600_000
THIRD_ROUND = _stage(12_000, 2e-3, warmup_share=0.03, decay_share=0.6, positions="answers")
# The ablations compare short runs: what a stage is worth shows while there is something left to learn.
ABLATION: dict[StageName, StageOptions] = {
    "stage-1": _stage(400, 1e-2, batch_samples=64, samples_per_pass=64),
    "stage-2": _stage(400, 5e-3, batch_samples=64, samples_per_pass=64),
    "stage-3": _stage(400, 2e-3, batch_samples=64, samples_per_pass=64, positions="answers"),
}


def _draw_part(job: tuple[Path, Split, int, int, int, Assets, Encoding]) -> None:
    folder, split, first, last, seed, assets, encoding = job
    part = arrays_from_samples((sample(split, number, seed) for number in range(first, last)), assets, encoding)
    for name in Arrays.__dataclass_fields__:
        np.load(folder / f"{name}.npy", mmap_mode="r+")[first:last] = getattr(part, name)


def draw_arrays(
    folder: Path, split: Split, count: int, assets: Assets, encoding: Encoding, *, seed: int = 0, workers: int = 1
) -> Arrays:
    """Draw the first `count` samples of a split into .npy files of a folder, in several processes; read them if they are there.

    Call it before CUDA is used: the processes are forked.
    """
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        example = arrays_from_samples([sample(split, 0, seed)], assets, encoding)
        for name in Arrays.__dataclass_fields__:
            one = getattr(example, name)
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", one.dtype, (count, *one.shape[1:]))  # type: ignore[no-untyped-call]
        step = max(1, -(-count // (8 * workers)))
        jobs = [(folder, split, i, min(i + step, count), seed, assets, encoding) for i in range(0, count, step)]
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            pool.map(_draw_part, jobs, chunksize=1)
        (folder / "whole").touch()
    return Arrays(**{name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in Arrays.__dataclass_fields__})


def memory_data(arrays: Arrays, device: str, dtype: torch.dtype, count: int | None = None) -> MemoryData:
    """Put samples, or the first ones, on the device."""
    arrays = Arrays(**{name: getattr(arrays, name)[:count] for name in Arrays.__dataclass_fields__})
    place = torch.arange(arrays.ids.shape[1])
    prompt, tokens = (torch.from_numpy(part.astype(np.int64)) for part in (arrays.prompt_tokens, arrays.tokens))
    return MemoryData(
        torch.from_numpy(arrays.ids.astype(np.int64)),
        (place >= prompt[:, None]) & (place < tokens[:, None]),
        tokens,
        torch.from_numpy(arrays.pixels).to(device).permute(0, 3, 1, 2)[:, None].contiguous(),
        device=device,
        dtype=dtype,
    )


@torch.no_grad()
def accuracy(network: Network, data: MemoryData, kinds: Sequence[int]) -> dict[str, float]:
    """Share of samples whose answer a network would give token for token, in all ("all") and by kind.

    Each token of an answer is predicted behind the right ones before it: greedy decoding gives the whole answer exactly
    when all of them are right.
    """
    right = []
    for first in range(0, len(data), EVALUATED_AT_ONCE):
        batch = data.batch(range(first, min(first + EVALUATED_AT_ONCE, len(data))))
        said = network.logits(network.hidden(batch)).argmax(-1)
        right.append(((said == batch.targets) | (batch.targets < 0)).all(1).cpu())
    found = torch.cat(right).double()
    which = torch.as_tensor(np.asarray(kinds, np.int64))
    shares = {name: float(found[which == i].mean()) for i, name in enumerate(KINDS) if bool((which == i).any())}
    return {"all": float(found.mean()), **shares}


def untrained_teacher(seed: int, device: str, dtype: torch.dtype) -> Network:
    """Make a teacher that knows nothing yet."""
    spec = digits_spec("teacher")
    network = network_from_tensors(
        spec, untrained_source(spec, seed), dtype=dtype, stored_dtype=torch.float32, device=device
    )
    network.logit_tokens = 1 << 30  # the vocabulary is small: all logits at once
    return network


def student_of(
    teacher: Mapping[str, torch.Tensor],
    device: str,
    dtype: torch.dtype,
    *,
    init: Init = "inherit+mimic",
    seed: int = 0,
    stored_dtype: torch.dtype = torch.float32,
) -> Network:
    """Seed a Mamba-2 mixer beside every attention layer of a teacher, given as stored tensors."""
    spec = digits_spec("teacher")
    network = network_from_tensors(
        spec,
        teacher.__getitem__,
        students=frozenset(range(spec.layers)),
        init=init,
        seed=seed,
        dtype=dtype,
        stored_dtype=stored_dtype,
        device=device,
    )
    network.logit_tokens = 1 << 30
    return network


@torch.no_grad()
def trained_student(
    teacher: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor], device: str, dtype: torch.dtype
) -> Network:
    """Put the mixers of a trained linear student, given as stored tensors, beside the attention of its teacher."""
    network = student_of(teacher, device, dtype)
    spec = network.spec
    rows = (spec.conv_channels, spec.heads * spec.head_dim, spec.heads)
    for i, layer in enumerate(network.layers):
        prefix = f"{layer_prefix(spec, i)}attention."
        mixer = layer.student
        assert mixer is not None
        parts = torch.split(student[prefix + "wvkqgdt.weight"], list(rows))
        for part, value in zip((mixer.wvkq, mixer.wg, mixer.wdt), parts, strict=True):
            part.weight.copy_(value.t())
        for name in STUDENT_PARAMETERS:
            parameter = mixer.get_parameter(name)
            parameter.copy_(student[prefix + name].reshape(parameter.shape))
    return network


def with_attention(network: Network, kept: Sequence[int]) -> Network:
    """Copy a network and let the layers `kept` stay attention."""
    result = copy.deepcopy(network)
    for i in kept:
        result.layers[i].student = None
    return result


def stored_tensors(network: Network, kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """All tensors of the student's checkpoint on the CPU, float32; `kept` of all layers gives the teacher's."""
    return {name: value.float().cpu().contiguous() for name, value in checkpoint_tensors(network, tuple(kept))}


def train(
    network: Network,
    name: StageName,
    options: StageOptions,
    data: MemoryData,
    *,
    kept: Sequence[int] = (),
    seed: int = 0,
    fast: bool = True,
    compiled: bool = False,
    curve: Callable[[Record], None] = lambda record: None,
) -> Network:
    """Run one stage; `fast` records it as a CUDA graph where there is a GPU."""
    loop = LoopOptions(seed=seed, log_steps=50, cuda_graph=fast, compile=compiled)
    trainer = StageTrainer(network, name, options, data, loop, kept=tuple(kept))
    trainer.run(on_record=curve)
    network.requires_grad_(False)
    return network


def curve_lines(path: Path, every: int = 50, **labels: Any) -> Callable[[Record], None]:
    """Give a function that appends every so many records to a JSONL file, with labels."""

    def write(record: Record) -> None:
        if int(record["step"]) % every == 0 or record["step"] == 1:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**labels, **record}) + "\n")

    return write
