"""A whole run: teacher and data in, checkpoint out; its stages one behind the other, each of which can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mmm_export import names
from mmm_export.distillation.layout import student_spec
from mmm_export.distillation.loading import checkpoint_tensors, network_from_tensors
from mmm_export.distillation.network import Network
from mmm_export.distillation.parallel import SINGLE, Processes, spread
from mmm_export.distillation.recipe import Recipe
from mmm_export.distillation.stage import StageName, StageOptions
from mmm_export.distillation.states import load_parameters, load_trainer, parameters_state, trainer_state
from mmm_export.distillation.student_checkpoint import write_student
from mmm_export.distillation.trainer import Data, LoopOptions, Record, StageTrainer, TrainingError
from mmm_export.distillation.work_folder import WorkFolder, work_identity
from mmm_export.errors import CheckpointError, OptionError
from mmm_export.manifest import Dtype
from mmm_export.model import tensors
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.output import output_folder
from mmm_export.progress import Progress, SilentProgress
from mmm_export.spec import ModelSpec

VALUE_BYTES: dict[Dtype, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Listener(Protocol):
    """Who is told what happens."""

    def stage(self, name: StageName, options: StageOptions, done: int) -> None:
        """A stage begins, `done` steps of it being done already."""

    def record(self, record: Record) -> None:
        """A step is done."""


class SilentListener:
    """Says nothing."""

    def stage(self, name: StageName, options: StageOptions, done: int) -> None:
        """Ignore it."""

    def record(self, record: Record) -> None:
        """Ignore it."""


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        teacher: checkpoint folder.
        recipe: what is computed.
        stages: of the recipe, those that are run now.
        output: checkpoint folder to write.
        work: folder of the unfinished work.
        data_identity: name of the data, so that a run is not resumed with another.
        resume: whether work that is there is gone on with.
        force: whether an existing output is replaced.
        device: where it is computed.
        processes: that do it together.
    """

    teacher: Path
    recipe: Recipe
    stages: tuple[StageName, ...]
    output: Path
    work: Path
    data_identity: str = ""
    resume: bool = False
    force: bool = False
    device: str = "cpu"
    processes: Processes = SINGLE


