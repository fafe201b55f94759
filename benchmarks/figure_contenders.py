"""The contenders of the figure, each measured by one function that notes rows."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import figure_linear
import gpu_timing
import torch
from figure_part import (
    CHECK_STEPS,
    Part,
    PeakAllocated,
    Row,
    Sizes,
    eager_ms,
    free_memory,
    graph_ms,
)
from figure_teacher import Attention, Teacher, static_caches
from torch_models import model_from_bundle, random_model

from mmm_export.model.decoder import MmMamba
from mmm_export.spec import ModelSpec

PLAIN_CHUNK_TOKENS = 2048
TUNED_AT = (1024, 32_768)  # lengths at which mamba-ssm's kernels are tuned anew
LONG_TOKENS = 10_000  # prompts beyond take up to seconds in PyTorch


def measure_ceilings(part: Part) -> None:
    part.attempt({"name": "ceiling_copy"}, lambda: {"bytes_per_s": gpu_timing.copy_bytes_per_s()})
    part.attempt({"name": "ceiling_gemm"}, lambda: {"flop_per_s": gpu_timing.gemm_flop_per_s()})


@torch.no_grad()
def measure_linear(part: Part, sizes: Sizes, bundle: Path, peers: Path | None) -> None:
    """Measure the linear model in PyTorch: plain modules, and mamba-ssm's operators in a CUDA graph."""
    model = model_from_bundle(bundle, part.device)
    part.tell("the weights are on the device")
    operators: Any = figure_linear.PlainOperators(model.spec)
    missing = ""
    if part.device == "cuda":
        try:
            operators = figure_linear.TritonOperators(model.spec, peers)
        except ImportError as error:
            missing = str(error)
    fast = None if missing else figure_linear.FastLinear(model, operators)
    free_memory()
    _keep_plain_logits(part, sizes, model)
    # The longest prompt of the plain modules comes last: it takes longest, and says least.
    _measure_plain(part, sizes, model, sizes.lengths[0])
    if fast is None:
        part.note(name="decode", contender="triton", batch=1, tokens=sizes.lengths[0], missing=missing)
    else:
        _measure_fast(part, sizes, fast)
    if len(sizes.lengths) > 1:
        _measure_plain(part, sizes, model, sizes.lengths[-1])


def _keep_plain_logits(part: Part, sizes: Sizes, model: MmMamba) -> None:
    """Keep what all are compared with, the plain modules in float32, and the same in the type of the weights."""
    dtype = model.dtype
    ids = part.tensor(part.prompt(sizes.check_tokens + CHECK_STEPS, model.spec.vocab_size))
    for contender, model.dtype in (("reference", torch.float32), ("plain", dtype)):
        first, states = figure_linear.plain_prefill(model, ids[: sizes.check_tokens], PLAIN_CHUNK_TOKENS)
        logits = [first]
        for token in ids[sizes.check_tokens :]:
            stepped, states = figure_linear.plain_step(model, token[None], states)
            logits.append(stepped[0])
        part.keep_logits(contender, logits)


def _measure_fast(part: Part, sizes: Sizes, model: figure_linear.FastLinear) -> None:
    ids = part.tensor(part.prompt(sizes.check_tokens + CHECK_STEPS, model.spec.vocab_size))
    first, states = model.prefill(ids[: sizes.check_tokens])  # compiles, and tunes at this length
    part.tell("mamba-ssm's kernels are compiled")
    states = figure_linear.batched(states, 1)
    part.keep_logits("triton", [first, *(model.step(t[None], states)[0] for t in ids[sizes.check_tokens :])])
    for length in sizes.lengths:
        ids = part.tensor(part.prompt(length, model.spec.vocab_size))
        found: dict[str, Any] = {}
        about = {"contender": "triton", "tokens": length}
        if length in TUNED_AT:
            model.operators.retune()

        def prefill(_: int, ids: torch.Tensor = ids, found: dict[str, Any] = found) -> None:
            found["states"] = model.prefill(ids)[1]

        row = functools.partial(_prefilled, part, prefill, length, min(3, sizes.calls))
        if part.attempt({"name": "prefill", "batch": 1, **about}, row, length / 3e4):
            for batch in sizes.batches:
                states = figure_linear.batched(found["states"], batch)
                work = model.generation(states, torch.full((batch,), 5, device=part.device))
                part.attempt({"name": "decode", "batch": batch, **about}, functools.partial(_graphed, part, work), 1)
                del states, work


