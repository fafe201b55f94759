"""Trains the demo models and measures the paper's ablations on the demo task: teacher, students by three stages, curves.

python benchmarks/digits_distillation.py prepare --work DIR     pictures' sources and token ids, on a machine with the packages
python benchmarks/digits_distillation.py teacher --work DIR     trains the teacher
python benchmarks/digits_distillation.py students --work DIR    distils the linear and the hybrid student from it
python benchmarks/digits_distillation.py more --work DIR        a second round of stage 3 for the linear one
python benchmarks/digits_distillation.py more --work DIR --round 3       a third one, on five times as many pictures
python benchmarks/digits_distillation.py ablations --work DIR   stages, inits and attention counts, three seeds each
python benchmarks/digits_distillation.py ship --work DIR        writes demo_models/ from them

All but `prepare` and `ship` need torch and numpy alone. DIR collects assets.npz, encoding.json, the models as .npz, and curves and
results as .jsonl. `python benchmarks/digits_results.py` makes the result file of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
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
from mmm_export.model.testing.specs import Kind

LAYERS = digits_spec("teacher").layers
HYBRID = Layout(2)  # as released: the first layer of every four
SEEDS = (0, 1, 2)
ROOT = Path(__file__).resolve().parent.parent
KINDS: tuple[Kind, ...] = ("teacher", "linear", "hybrid")
LOOKS = 5  # at the test accuracy during a run
RATES = ("5e-3,2e-3,1e-3", "2e-3,1e-3,5e-4", "1e-2,5e-3,2e-3", "5e-3,2e-3,3e-3", "5e-3,2e-3,5e-3")
GROUPS = ("counts", "subsets", "inits")
ROUNDS = {  # of stage 3 for the linear student, after the first: how, on how many samples
    2: (experiment.SECOND_ROUND, experiment.TRAIN_SAMPLES, "second round"),
    3: (experiment.THIRD_ROUND, experiment.THIRD_ROUND_SAMPLES, "third round"),
}


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


def draw(options: argparse.Namespace) -> None:
    """Draw the samples of both splits, which the other commands then share."""
    for split, count in _counts(options):
        _drawn(split, count, options)


class Bench:
    """What all runs share: data on the device, places for curves and results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work
        self.device = options.device
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.options = options
        self.arrays = {split: _drawn(split, count, options) for split, count in _counts(options)}
        self.train = experiment.memory_data(self.arrays["train"], self.device, self.dtype, options.used_samples)
        self.test = experiment.memory_data(self.arrays["test"], self.device, self.dtype)
        self.begin = time.perf_counter()
        self.looks: dict[str, int] = {}  # how often each run was measured on the way

    def stage(
        self, network: Network, name: StageName, options: StageOptions, run: str, seed: int, **more: Any
    ) -> float:
        """Run a stage; returns its seconds."""
        begin = time.perf_counter()
        options = dataclasses.replace(options, steps=max(1, round(options.steps * self.options.steps_scale)))
        curve = experiment.curve_lines(self.work / f"curves-{self.options.part}.jsonl", run=run, seed=seed)

        def record(row: Record) -> None:
            curve(row)
            looks = int(row["step"]) * LOOKS // options.steps
            if self.options.command in ("teacher", "students", "more") and looks > self.looks.get(f"{run} {name}", 0):
                self.looks[f"{run} {name}"] = looks
                found = experiment.accuracy(network, self.test, self.arrays["test"].kinds)["all"]
                self.row(run=run, seed=seed, stage=name, step=row["step"], accuracy=found)
                if name == "supervised":
                    save(self.work / "teacher.npz", experiment.stored_tensors(network, range(LAYERS)))
            if "steps_per_s" in row and int(row["step"]) % 1000 == 0:
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
        by_kind = {kind: round(share, 4) for kind, share in found.items() if kind != "all"}
        self.row(**labels, accuracy=found["all"], by_kind=by_kind)

    def row(self, **labels: Any) -> None:
        """Keep a row of the results, and say it with the time."""
        with (self.work / f"results-{self.options.part}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(labels) + "\n")
        _say(f"{time.perf_counter() - self.begin:.0f} s", json.dumps(labels))


def _say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def _counts(options: argparse.Namespace) -> list[tuple[str, int]]:
    return [("train", options.train_samples or experiment.TRAIN_SAMPLES), ("test", TEST_SAMPLES)]


def _drawn(split: Any, count: int, options: argparse.Namespace) -> Arrays:
    """Draw samples, or read those that another run drew."""
    begin = time.perf_counter()
    stored = json.loads((options.work / "encoding.json").read_text(encoding="utf-8"))
    folder = (options.cache or options.work) / f"{split}-{count}"
    assets = Assets.load(options.work / "assets.npz")
    arrays = experiment.draw_arrays(folder, split, count, assets, Encoding(**stored), workers=options.workers)
    _say(f"{count} samples of {split} in {time.perf_counter() - begin:.1f} s")
    return arrays


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
    stages = _with_rates(experiment.STUDENT, options.rates)
    for name in STAGES[:2]:
        bench.stage(network, name, stages[name], "linear and hybrid", options.seed)
    for run, layout in (("linear", Layout(0)), ("hybrid", HYBRID)):
        kept = layout.kept(LAYERS)
        student = experiment.with_attention(network, kept)
        bench.stage(student, "stage-3", stages["stage-3"], run, options.seed, kept=kept)
        stored = experiment.stored_tensors(student, kept)
        save(bench.work / f"{run}.npz", stored)
        bench.result(student, run=run, seed=options.seed, train_s=round(time.perf_counter() - begin, 1))


def group(options: argparse.Namespace) -> None:
    """Run one part of the ablations with one seed."""
    bench = Bench(options)
    seed, source = options.seed, load(options.work / "teacher.npz")
    stages_of = _with_rates(experiment.ABLATION, options.rates)

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
        seconds = bench.stage(network, name, stages_of[name], label, seed, kept=kept)
        labels = {"run": label, "seed": seed, "init": init, "stages": stages, "attention_layers": count}
        bench.result(network, **labels, stage_s=round(seconds, 1))
        return network

    def untrained(init: Any) -> None:
        network = experiment.student_of(source, bench.device, bench.dtype, init=init, seed=seed)
        label = f"{init}, no stage, 0 attention layers"
        bench.result(network, run=label, seed=seed, init=init, stages="none", attention_layers=0)

    if options.group == "counts":
        untrained("inherit+mimic")
        both = run(run(None, "1"), "12")
        for count in (0, 2, 1, 4):
            run(both, "123", count=count)
    elif options.group == "subsets":
        run(None, "3")
        run(run(None, "2"), "23")
        run(run(None, "1"), "13")
    else:
        for init in ("scratch", "inherit"):
            untrained(init)
            run(run(run(None, "1", init), "12", init), "123", init)


def more(options: argparse.Namespace) -> None:
    """Give the linear student another round of stage 3."""
    stage, samples, label = ROUNDS[options.round]
    options.train_samples = options.train_samples or samples
    bench = Bench(options)
    teacher_tensors, linear = load(bench.work / "teacher.npz"), load(bench.work / "linear.npz")
    network = experiment.trained_student(teacher_tensors, linear, bench.device, bench.dtype)
    bench.result(network, run=f"linear, before the {label}", seed=options.seed)
    # The order of samples continues with another seed: the first one's would begin with the same samples again.
    seed = options.seed + options.round - 1
    seconds = bench.stage(network, "stage-3", stage, f"linear, {label}", seed)
    save(bench.work / "linear.npz", experiment.stored_tensors(network, ()))
    bench.result(network, run=f"linear, {label}", seed=seed, train_s=round(seconds, 1))


def ship(options: argparse.Namespace) -> None:
    """Write the trained models as checkpoints in the released layout, bf16."""
    from mmm_export.distillation.digits.vocabulary import digits_vocabulary
    from mmm_export.model.tensors import unused_shapes
    from mmm_export.model.testing import write_checkpoint

    tokenizer = options.work / "tokenizer.model"
    tokenizer.write_bytes(digits_vocabulary())
    for kind in KINDS:
        spec = digits_spec(kind)
        values = {name: value.numpy() for name, value in load(options.work / f"{kind}.npz").items()}
        folder = options.output / kind
        write_checkpoint(folder, spec, dtype="bf16", tokenizer=tokenizer, extra=values, drop=tuple(unused_shapes(spec)))
        _say(folder, f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


def _with_rates(stages: dict[StageName, StageOptions], rates: str | None) -> dict[StageName, StageOptions]:
    """Put other learning rates into a recipe."""
    if rates is None:
        return stages
    values = zip(STAGES, map(float, rates.split(",")), strict=True)
    return {name: dataclasses.replace(stages[name], learning_rate=value) for name, value in values}


def rate(options: argparse.Namespace) -> None:
    """Try one set of learning rates on short stages."""
    bench = Bench(options)
    source = load(options.work / "teacher.npz")
    network = experiment.student_of(source, bench.device, bench.dtype, seed=options.seed)
    for name, options_of_stage in _with_rates(experiment.STUDENT, options.rates).items():
        stage = dataclasses.replace(options_of_stage, steps={"stage-1": 250, "stage-2": 250, "stage-3": 600}[name])
        seconds = bench.stage(network, name, stage, f"rates {options.rates}", options.seed)
        bench.result(network, run=f"rates {options.rates}", stage=name, stage_s=round(seconds, 1))


def rates(options: argparse.Namespace) -> None:
    """Try several sets of learning rates side by side."""
    _side_by_side(options, [["rate", f"--rates={each}", f"--part=rates-{i}"] for i, each in enumerate(RATES)])


def ablations(options: argparse.Namespace) -> None:
    """Run all groups and seeds side by side on all GPUs: models this small leave one idle most of the time."""
    runs = [
        ["group", f"--group={part}", f"--seed={seed}", f"--part=ablations-{part}-{seed}"]
        for seed in SEEDS
        for part in GROUPS
    ]
    _side_by_side(options, runs)


def _side_by_side(options: argparse.Namespace, runs: list[list[str]]) -> None:
    for split, count in _counts(options):
        _drawn(split, count, options)
    shared = [
        f"--{name.replace('_', '-')}={getattr(options, name)}"
        for name in ("work", "device", "train_samples", "used_samples")
        if getattr(options, name) is not None
    ]
    shared += [f"--steps-scale={options.steps_scale}", f"--cache={options.cache or options.work}"]
    shared += ["--compile"] if options.compile else []
    shared += [f"--rates={options.rates}"] if options.rates and "rate" not in runs[0] else []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(i) for i in range(torch.cuda.device_count())] or [""]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *run, *shared],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]},
        )
        for i, run in enumerate(runs)
    ]
    failed = [process.args for process in running if process.wait() != 0]
    if failed:
        raise SystemExit(f"failed: {failed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {f.__name__: f for f in (prepare, draw, teacher, students, rate, rates, group, ablations, more, ship)}
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "demo_models", help="of ship")
    parser.add_argument("--cache", type=Path, help="folder for drawn samples; DIR unless given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--train-samples", type=int, help=f"{experiment.TRAIN_SAMPLES}, or what the round wants")
    parser.add_argument("--used-samples", type=int, help="of the drawn ones; all unless given")
    parser.add_argument("--round", type=int, choices=sorted(ROUNDS), default=2, help="of more")
    parser.add_argument("--rates", help="learning rates of the three stages, such as 5e-3,2e-3,1e-3")
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
