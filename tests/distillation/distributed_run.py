"""A program for torchrun: distils the toy teacher, and prints what it computed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from toy_task import toy_data

from mmm_export.distillation.layout import Layout
from mmm_export.distillation.parallel import launched_processes
from mmm_export.distillation.pipeline import Job, run_job
from mmm_export.distillation.recipe import Recipe, RunOptions
from mmm_export.distillation.stage import StageOptions

STAGE = StageOptions(steps=4, batch_samples=8, samples_per_pass=2, learning_rate=5e-3)


def main(teacher: str, folder: str, recompute: str, device_kind: str) -> None:
    recipe = Recipe(
        stages={"stage-1": STAGE, "stage-2": STAGE, "stage-3": STAGE},
        layout=Layout(1),
        run=RunOptions(dtype="fp32", recompute=recompute == "recompute", snapshot_steps=3),
    )
    place = Path(folder)
    with launched_processes(device_kind) as (processes, device):
        job = Job(
            Path(teacher),
            recipe,
            tuple(recipe.stages),
            output=place / "student",
            work=place / "work",
            device=device,
            processes=processes,
        )
        calls = [0]

        def stop() -> bool:
            calls[0] += 1
            return calls[0] == 6 and (place / "interrupt").exists()

        run_job(
            job if not (place / "work").exists() else with_resume(job),
            lambda checkpoint: toy_data(device=device),
            stop=stop,
        )


def with_resume(job: Job) -> Job:
    from dataclasses import replace

    return replace(job, resume=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
