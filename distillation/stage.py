"""What a stage of training is: its objective, what it trains, its steps, its optimizer. Values of the paper are in recipes/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from mmm_export.distillation.network import Network, Objective
from mmm_export.distillation.parallel import set_trained
from mmm_export.errors import OptionError

StageName = Literal["stage-1", "stage-2", "stage-3", "supervised"]
STAGES: tuple[StageName, ...] = ("stage-1", "stage-2", "stage-3")  # of a distillation, in order

# Parameters of a student mixer by the words of a recipe.
PARTS: dict[str, tuple[str, ...]] = {
    "qkv": ("wvkq.weight",),
    "gate": ("wg.weight",),
    "dt": ("wdt.weight",),
    "conv": ("conv1d.weight", "conv1d.bias"),
    "norm": ("g_norm_swish_gate.weight",),
    "dt_bias": ("dt_bias",),
    "decay": ("A_log_bias",),
}
_MIMIC = ("conv", "dt", "dt_bias", "decay", "gate", "norm")
TRAINS: dict[StageName, tuple[str, ...]] = {
    "stage-1": _MIMIC,
    "stage-2": ("qkv", *_MIMIC),
    "stage-3": ("qkv", *_MIMIC),
    "supervised": ("all",),
}
OBJECTIVES: dict[StageName, Objective] = {
    "stage-1": "mimic",
    "stage-2": "mimic",
    "stage-3": "divergence",
    "supervised": "answers",
}


@dataclass(frozen=True)
class StageOptions:
    """One stage of a recipe.

    Attributes:
        steps: of the optimizer.
        batch_samples: samples of one step, on all GPUs together.
        samples_per_pass: samples that one GPU reads at a time; lower it when memory runs out.
        learning_rate: of the stable phase.
        weight_decay: of everything but biases.
        warmup_share: share of the steps in which the rate rises from 0.
        decay_share: share of the steps in which it falls to 0, at the end.
        clip_norm: largest norm of the gradient of all parameters; 0 for none.
        loss_scale: factor of the loss, before clipping.
        reduction: what the loss is divided by: the trained "tokens", or the "samples", as the paper's stage 3 has it.
        positions: of the divergence: "all", or those that predict "answers".
        train: parts that are trained, words of PARTS, or "all" for every parameter; None for the stage's own.
        beta2: decay rate of AdamW's second moment; the first one's is 0.9.
    """

    steps: int
    batch_samples: int
    learning_rate: float
    samples_per_pass: int = 2
    weight_decay: float = 0.05
    warmup_share: float = 0.1
    decay_share: float = 0.1
    clip_norm: float = 5.0
    loss_scale: float = 1.0
    reduction: Literal["tokens", "samples"] = "tokens"
    positions: Literal["all", "answers"] = "all"
    train: tuple[str, ...] | None = None
    beta2: float = 0.999

    def __post_init__(self) -> None:
        shares = self.warmup_share, self.decay_share
        wrong = (
            ("steps", self.steps, self.steps >= 1, "1 or more"),
            ("batch_samples", self.batch_samples, self.batch_samples >= 1, "1 or more"),
            ("samples_per_pass", self.samples_per_pass, self.samples_per_pass >= 1, "1 or more"),
            ("learning_rate", self.learning_rate, 0 < self.learning_rate < 10, "above 0 and below 10"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < 10, "0 to 10"),
            ("warmup_share", self.warmup_share, 0 <= self.warmup_share <= 1, "0 to 1"),
            ("decay_share", self.decay_share, 0 <= self.decay_share <= 1, "0 to 1"),
            ("warmup_share + decay_share", sum(shares), sum(shares) <= 1, "at most 1"),
            ("clip_norm", self.clip_norm, 0 <= self.clip_norm < float("inf"), "0 or more"),
            ("loss_scale", self.loss_scale, 0 < self.loss_scale < float("inf"), "above 0"),
            ("beta2", self.beta2, 0 < self.beta2 < 1, "between 0 and 1"),
        )
        for name, found, right, wanted in wrong:
            if not right:  # NaN fails every comparison
                raise OptionError(f"{name} of a stage is out of range", found=str(found), wanted=wanted)
        known = (*PARTS, "all")
        for word in self.train or ():
            if word not in known:
                raise OptionError(f"a stage cannot train {word!r:.40}", wanted=", ".join(known))


def learning_rate(options: StageOptions, step: int) -> float:
    """Rate of a step, counted from 0: linear warmup, stable, linear decay. The last step has some rate left."""
    warmup = round(options.warmup_share * options.steps)
    decay = round(options.decay_share * options.steps)
    rise = (step + 1) / warmup if step < warmup else 1.0
    left = options.steps - step
    fall = left / (decay + 1) if left <= decay else 1.0
    return options.learning_rate * min(rise, fall)


def trained_parameters(network: Network, name: StageName, options: StageOptions, kept: tuple[int, ...]) -> list[str]:
    """Update which parameters of a network want a gradient; return their names.

    Args:
        network: changed.
        name: of the stage.
        options: may say what is trained.
        kept: layers that stay attention; their student mixers are not used in stage 3 and stay as they are.
    """
    parts = options.train or TRAINS[name]
    if "all" in parts:
        chosen = dict(network.named_parameters())
        if OBJECTIVES[name] != "answers":
            chosen = {n: p for n, p in chosen.items() if ".student." in n}
    else:
        suffixes = tuple(f".student.{suffix}" for part in parts for suffix in PARTS[part])
        chosen = {n: p for n, p in network.named_parameters() if n.endswith(suffixes)}
    unused = unused_students(network, name, kept)
    chosen = {n: p for n, p in chosen.items() if not n.startswith(unused)}
    if not chosen:
        raise OptionError(f"{name} trains nothing", found=f"parts {', '.join(parts)}", wanted="a layer that has them")
    set_trained(network, set(chosen))
    return list(chosen)


def unused_students(network: nn.Module, name: StageName, kept: tuple[int, ...]) -> tuple[str, ...]:
    """Prefixes of the student mixers that a stage does not run."""
    if OBJECTIVES[name] == "mimic":
        return ()
    layers = network.layers
    chosen = [layers[i] for i in kept] if isinstance(layers, list) else []
    return tuple(f"{n}.student." for n, module in network.named_modules() if any(module is layer for layer in chosen))
