"""`mmm-export distill`: from a teacher to a student, by the recipe of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmm_export.command_line import INTERRUPTED, UsageError
from mmm_export.commands.options import PATH
from mmm_export.packages import require

if TYPE_CHECKING:
    from mmm_export.distillation.recipe import Recipe


@click.command()
@click.option("--teacher", type=PATH, required=True, metavar="CHECKPOINT", help="The all-attention model, HoVLE.")
@click.option("--data", type=PATH, metavar="FILE", help="Conversations, one JSON object a line, as InternVL has them.")
@click.option(
    "--images", type=PATH, metavar="FOLDER", show_default="the folder of --data", help="Where image paths begin."
)
@click.option(
    "--recipe",
    required=True,
    metavar="NAME|FILE",
    help="mmmamba-linear, mmmamba-hybrid, supervised, or a YAML file of your own.",
)
@click.option("-o", "--output", type=PATH, required=True, metavar="CHECKPOINT", help="Folder to write.")
@click.option(
    "--stage",
    type=click.Choice(["seed", "1", "2", "3", "all"]),
    default="all",
    help="What to run: one stage after those that are done, all of the recipe, or only seed a student.",
)
@click.option(
    "--work",
    type=PATH,
    metavar="FOLDER",
    show_default="OUTPUT.work",
    help="Where log, snapshots and finished stages are kept.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with what is in the work folder; the curve is the same as without a stop."
)
@click.option("--strict", is_flag=True, help="Refuse the first unusable sample instead of leaving it out.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where it is computed.")
@click.option("--tensorboard", is_flag=True, help="Also log for TensorBoard, in the work folder.")
@click.option("--dry-run", is_flag=True, help="Only print memory, tokens and time, for --gpus GPUs.")
@click.option("--gpus", type=click.IntRange(min=1), default=8, metavar="N", help="GPUs that a dry run assumes.")
@click.option("--force", is_flag=True, help="Replace OUTPUT if it is a checkpoint already.")
def distill(**options: Any) -> int:
    """Distil a teacher into mmMamba, linear or hybrid: seed Mamba-2 layers from its attention, then train them in three stages.

    The result is a checkpoint in the released layout, which `mmm-export onnx` takes. Ctrl-C ends the run after its
    current step; --resume goes on from there. On several GPUs: torchrun --nproc-per-node N -m mmm_export distill ...

    \b
    Example:
      mmm-export distill --teacher HoVLE --data sft.jsonl --recipe mmmamba-hybrid -o build/hybrid
    """
    require("distill")
    if options["tensorboard"]:
        require("tensorboard")
    from mmm_export.distillation.recipe_file import read_recipe, recipe_path

    recipe = read_recipe(recipe_path(options["recipe"]))
    if options["stage"] == "seed":
        return _seed(recipe, options)
    if options["dry_run"]:
        return _estimate(recipe, options)
    if options["data"] is None:
        raise UsageError("missing option '--data'", "only --stage seed and --dry-run do without data")
    return _train(recipe, options)


def _seed(recipe: Recipe, options: dict[str, Any]) -> int:
    from mmm_export.distillation.seeded_checkpoint import seed_student
    from mmm_export.progress import console_progress
    from mmm_export.rendering.distillation import seeded

    output = options["output"]
    seed_student(options["teacher"], recipe, output, force=options["force"], progress=console_progress())
    click.echo(seeded(output, recipe), err=True)
    return 0


def _estimate(recipe: Recipe, options: dict[str, Any]) -> int:
    from mmm_export.distillation.estimate import estimate, sampled_lengths
    from mmm_export.distillation.jsonl_data import open_data
    from mmm_export.distillation.pipeline import check_teacher
    from mmm_export.model.checkpoint import Checkpoint
    from mmm_export.rendering.distillation import estimates

    checkpoint = Checkpoint.open(options["teacher"], rope_scaling="teacher")
    check_teacher(checkpoint.spec, recipe)
    samples = None
    if options["data"] is not None:
        data = open_data(options["data"], checkpoint, recipe, images=options["images"], strict=options["strict"])
        samples = sampled_lengths(data)
    click.echo(estimates(estimate(checkpoint.spec, recipe, gpus=options["gpus"], samples=samples)))
    return 0


def _train(recipe: Recipe, options: dict[str, Any]) -> int:
    from mmm_export.distillation.journal import Journal
    from mmm_export.distillation.jsonl_data import JsonlData, open_data
    from mmm_export.distillation.parallel import launched_processes
    from mmm_export.distillation.pipeline import Job, run_job
    from mmm_export.distillation.recipe import chosen_stages
    from mmm_export.distillation.running import chosen_device, interruptible, numeric_settings
    from mmm_export.distillation.work_folder import file_identity
    from mmm_export.progress import SilentProgress, console_progress
    from mmm_export.rendering.distillation import finished

    output: Path = options["output"]
    work = options["work"] or output.with_name(f"{output.name}.work")
    opened: list[JsonlData] = []

    def data(checkpoint: Any) -> JsonlData:
        opened.append(
            open_data(
                options["data"],
                checkpoint,
                recipe,
                images=options["images"],
                strict=options["strict"],
                pin=device.startswith("cuda"),
            )
        )
        return opened[0]

    numeric_settings(recipe.run)
    with launched_processes(chosen_device(options["device"])) as (processes, device):
        job = Job(
            options["teacher"],
            recipe,
            chosen_stages(recipe, options["stage"]),
            output,
            work,
            data_identity=file_identity(options["data"]) if options["data"].exists() else "",
            resume=options["resume"],
            force=options["force"],
            device=device,
            processes=processes,
        )
        progress = console_progress() if processes.first else SilentProgress()
        board = work / "tensorboard" if options["tensorboard"] and processes.first else None
        with Journal(lambda line: click.echo(line, err=True), board) as journal, interruptible() as stop:
            done = run_job(job, data, listener=journal, progress=progress, stop=stop)
        if not processes.first:
            return 0 if done else INTERRUPTED
        skipped = opened[0].summary() if opened else {}
        click.echo(finished(output, work, recipe, done=done, skipped=skipped, last=journal.last), err=True)
    return 0 if done else INTERRUPTED
