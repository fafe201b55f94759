"""Trains the demo models and measures the paper's ablations on the demo task: teacher, students by three stages, curves.

python benchmarks/digits_distillation.py prepare --work DIR     pictures' sources and token ids, on a machine with the packages
python benchmarks/digits_distillation.py teacher --work DIR     trains the teacher
python benchmarks/digits_distillation.py students --work DIR    distils the linear and the hybrid student from it
python benchmarks/digits_distillation.py ablations --work DIR   stages, inits and attention counts, three seeds each

All but `prepare` need torch and numpy alone. DIR collects assets.npz, encoding.json, curves.jsonl, results.jsonl and *.safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmm_export.distillation.digits import experiment
from mmm_export.distillation.digits.architecture import digits_spec
from mmm_export.distillation.digits.arrays import Arrays, Encoding
from mmm_export.distillation.digits.assets import Assets, packaged_assets
from mmm_export.distillation.digits.samples import TEST_SAMPLES
from mmm_export.distillation.layout import Layout
from mmm_export.distillation.network import Network
from mmm_export.distillation.stage import STAGES, StageName, StageOptions
from mmm_export.distillation.trainer import Record

LAYERS = digits_spec("teacher").layers
HYBRID = Layout(2)  # as released: the first layer of every four
SEEDS = (0, 1, 2)
GROUPS = ("counts", "subsets", "inits")


def prepare(options: argparse.Namespace) -> None:
    """Collect what a machine with torch and numpy alone cannot make."""
    import tempfile

    from mmm_export.distillation.digits.vocabulary import write_digits_tokenizer
    from mmm_export.text import Tokenizer

    packaged_assets().save(options.work / "assets.npz")
    with tempfile.TemporaryDirectory() as folder:
        write_digits_tokenizer(Path(folder))
        tokens = digits_spec("teacher").vision.tokens_per_tile
        encoding = Encoding.from_tokenizer(Tokenizer.from_folder(folder), tokens)
    (options.work / "encoding.json").write_text(json.dumps(dataclasses.asdict(encoding)), encoding="utf-8")


class Bench:
    """What all runs share: data on the device, places for curves and results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work
        self.device = options.device
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.options = options
        cache = options.cache or options.work
        self.arrays = {
            split: _cached(cache / f"{split}-{count}", split, count, options) for split, count in _counts(options)
        }
        self.train = experiment.memory_data(self.arrays["train"], self.device, self.dtype)
        self.test = experiment.memory_data(self.arrays["test"], self.device, self.dtype)
        self.begin = time.perf_counter()

    def stage(
        self, network: Network, name: StageName, options: StageOptions, run: str, seed: int, **more: Any
    ) -> float:
        """Run a stage; returns its seconds."""
        begin = time.perf_counter()
        options = dataclasses.replace(options, steps=max(1, round(options.steps * self.options.steps_scale)))
        curve = experiment.curve_lines(self.work / f"curves-{self.options.part}.jsonl", run=run, seed=seed)

        def record(row: Record) -> None:
            curve(row)
            if int(row["step"]) % max(1, options.steps // 8) == 0 and name == "supervised":
                row = {
                    **row,
                    "test_accuracy": experiment.accuracy(network, self.test, self.arrays["test"].kinds)["all"],
                }
            if "steps_per_s" in row and int(row["step"]) % 500 == 0:
                _say(run, seed, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})

        fast = self.device == "cuda"
        experiment.train(
            network,
            name,
            options,
            self.train,
            seed=seed,
            fast=fast,
            compiled=self.options.compile,
            curve=record,
            **more,
        )
        return time.perf_counter() - begin

    def result(self, network: Network, **labels: Any) -> None:
        """Measure a network on the test set and keep the figures."""
        found = experiment.accuracy(network, self.test, self.arrays["test"].kinds)
        row = {**labels, "accuracy": found["all"], "by_kind": {k: round(v, 4) for k, v in found.items() if k != "all"}}
        with (self.work / f"results-{self.options.part}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        _say(f"{time.perf_counter() - self.begin:.0f} s", json.dumps(row))


def _say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def _counts(options: argparse.Namespace) -> list[tuple[str, int]]:
    return [("train", options.train_samples), ("test", TEST_SAMPLES)]


def _cached(path: Path, split: Any, count: int, options: argparse.Namespace) -> Arrays:
    """Draw samples, or read those that another run drew."""
    names = list(Arrays.__dataclass_fields__)
    files = {name: path.with_name(f"{path.name}-{name}.npy") for name in names}
    if not all(file.exists() for file in files.values()):
        begin = time.perf_counter()
        stored = json.loads((options.work / "encoding.json").read_text(encoding="utf-8"))
        drawn = experiment.draw_arrays(
            split, count, Assets.load(options.work / "assets.npz"), Encoding(**stored), workers=options.workers
        )
        for name, file in files.items():
            np.save(file, getattr(drawn, name))
        _say(f"drew {count} samples of {split} in {time.perf_counter() - begin:.1f} s")
    return Arrays(**{name: np.load(file, mmap_mode="c") for name, file in files.items()})


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Keep tensors as a plain .npz of bf16 bits: what the shipped checkpoints store."""
    bits = {name: value.bfloat16().view(torch.int16).numpy() for name, value in tensors.items()}
    np.savez(path, **bits)  # type: ignore[arg-type]


def load(path: Path) -> dict[str, torch.Tensor]:
    """Read what `save` wrote, as float32."""
    with np.load(path) as stored:
        return {name: torch.from_numpy(stored[name]).view(torch.bfloat16).float() for name in stored.files}


def teacher(options: argparse.Namespace) -> None:
    """Train the teacher."""
    bench = Bench(options)
    network = experiment.untrained_teacher(options.seed, bench.device, bench.dtype)
    seconds = bench.stage(network, "supervised", experiment.TEACHER, "teacher", options.seed)
    save(bench.work / "teacher.npz", experiment.stored_tensors(network, range(LAYERS)))
    bench.result(_rounded_teacher(bench), run="teacher", seed=options.seed, train_s=round(seconds, 1))


def _rounded_teacher(bench: Bench) -> Network:
    """Read the teacher as it is stored."""
    spec = digits_spec("teacher")
    from mmm_export.distillation.loading import network_from_tensors

    network = network_from_tensors(
        spec, load(bench.work / "teacher.npz").__getitem__, dtype=bench.dtype, device=bench.device
    )
    network.logit_tokens = 1 << 30
    return network


def students(options: argparse.Namespace) -> None:
    """Distil both students: stages 1 and 2 once, stage 3 for each."""
    bench = Bench(options)
    begin = time.perf_counter()
    source = load(bench.work / "teacher.npz")
    network = experiment.student_of(source, bench.device, bench.dtype, seed=options.seed)
    for name in STAGES[:2]:
        bench.stage(network, name, experiment.STUDENT[name], "linear and hybrid", options.seed)
    for run, layout in (("linear", Layout(0)), ("hybrid", HYBRID)):
        kept = layout.kept(LAYERS)
        student = experiment.with_attention(network, kept)
        bench.stage(student, "stage-3", experiment.STUDENT["stage-3"], run, options.seed, kept=kept)
        stored = experiment.stored_tensors(student, kept)
        save(bench.work / f"{run}.npz", stored)
        bench.result(student, run=run, seed=options.seed, train_s=round(time.perf_counter() - begin, 1))


def group(options: argparse.Namespace) -> None:
    """Run one part of the ablations with one seed."""
    bench = Bench(options)
    seed, source = options.seed, load(options.work / "teacher.npz")

    def run(parent: Network | None, stages: str, init: Any = "inherit+mimic", count: int = 0) -> Network:
        """Go on from `parent` (or the seeded student) by the last of `stages`, such as "13"; measure with attention."""
        network = (
            experiment.student_of(source, bench.device, bench.dtype, init=init, seed=seed)
            if parent is None
            else experiment.with_attention(parent, ())
        )
        kept = Layout(count).kept(LAYERS)
        name: StageName = f"stage-{stages[-1]}"  # type: ignore[assignment]
        if name == "stage-3":
            network = experiment.with_attention(network, kept)
        label = f"{init}, stages {stages}, {count} attention layers"
        seconds = bench.stage(network, name, experiment.ABLATION[name], label, seed, kept=kept)
        labels = {"run": label, "seed": seed, "init": init, "stages": stages, "attention_layers": count}
        bench.result(network, **labels, stage_s=round(seconds, 1))
        return network

    if options.group == "counts":
        both = run(run(None, "1"), "12")
        for count in (1, 2, 4):
            run(both, "123", count=count)
        run(both, "123")
    elif options.group == "subsets":
        run(None, "3")
        run(run(None, "2"), "23")
        run(run(None, "1"), "13")
    else:
        for init in ("scratch", "inherit"):
            run(run(run(None, "1", init), "12", init), "123", init)


def ablations(options: argparse.Namespace) -> None:
    """Run all groups and seeds side by side on one GPU: models this small leave it idle most of the time."""
    for split, count in _counts(options):
        _cached((options.cache or options.work) / f"{split}-{count}", split, count, options)
    shared = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("work", "device", "train_samples")]
    shared += [f"--steps-scale={options.steps_scale}", f"--cache={options.cache or options.work}"]
    shared += ["--compile"] if options.compile else []
    running = []
    for seed in SEEDS:
        for part in GROUPS:
            command = [sys.executable, __file__, "group", f"--group={part}", f"--seed={seed}", *shared]
            running.append(subprocess.Popen([*command, f"--part=ablations-{part}-{seed}"]))
    failed = [process.args for process in running if process.wait() != 0]
    if failed:
        raise SystemExit(f"failed: {failed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {f.__name__: f for f in (prepare, teacher, students, group, ablations)}
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder for drawn samples; DIR unless given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--train-samples", type=int, default=experiment.TRAIN_SAMPLES)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="of the recipe's steps; below 1 for a trial")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--group", choices=GROUPS, default="counts")
    parser.add_argument("--part", help="in the names of curves and results; the command unless given")
    options = parser.parse_args()
    options.part = options.part or options.command
    torch.set_float32_matmul_precision("high")
    commands[options.command](options)


if __name__ == "__main__":
    main()
