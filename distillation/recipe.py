"""A recipe: everything that decides what a distillation computes. Read from YAML by recipe_file.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mmm_export.distillation.layout import Layout
from mmm_export.distillation.seeding import Init
from mmm_export.distillation.stage import STAGES, StageName, StageOptions
from mmm_export.errors import OptionError
from mmm_export.manifest import Dtype

LONGEST_SAMPLE = 1 << 20


@dataclass(frozen=True)
class DataOptions:
    """How samples become batches.

    Attributes:
        max_tokens: longest sample, and longest row that several samples are packed into.
        max_tiles: most tiles of the images of a sample together, without thumbnails; None for the model's own number.
        packing: whether short samples share a row.
        workers: processes that read and tokenise, on each GPU; 0 reads in the training process.
        system: system text of the prompt; None for the model's own.
    """

    max_tokens: int = 8192
    max_tiles: int | None = 12
    packing: bool = True
    workers: int = 4
    system: str | None = None

    def __post_init__(self) -> None:
        wrong = (
            ("max_tokens", self.max_tokens, 2 <= self.max_tokens <= LONGEST_SAMPLE, f"2 to {LONGEST_SAMPLE}"),
            ("max_tiles", self.max_tiles, self.max_tiles is None or 1 <= self.max_tiles <= 1024, "1 to 1024"),
            ("workers", self.workers, 0 <= self.workers <= 256, "0 to 256"),
        )
        for name, found, right, wanted in wrong:
            if not right:
                raise OptionError(f"data.{name} is out of range", found=str(found), wanted=wanted)


@dataclass(frozen=True)
class RunOptions:
    """How the work is done; it changes speed and memory, and the result by rounding alone.

    Attributes:
        dtype: number format of the activations, and of frozen weights; not fp16, whose gradients would need scaling.
        recompute: activation checkpointing: forget what a layer computed and compute it again on the way back.
        compile: whether torch.compile compiles the layers.
        cuda_graph: whether a step is recorded once and replayed, see LoopOptions.
        deterministic: whether to take only kernels that give the same bits each time.
        logit_tokens: positions whose logits are in memory at a time.
        log_steps: steps between two looks at the loss.
        snapshot_steps: steps between two snapshots.
    """

    dtype: Literal["fp32", "bf16"] = "bf16"
    recompute: bool = True
    compile: bool = False
    cuda_graph: bool = False
    deterministic: bool = False
    logit_tokens: int = 1024
    log_steps: int = 10
    snapshot_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("logit_tokens", "log_steps", "snapshot_steps"):
            if getattr(self, name) < 1:
                raise OptionError(f"run.{name} is out of range", found=str(getattr(self, name)), wanted="1 or more")


@dataclass(frozen=True)
class SeedingOptions:
    """What the students start from, see seeding.py."""

    init: Init = "inherit+mimic"


@dataclass(frozen=True)
class OutputOptions:
    """Number format of the checkpoint that is written; None for the teacher's."""

    dtype: Dtype | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes:
        seed: of the drawn starting values and of the order of samples.
        stages: what is run, by name, in order; "supervised" alone trains the given model itself.
        seeding: what students start from.
        layout: which layers stay attention.
        data: how samples become batches.
        run: how the work is done.
        output: what is written.
    """

    stages: Mapping[StageName, StageOptions]
    seed: int = 42
    seeding: SeedingOptions = field(default_factory=SeedingOptions)
    layout: Layout = field(default_factory=Layout)
    data: DataOptions = field(default_factory=DataOptions)
    run: RunOptions = field(default_factory=RunOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def __post_init__(self) -> None:
        if not self.stages:
            raise OptionError("the recipe has no stage", wanted=f"one of {', '.join(STAGES)}, or supervised")
        if "supervised" in self.stages and len(self.stages) > 1:
            raise OptionError(
                "a recipe is either supervised or a distillation",
                found=", ".join(self.stages),
                hint="put the supervised stage into a recipe of its own",
            )
        if not 0 <= self.seed < 2**31:
            raise OptionError("seed is out of range", found=str(self.seed), wanted="0 to 2147483647")
        order = [name for name in STAGES if name in self.stages]
        if [name for name in self.stages if name in STAGES] != order:
            object.__setattr__(self, "stages", {name: self.stages[name] for name in order})

    @property
    def supervised(self) -> bool:
        """Whether it trains a model on answers instead of distilling it."""
        return "supervised" in self.stages


StageChoice = Literal["1", "2", "3", "all"]


def chosen_stages(recipe: Recipe, choice: StageChoice) -> tuple[StageName, ...]:
    """Give the stages of a recipe that --stage asks for.

    Raises:
        OptionError: the recipe has not got it.
    """
    if choice == "all":
        return tuple(recipe.stages)
    name: StageName = f"stage-{choice}"  # type: ignore[assignment]
    if name not in recipe.stages:
        raise OptionError(f"the recipe has no {name}", found=", ".join(recipe.stages), hint="choose another --stage")
    return (name,)