def _measure_plain(part: Part, sizes: Sizes, model: MmMamba, length: int) -> None:
    """Measure one prompt and decode steps after it, whose cost does not depend on its length."""
    ids = part.tensor(part.prompt(length, model.spec.vocab_size))
    found: dict[str, Any] = {}
    about = {"contender": "plain", "tokens": length}

    def prefill(_: int) -> None:
        found["states"] = figure_linear.plain_prefill(model, ids, PLAIN_CHUNK_TOKENS)[1]

    row = functools.partial(_looped, part, prefill, 1, warm=int(length < LONG_TOKENS))
    if part.attempt({"name": "prefill", "batch": 1, **about}, row, length / 8e3):
        for batch in sizes.batches:
            states = figure_linear.plain_batched(found["states"], batch)
            work = figure_linear.plain_generation(model, states, torch.full((batch,), 5, device=part.device))
            row = functools.partial(_looped, part, work, sizes.calls)
            part.attempt({"name": "decode", "batch": batch, **about}, row, 1)
            del states, work, row


@torch.no_grad()
def measure_teacher(part: Part, sizes: Sizes, spec: ModelSpec, dtype: torch.dtype) -> None:
    """Measure the attention teacher with growing and with static caches."""
    model = random_model(spec, dtype, part.device)
    longest = max(sizes.lengths) + 64
    check = part.tensor(part.prompt(min(256, sizes.lengths[0]), spec.vocab_size))
    part.keep_logits("teacher-plain", [_plain_teacher(model, check)])
    teacher = Teacher(model, longest)
    del model
    free_memory()
    hows: tuple[Attention, ...] = ("flash", "cudnn", "eager")
    for how in hows:
        check_row = functools.partial(_check_teacher, part, teacher, check, how)
        part.attempt({"name": "check", "contender": f"teacher-{how}"}, check_row)
    part.note(name="teacher_bytes", weights=teacher.weight_bytes, cache_per_token=teacher.cache_bytes(1, 1))
    for length in by_importance(sizes.lengths):
        ids = part.tensor(part.prompt(length, spec.vocab_size))
        caches = _teacher_prefills(part, teacher, ids)
        if caches is None:
            continue
        _growing(part, teacher, caches, length, sizes)
        one = [(key[:, :, :length], value[:, :, :length]) for key, value in caches]
        del caches  # the static ones take their place, layer by layer
        _static(part, teacher, ids, one, sizes)


