"""What a run will need, from the dimensions alone: memory, tokens, time. Formulas, whose constants were measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmm_export.distillation.conversation import SampleError
from mmm_export.distillation.jsonl_data import JsonlData
from mmm_export.distillation.layout import student_spec
from mmm_export.distillation.recipe import Recipe
from mmm_export.distillation.stage import PARTS, TRAINS, StageName, StageOptions
from mmm_export.manifest import Dtype
from mmm_export.model import tensors
from mmm_export.spec import ModelSpec

BYTES: dict[Dtype, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
MASTER, GRADIENT, MOMENTS = 4, 4, 8  # bytes of a trained parameter, all in float32
# What an H100 reached, benchmarks/results/h100-full-size-distillation.json: imitation is bound by the scan's elementwise work.
FLOP_PER_S: dict[StageName, float] = {"stage-1": 1.0e14, "stage-2": 1.0e14, "stage-3": 1.7e14, "supervised": 1.7e14}
SAMPLED = 64  # samples whose length is looked at


@dataclass(frozen=True)
class Lengths:
    """What a look at the data says: of how many samples, their mean and longest length in tokens, and how many are unusable."""

    samples: int
    looked_at: int
    mean_tokens: float
    longest_tokens: int
    unusable: int


@dataclass(frozen=True)
class StageEstimate:
    """One stage on each GPU. `tokens` of the whole stage; sizes in bytes.

    While gradients grow, what the pass kept is given up: memory holds the larger of the two.
    """

    name: StageName
    trained_parameters: int
    weights_bytes: int
    moments_bytes: int
    gradients_bytes: int
    activations_bytes: int
    tokens: float
    flop: float
    seconds: float

    @property
    def memory_bytes(self) -> int:
        """Peak of one GPU."""
        return self.weights_bytes + self.moments_bytes + max(self.gradients_bytes, self.activations_bytes)


@dataclass(frozen=True)
class Estimate:
    """A whole run; `lengths` is None when no data was looked at, and samples are then taken to be of the greatest length."""

    gpus: int
    lengths: Lengths | None
    sample_tokens: float
    stages: tuple[StageEstimate, ...]


def sampled_lengths(data: JsonlData) -> Lengths:
    """Read a few samples spread over the data."""
    count = len(data)
    looked_at = min(SAMPLED, count)
    chosen = [i * count // looked_at for i in range(looked_at)]
    lengths, unusable = [], 0
    for index in chosen:
        try:
            lengths.append(len(data.sample(index).ids))
        except SampleError:
            unusable += 1
    mean = sum(lengths) / len(lengths) if lengths else float(data.options.max_tokens)
    return Lengths(count, len(chosen), mean, max(lengths, default=0), unusable)


def parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    """Count the values of some tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def trained_parameters(spec: ModelSpec, recipe: Recipe, name: StageName) -> int:
    """Count what a stage trains."""
    if recipe.supervised:
        return parameters(tensors.required_shapes(spec))
    shapes = tensors.mixer_shapes(spec, "mamba2")
    sizes = {
        "wvkq.weight": spec.conv_channels * spec.hidden_size,
        "wg.weight": spec.heads * spec.head_dim * spec.hidden_size,
        "wdt.weight": spec.heads * spec.hidden_size,
        **{n.removeprefix("attention."): math.prod(shape) for n, shape in shapes.items()},
    }
    words = recipe.stages[name].train or TRAINS[name]
    parts = {part for word in words for part in (PARTS[word] if word != "all" else sum(PARTS.values(), ()))}
    layers = spec.layers
    if name == "stage-3":
        layers -= len(recipe.layout.kept(spec.layers))
    return layers * sum(sizes[part] for part in parts)


def estimate(spec: ModelSpec, recipe: Recipe, *, gpus: int, samples: Lengths | None) -> Estimate:
    """Estimate a run on some GPUs of one kind.

    Args:
        spec: of the teacher.
        recipe: what is run.
        gpus: how many.
        samples: what a look at the data says.
    """
    length = samples.mean_tokens if samples else float(recipe.data.max_tokens)
    stages = tuple(_stage(spec, recipe, name, stage, gpus, length) for name, stage in recipe.stages.items())
    return Estimate(gpus, samples, length, stages)


