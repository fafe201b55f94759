"""What distillation costs at full size, with random weights.

python benchmarks/full_size_distillation.py seed              seeding from a 2.6B teacher: 11 GB of disk, results/cpu-seeding.json
python benchmarks/full_size_distillation.py seed --tiny       the same in seconds; writes a result only to --results
python benchmarks/full_size_distillation.py steps             steps of each stage on a GPU, the teacher made in its memory
python benchmarks/full_size_distillation.py steps --tiny      the same on a tiny model, on the CPU where there is no GPU
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import MIB, run_sampled
from result_file import RESULTS, ROOT, write_results

if TYPE_CHECKING:
    import torch

    from mmm_export.distillation.batch import Batch
    from mmm_export.spec import ModelSpec

GIB = 1 << 30


def measure_seeding(folder: Path, *, tiny: bool, keep: bool) -> dict[str, Any]:
    """Write a random teacher unless it is there, seed a linear student from it by the command, return the row."""
    from mmm_export.model.testing import full_size_spec, tiny_spec, write_checkpoint

    teacher = folder / ("tiny-teacher" if tiny else "full-teacher")
    begin = time.perf_counter()
    if not teacher.is_dir():
        partial = teacher.with_name(f"{teacher.name}-partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(partial, tiny_spec(kinds="teacher") if tiny else full_size_spec("teacher"), dtype="bf16")
        partial.rename(teacher)
    write_s = time.perf_counter() - begin
    student = folder / "student"
    command = [sys.executable, "-m", "mmm_export", "distill", "--teacher", str(teacher), "--recipe", "mmmamba-linear"]
    wall_s, peak = run_sampled([*command, "--stage", "seed", "-o", str(student)])
    size = sum(path.stat().st_size for path in student.iterdir())
    shutil.rmtree(student)
    if not keep:
        shutil.rmtree(teacher)
    return {
        "name": "seeding",
        "model": f"HoVLE, {'tiny' if tiny else '2.6B parameters'}, random weights, bf16",
        "wall_s": round(wall_s, 1),
        "peak_anonymous_mib": round(peak / MIB, 1),
        "student_bytes": size,
        "write_teacher_s": round(write_s, 1),
    }


class OneBatch:
    """The same batch for every pass."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return self.batch.samples

    def batches(self, plan: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Give it for each list of indices."""
        return (self.batch for _ in plan)


def packed_batch(spec: ModelSpec, tokens: int, samples: int, tiles: int, device: str, dtype: torch.dtype) -> Batch:
    """Give one row of random samples of equal length, each with one image and an answer of a quarter of its tokens."""
    import torch

    from mmm_export.distillation.batch import NO_TARGET, Batch

    length = tokens // samples
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, min(300, spec.vocab_size), (samples, length), generator=generator)
    ids[:, 2 : 2 + tiles * spec.vision.tokens_per_tile] = spec.image_token_id
    targets = torch.full_like(ids, NO_TARGET)
    targets[:, -length // 4 : -1] = ids[:, -length // 4 + 1 :]
    side = spec.vision.tile_size
    return Batch(
        ids=ids.reshape(1, -1),
        targets=targets.reshape(1, -1),
        valid=torch.ones(1, samples * length, dtype=torch.bool),
        positions=torch.arange(length).repeat(samples)[None],
        segments=torch.arange(samples, dtype=torch.int32).repeat_interleave(length)[None],
        pixels=torch.randn(samples * tiles, 3, side, side, generator=generator).to(dtype),
        samples=samples,
    ).to(device)


def measure_steps(*, tiny: bool, steps: int, compiled: bool) -> list[dict[str, Any]]:
    """Run the optimizer's steps of each stage and return a row for each."""
    import torch

    from mmm_export.distillation.loading import network_from_tensors
    from mmm_export.distillation.recipe_file import read_recipe, recipe_path
    from mmm_export.distillation.stage import StageName
    from mmm_export.distillation.trainer import LoopOptions, StageTrainer
    from mmm_export.model import tensors
    from mmm_export.model.testing import full_size_spec, tiny_spec

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    spec = tiny_spec(kinds="teacher", tile_size=448) if tiny else full_size_spec("teacher")
    shapes = tensors.required_shapes(spec)
    generator = torch.Generator(device).manual_seed(0)

    def source(name: str) -> torch.Tensor:
        shape = shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=device, dtype=torch.bfloat16)
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        values = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
        return values / max(fan_in, 1) ** 0.5

    begin = time.perf_counter()
    everything = frozenset(range(spec.layers))
    network = network_from_tensors(
        spec, source, students=everything, dtype=torch.bfloat16, stored_dtype=torch.bfloat16, device=device
    )
    build_s = time.perf_counter() - begin
    tokens, samples, tiles = (256, 4, 0) if tiny else (8192, 4, 5)
    batch = packed_batch(spec, tokens, samples, tiles, device, torch.bfloat16)
    recipe = read_recipe(recipe_path("mmmamba-hybrid"))
    kept = replace(recipe.layout, attention_layers=1 if tiny else 8).kept(spec.layers)
    rows = []
    plans: list[tuple[StageName, bool]] = [
        ("stage-1", True),
        ("stage-2", True),
        ("stage-2", False),
        ("stage-3", True),
        ("stage-3", False),
    ]
    if compiled:
        plans = [plan for plan in plans if plan[1]]  # each other plan would be compiled anew
    for name, recompute in plans:
        network.recompute = recompute
        stage = replace(recipe.stages[name], steps=1 + steps, batch_samples=samples, samples_per_pass=samples)
        row: dict[str, Any] = {"name": name, "recompute": recompute, "compiled": compiled, "tokens": tokens}
        row |= {"samples": samples, "tiles": samples * tiles, "build_s": round(build_s, 1)}
        times: list[float] = []
        losses: list[float] = []
        try:
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            loop = LoopOptions(log_steps=1, compile=compiled)
            trainer = StageTrainer(network, name, stage, OneBatch(batch), loop, kept=kept if name == "stage-3" else ())
            last = time.perf_counter()

            def told(record: dict[str, Any], times: list[float] = times, losses: list[float] = losses) -> None:
                nonlocal last
                now = time.perf_counter()
                times.append(now - last)
                losses.append(record["loss"])
                last = now

            trainer.run(on_record=told)
            row["trained_parameters"] = sum(p.numel() for p in trainer._parameters)
            times.sort()
            median = sorted(times[1:])[len(times[1:]) // 2] if len(times) > 1 else times[0]
            row |= {"step_s": round(median, 4), "tokens_per_s": round(tokens / median, 1)}
            row["losses"] = [round(loss, 5) for loss in losses]
        except torch.cuda.OutOfMemoryError as error:
            row["out_of_memory"] = str(error).splitlines()[0][:120]
        if device == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
            row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        rows.append(row)
        sys.stderr.write(f"{row}\n")
        network.zero_grad()
        trainer = None  # type: ignore[assignment]
        gc.collect()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["seed", "steps"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of each stage, after one that is not (default: 4)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the passes")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmark", help="where models are written")
    parser.add_argument("--keep", action="store_true", help="keep the teacher for another run")
    parser.add_argument("--results", type=Path, help="result file")
    options = parser.parse_args()
    if options.what == "seed":
        options.folder.mkdir(parents=True, exist_ok=True)
        rows = [measure_seeding(options.folder, tiny=options.tiny, keep=options.keep)]
        results = options.results or (None if options.tiny else RESULTS / "cpu-seeding.json")
        what, where = "seeding a student from a teacher: wall time and peak anonymous memory of the process", None
    else:
        import torch

        rows = measure_steps(tiny=options.tiny, steps=options.steps, compiled=options.compile)
        results = options.results or (None if options.tiny else RESULTS / "h100-full-size-distillation.json")
        what = "optimizer steps of each stage at full size, one pass of one packed row: median time and peak memory"
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    sys.stderr.write(f"{rows}\n")
    if results:
        write_results(results, what, rows, where=where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