def by_importance(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Put the shortest and the longest first, then the others from long to short: a deadline may cut the last."""
    return tuple(dict.fromkeys((lengths[0], *reversed(lengths))))


def _teacher_prefills(part: Part, teacher: Teacher, ids: torch.Tensor) -> Any:
    """Time both prefills; return the caches of the last that worked, None if none did."""
    found: dict[str, Any] = {}
    hows: tuple[tuple[Attention, float], ...] = (("cudnn", 3e4), ("flash", 2e4))  # and tokens a second, roughly
    for how, rate in hows:

        def prefill(_: int, how: Attention = how) -> None:
            found.clear()
            found["caches"] = teacher.prefill(ids, how)[1]

        # cuDNN plans a shape at its first call.
        row = functools.partial(_prefilled, part, prefill, len(ids), 1, warm=int(how == "cudnn"))
        about = {"name": "prefill", "contender": f"teacher-{how}", "batch": 1, "tokens": len(ids)}
        part.attempt(about, row, len(ids) / rate)
    return found.get("caches")


def _growing(part: Part, teacher: Teacher, one: Any, length: int, sizes: Sizes) -> None:
    """Time steps with caches that grow by torch.cat, eager and flash attention. Updates `one`, those of one row."""
    for batch in sizes.batches:
        about = {"batch": batch, "tokens": length}
        # Growing holds an old and a new tensor of a layer; eager attention repeats it for each head, in two layouts.
        if not _fits(part, teacher.cache_bytes(batch, length) * (1 + 6 / len(teacher.layers)), batch):
            part.note(name="decode", contender="teacher-hf-flash", **about, missing="out of memory")
            continue
        caches = one if batch == 1 else [tuple(_rows(c, batch) for c in pair) for pair in one]
        hows: tuple[Attention, ...] = ("flash", "eager")
        for how in hows:
            work = teacher.generation(caches, torch.full((batch,), 5, device=part.device), how, static=False)
            about["contender"] = f"teacher-hf-{how}"
            part.attempt({"name": "decode", **about}, functools.partial(_looped, part, work, sizes.calls), batch)
            del work


def _static(part: Part, teacher: Teacher, ids: torch.Tensor, one: Any, sizes: Sizes) -> None:
    """Time steps with static caches in CUDA graphs: cuDNN, flash attention, and plain products. Empties `one`."""
    for batch in sizes.batches:
        about = {"batch": batch, "tokens": len(ids)}
        if not _fits(part, teacher.cache_bytes(batch, len(ids) + 1), batch):
            part.note(name="decode", contender="teacher-static-cudnn", **about, missing="out of memory")
            continue
        caches = static_caches(one or teacher.prefill(ids, "cudnn")[1], batch)
        free_memory()
        hows: tuple[Attention, ...] = ("cudnn", "flash", "products")
        for how in hows:
            work = teacher.generation(caches, torch.full((batch,), 5, device=part.device), how, static=True)
            about["contender"] = f"teacher-static-{how}"
            part.attempt({"name": "decode", **about}, functools.partial(_graphed, part, work), batch)
            del work
        del caches
        free_memory()


def _plain_teacher(model: MmMamba, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the plain modules in float32, which the teacher's other forms are compared with."""
    dtype, model.dtype = model.dtype, torch.float32
    with ids.device:
        states = model.initial_states(max_tokens=len(ids))
        embeds = model.embed(ids[None], torch.zeros(0, model.spec.hidden_size))
        logits, _ = model.prefill(embeds, torch.tensor([len(ids)]), states, torch.tensor([0]))
    model.dtype = dtype
    return logits[0, 0]


def _rows(cache: torch.Tensor, batch: int) -> torch.Tensor:
    return cache.expand(batch, -1, -1, -1).contiguous()


def _fits(part: Part, needed: float, batch: int) -> bool:
    """Whether there is room, so that no time is spent on finding out otherwise; one row is tried in any case."""
    if part.device == "cpu" or batch == 1:
        return True
    free, _ = torch.cuda.mem_get_info()
    return needed < 0.97 * free


def _graphed(part: Part, work: Any) -> Row:
    peak = PeakAllocated(part)
    row = graph_ms(work)
    return {**row, **peak.row()}


def _looped(part: Part, work: Any, calls: int, warm: int = 3) -> Row:
    peak = PeakAllocated(part)
    row = eager_ms(work, calls=calls, warm=warm)
    return {**row, **peak.row()}


def _prefilled(part: Part, work: Any, length: int, calls: int, warm: int = 1) -> Row:
    """Time a prefill: a short one, whose launches would take longer than its work, in a CUDA graph; a long one as it is."""
    peak = PeakAllocated(part)
    if length > LONG_TOKENS:
        row = eager_ms(work, calls=calls, warm=warm)
    else:
        row = graph_ms(work, replays=10)
        work(0)  # what a graph left behind is gone with it
    return {**row, **peak.row()}


def _check_teacher(part: Part, teacher: Teacher, ids: torch.Tensor, how: Attention) -> Row:
    part.keep_logits(f"teacher-{how}", [teacher.prefill(ids, how)[0]])
    return {}