def _stage(
    spec: ModelSpec, recipe: Recipe, name: StageName, stage: StageOptions, gpus: int, length: float
) -> StageEstimate:
    value = BYTES[recipe.run.dtype]
    total = parameters(tensors.required_shapes(spec))
    trained = trained_parameters(spec, recipe, name)
    students = 0 if recipe.supervised else spec.layers * _mixer_values(spec)
    weights = total * (4 if recipe.supervised else value) + students * MASTER
    if gpus > 1:  # spread, but a layer is whole while it runs, and what all layers share while a pass runs
        layer = parameters(dict(tensors.layer_shapes(spec, "mha"))) * value + _mixer_values(spec) * MASTER
        weights = weights // gpus + layer + 2 * spec.vocab_size * spec.hidden_size * value
    tokens_in_pass = min(length * stage.samples_per_pass, float(recipe.data.max_tokens * stage.samples_per_pass))
    tokens = float(stage.steps * stage.batch_samples) * length
    flop = _flop_per_token(spec, recipe, name, length) * tokens
    return StageEstimate(
        name=name,
        trained_parameters=trained,
        weights_bytes=weights,
        moments_bytes=trained * MOMENTS // gpus,
        gradients_bytes=trained * GRADIENT // gpus,
        activations_bytes=round(tokens_in_pass * _bytes_per_token(spec, recipe, name))
        + _logit_bytes(spec, recipe, name, tokens_in_pass),
        tokens=tokens,
        flop=flop,
        seconds=flop / gpus / FLOP_PER_S[name],
    )


def _mixer_values(spec: ModelSpec) -> int:
    shapes = tensors.mixer_shapes(spec, "mamba2")
    return parameters({n: shape for n, shape in shapes.items() if not n.endswith("o_proj.weight")})


def _scan_bytes(spec: ModelSpec) -> float:
    """What the scan of one layer keeps of a token for the way back, in float32."""
    chunk = 128 if spec.head_dim >= 128 else 64
    products = 4 * spec.heads * chunk  # decays and scores inside a chunk, before and after they are multiplied
    states = 4 * spec.heads * spec.head_dim * spec.state_dim / chunk
    rows = 4 * spec.conv_channels + 6 * spec.heads * spec.head_dim
    return 4.0 * (products + states + rows)


def _bytes_per_token(spec: ModelSpec, recipe: Recipe, name: StageName) -> float:
    value = BYTES[recipe.run.dtype]
    scan = _scan_bytes(spec) + value * spec.projected_size
    if name in ("stage-1", "stage-2"):
        kept = value * spec.hidden_size + 4 * spec.hidden_size  # what each student reads, and its error
        return spec.layers * kept + scan if recipe.run.recompute else spec.layers * (kept + scan)
    mlp = value * 4 * spec.intermediate_size + value * 12 * spec.hidden_size
    attention = value * 4 * spec.conv_channels
    students = 0 if recipe.supervised else spec.layers - len(recipe.layout.kept(spec.layers))
    if recipe.run.recompute:
        return spec.layers * value * spec.hidden_size + mlp + (scan if students else attention)
    return spec.layers * mlp + students * scan + (spec.layers - students) * attention


def _logit_bytes(spec: ModelSpec, recipe: Recipe, name: StageName, tokens: float) -> int:
    if name in ("stage-1", "stage-2"):
        return 0
    copies = 5 if name == "stage-3" else 3  # of both models, their logarithms, a gradient
    return round(copies * 4 * spec.vocab_size * min(tokens, float(recipe.run.logit_tokens)))


def _flop_per_token(spec: ModelSpec, recipe: Recipe, name: StageName, length: float) -> float:
    """Count multiplications and additions, matrix products alone."""
    teacher = 2.0 * sum(
        math.prod(s) for n, s in tensors.layer_shapes(spec, "mha").items() if len(s) == 2 for _ in spec.kinds
    )
    attention = spec.layers * 2.0 * spec.heads * spec.head_dim * length  # causal: half of the pairs
    forward = teacher + attention
    head = 2.0 * spec.vocab_size * spec.hidden_size
    if recipe.supervised:
        return (4 if recipe.run.recompute else 3) * forward + 4 * head
    mixers = 2.0 * spec.layers * spec.projected_size * spec.hidden_size
    if name in ("stage-1", "stage-2"):
        return forward + (3 if recipe.run.recompute else 2) * mixers  # no gradient leaves a mixer
    kept = len(recipe.layout.kept(spec.layers))
    other = student_spec(spec, recipe.layout.kept(spec.layers))
    student = 2.0 * sum(
        math.prod(s) for kind in other.kinds for s in tensors.layer_shapes(spec, kind).values() if len(s) == 2
    )
    passes = 3 if recipe.run.recompute else 2
    return forward + passes * student + mixers * (spec.layers - kept) / spec.layers + 5 * head
