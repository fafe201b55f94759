"""From a teacher's files to a seeded student's, tensor by tensor: needs little memory at any size."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mmm_export import names
from mmm_export.distillation.layout import student_spec
from mmm_export.distillation.pipeline import check_teacher, checkpoint_bytes, write_network
from mmm_export.distillation.recipe import Recipe
from mmm_export.distillation.seeding import seeded_tensor
from mmm_export.errors import OptionError
from mmm_export.model import tensors
from mmm_export.model.checkpoint import Checkpoint
from mmm_export.output import output_folder
from mmm_export.progress import Progress, SilentProgress


def seed_student(
    teacher: Path, recipe: Recipe, output: Path, *, force: bool = False, progress: Progress | None = None
) -> None:
    """Write the student that training would begin with.

    Args:
        teacher: checkpoint folder.
        recipe: its seed, seeding and layout.
        output: checkpoint folder to write.
        force: whether an existing output is replaced.
        progress: of the writing.

    Raises:
        CheckpointError: the teacher cannot be read or used.
        OptionError: the recipe is no distillation.
        OutputError: the output is in the way.
    """
    if recipe.supervised:
        raise OptionError("a supervised recipe has no student to seed", hint="choose a recipe of a distillation")
    checkpoint = Checkpoint.open(teacher, rope_scaling="teacher")
    check_teacher(checkpoint.spec, recipe)
    spec = checkpoint.spec
    target = student_spec(spec, recipe.layout.kept(spec.layers))
    made: dict[str, tuple[int, str]] = {}
    for layer in target.mamba_layers:
        prefix = tensors.layer_prefix(spec, layer) + "attention."
        shapes = tensors.mixer_shapes(spec, "mamba2")
        made |= {prefix + (own := name.removeprefix("attention.")): (layer, own) for name in shapes}

    def tensor(name: str) -> Tensor:
        if name not in made:
            return checkpoint.tensor(name)
        layer, own = made[name]
        prefix = tensors.layer_prefix(spec, layer)
        if own == "o_proj.weight":
            return checkpoint.tensor(prefix + "attention.wo.weight")
        return seeded_tensor(
            own,
            lambda: checkpoint.tensor(prefix + tensors.ATTENTION_PROJECTION),
            spec,
            layer,
            init=recipe.seeding.init,
            seed=recipe.seed,
        )

    dtype = recipe.output.dtype or checkpoint.dtype
    size = checkpoint_bytes(checkpoint, target, dtype)
    with output_folder(output, force=force, needed_bytes=size, marker=names.CONFIG_FILE, protect=(teacher,)) as place:
        write_network(place, checkpoint, tensor, target, dtype, progress or SilentProgress())
