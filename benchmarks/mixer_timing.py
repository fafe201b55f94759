"""Times the mixer of this project: decode steps and prefills of mmMamba's layer, in every variant that is asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_timing import CUDA, Timing, graph_time, hot_time, rotation

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from gpu.bounds import relative_l2
from gpu.calls import Call, prepare, run
from gpu.inputs import Sizes, draw
from gpu.kernels import Kernels, Method
from gpu.reference import mixer

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
CHUNK = 64  # tokens; sets the number of operations of the chunked form
ERROR_TOKENS = 16_384  # the float64 reference of more takes gigabytes

Row = dict[str, Any]


def least_bytes(sizes: Sizes, io: torch.dtype, state: torch.dtype) -> float:
    """What any implementation moves: each input read once, each output written once; weights, which stay cached, left out."""
    row = sizes.width + sizes.heads * sizes.head_dim
    states = sizes.heads * sizes.head_dim * sizes.state_dim * state.itemsize
    conv = sizes.channels * (sizes.conv_width - 1) * io.itemsize
    return float(sizes.batch * (sizes.tokens * row * io.itemsize + 2 * states + 2 * conv))


def operations(sizes: Sizes) -> float:
    """Of the matrix products of the chunked form, its causal half counted whole; of a step, one product with the state."""
    P, N = sizes.head_dim, sizes.state_dim
    a_token = 4 * P * N + (2 * CHUNK * (P + N) if sizes.tokens > 1 else 0)
    return float(sizes.batch * sizes.tokens * sizes.heads * a_token)


def calls_in_rotation(
    kernels: Kernels, sizes: Sizes, io: torch.dtype, state: torch.dtype, method: Method, segments: int, overlap: int
) -> list[Call]:
    """Make calls on different rows and states, in place, that share one layer's weights as in a model."""
    weights: dict[str, torch.Tensor] = {}
    calls = []
    for seed in range(rotation(least_bytes(sizes, io, state))):
        inputs = draw(sizes, io, state, seed=seed)
        names = ("conv_weight", "conv_bias", "dt_bias", "A_log", "norm_weight")
        weights = weights or {name: getattr(inputs, name) for name in names}
        inputs = replace(inputs, **weights)
        calls.append(
            prepare(kernels, inputs, method=method, segments=segments, overlap=overlap, in_place=sizes.tokens == 1)
        )
    return calls


def retarget(calls: Sequence[Call], kernels: Kernels, method: Method, segments: int, overlap: int) -> None:
    """Update calls to another variant; raises RefusedError when the library has no such variant."""
    for call in calls:
        shape = call.args.shape
        shape.method = method
        call.args.segments, call.args.overlap = segments, overlap
        if kernels.workspace_bytes(shape) > call.workspace.tensor.numel():
            raise ValueError(f"the workspace of {method.name} is larger than that of AUTO")


def timed(kernels: Kernels, calls: Sequence[Call]) -> tuple[Timing, Timing]:
    """Time calls over their rotation, and the first one alone."""
    cold = graph_time(lambda i: calls[i].enqueue(kernels), len(calls), per_graph=32)
    return cold, hot_time(lambda _: calls[0].enqueue(kernels)) if calls[0].inputs.sizes.tokens <= 4096 else cold


def error_of(kernels: Kernels, sizes: Sizes, io: torch.dtype, state: torch.dtype) -> float | None:
    """Relative L2 error of y against float64, with operands as the kernels take them; None where it would not fit."""
    if sizes.tokens * sizes.batch > (ERROR_TOKENS if CUDA else 300):
        return None
    inputs = draw(sizes, io, state)
    y = run(kernels, inputs).y.tensor
    references = (mixer(inputs), mixer(inputs, operands=io))
    return min(relative_l2(y, reference.y) for reference in references)


def variants(tokens: int, io: torch.dtype, methods: Sequence[str], segments: Sequence[int]) -> Iterator[Row]:
    """List the variants to time: AUTO first, which is the row's own figure, then forced ones."""
    yield {"method": Method.AUTO, "segments": 0, "overlap": 0}
    yield {"method": Method.AUTO, "segments": 0, "overlap": 1}
    for name in methods:
        method = Method[name.upper()]
        if method is Method.CHUNKED and tokens > 1 and io != FP32:
            for count in segments:
                if count * CHUNK <= max(tokens, CHUNK) and (count >= 4 or tokens <= 20_000):
                    yield {"method": method, "segments": count, "overlap": 0}
        elif (method is Method.STEP and tokens == 1) or (method is Method.SEQUENTIAL and tokens <= 4096):
            yield {"method": method, "segments": 0, "overlap": 0}