def run_job(
    job: Job,
    data: Callable[[Checkpoint], Data],
    *,
    listener: Listener | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Run a job.

    Args:
        job: what to do.
        data: opens the data, once the teacher is known.
        listener: told every step.
        progress: of the long pieces of work besides.
        stop: asked after every step.

    Returns:
        Whether the output was written: false when `stop` ended it.

    Raises:
        CheckpointError: the teacher cannot be read or used.
        TrainingError: the loss is no number, or memory ran out.
        OptionError: the recipe does not fit.
        OutputError: the output or the work folder is in the way.
    """
    try:
        _run(job, data, listener or SilentListener(), progress or SilentProgress(), stop)
    except _StoppedError:
        return False
    return True


class _StoppedError(Exception):
    """`stop` ended a run: unwinds it, so that no output appears."""


def _run(
    job: Job,
    data: Callable[[Checkpoint], Data],
    listener: Listener,
    progress: Progress,
    stop: Callable[[], bool],
) -> None:
    recipe = job.recipe
    checkpoint = Checkpoint.open(job.teacher, rope_scaling="teacher")
    spec = checkpoint.spec
    check_teacher(spec, recipe)
    kept = recipe.layout.kept(spec.layers)
    dtype = recipe.output.dtype or checkpoint.dtype
    target = spec if recipe.supervised else student_spec(spec, kept)
    with ExitStack() as stack:
        if job.processes.first:
            place = stack.enter_context(
                output_folder(
                    job.output,
                    force=job.force,
                    needed_bytes=checkpoint_bytes(checkpoint, target, dtype),
                    marker=names.CONFIG_FILE,
                    protect=(job.teacher,),
                )
            )
        source = data(checkpoint)
        identity = work_identity(recipe, str(sorted(checkpoint.config.items())), job.data_identity)
        work = WorkFolder(job.work, identity)
        if job.processes.first:
            work.begin(resume=job.resume)
        job.processes.wait()
        with progress.stage("Read the teacher and seed the student"):
            network = build_network(checkpoint, recipe, job.device)
            if job.processes.count > 1:
                spread(network, [*network.layers], job.device)
        for name in job.stages:
            _run_stage(job, network, name, source, work, kept, listener, stop)
        final = dict(_final_tensors(checkpoint, network, kept, recipe, job.processes.first))
        if job.processes.first:
            write_network(
                place,
                checkpoint,
                lambda name: final[name] if name in final else checkpoint.tensor(name),
                target,
                dtype,
                progress,
            )
        job.processes.wait()


def check_teacher(spec: ModelSpec, recipe: Recipe) -> None:
    """Raise CheckpointError for a model that cannot be what the recipe wants of it."""
    if recipe.supervised:
        if spec.vision.grid != spec.vision.position_grid:
            raise CheckpointError(
                "the model's positions cannot be trained",
                found=f"a grid of {spec.vision.position_grid} for tiles of {spec.vision.grid} patches",
                wanted="a stored grid of the tiles' own size",
            )
        return
    if spec.mamba_layers:
        raise CheckpointError(
            "the teacher is no teacher",
            found=f"{len(spec.mamba_layers)} of {spec.layers} layers are mamba2 already",
            wanted="a model whose layers are all attention, such as HoVLE",
        )


def build_network(checkpoint: Checkpoint, recipe: Recipe, device: str) -> Network:
    """Read a teacher and seed students in all of its layers; for supervised training, read the model alone in float32."""
    spec = checkpoint.spec
    network = network_from_tensors(
        spec,
        checkpoint.tensor,
        students=frozenset() if recipe.supervised else frozenset(range(spec.layers)),
        init=recipe.seeding.init,
        seed=recipe.seed,
        dtype=DTYPES[recipe.run.dtype],
        stored_dtype=torch.float32 if recipe.supervised else DTYPES[recipe.run.dtype],
        device=device,
        head=checkpoint.head_name,
    )
    network.recompute = recipe.run.recompute
    network.logit_tokens = recipe.run.logit_tokens
    return network


def _run_stage(
    job: Job,
    network: Network,
    name: StageName,
    data: Data,
    work: WorkFolder,
    kept: tuple[int, ...],
    listener: Listener,
    stop: Callable[[], bool],
) -> None:
    """Run one stage to its end, or from its snapshot; raises _StoppedError when `stop` ended it."""
    stage, run = job.recipe.stages[name], job.recipe.run
    result = work.result(name)
    if result is not None:
        load_parameters(network, result)
        return
    earlier = work.newest_before(name)
    if earlier is not None and (values := work.result(earlier)) is not None:
        load_parameters(network, values)
    loop = LoopOptions(job.recipe.seed, run.log_steps, run.snapshot_steps, run.compile, run.cuda_graph)
    trainer = StageTrainer(network, name, stage, data, loop, kept=kept, processes=job.processes)
    snapshot = work.snapshot()
    if snapshot is not None and snapshot["stage"] == name:
        load_trainer(trainer, snapshot)
    listener.stage(name, stage, trainer.step)
    own = [n for n, _ in network.named_parameters() if ".student." in n] if not job.recipe.supervised else []

    def save(trainer: StageTrainer) -> None:
        state = trainer_state(trainer)
        if job.processes.first:
            work.save_snapshot(state)
        job.processes.wait()

    with ExitStack() as stack:
        write = stack.enter_context(work.records(name, trainer.step)) if job.processes.first else lambda record: None

        def tell(record: Record) -> None:
            write(record)
            if job.processes.first:
                listener.record(record)

        try:
            trainer.run(on_record=tell, on_snapshot=save, stop=stop)
        except TrainingError as error:
            indices = trainer.order.step(trainer.step, stage.batch_samples)
            path = work.save_bad_batch(trainer.batches_of(trainer.step), indices, job.processes.rank)
            error.hint = f"{error.hint}: {path}"
            raise
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(
                error
            ):
                raise
            raise out_of_memory(error, stage, job.recipe) from error
    if trainer.step < stage.steps:
        raise _StoppedError
    values = parameters_state(network, own or trainer.trained)
    if job.processes.first:
        work.save_result(name, values)
    job.processes.wait()


def out_of_memory(error: Exception, stage: StageOptions, recipe: Recipe) -> TrainingError:
    """Name the option that helps most."""
    if stage.samples_per_pass > 1:
        advice = f"lower samples_per_pass, which is {stage.samples_per_pass}; the result stays the same"
    elif not recipe.run.recompute:
        advice = "turn run.recompute on; the result stays the same"
    elif recipe.run.logit_tokens > 256:
        advice = f"lower run.logit_tokens, which is {recipe.run.logit_tokens}; the result stays the same"
    else:
        advice = f"lower data.max_tokens, which is {recipe.data.max_tokens}, or use more GPUs"
    return TrainingError(
        "the memory is full", found=(str(error).splitlines() or [""])[0][:160], wanted="a pass that fits", hint=advice
    )


def _final_tensors(
    checkpoint: Checkpoint, network: Network, kept: tuple[int, ...], recipe: Recipe, keep: bool
) -> Mapping[str, Tensor]:
    """Give what training changed, whole and on the CPU, by stored name."""
    changed = {}
    for name, value in checkpoint_tensors(network, kept):
        stored = checkpoint.head_name if name == tensors.HEAD else name
        if recipe.supervised or (".attention." in stored and not stored.endswith(("wqkv.weight", "wo.weight"))):
            value = value.cpu()  # gathered by all processes, kept by one
            if keep:
                changed[stored] = value
    return changed


def write_network(
    folder: Path,
    checkpoint: Checkpoint,
    tensor: Callable[[str], Tensor],
    target: ModelSpec,
    dtype: Dtype,
    progress: Progress,
) -> None:
    """Write a checkpoint of the teacher's kind, its tensors as `tensor` gives them by name."""
    width = VALUE_BYTES[dtype]
    with progress.stage("Write the checkpoint", checkpoint_bytes(checkpoint, target, dtype)) as advance:
        write_student(
            folder,
            target,
            checkpoint.config,
            _shapes(checkpoint, target),
            tensor,
            dtype=dtype,
            tokenizer=checkpoint.folder,
            advance=lambda values: advance(width * values),
        )


def checkpoint_bytes(checkpoint: Checkpoint, target: ModelSpec, dtype: Dtype) -> int:
    """Size of a student's weights on the disk."""
    return VALUE_BYTES[dtype] * sum(torch.Size(shape).numel() for shape in _shapes(checkpoint, target).values())


def _shapes(checkpoint: Checkpoint, target: ModelSpec) -> dict[str, tensors.Shape]:
    """Every tensor of a student: what it needs, and what the teacher stores besides."""
    shapes = tensors.required_shapes(target, head=checkpoint.head_name)
    return shapes | {n: shape for n, shape in tensors.unused_shapes(target).items() if n in checkpoint.names()}


def random_teacher(folder: Path, spec: ModelSpec, *, seed: int, dtype: Dtype = "fp32", tokenizer: Path | None) -> None:
    """Write a teacher without any training, for a supervised recipe to begin with.

    Args:
        folder: a new or empty folder.
        spec: its dimensions; all layers attention.
        seed: of its values.
        dtype: number format.
        tokenizer: a folder with the tokenizer's files, or None.
    """
    from mmm_export.distillation.loading import untrained_source
    from mmm_export.model.testing.released_config import config_from_spec

    if spec.mamba_layers:
        raise OptionError("a teacher has only attention layers", found=f"{len(spec.mamba_layers)} mamba2 layers")
    config = config_from_spec(spec, dtype=dtype)
    with output_folder(folder, force=False, marker=names.CONFIG_FILE) as place:
        source = untrained_source(spec, seed)
        write_student(place, spec, config, tensors.required_shapes(spec), source, dtype=dtype, tokenizer=tokenizer)