def label(variant: Row) -> str:
    name: str = variant["method"].name.lower()
    return (
        name + (f"/{variant['segments']}" if variant["segments"] else "") + ("+overlap" if variant["overlap"] else "")
    )


def row(
    kernels: Kernels,
    sizes: Sizes,
    io: torch.dtype,
    state: torch.dtype,
    methods: Sequence[str],
    segments: Sequence[int],
) -> Row:
    """Measure one size: AUTO without and with overlap, and the forced variants; what fails is noted, not fatal."""
    found: Row = {
        "name": "decode_mixer" if sizes.tokens == 1 else "prefill_mixer",
        "batch": sizes.batch,
        "tokens": sizes.tokens,
        "dtype": NAMES[io],
        "state_dtype": NAMES[state],
        "method": "auto",
        "bytes": least_bytes(sizes, io, state),
        "operations": operations(sizes),
        "error": error_of(kernels, sizes, io, state),
        "variants_us": {},
    }
    calls = calls_in_rotation(kernels, sizes, io, state, Method.AUTO, 0, 0)
    for variant in variants(sizes.tokens, io, methods, segments):
        name = label(variant)
        try:
            retarget(calls, kernels, **variant)
            cold, hot = timed(kernels, calls)
        except Exception as error:  # one variant that fails must not take the others along
            found["variants_us"][name] = None
            sys.stderr.write(f"{found['name']} B={sizes.batch} T={sizes.tokens} {name}: {str(error)[:160]}\n")
            if name == "auto":
                raise
            continue
        found["variants_us"][name] = round(cold.us, 3)
        if name == "auto":
            found.update(ours_us=cold.us, ours_spread_us=cold.spread_us, ours_hot_us=hot.us)
        elif name == "auto+overlap":
            found.update(ours_overlap_us=cold.us, ours_overlap_hot_us=hot.us)
    timings = {name: us for name, us in found["variants_us"].items() if us}
    found["best"] = min(timings, key=lambda name: timings[name])
    found["best_us"] = timings[found["best"]]
    return found


def rows_or_reasons(kernels: Kernels, cases: Iterable[tuple[Any, ...]]) -> Iterator[Row]:
    """Yield the row of each case, the arguments of `row`; say on standard error why one is missing."""
    for case in cases:
        try:
            yield row(kernels, *case)
        except Exception as error:
            sys.stderr.write(f"{case[0]}: {type(error).__name__}: {str(error)[:200]}\n")
        if CUDA:
            torch.cuda.empty_cache()


def decode_rows(kernels: Kernels, methods: Sequence[str], segments: Sequence[int], *, quick: bool) -> Iterator[Row]:
    """Yield decode steps of batch 1 to 8, and the other types at the ends."""
    cases: list[tuple[Any, ...]]
    cases = [(Sizes(batch, 1), BF16, FP32, methods, segments) for batch in ((1, 8) if quick else (1, 2, 4, 8))]
    if not quick:
        types = ((FP16, FP32), (FP32, FP32), (BF16, BF16))
        cases += [(Sizes(batch, 1), io, state, (), ()) for batch in (1, 8) for io, state in types]
    yield from rows_or_reasons(kernels, cases)


def prefill_rows(
    kernels: Kernels, tokens: Sequence[int], methods: Sequence[str], segments: Sequence[int], *, quick: bool
) -> Iterator[Row]:
    """Yield prefills of one sequence in bf16; then fp16, and a batch of 8."""
    cases: list[tuple[Any, ...]] = [(Sizes(1, count), BF16, FP32, methods, segments) for count in tokens]
    if not quick:
        cases += [(Sizes(1, count), FP16, FP32, (), ()) for count in tokens if count in (1024, 8192, 103_000)]
        short = 1024 if CUDA else 64
        cases += [(Sizes(8, short), BF16, FP32, (), ()), (Sizes(1, short), FP32, FP32, (), ())]
    yield from rows_or_reasons(kernels, cases)
